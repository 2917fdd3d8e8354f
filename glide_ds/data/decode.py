"""From an encoded image to a square uint8 picture: orientation, colour, borders, crop, resize.

Arrays are uint8 [height, width, 3], sRGB. JPEG goes through simplejpeg (libjpeg-turbo), which can decode at
1/2, 1/4 or 1/8 of the size for less work; everything else through Pillow.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from glide_ds.data.captions import Cause, Unusable

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # top, bottom, left, right

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "jfif", "gif", "bmp", "tif", "tiff", "img", "image")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
TRIM_TOLERANCE = 12  # of 255: what still counts as one colour along a picture's edge
BLENDED = 0.8  # a line with less of the next line's distance from the border's colour is part border
RINGING, RINGING_MEAN = 48, 3.0  # of 255: how far JPEG strays beside a strong edge, at most and on average
MIN_TRIMMED = 0.1  # of a side: what would leave less is no border but a flat picture
PROBES = 8  # pixels of an edge looked at before all of them
ROWS, COLUMNS = 0, 1  # axes
# A JPEG is decoded at a scale that leaves at least this many times the wanted side. Median / 5th percentile dB
# against full decode and Lanczos at 64 px: 1.0 40.4/27.1, 1.5 43.1/35.9, 2.0 44.8/40.8 for 7 % more time.
REDUCED_SIDE = 1.5
ENOUGH = 1.0  # times the wanted side must be left after trimming, else it is decoded again in full
FULL_SIZE = 1 << 20  # no reduction
WHITE = np.full(3, 255, np.uint8)

# One place refuses large pictures, with a cause: `_check_size`, from the header.
Image.MAX_IMAGE_PIXELS = None
ImageFile.LOAD_TRUNCATED_IMAGES = False


@dataclass(frozen=True)
class DecodeOptions:
    """How a picture becomes square. Fields as in config.DataConfig."""

    size: int
    crop: str = "center"
    trim: bool = True
    min_side: int = 2
    max_pixels: int = 64_000_000


def image_member(members: Mapping[str, bytes]) -> bytes:
    """The encoded image among a sample's members, by extension. Raises Unusable where there is none."""
    for extension in IMAGE_EXTENSIONS:
        if extension in members:
            return members[extension]
    raise Unusable(Cause.NO_IMAGE, f"members: {', '.join(sorted(members))}")


def decode(data: bytes, options: DecodeOptions) -> Pixels:
    """Decode, turn upright, trim, square and resize: uint8 [S, S, 3]. Raises Unusable with the cause."""
    if not data:
        raise Unusable(Cause.CORRUPT_IMAGE, "empty file")
    try:
        pixels, scale = open_pixels(data, options, round(options.size * REDUCED_SIDE))
        if not options.trim:
            return make_square(pixels, (0, pixels.shape[0], 0, pixels.shape[1]), options)
        box = content_box(pixels, reduced=scale > 1)
        if scale > 1 and _side(box) < options.size * ENOUGH:
            pixels, _ = open_pixels(data, options, FULL_SIZE)
            box = content_box(pixels)
        return make_square(pixels, box, options)
    except Unusable:
        raise
    except Exception as error:  # noqa: BLE001 - codecs raise anything on damaged data, all of it means the same
        raise Unusable(Cause.CORRUPT_IMAGE, f"{type(error).__name__}: {error}"[:120]) from None


def _side(box: Box) -> int:
    top, bottom, left, right = box
    return min(bottom - top, right - left)


def open_pixels(data: bytes, options: DecodeOptions, wanted: int) -> tuple[Pixels, int]:
    """The upright RGB picture, and the divisor of its size: a JPEG's shorter side stays at `wanted` or more."""
    if data[:3] == b"\xff\xd8\xff" and (opened := _open_jpeg(data, options, wanted)) is not None:
        return opened
    return _open_any(data, options), 1


