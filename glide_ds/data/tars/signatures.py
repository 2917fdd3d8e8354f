"""What a file is that is called a tar and is none."""

from __future__ import annotations

import re

from glide_ds.data.tars.scan import BLOCK, is_header
from glide_ds.errors import DataError

COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4"),
    b"\x1f\x9d": ("compress", "uncompress"),
    b"\x5d\0\0": ("lzma", "unlzma"),
    b"LZIP": ("lzip", "lzip -d"),
}
ARCHIVES = {
    b"PK\x03\x04": "a zip archive",
    b"PK\x05\x06": "an empty zip archive",
    b"PK\x07\x08": "a zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7-zip archive",
    b"Rar!": "a RAR archive",
    b"PAR1": "a parquet file",
    b"ARROW1": "an Arrow file",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a numpy array",
    b"SQLite format 3": "a SQLite database",
    b"%PDF": "a PDF file",
    b"GIF8": "a GIF picture",
    b"RIFF": "a WebP picture, or another RIFF file",
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x89PNG": "a PNG picture",
}
GIT_LFS = b"version https://git-lfs.github.com/spec/"
ZSTD_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")  # frames that hold what a packer notes
PAGE = re.compile(rb"\s*(\xef\xbb\xbf)?\s*<(!doctype|!--|html|head|\?xml|error)", re.IGNORECASE)
RECORD = re.compile(rb"\s*[{\[]\s*[\"\[{]")
TEXT = re.compile(rb"[\t-\r -~\x80-\xff]+")


def check_is_tar(url: str, start: bytes) -> None:
    """Raises DataError, by name and with the remedy, where a file's first block is that of something else."""
    if not start:
        raise DataError(
            f"shard {url} is empty: it has 0 bytes",
            "there is no sample in it",
            "fetch it again, or wait until it is written",
        )
    if is_header(start):  # whatever its first member is called
        return
    if start.removeprefix(b"\xef\xbb\xbf").startswith(GIT_LFS):
        raise DataError(
            f"shard {url} is a git-lfs pointer, not the file itself",
            "there is no sample in it",
            "fetch the files with `git lfs pull` in its repository",
        )
    if name := compression(start):
        remedy = next(remedy for each, remedy in COMPRESSED.values() if each == name)
        raise DataError(
            f"shard {url} is {name}-compressed",
            "no sample can be read alone",
            f"set data.reader=stream, or unpack it first: {remedy} < {url} > plain.tar",
        )
    kind = next((kind for mark, kind in ARCHIVES.items() if start.startswith(mark)), "")
    if kind:
        raise DataError(f"shard {url} is {kind}, no tar", "no sample can be found in it", _pack(url))
    if PAGE.match(start) or RECORD.match(start) or _is_message(start):
        text = " ".join(start[:80].decode("utf-8", "replace").split())
        raise DataError(
            f"shard {url} is a page or message, no tar; it begins {text!r}",
            "a server gave this in place of the file",
            "fetch it again, and look whether the address needs an account or has expired",
        )


def compression(start: bytes) -> str:
    """What a file is compressed by, as COMPRESSED has it; "" where it begins with no mark of that."""
    if is_header(start):
        return ""
    if ZSTD_SKIPPABLE.match(start):
        return "zstd"
    return next((name for mark, (name, _) in COMPRESSED.items() if start.startswith(mark)), "")


def _is_message(start: bytes) -> bool:
    """Whether it is a short text, as servers send it with an error."""
    try:
        return len(start) < BLOCK and TEXT.fullmatch(start) is not None and bool(start.decode())
    except UnicodeDecodeError:
        return False


def _pack(url: str) -> str:
    return "unpack it, and make shards of the files with `glide-ds prepare pack FOLDER --out shards/`"
