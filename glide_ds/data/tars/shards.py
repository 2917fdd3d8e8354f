"""Tar shards by URL pattern, and the samples of many of them under one numbering."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
from cachetools import LRUCache

from glide_ds.data.tars.catalog import Catalog, look
from glide_ds.data.tars.index import ShardIndex, index_of
from glide_ds.data.tars.patterns import expand
from glide_ds.data.tars.peers import Alone, Peers
from glide_ds.data.tars.scan import split_name
from glide_ds.data.tars.storage import (
    LocalFile,
    RemoteFile,
    Storage,
    fault,
    is_remote,
    open_at_once,
)
from glide_ds.errors import DataError, GlideError
from glide_ds.masking import masked

OPEN_SHARDS = 256  # with their indexes, per process, at least


# ---- a set of shards


class ShardSet:
    """The samples of many shards under one numbering, 0 to samples - 1, in the order of the shards."""

    def __init__(
        self,
        urls: Sequence[str],
        heads: Catalog,
        storage: Storage,
        index_dir: str | None = None,
    ) -> None:
        self.urls, self.heads = list(urls), heads
        self.sizes = heads.rows["samples"].copy()
        self.ends = np.cumsum(self.sizes)
        self._ends = self.ends.tolist()  # plain integers, for one sample at a time
        self.duplicates = int(heads.rows["duplicates"].sum())
        self.damaged = [(urls[shard], note) for shard, notes in sorted(heads.damage.items()) for note in notes]
        self.fingerprint = hashlib.blake2b(heads.rows["fingerprint"].tobytes(), digest_size=8).hexdigest()
        self._index_dir, self._open_at_once = index_dir, OPEN_SHARDS
        self._opened = self._none_open()
        self._storage = storage

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def fingerprints(self) -> list[str]:
        return self.heads.rows["fingerprint"].astype(str).tolist()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": self._none_open()}

    def __add__(self, other: ShardSet) -> ShardSet:
        """Both sets' samples, this one's first."""
        return ShardSet(self.urls + other.urls, self.heads + other.heads, self._storage, self._index_dir)

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
            name = index.name(row, file)
        except (OSError, EOFError, GlideError):
            name = f"sample {row}"
        return masked(f"{self.urls[shard]} {name}")

    def key(self, sample: int) -> str:
        """A sample's key.

        Raises SurroundingsError where the shard can't be read, DataError where it is not what it was.
        """
        shard, row = self.locate(sample)
        try:
            index, file = self._opened.get(shard) or self._open(shard)
            key, _ = split_name(index.name(row, file)) or ("", "")
        except (OSError, EOFError) as error:
            raise fault(self.urls[shard], error) from error
        return key

    def _open(self, shard: int) -> tuple[ShardIndex, LocalFile | RemoteFile]:
        url, head = self.urls[shard], self.heads[shard]
        file = self._storage.open(url, head.stat)
        index = index_of(url, head.fingerprint, head.stat, self._storage, self._index_dir)
        self._opened[shard] = index, file
        return index, file


def open_shards(
    patterns: str | Sequence[str],
    index_dir: str | None = None,
    *,
    storage: Storage | None = None,
    salvage: bool = False,
    peers: Peers | None = None,
) -> ShardSet:
    """Open shards by pattern, making the indexes that are missing, together with `peers` where there are some.

    Damaged tars raise DataError unless `salvage` takes what is left.
    """
    storage, peers = storage or Storage(), peers or Alone()
    urls = _expanded(patterns, peers)
    shards = ShardSet(urls, look(urls, storage, index_dir, peers), storage, index_dir)
    if shards.damaged and not salvage:
        raise _damage(shards.damaged)
    if not len(shards):
        raise DataError(
            f"the {len(urls)} shards of {patterns!r} hold no sample",
            remedy="name their members KEY.EXTENSION, as in 000001.jpg beside 000001.txt",
        )
    return shards


def _expanded(patterns: str | Sequence[str], peers: Peers) -> list[str]:
    """Raises DataError also where processes find other shards than the first."""
    named = (patterns,) if isinstance(patterns, str) else patterns
    if any(map(is_remote, named)):
        return peers.first(lambda: expand(patterns))
    urls: list[str] = []

    def digest() -> str:
        urls.extend(expand(patterns))
        return hashlib.blake2b("\n".join(urls).encode(), digest_size=8).hexdigest()

    digests = peers.each(digest)
    if others := [rank for rank, each in enumerate(digests) if each != digests[0]]:
        raise DataError(
            f"rank {others[0]} finds other shards of {patterns!r} than rank 0 ({len(others)} such ranks)",
            "each would train on another data set",
            "give all hosts the same files under the same names",
        )
    return urls


def _damage(damaged: list[tuple[str, str]]) -> DataError:
    names = "; ".join(f"{url}: {note}" for url, note in damaged[:5])
    more = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
    return DataError(
        f"{len({url for url, _ in damaged})} shard(s) are damaged: {names}{more}",
        "samples would be missing",
        "fetch them again, or set data.damaged_shards=salvage to train on the members that are whole",
    )
