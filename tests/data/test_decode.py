"""Every format becomes the right upright RGB square; what cannot says why."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from data_kit import encoded, photo
from PIL import Image

from glide_ds.data.pictures.borders import content_box
from glide_ds.data.pictures.decode import DecodeOptions, decode, image_member, open_pixels
from glide_ds.data.tally import Cause, Unusable

OPTIONS = DecodeOptions(16)
WHOLE = DecodeOptions(16, trim=False)


def image_bytes(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_formats_agree(kind: str) -> None:
    square = photo(1, 64, 64)
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    out = decode(encoded(square, kind, **options), OPTIONS)
    assert out.shape == (16, 16, 3)
    assert out.dtype == np.uint8
    assert distance(out, decode(encoded(square), OPTIONS)) < (8 if kind == "GIF" else 2)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "I;16", "LA", "RGBA", "PA"])
def test_modes(mode: str) -> None:
    grey = Image.fromarray(photo(2, 32, 32)).convert("L").point(lambda v: 40 if v < 120 else 200)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif mode == "PA":
        image = grey.convert("P").convert("PA")
    else:
        image = grey.convert(mode)
    kind = "TIFF" if mode in ("CMYK", "PA") else "PNG"
    if mode == "PA":
        pytest.importorskip("PIL.TiffImagePlugin")
    out = decode(image_bytes(image, kind), WHOLE)
    limit = 12 if mode == "1" else 3
    if mode == "1":
        expected = np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC))
    else:
        expected = np.asarray(grey.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC))
    assert distance(out, expected) < limit


def test_alpha_lies_on_white() -> None:
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[8:24, 8:24] = (255, 0, 0, 255)
    out = decode(encoded(pixels), WHOLE)
    assert out[0, 0].tolist() == [255, 255, 255]
    assert out[8, 8].tolist() == [255, 0, 0]
    assert decode(encoded(pixels), OPTIONS).reshape(-1, 3).mean(0).tolist() == [255, 0, 0]  # and is trimmed


def test_palette_transparency_lies_on_white() -> None:
    image = Image.new("P", (16, 16), 0)
    image.putpalette([0, 0, 0, 0, 0, 255])
    image.paste(1, (4, 4, 12, 12))
    out = decode(image_bytes(image, "PNG", transparency=0), WHOLE)
    assert out[0, 0].tolist() == [255, 255, 255]
    assert out[8, 8].tolist() == [0, 0, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation(orientation: int, kind: str) -> None:
    upright = Image.fromarray(photo(3, 64, 64))
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    out = decode(image_bytes(stored, kind, exif=exif), WHOLE)
    assert distance(out, decode(image_bytes(upright, "PNG"), WHOLE)) < 3


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 0), (30, 90, 200)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_borders_go_before_the_resize(colour: tuple[int, int, int], kind: str) -> None:
    inner = photo(4, 60, 80)
    for top, left in ((30, 0), (0, 50), (24, 40)):
        framed = np.full((60 + 2 * top, 80 + 2 * left, 3), colour, np.uint8)
        framed[top : top + 60, left : left + 80] = inner
        options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
        out = decode(encoded(framed, kind, **options), OPTIONS)
        assert distance(out, decode(encoded(inner), OPTIONS)) < (6 if kind == "JPEG" else 0.01)


def test_content_box_leaves_photos_and_flat_pictures_whole() -> None:
    assert content_box(photo(5, 40, 30)) == (0, 40, 0, 30)
    assert content_box(np.full((40, 30, 3), 9, np.uint8)) == (0, 40, 0, 30)
    speck = np.full((40, 30, 3), 9, np.uint8)
    speck[20, 15] = 200
    assert content_box(speck) == (0, 40, 0, 30)
    one_side = photo(6, 40, 30).copy()
    one_side[33:] = 255
    assert content_box(one_side) == (0, 33, 0, 30)


def dead_leaves(seed: int, height: int, width: int) -> np.ndarray:
    """Overlapping discs of many sizes over soft clouds: edges and scales much like a photo's."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    pixels = photo(seed, height, width).astype(np.int16)
    for _ in range(30):
        radius = 8 * (1 - rng.random()) ** (-1 / 1.5)
        inside = (rows - rng.random() * height) ** 2 + (columns - rng.random() * width) ** 2 < radius**2
        pixels[inside] += rng.integers(-120, 120, 3, np.int16)
    return pixels.clip(0, 255).astype(np.uint8)


