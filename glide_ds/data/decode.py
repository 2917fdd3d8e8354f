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

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "jfif", "gif", "bmp", "tif", "tiff", "img", "image")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
TRIM_TOLERANCE = 12  # of 255: JPEG's ringing beside a border stays below it
MIN_TRIMMED = 0.1  # of a side: what would leave less is no border but a flat picture
REDUCED_SIDE = 2  # a JPEG is decoded at a scale that leaves at least this many times the wanted side
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
    return make_square(open_pixels(data, options), options)


def open_pixels(data: bytes, options: DecodeOptions) -> Pixels:
    """The upright RGB picture, full size or reduced to no less than what the resize needs."""
    if not data:
        raise Unusable(Cause.CORRUPT_IMAGE, "empty file")
    try:
        if data[:3] == b"\xff\xd8\xff" and (pixels := _open_jpeg(data, options)) is not None:
            return pixels
        return _open_any(data, options)
    except Unusable:
        raise
    except Exception as error:  # noqa: BLE001 - codecs raise anything on damaged data, all of it means the same
        raise Unusable(Cause.CORRUPT_IMAGE, f"{type(error).__name__}: {error}"[:120]) from None


def _check_size(width: int, height: int, options: DecodeOptions) -> None:
    if width * height > options.max_pixels:
        raise Unusable(Cause.TOO_LARGE, f"{width} x {height} exceeds data.max_pixels={options.max_pixels}")
    if min(width, height) < options.min_side:
        raise Unusable(Cause.TOO_SMALL, f"{width} x {height} is under data.min_side={options.min_side}")


def _open_jpeg(data: bytes, options: DecodeOptions) -> Pixels | None:
    """A grey or YCbCr JPEG by libjpeg-turbo, or None where only Pillow can (CMYK, or one it rejects)."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    _check_size(width, height, options)
    if colours in ("CMYK", "YCCK"):
        return None
    wanted = options.size * REDUCED_SIDE
    wanted_height, wanted_width = _reduced(height, width, wanted)
    pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=wanted_height, min_width=wanted_width)
    return _upright(pixels, _orientation(data))


def _reduced(height: int, width: int, wanted: int) -> tuple[int, int]:
    """The size at the smallest of the scales 1, 1/2, 1/4, 1/8 that keeps the shorter side at `wanted`."""
    scale = 8
    while scale > 1 and min(height, width) // scale < wanted:
        scale //= 2
    return -(-height // scale), -(-width // scale)


def _orientation(data: bytes) -> int:
    """EXIF's orientation, 1 to 8, read only where there is an EXIF block in front."""
    if b"Exif\0\0" not in data[:65536]:
        return 1
    with Image.open(io.BytesIO(data)) as image:
        value = image.getexif().get(0x0112, 1)
    return value if value in range(1, 9) else 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
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
            raise Unusable(Cause.UNKNOWN_FORMAT, f"begins with {data[:8]!r}") from None
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


def content_box(pixels: Pixels, tolerance: int = TRIM_TOLERANCE) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of what lies inside uniform borders; the whole picture where there are none.

    An edge is a border where its outermost line has one colour, within `tolerance` of its middle per
    channel; the border is every following line of that colour.
    """
    height, width = pixels.shape[:2]
    top = _border(pixels, tolerance)
    if top == height:
        return 0, height, 0, width
    bottom = height - _border(pixels[::-1], tolerance)
    rows = pixels[top:bottom].transpose(1, 0, 2)
    left = _border(rows, tolerance)
    right = width - _border(rows[::-1], tolerance)
    if bottom - top < MIN_TRIMMED * height or right - left < MIN_TRIMMED * width:
        return 0, height, 0, width
    return top, bottom, left, right


def _border(lines: Pixels, tolerance: int) -> int:
    """How many leading lines have the outermost line's one colour."""
    edge = lines[0]
    colour = edge[len(edge) // 2].astype(np.int16)
    probe = edge[:: max(1, len(edge) // 8)]
    if (abs(probe - colour) > tolerance).any() or (abs(edge - colour) > tolerance).any():
        return 0
    count, step = 1, 8
    while count < len(lines):
        block = abs(lines[count : count + step] - colour) > tolerance
        broken = block.any(axis=(1, 2))
        if broken.any():
            return count + int(broken.argmax())
        count += len(block)
        step *= 2
    return len(lines)


# ---- square and resize


def make_square(pixels: Pixels, options: DecodeOptions) -> Pixels:
    """Trim borders, crop or pad to a square and resize to [S, S, 3]."""
    ground = WHITE
    if options.trim:
        top, bottom, left, right = content_box(pixels)
        if (top, left) != (0, 0):
            ground = pixels[0, 0]
        pixels = pixels[top:bottom, left:right]
    if options.crop == "pad":
        return _pad(pixels, options.size, ground)
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
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
    """Antialiased bicubic resize of uint8 [H, W, 3]."""
    if pixels.shape[:2] == (height, width):
        return pixels
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).unsqueeze(0)
    image = torch.nn.functional.interpolate(image, (height, width), mode="bicubic", antialias=True)
    return image[0].permute(1, 2, 0).numpy()
