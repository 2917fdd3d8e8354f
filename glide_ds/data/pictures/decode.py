"""From an encoded image to a square uint8 picture: orientation, colour, borders, crop, resize.

Arrays are uint8 [height, width, 3], sRGB. JPEG goes through simplejpeg (libjpeg-turbo), which can decode at
1/2, 1/4 or 1/8 of the size for less work; everything else through Pillow.

How the variant was chosen (benchmarks/results/loader-cpu.json, "variants"; 64 px against full decode, exact trim and
Pillow's Lanczos, over 400 pictures, a fifth of them bordered; median / 5th percentile dB). What costs quality is not
the reduced decode but a crop rounded to its pixels: 34.6 / 28.0, where a crop that keeps its fraction of a pixel
(`resample`), inside borders found to the pixel of the full size (`borders`), gives 44.7 / 36.1 in the same time.
Leaving only the wanted 64 pixels gives 41.8 / 33.8 in 0.96 of the time, and 37.4 / 35.4 instead of 44.5 / 42.8 where
the shorter side is 256, as img2dataset writes it. Leaving 96 gives 46.2 / 38.2 in 1.09. Decoding again where trimming
leaves fewer than the wanted pixels gives 44.7 / 37.8 in 1.05, all of it spent on the bordered pictures: only what
would be enlarged more than twofold is.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, UnidentifiedImageError

from glide_ds.data.pictures.borders import content_box
from glide_ds.data.pictures.colours import check_planes, rgb
from glide_ds.data.pictures.metadata import (
    END_OF_IMAGE,
    PNG_START,
    bare_png,
    is_whole_jpeg,
    jpeg_orientation,
    orientation,
)
from glide_ds.data.pictures.resample import Box, Pixels, resize
from glide_ds.data.tally import Cause, Unusable

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "jfif", "gif", "bmp", "tif", "tiff", "avif", "img", "image")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
REDUCED_SIDE = 1.25  # times the wanted side is left of a JPEG's shorter side by reduced decoding, at least
ENOUGH = 0.5  # times the wanted side must be left after trimming, else it is decoded again, less reduced
WHITE = np.full(3, 255, np.uint8)

# One place refuses large pictures, with a cause: `_check_size`, from the header.
Image.MAX_IMAGE_PIXELS = None
ImageFile.LOAD_TRUNCATED_IMAGES = False


class Cropping(NamedTuple):
    """How a run makes its pictures square. Fields as in config.DataConfig."""

    crop: str = "center"
    trim: bool = True


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
    return decode_at(data, options, options.size)[0]


def decode_at(data: bytes, options: DecodeOptions, *sides: int) -> tuple[Pixels, ...]:
    """`decode` to squares of several sides at once, uint8 [side, side, 3] each, instead of options.size."""
    if not data:
        raise Unusable(Cause.CORRUPT_IMAGE, "empty file")
    largest = max(sides)
    try:
        opened = open_pixels(data, options, round(largest * REDUCED_SIDE))
        box = content_box(*opened) if options.trim else opened.extent
        if opened.scale > 1 and _side(box) < largest * ENOUGH:
            finer = largest * _side(opened.extent) / _side(box)
            opened = open_pixels(data, options, math.ceil(finer))
            box = content_box(*opened)
        return tuple(make_square(opened, box, options.crop, side) for side in sides)
    except Unusable:
        raise
    except Exception as error:  # noqa: BLE001 - codecs raise anything on damaged data, all of it means the same
        raise Unusable(Cause.CORRUPT_IMAGE, f"{type(error).__name__}: {error}"[:120]) from None


def _side(box: Box) -> float:
    top, bottom, left, right = box
    return min(bottom - top, right - left)


class Opened(NamedTuple):
    """A decoded picture, upright."""

    pixels: Pixels
    scale: int  # the divisor of its size
    extent: Box  # where the picture lies in `pixels`: an outer line of a reduced one may stand for less


def open_pixels(data: bytes, options: DecodeOptions, wanted: int) -> Opened:
    """The upright RGB picture, a JPEG's reduced as far as its shorter side stays at `wanted` or more."""
    if data[:3] == b"\xff\xd8\xff" and (opened := _open_jpeg(data, options, wanted)) is not None:
        return opened
    return _open_any(data, options)


def _check_size(width: int, height: int, options: DecodeOptions) -> None:
    if width * height > options.max_pixels:
        raise Unusable(Cause.TOO_LARGE, f"{width} x {height} exceeds data.max_pixels={options.max_pixels}")
    if min(width, height) < options.min_side:
        raise Unusable(Cause.TOO_SMALL, f"{width} x {height} is under data.min_side={options.min_side}")


