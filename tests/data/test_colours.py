"""Wide greys, floats and alpha come out as bright as they were meant."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import pytest

from glide_ds.data.pictures.decode import DecodeOptions, open_pixels
from glide_ds.data.tally import Cause, Unusable

OPTIONS = DecodeOptions(8, trim=False)
SIDE = 8


def opened(data: bytes) -> np.ndarray:
    """[8, 8, 3]"""
    return open_pixels(data, OPTIONS, SIDE).pixels


def halves(top: float, bottom: float, kind: Any) -> np.ndarray:
    values = np.full((SIDE, SIDE), bottom, kind)
    values[: SIDE // 2] = top
    return values


def png16(values: np.ndarray, colour: int = 0, transparent: bytes = b"") -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 16, colour, 0, 0, 0))
    middle = chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + header + middle + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(values: np.ndarray, *, photometric: int = 1, order: str = "<") -> bytes:
    """An uncompressed grey TIFF of any number type."""
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    start = 8 + 2 + 12 * 10 + 4
    tags = [(256, SIDE), (257, SIDE), (258, values.itemsize * 8), (259, 1), (262, photometric)]
    tags += [(273, start), (277, 1), (278, SIDE), (279, len(data)), (339, kind)]
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}IH", 8, len(tags)) + entries + bytes(4) + data


def bmp(alpha: int, header: int = 108, mask: int = 0xFF000000) -> bytes:
    pixels = np.empty((SIDE, SIDE, 4), np.uint8)
    pixels[:] = 10, 20, 200, alpha
    info = struct.pack("<IiiHHIIiiII", header, SIDE, SIDE, 1, 32, 3, pixels.nbytes, 0, 0, 0, 0)
    info = (info + struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, mask)).ljust(header, b"\0")
    offset = 14 + len(info)
    return b"BM" + struct.pack("<IHHI", offset + pixels.nbytes, 0, 0, offset) + info + pixels.tobytes()


@pytest.mark.parametrize(
    ("top", "bottom"), [(255, 0), (200, 100), (256, 10), (65535, 0), (1000, 40000), (0, 0)]
)
def test_sixteen_bits(top: int, bottom: int) -> None:
    values = halves(top, bottom, np.uint16)
    for data in (png16(values), tiff(values), tiff(values, order=">")):
        assert np.array_equal(opened(data)[[0, -1], 0, 0], np.round(np.array([top, bottom]) / 257).astype(int))


def test_what_is_transparent_in_sixteen_bits_is_white() -> None:
    values = halves(0, 30000, np.uint16)
    assert opened(png16(values, 0, struct.pack(">H", 0)))[[0, -1], 0, 0].tolist() == [255, 117]
    assert opened(png16(values, 0, struct.pack(">H", 30000)))[[0, -1], 0, 0].tolist() == [0, 255]
    assert opened(png16(values, 0, struct.pack(">H", 1)))[[0, -1], 0, 0].tolist() == [0, 117]
    coloured = np.stack([values] * 3, -1)
    assert opened(png16(coloured, 2, struct.pack(">HHH", 0, 0, 0)))[[0, -1], 0, 0].tolist() == [255, 117]
    assert opened(png16(coloured, 2, struct.pack(">HHH", *[30000] * 3)))[[0, -1], 0, 0].tolist() == [0, 255]
    alpha = np.stack([values, halves(0, 65535, np.uint16)], -1)
    assert opened(png16(alpha, 4))[[0, -1], 0, 0].tolist() == [255, 117]


@pytest.mark.parametrize(
    ("top", "bottom", "wanted"),
    [
        (1.0, 0.0, (255, 0)),
        (0.5, 0.25, (128, 64)),
        (1.5, 0.5, (255, 128)),  # beyond white
        (10.5, 3.0, (255, 255)),
        (0.5, -3.0, (128, 0)),
        (np.nan, 0.5, (0, 128)),
        (np.inf, 0.5, (255, 128)),
        (-np.inf, 0.5, (0, 128)),
        (255.0, 100.0, (255, 100)),  # whole numbers: bytes kept in floats
        (65535.0, 25700.0, (255, 100)),
        (120.5, 60.25, (120, 60)),
        (0.0, 0.0, (0, 0)),
    ],
)
def test_floats(top: float, bottom: float, wanted: tuple[int, int]) -> None:
    data = tiff(halves(top, bottom, np.float32))
    assert opened(data)[[0, -1], 0, 0].tolist() == list(wanted)


def test_few_lights_do_not_darken_a_picture() -> None:
    values = halves(0.5, 0.25, np.float32)
    values[3, 3] = 900.5
    assert opened(tiff(values))[[0, -1], 0, 0].tolist() == [128, 64]


def test_no_number_at_all_is_no_picture() -> None:
    with pytest.raises(Unusable, match=Cause.CORRUPT_IMAGE):
        opened(tiff(halves(np.nan, np.inf, np.float32)))


@pytest.mark.parametrize(
    ("top", "bottom", "kind", "wanted"),
    [
        (2**32 - 1, 2**31, np.uint32, (255, 128)),
        (2**31 - 1, 2**30, np.int32, (255, 128)),
        (2**31 - 1, -5, np.int32, (255, 0)),
        (65535, 25700, np.uint32, (255, 100)),
        (65535, 25700, np.int32, (255, 100)),
        (32767, -9, np.int16, (255, 0)),
    ],
)
def test_integers(top: int, bottom: int, kind: Any, wanted: tuple[int, int]) -> None:
    assert opened(tiff(halves(top, bottom, kind)))[[0, -1], 0, 0].tolist() == list(wanted)


def test_white_may_be_zero() -> None:
    assert opened(tiff(halves(65535, 0, np.uint16), photometric=0))[[0, -1], 0, 0].tolist() == [0, 255]


@pytest.mark.parametrize("header", [108, 124])
def test_an_empty_alpha_of_a_bmp_is_no_alpha(header: int) -> None:
    assert opened(bmp(0, header))[0, 0].tolist() == [200, 20, 10]
    assert opened(bmp(0, header, mask=0))[0, 0].tolist() == [200, 20, 10]
    assert opened(bmp(255, header))[0, 0].tolist() == [200, 20, 10]
    assert opened(bmp(128, header))[0, 0].tolist() == [227, 137, 132]


@pytest.mark.parametrize("kind", ["u1", "u2"])
def test_colours_in_planes_of_their_own_are_right_or_refused(kind: str) -> None:
    """Pillow reads those of 16 bits as noise."""
    values = np.full((3, SIDE, SIDE), 200, kind) * np.array([1, 0, 0], kind)[:, None, None]
    size = values[0].nbytes
    after = 8 + 2 + 12 * 11 + 4
    lists = struct.pack("<3H", *3 * [8 * values.itemsize]) + struct.pack(
        "<6I", *(after + 30 + n * size for n in range(3)), *3 * [size]
    )
    tags = [(256, 1, SIDE), (257, 1, SIDE), (258, 3, after), (259, 1, 1), (262, 1, 2), (273, 3, after + 6)]
    tags += [(277, 1, 3), (278, 1, SIDE), (279, 3, after + 18), (284, 1, 2), (339, 1, 1)]
    entries = b"".join(
        struct.pack("<HHII", tag, 3 if tag == 258 else 4, count, value) for tag, count, value in tags
    )
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + lists + values.tobytes()
    if kind == "u1":
        assert (opened(data) == (200, 0, 0)).all()
        return
    with pytest.raises(Unusable, match="plane") as refused:
        opened(data)
    assert refused.value.cause == Cause.UNKNOWN_FORMAT
