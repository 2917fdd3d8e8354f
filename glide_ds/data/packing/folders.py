"""A folder of pictures where shards are wanted: it is packed into the user's cache, once for all processes."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import sys
from pathlib import Path

from glide_ds.config import cache_dir
from glide_ds.data.packing.intake import walk
from glide_ds.data.packing.pack import pack
from glide_ds.errors import DataError, SurroundingsError
from glide_ds.files import locked, write_file

STAMP = ".stamp"  # what the folder looked like when it was packed


def packed(folder: str, pattern: str | None = None) -> list[str]:
    """Shards of the pictures in a folder, or of those that a glob names: packed anew where the folder has changed.

    Raises DataError where no picture can be used, SurroundingsError where the cache can't be written.
    """
    source = Path(folder).resolve()
    named = f"{source}\n{os.path.abspath(pattern)}" if pattern else str(source)
    digest = hashlib.blake2b(named.encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()
    out = cache_dir() / "packed" / f"{source.name}-{digest}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with locked(out.with_name(f"{out.name}.lock")):
            _bring_up_to_date(source, out, None if pattern is None else _chosen(folder, source, pattern))
    except OSError as error:
        raise SurroundingsError(
            f"the pictures of {folder} can't be packed into {out} ({error.strerror or error})",
            "there are no shards to read",
            f"make room there, name another place by GLIDE_DS_CACHE, or: glide-ds prepare pack {folder} --out shards/",
        ) from error
    return sorted(str(path) for path in out.glob("*.tar"))


def _chosen(folder: str, source: Path, pattern: str) -> set[str]:
    """What a glob names, as paths below `source`, which `folder` may be a link to."""
    return {str(source / os.path.relpath(path, folder)) for path in glob.glob(pattern, recursive=True)}


def _bring_up_to_date(source: Path, out: Path, only: set[str] | None) -> None:
    stamp, look = out / STAMP, _look(source, out)
    if stamp.exists() and stamp.read_text() == look and all(map(_is_whole, out.glob("*.tar"))):
        return
    _say(f"{source} holds pictures, which training reads from shards: packing them into {out}")
    out.mkdir(exist_ok=True)
    stamp.unlink(missing_ok=True)
    workers = min(4, len(os.sched_getaffinity(0)))
    try:
        summary = pack(source, out, workers=workers, only=only)
    except DataError:
        shutil.rmtree(out, ignore_errors=True)  # what was made of nothing that can be used
        raise
    write_file(stamp, look)
    skipped = summary["skipped"]
    left_out = f", {len(skipped):,} skipped: {'; '.join(skipped[:3])}" if skipped else ""
    _say(
        f"{summary['samples']:,} pictures packed{left_out}. To keep the shards, and some of them to validate on: "
        f"glide-ds prepare pack {source} --out shards/ --hold_out 0.02"
    )


def _is_whole(tar: Path) -> bool:
    return tar.with_name(f"{tar.name}.index").exists()


def _look(source: Path, out: Path) -> str:
    """A digest of the name, size and time of every file in the folder."""
    digest = hashlib.blake2b(digest_size=16)
    for place, names in walk(source, out):
        for name in names:
            status = os.stat(place / name)
            digest.update(
                f"{place / name}\n{status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape")
            )
    return digest.hexdigest()


def _say(text: str) -> None:
    print(f"glide_ds: {text}", file=sys.stderr, flush=True)
