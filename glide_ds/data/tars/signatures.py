"""What a file is that is called a tar and is none."""

from __future__ import annotations

import re

from glide_ds.errors import DataError

COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"\x04\x22\x4d\x18": ("lz4", "unlz4"),
    b"\x1f\x9d": ("compress", "uncompress"),
}
ARCHIVES = {
    b"PK\x03\x04": "a zip archive",
    b"PK\x05\x06": "an empty zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7-zip archive",
    b"Rar!": "a RAR archive",
    b"PAR1": "a parquet file",
    b"\xff\xd8\xff": "a JPEG picture",
    b"\x89PNG": "a PNG picture",
}
GIT_LFS = b"version https://git-lfs.github.com/spec/"
PAGE = re.compile(rb"\s*(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml|error)", re.IGNORECASE)
RECORD = re.compile(rb"\s*[{\[]\s*[\"\[{]")


def check_is_tar(url: str, start: bytes) -> None:
    """Raises DataError, by name and with the remedy, where a file's first block is that of something else."""
    if not start:
        raise DataError(
            f"shard {url} is empty: it has 0 bytes",
            "there is no sample in it",
            "fetch it again, or wait until it is written",
        )
    if start.startswith(GIT_LFS):
        raise DataError(
            f"shard {url} is a git-lfs pointer, not the file itself",
            "there is no sample in it",
            "fetch the files with `git lfs pull` in its repository",
        )
    for mark, (name, remedy) in COMPRESSED.items():
        if start.startswith(mark):
            raise DataError(
                f"shard {url} is {name}-compressed",
                "no sample can be read alone",
                f"set data.reader=stream, or unpack it first: {remedy} < {url} > plain.tar",
            )
    kind = next((kind for mark, kind in ARCHIVES.items() if start.startswith(mark)), "")
    if kind:
        raise DataError(f"shard {url} is {kind}, no tar", "no sample can be found in it", _pack(url))
    if PAGE.match(start) or RECORD.match(start):
        text = " ".join(start[:80].decode("utf-8", "replace").split())
        raise DataError(
            f"shard {url} is a page or message, no tar; it begins {text!r}",
            "a server gave this in place of the file",
            "fetch it again, and look whether the address needs an account or has expired",
        )


def _pack(url: str) -> str:
    return "unpack it, and make shards of the files with `glide-ds prepare pack FOLDER --out shards/`"
