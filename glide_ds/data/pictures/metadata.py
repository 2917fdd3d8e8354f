"""What lies around a picture in its file: which way is up, texts, and what libjpeg remarks on."""

from __future__ import annotations

import re
import struct
import warnings
import zlib

from PIL import Image

ORIENTATION = 0x0112
EXIF, XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"
XMP_ORIENTATION = re.compile(rb"tiff:Orientation\s*(?:=\s*[\"']|>)\s*([1-8])\b")
PNG_START = b"\x89PNG\r\n\x1a\n"
TRANSPARENCY = b"tRNS"  # the one chunk that a PNG can do without and its picture can't
MARKERS_ALONE = (0x01, *range(0xD0, 0xD8))  # segments without a length
END_OF_IMAGE = b"\xff\xd9"
READ_AHEAD = 16  # bytes that libjpeg may have taken of what it calls extraneous


def jpeg_orientation(data: bytes) -> int:
    """EXIF's orientation, else XMP's, 1 to 8; 1 where neither can be read.

    Found by walking the segments before the image, so photos without pay little.
    """
    offset, from_xmp = 2, 1
    while offset + 4 <= len(data) and data[offset] == 0xFF:
        kind = data[offset + 1]
        if kind == 0xFF:  # fill bytes
            offset += 1
        elif kind in MARKERS_ALONE:
            offset += 2
        elif kind in (0xDA, 0xD9):
            break
        else:
            size = int.from_bytes(data[offset + 2 : offset + 4], "big")
            if kind == 0xE1:
                segment = data[offset + 4 : offset + 2 + size]
                if segment.startswith(EXIF[:4]) and (value := _exif_orientation(segment)):
                    return value
                if segment.startswith(XMP) and (found := XMP_ORIENTATION.search(segment)):
                    from_xmp = int(found[1])
            offset += 2 + size
    return from_xmp


def _exif_orientation(segment: bytes) -> int | None:
    exif = Image.Exif()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exif.load(segment)
            value = exif.get(ORIENTATION)
        except Exception:  # noqa: BLE001 - Pillow raises anything on what is no EXIF, which says nothing then
            return None
    return value if isinstance(value, int) and 1 <= value <= 8 else None


def orientation(image: Image.Image) -> int:
    """As Pillow finds it in a loaded picture's EXIF or XMP, 1 to 8; 1 where they can't be read."""
    try:
        value = image.getexif().get(ORIENTATION)
    except Exception:  # noqa: BLE001 - as above
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def bare_png(data: bytes) -> bytes:
    """A PNG without its texts, profile and the like, which may be damaged or larger than Pillow takes.

    But for sound EXIF and XMP of a size that a person writes, which may hold the orientation.
    """
    kept, offset = [PNG_START], len(PNG_START)
    while offset + 12 <= len(data):
        size, kind = struct.unpack(">I4s", data[offset : offset + 8])
        end = offset + 12 + size
        whole = end <= len(data) and zlib.crc32(data[offset + 4 : end - 4]) == int.from_bytes(
            data[end - 4 : end], "big"
        )
        small = whole and size < 1 << 16
        xmp = kind == b"iTXt" and data[offset + 8 :].startswith(b"XML:com.adobe.xmp\0\0")
        exif = kind == b"eXIf"
        needed = kind[0] < ord("a") or kind == TRANSPARENCY
        if needed or (small and (xmp or exif)):
            kept.append(data[offset:end])
        offset = end
    kept.append(data[offset:])
    return b"".join(kept)


def is_whole_jpeg(data: bytes, remark: str) -> bool:
    """Whether a JPEG has all of its picture, though libjpeg made a remark on it."""
    if re.search(r"premature end of data|Huffman|arithmetic|instead of RST", remark):
        return False
    extraneous = re.search(r"(\d+) extraneous bytes before marker 0xd9", remark)
    if extraneous:
        # Zeros that the picture was read from, as of a file that was not written to its end, are no padding behind it.
        before = data[: data.rfind(END_OF_IMAGE)]
        return len(before) - len(before.rstrip(b"\0")) <= int(extraneous[1]) + READ_AHEAD
    return True