def _open_jpeg(data: bytes, options: DecodeOptions, wanted: int) -> Opened | None:
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
    pixels = _read_jpeg(data, rows, columns)
    if pixels is None:
        return None
    return _upright(Opened(pixels, scale, (0, height / scale, 0, width / scale)), jpeg_orientation(data))


def _read_jpeg(data: bytes, rows: int, columns: int) -> Pixels | None:
    """None where libjpeg refuses what may yet be whole: Pillow then decides. What it only remarks on is read.

    Raises Unusable where some of the picture is missing.
    """
    try:
        return simplejpeg.decode_jpeg(data, "RGB", min_height=rows, min_width=columns)
    except ValueError as error:
        remark = str(error)
    if remark.startswith("Premature end of JPEG file") and END_OF_IMAGE not in data[-2:]:
        try:  # what if only the mark is missing?
            return simplejpeg.decode_jpeg(data + END_OF_IMAGE, "RGB", min_height=rows, min_width=columns)
        except ValueError as error:
            remark, data = str(error), data + END_OF_IMAGE
    if not is_whole_jpeg(data, remark):
        raise Unusable(Cause.CORRUPT_IMAGE, remark[:120])
    try:
        return simplejpeg.decode_jpeg(data, "RGB", min_height=rows, min_width=columns, strict=False)
    except ValueError:
        return None


def _scale(side: int, wanted: int) -> int:
    """The largest of the divisors 1, 2, 4, 8 that leaves at least `wanted` of a side."""
    return next((scale for scale in (8, 4, 2) if side // scale >= wanted), 1)


def _upright(opened: Opened, turn: int) -> Opened:
    if turn == 1:
        return opened
    pixels, scale, (top, bottom, left, right) = opened
    if turn >= 5:
        pixels = pixels.transpose(1, 0, 2)
        top, bottom, left, right = left, right, top, bottom
    height, width = pixels.shape[:2]
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
        left, right = width - right, width - left
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
        top, bottom = height - bottom, height - top
    return Opened(np.ascontiguousarray(pixels), scale, (top, bottom, left, right))


def _open_any(data: bytes, options: DecodeOptions) -> Opened:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _by_pillow(data, options)
        except Exception as error:
            if not data.startswith(PNG_START) or (
                isinstance(error, Unusable) and error.cause != Cause.CORRUPT_IMAGE
            ):
                raise
            return _by_pillow(bare_png(data), options)


def _by_pillow(data: bytes, options: DecodeOptions) -> Opened:
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        cause = Cause.CORRUPT_IMAGE if data.startswith(SIGNATURES) else Cause.UNKNOWN_FORMAT
        raise Unusable(cause, f"begins with {data[:8]!r}") from None
    with image:
        _check_size(*image.size, options)
        check_planes(image)
        image.load()
        wide = data.startswith(PNG_START) and data[24] == 16
        pixels = np.array(rgb(image, wide=wide))
        turn = jpeg_orientation(data) if image.format == "JPEG" else orientation(image)
    return _upright(Opened(pixels, 1, (0, pixels.shape[0], 0, pixels.shape[1])), turn)


# ---- square


def make_square(opened: Opened, box: Box, crop: str, size: int) -> Pixels:
    """Cut the box out, crop or pad it to a square and resize to [size, size, 3]."""
    pixels, scale, _ = opened
    top, bottom, left, right = box
    if crop == "pad":
        ground = pixels[0, 0] if (top, left) != (0, 0) else WHITE
        return _pad(pixels, box, size, ground)
    side = _side(box)
    # The crop is in whole pixels of the full size, as it would be without reduced decoding.
    top += (bottom - top - side) * scale // 2 / scale
    left += (right - left - side) * scale // 2 / scale
    return resize(pixels, (top, top + side, left, left + side), size, size)


def _pad(pixels: Pixels, box: Box, size: int, ground: Pixels) -> Pixels:
    top, bottom, left, right = box
    scale = size / max(bottom - top, right - left)
    rows, columns = max(1, round((bottom - top) * scale)), max(1, round((right - left) * scale))
    square = np.empty((size, size, 3), np.uint8)
    square[:] = ground
    row, column = (size - rows) // 2, (size - columns) // 2
    square[row : row + rows, column : column + columns] = resize(pixels, box, rows, columns)
    return square