def _check_size(width: int, height: int, options: DecodeOptions) -> None:
    if width * height > options.max_pixels:
        raise Unusable(Cause.TOO_LARGE, f"{width} x {height} exceeds data.max_pixels={options.max_pixels}")
    if min(width, height) < options.min_side:
        raise Unusable(Cause.TOO_SMALL, f"{width} x {height} is under data.min_side={options.min_side}")


def _open_jpeg(data: bytes, options: DecodeOptions, wanted: int) -> tuple[Pixels, int] | None:
    """A grey or YCbCr JPEG by libjpeg-turbo, or None where only Pillow can (CMYK, or one it rejects)."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(width, height, options)
    if colours in ("CMYK", "YCCK"):
        return None
    scale = _scale(min(height, width), wanted)
    rows, columns = -(-height // scale), -(-width // scale)
    pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=rows, min_width=columns)
    # A last row or column that stands for less than `scale` pixels would shift everything in the resize.
    return _upright(pixels[: height // scale, : width // scale], _orientation(data)), scale


def _scale(side: int, wanted: int) -> int:
    """The largest of the divisors 1, 2, 4, 8 that leaves at least `wanted` of a side."""
    return next((scale for scale in (8, 4, 2) if side // scale >= wanted), 1)


def _orientation(data: bytes) -> int:
    """EXIF's orientation, 1 to 8, found by walking the segments before the image, so photos without pay little."""
    offset = 2
    while data[offset : offset + 1] == b"\xff" and (kind := data[offset + 1]) not in (0xDA, 0xD9):
        if kind == 0xE1 and data[offset + 4 : offset + 8] == b"Exif":
            with Image.open(io.BytesIO(data)) as image:
                value = image.getexif().get(0x0112, 1)
            return value if value in range(1, 9) else 1
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    return 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _open_any(data: bytes, options: DecodeOptions) -> Pixels:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            cause = Cause.CORRUPT_IMAGE if data.startswith(SIGNATURES) else Cause.UNKNOWN_FORMAT
            raise Unusable(cause, f"begins with {data[:8]!r}") from None
        with image:
            _check_size(*image.size, options)
            image.load()
            return np.array(_rgb(ImageOps.exif_transpose(image)))


def _rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: alpha over white, 16 bits to 8, CMYK by Pillow's own conversion."""
    if image.mode.startswith(("I;16", "I")) or image.mode == "F":
        return _from_wide(image).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        ground = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, layer).convert("RGB")
    return image.convert("RGB")


def _from_wide(image: Image.Image) -> Image.Image:
    values: NDArray[Any] = np.asarray(image).astype(np.float64)
    top = 1.0 if image.mode == "F" and values.max() <= 1 else 65535.0 if values.max() > 255 else 255.0
    return Image.fromarray((np.nan_to_num(values) / top * 255).clip(0, 255).round().astype(np.uint8))


# ---- borders


def content_box(pixels: Pixels, *, reduced: bool = False) -> Box:
    """(top, bottom, left, right) of what lies inside uniform borders; the whole picture where there are none.

    An edge is a border where its outermost line has one colour, within TRIM_TOLERANCE per channel. The
    border goes on over lines that leave that colour by no more than JPEG's ringing beside a strong edge. A
    `reduced` picture loses the line that blends border and content, too.
    """
    height, width = pixels.shape[:2]
    top = _border(pixels, ROWS, False, reduced)
    if top == height:
        return 0, height, 0, width
    bottom = height - _border(pixels, ROWS, True, reduced)
    rows = pixels[top:bottom]
    left = _border(rows, COLUMNS, False, reduced)
    right = width - _border(rows, COLUMNS, True, reduced)
    if bottom - top < MIN_TRIMMED * height or right - left < MIN_TRIMMED * width:
        return 0, height, 0, width
    return top, bottom, left, right


