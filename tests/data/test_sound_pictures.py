"""A picture that is all there is read, whatever lies around it; half a picture is not."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from data_kit import encoded, photo
from PIL import Image

from glide_ds.data.pictures.decode import DecodeOptions, decode, open_pixels
from glide_ds.data.tally import Cause, Unusable

OPTIONS = DecodeOptions(32)
PHOTO, NOISE = photo(3, 96, 80), np.random.default_rng(0).integers(0, 256, (96, 80, 3), np.uint8)


def jpeg(pixels: np.ndarray = PHOTO, **options: object) -> bytes:
    return encoded(pixels, "JPEG", quality=90, **options)


def segment(data: bytes, kind: bytes = b"\xe1") -> bytes:
    return b"\xff" + kind + struct.pack(">H", len(data) + 2) + data


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def after_header(png: bytes, *chunks: bytes) -> bytes:
    return png[:33] + b"".join(chunks) + png[33:]


def same(data: bytes, as_in: bytes) -> None:
    assert np.array_equal(decode(data, OPTIONS), decode(as_in, OPTIONS))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("pixels", [PHOTO, NOISE], ids=["photo", "noise"])
def test_what_libjpeg_only_remarks_on(pixels: np.ndarray, progressive: bool) -> None:
    data = jpeg(pixels, progressive=progressive)
    for junk in (b"x", b"some junk", bytes(1), bytes(40), bytes(4000), b"\xff" * 9, b"\xff\x00" * 9):
        same(data[:-2] + junk + data[-2:], data)
        same(data + junk, data)
    same(data[:-2], data)  # but for the mark, it is all there
    same(data[:-1], data)
    assert decode(data[:20] + bytes(3) + data[20:], OPTIONS).shape == (32, 32, 3)  # which only Pillow reads


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("pixels", [PHOTO, NOISE], ids=["photo", "noise"])
@pytest.mark.parametrize("part", [0.3, 0.5, 0.8, 0.95])
def test_half_a_jpeg_stays_refused(pixels: np.ndarray, progressive: bool, part: float) -> None:
    data = jpeg(pixels, progressive=progressive)
    start = data.index(b"\xff\xda")
    half = data[: start + int((len(data) - start) * part)]
    for broken in (
        half,
        half + data[-2:],
        half.ljust(len(data), b"\0"),
        half.ljust(len(data), b"\0") + data[-2:],
        half + data[-2:] + bytes(100) + data[-2:],
    ):
        with pytest.raises(Unusable, match=Cause.CORRUPT_IMAGE):
            decode(broken, OPTIONS)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF", "BMP"])
def test_half_of_another_picture_stays_refused(kind: str) -> None:
    data = encoded(NOISE, kind)
    for part in (0.5, 0.9):
        with pytest.raises(Unusable, match=Cause.CORRUPT_IMAGE):
            decode(data[: int(len(data) * part)], OPTIONS)


BAD_EXIF = [
    b"",
    b"garbage that is no tiff",
    b"II*\0\x08\0\0\0\xff\xff",
    b"MM\0*\xff\xff\xff\xff",
    b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0\0\0\0\0",  # orientation 9
    b"II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0",  # orientation "abc"
    b"II*\0\x08\0\0\0\x01\0\x12\x01\x05\0\x01\0\0\0\xff\xff\xff\x7f\0\0\0\0",  # a fraction that lies nowhere
]


@pytest.mark.parametrize("exif", BAD_EXIF)
def test_exif_that_cannot_be_read_says_upright(exif: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data, png = jpeg(), encoded(PHOTO)
        same(data[:2] + segment(b"Exif\0\0" + exif) + data[2:], data)
        same(after_header(png, chunk(b"eXIf", exif)), png)


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 3_000_000))],
        [chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(b"x" * 3_000_000))],
        [chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 900_000))] * 100,
        [chunk(b"tEXt", b"Comment\0" + b"x" * 3_000_000)],
        [chunk(b"iCCP", b"profile\0\0" + zlib.compress(b"x" * 3_000_000))],
        [chunk(b"tEXt", b"Comment\0damaged")[:-1] + b"\0"],
        [chunk(b"zTXt", b"Comment\0\0no zlib")],
        [chunk(b"pHYs", b"12")],
        [chunk(b"pHYs", b"12"), chunk(b"tIME", b"")],
    ],
    ids=["zTXt", "iTXt", "many", "tEXt", "profile", "damaged", "no zlib", "pHYs", "tIME"],
)
def test_texts_of_a_png_do_not_spoil_it(chunks: list[bytes]) -> None:
    for pixels in (PHOTO, np.dstack([PHOTO, PHOTO[..., 0]])):
        png = encoded(pixels)
        same(after_header(png, *chunks), png)


def xmp(orientation: int, form: str) -> bytes:
    return (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
        + form.format(orientation).encode()
        + b"</rdf:RDF></x:xmpmeta>"
    )


FORMS = ('tiff:Orientation="{}"/>', "><tiff:Orientation>{}</tiff:Orientation></rdf:Description>")


def turned(orientation: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(PHOTO, kind, exif=exif, **({"quality": 90} if kind == "JPEG" else {}))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_behind_fill_bytes_and_in_xmp(orientation: int) -> None:
    plain, data = jpeg(), turned(orientation)
    wanted = open_pixels(data, OPTIONS, 1000).pixels
    place = data.index(b"\xff\xe1")
    sources = [data[:place] + b"\xff" * fill + data[place:] for fill in (1, 2, 7)]
    for form in FORMS:
        text = segment(b"http://ns.adobe.com/xap/1.0/\0" + xmp(orientation, form))
        sources += [plain[:2] + text + plain[2:]]
        sources += [plain[:2] + segment(b"Exif\0\0" + bad) + text + plain[2:] for bad in BAD_EXIF]
        sources += [
            data[:2] + segment(b"http://ns.adobe.com/xap/1.0/\0" + xmp(3, form)) + data[2:]
        ]  # EXIF goes first
    for source in sources:
        assert np.array_equal(open_pixels(source, OPTIONS, 1000).pixels, wanted)
    for junk in (b"some junk", bytes(40)):  # the same where Pillow decodes
        assert open_pixels(data[:-2] + junk + data[-2:], OPTIONS, 1000).pixels.shape == wanted.shape


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_orientation_in_other_formats(kind: str) -> None:
    assert open_pixels(turned(6, kind), OPTIONS, 1000).pixels.shape == (80, 96, 3)
    if kind == "PNG":
        text = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6, FORMS[0]))
        huge = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"x" * 3_000_000))
        for chunks in ([text], [huge, text]):
            assert open_pixels(after_header(encoded(PHOTO), *chunks), OPTIONS, 1000).pixels.shape == (80, 96, 3)
        exif = io.BytesIO(turned(6, kind)).getvalue()
        assert open_pixels(after_header(exif, huge), OPTIONS, 1000).pixels.shape == (80, 96, 3)
