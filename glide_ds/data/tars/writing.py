"""Writing shards, by webdataset's own writer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from glide_ds.files import replacing

MODE = 0o644


@contextmanager
def writing_shard(path: Path) -> Iterator[Callable[[str, Mapping[str, bytes]], None]]:
    """Give the body what adds a sample: its key, and its members' bytes by extension.

    The file appears under its name once it is whole. The same samples give the same bytes: nobody owns the members,
    their time is 0, and a sample's lie in the order of their extensions. Raises OSError where the disk has no room.
    """
    from webdataset.writer import TarWriter  # here, not on top: it costs other runs time

    with (
        replacing(path) as partial,
        partial.open("wb") as file,
        TarWriter(file, user="", group="", mode=MODE, mtime=0, encoder=False) as tar,
    ):
        yield lambda key, members: tar.write({"__key__": key, **members})