def framed_leaves(seed: int) -> tuple[np.ndarray, int]:
    """A picture of 256 to 451 pixels, every fourth with bars above and below; and the height of a bar."""
    side = 256 + 13 * seed
    pixels = dead_leaves(seed, side, side + 4 * seed)
    if seed % 4:
        return pixels, 0
    bar = 37 + seed
    framed = np.full((side, pixels.shape[1], 3), 255 * (seed % 8 == 0), np.uint8)
    framed[bar:-bar] = pixels[bar:-bar]
    return framed, bar


def test_reduced_decoding_is_near_full_decoding_exact_trim_and_lanczos() -> None:
    """Median >= 41 dB and 5th percentile >= 32 dB over photos with and without borders."""
    quality = []
    for seed in range(16):
        pixels, bar = framed_leaves(seed)
        data = encoded(pixels, "JPEG", quality=90)
        content = np.asarray(Image.open(io.BytesIO(data)))[bar : pixels.shape[0] - bar]
        cut = min(content.shape[:2])
        y, x = ((n - cut) // 2 for n in content.shape[:2])
        square = Image.fromarray(content[y : y + cut, x : x + cut])
        wanted = np.asarray(square.resize((64, 64), Image.Resampling.LANCZOS)).astype(float)
        error = ((decode(data, DecodeOptions(64)) - wanted) ** 2).mean()
        quality.append(10 * np.log10(255**2 / error))
    assert np.median(quality) >= 41
    assert np.percentile(quality, 5) >= 32


def test_edges_of_reduced_pictures_are_found_to_the_pixel_of_the_full_size() -> None:
    for seed in range(0, 16, 4):
        pixels, bar = framed_leaves(seed)
        opened = open_pixels(encoded(pixels, "JPEG", quality=90), DecodeOptions(64), 64)
        assert opened.scale == 4
        top, bottom, left, right = (4 * edge for edge in content_box(*opened))
        assert (top, bottom, left, right) == (bar, pixels.shape[0] - bar, 0, pixels.shape[1])


def test_wide_borders_are_decoded_again_in_full() -> None:
    inner = dead_leaves(3, 100, 100)
    framed = np.full((400, 400, 3), (250, 0, 250), np.uint8)
    framed[150:250, 150:250] = inner
    data = encoded(framed, "JPEG", quality=95, subsampling=0)
    assert distance(decode(data, DecodeOptions(64)), decode(encoded(inner), DecodeOptions(64))) < 6


def test_crop_and_pad() -> None:
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, :20], wide[:, 20:40], wide[:, 40:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    cropped = decode(encoded(wide), WHOLE)
    assert cropped.reshape(-1, 3).mean(0).tolist() == [0, 255, 0]
    padded = decode(encoded(wide), DecodeOptions(18, crop="pad", trim=False))
    assert padded[0, 0].tolist() == [255, 255, 255]
    assert distance(padded[9, 3], np.array([255, 0, 0])) <= 1
    assert distance(padded[9, 15], np.array([0, 0, 255])) <= 1


def bomb() -> bytes:
    header = struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", Cause.CORRUPT_IMAGE),
        (b"not an image at all", Cause.UNKNOWN_FORMAT),
        (encoded(photo(1))[:200], Cause.CORRUPT_IMAGE),
        (encoded(photo(1), "JPEG")[:300], Cause.CORRUPT_IMAGE),
        (encoded(photo(1, 400, 400), "JPEG")[:-3000], Cause.CORRUPT_IMAGE),
        (encoded(photo(1), "WEBP")[:100], Cause.CORRUPT_IMAGE),
        (encoded(np.zeros((1, 1, 3), np.uint8)), Cause.TOO_SMALL),
        (encoded(np.zeros((1, 50, 3), np.uint8), "JPEG"), Cause.TOO_SMALL),
        (bomb(), Cause.TOO_LARGE),
    ],
)
def test_causes(data: bytes, cause: Cause) -> None:
    with pytest.raises(Unusable) as found:
        decode(data, OPTIONS)
    assert found.value.cause == cause


def test_image_member() -> None:
    assert image_member({"txt": b"t", "webp": b"w"}) == b"w"
    with pytest.raises(Unusable, match="no image"):
        image_member({"txt": b"t", "mp4": b"v"})