def _border(pixels: Pixels, axis: int, from_end: bool, reduced: bool) -> int:
    """How many lines from one end belong to a border; 0 where the outermost has more than one colour."""
    edge = _lines(pixels, axis, from_end, 1)
    step = pixels.shape[1 - axis] // PROBES + 1
    across = (slice(None), slice(None, None, step)) if axis == ROWS else slice(None, None, step)
    probes = edge[across].reshape(-1, 3).tolist()  # plain integers: nearly every photo ends here
    colour = probes[len(probes) // 2]
    for probe in probes:
        for value, wanted in zip(probe, colour, strict=True):
            if abs(value - wanted) > TRIM_TOLERANCE:
                return 0
    away = _away(pixels[across], colour)
    reach = _first(_from(_line_max(away, axis), from_end) > RINGING)  # no border is longer than this
    away = _away(_lines(pixels, axis, from_end, reach + 2), colour)
    most, mean = (_from(f(away, axis), from_end) for f in (_line_max, _line_mean))
    if most[0] > TRIM_TOLERANCE:
        return 0
    count = _first((most > RINGING) | (mean > RINGING_MEAN))
    # Reduced decoding blends the last line of a border with the first of the content; that line goes too.
    blended = reduced and count + 1 < len(mean) and mean[count] < mean[count + 1] * BLENDED
    return count + bool(blended)


def _first(flags: NDArray[np.bool_]) -> int:
    return int(flags.argmax()) if flags.any() else len(flags)


def _lines(pixels: Pixels, axis: int, from_end: bool, count: int) -> Pixels:
    """The outermost rows or columns, where they lie: memory order matters more than convenience here."""
    part = slice(max(0, pixels.shape[axis] - count), None) if from_end else slice(count)
    return pixels[part] if axis == ROWS else pixels[:, part]


def _away(region: Pixels, colour: list[int]) -> Pixels:
    """How far each value lies from a colour's: uint8 [height, 3 width]."""
    # A whole line of the colour: with three values the subtraction's inner loop would be three long.
    line = np.empty((region.shape[1], 3), np.uint8)
    line[:] = colour
    flat = np.ascontiguousarray(region).reshape(len(region), -1)
    return np.maximum(flat, line.reshape(-1)) - np.minimum(flat, line.reshape(-1))


def _line_max(away: Pixels, axis: int) -> Pixels:
    return away.max(axis=1) if axis == ROWS else away.max(axis=0).reshape(-1, 3).max(axis=1)


def _line_mean(away: Pixels, axis: int) -> NDArray[np.float64]:
    total = np.add.reduce(away, axis=1 - axis, dtype=np.uint32)
    if axis == COLUMNS:
        total = total.reshape(-1, 3).sum(axis=1)
    return total / (away.size // len(total))


def _from(values: NDArray[Any], from_end: bool) -> NDArray[Any]:
    return values[::-1] if from_end else values


# ---- square and resize


def make_square(pixels: Pixels, box: Box, options: DecodeOptions) -> Pixels:
    """Cut the box out, crop or pad it to a square and resize to [S, S, 3]."""
    top, bottom, left, right = box
    if options.crop == "pad":
        ground = pixels[0, 0] if (top, left) != (0, 0) else WHITE
        return _pad(pixels[top:bottom, left:right], options.size, ground)
    side = _side(box)
    # On a reduced picture this puts the crop on the reduced grid: half a reduced pixel beside the middle costs
    # nothing, while a resize from between the pixels would lose 3.5 dB.
    top += (bottom - top - side) // 2
    left += (right - left - side) // 2
    return resize(pixels[top : top + side, left : left + side], options.size, options.size)


def _pad(pixels: Pixels, size: int, ground: Pixels) -> Pixels:
    height, width = pixels.shape[:2]
    scale = size / max(height, width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    square = np.empty((size, size, 3), np.uint8)
    square[:] = ground
    top, left = (size - rows) // 2, (size - columns) // 2
    square[top : top + rows, left : left + columns] = resize(pixels, rows, columns)
    return square


def resize(pixels: Pixels, height: int, width: int) -> Pixels:
    """Antialiased bicubic resize of uint8 [H, W, 3] (torch's vectorised kernel for channels-last bytes)."""
    if pixels.shape[:2] == (height, width):
        return pixels
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).unsqueeze(0)
    image = torch.nn.functional.interpolate(image, (height, width), mode="bicubic", antialias=True)
    return image[0].permute(1, 2, 0).numpy()
