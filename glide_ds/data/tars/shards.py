"""Tar shards by URL pattern, and the samples of many of them under one numbering."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
from cachetools import LRUCache

from glide_ds.data.tars.index import IndexHead, ShardIndex, index_urls, open_index
from glide_ds.data.tars.patterns import expand
from glide_ds.data.tars.scan import BLOCK, header_name
from glide_ds.data.tars.storage import (
    LocalFile,
    RemoteFile,
    Stat,
    Storage,
    fault,
    is_remote,
    open_at_once,
)
from glide_ds.errors import DataError, GlideError, SurroundingsError

OPEN_SHARDS = 256  # with their indexes, per process, at least


# ---- a set of shards


class ShardSet:
    """The samples of many shards under one numbering, 0 to samples - 1, in the order of the shards."""

    def __init__(
        self,
        urls: Sequence[str],
        heads: Sequence[IndexHead],
        stats: Sequence[Stat],
        storage: Storage,
        index_dir: str | None = None,
    ) -> None:
        self.urls, self.heads = list(urls), list(heads)
        self.fingerprints = [head.fingerprint for head in heads]
        self.sizes = np.array([head.samples for head in heads], np.int64)
        self.ends = np.cumsum(self.sizes)
        self._ends = self.ends.tolist()  # plain integers, for one sample at a time
        self.duplicates = sum(head.duplicates for head in heads)
        self.damaged = [(url, note) for url, head in zip(urls, heads, strict=True) for note in head.damage]
        digest = hashlib.blake2b("".join(head.fingerprint for head in heads).encode(), digest_size=8)
        self.fingerprint = digest.hexdigest()
        self._index_dir, self._open_at_once = index_dir, OPEN_SHARDS
        self._opened = self._none_open()
        self._stats, self._storage = list(stats), storage

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": self._none_open()}

    def __add__(self, other: ShardSet) -> ShardSet:
        """Both sets' samples, this one's first."""
        urls, heads, stats = self.urls + other.urls, self.heads + other.heads, self._stats + other._stats
        return ShardSet(urls, heads, stats, self._storage, self._index_dir)

    def keep_open(self, shards: int) -> None:
        """Have room for that many open shards in each process: what is read in turn must all stay open.

        An index takes some 10 bytes of memory per member: 0.3 MB for 10,000 samples of three. Where the system allows
        fewer open files, the least recently read are closed.
        """
        self._open_at_once = max(OPEN_SHARDS, shards)
        self._opened = self._none_open()

    def _none_open(self) -> LRUCache[int, tuple[ShardIndex, LocalFile | RemoteFile]]:
        return LRUCache(open_at_once(self._open_at_once))

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard number, sample's number in that shard)."""
        shard = bisect_right(self._ends, sample)
        return shard, sample - (self._ends[shard - 1] if shard else 0)

    def read(self, sample: int, unread: frozenset[str] = frozenset()) -> dict[str, bytes]:
        """A sample's members by extension, but for those of the extensions `unread`.

        Raises SurroundingsError where the shard can't be read, DataError where it is not what it was.
        """
        shard = bisect_right(self._ends, sample)  # as `locate` does, without a call
        try:
            index, file = self._opened.get(shard) or self._open(shard)
            return index.read(sample - (self._ends[shard - 1] if shard else 0), file, unread)
        except (OSError, EOFError) as error:
            raise fault(self.urls[shard], error) from error

    def name(self, sample: int) -> str:
        """A sample as a person finds it: shard and key."""
        shard, row = self.locate(sample)
        try:
            index, file = self._opened.get(shard) or self._open(shard)
            name = header_name(file.read(index.members(row)[0][1] - BLOCK, BLOCK))
        except (OSError, EOFError, GlideError):
            name = f"sample {row}"
        return f"{self.urls[shard]} {name}"

    def _open(self, shard: int) -> tuple[ShardIndex, LocalFile | RemoteFile]:
        url = self.urls[shard]
        file = self._storage.open(url, self._stats[shard])
        places = [place for place in index_urls(url, self._index_dir) if not is_remote(place)]
        found = (ShardIndex.known(place, self.heads[shard]) for place in places)
        index = next((index for index in found if index is not None), None)
        if index is None:
            raise SurroundingsError(
                f"the index of {url} vanished during the run",
                "its samples can't be found",
                "start the same command again, which makes it anew",
            )
        self._opened[shard] = index, file
        return index, file


def open_shards(
    patterns: str | Sequence[str],
    index_dir: str | None = None,
    *,
    storage: Storage | None = None,
    salvage: bool = False,
    part: tuple[int, int] = (0, 1),
) -> ShardSet:
    """Open shards by pattern, making the indexes that are missing.

    `part` = (rank, world size) lets several processes begin with different shards, so that together they
    scan each missing one about once. Damaged tars raise DataError unless `salvage` takes what is left.
    """
    urls = expand(patterns)
    storage = storage or Storage()
    opened: dict[int, tuple[IndexHead, Stat]] = {}
    begin = part[0] * len(urls) // part[1]
    for number in (*range(begin, len(urls)), *range(begin)):
        index, stat = open_index(urls[number], storage, index_dir)
        opened[number] = (index.head, stat)
    heads, stats = zip(*(opened[number] for number in range(len(urls))), strict=True)
    shards = ShardSet(urls, heads, stats, storage, index_dir)
    if shards.damaged and not salvage:
        raise _damage(shards.damaged)
    if not len(shards):
        raise DataError(
            f"the {len(urls)} shards of {patterns!r} hold no sample",
            remedy="name their members KEY.EXTENSION, as in 000001.jpg beside 000001.txt",
        )
    return shards


def _damage(damaged: list[tuple[str, str]]) -> DataError:
    names = "; ".join(f"{url}: {note}" for url, note in damaged[:5])
    more = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
    return DataError(
        f"{len({url for url, _ in damaged})} shard(s) are damaged: {names}{more}",
        "samples would be missing",
        "fetch them again, or set data.damaged_shards=salvage to train on the members that are whole",
    )
