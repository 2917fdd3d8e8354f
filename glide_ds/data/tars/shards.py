"""Tar shards by URL pattern, and the samples of many of them under one numbering."""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from braceexpand import braceexpand
from cachetools import LRUCache

from glide_ds.data.tars.index import IndexHead, ShardIndex, index_urls, open_index
from glide_ds.data.tars.scan import BLOCK, header_name
from glide_ds.data.tars.storage import (
    LocalFile,
    RemoteFile,
    Stat,
    Storage,
    fault,
    is_remote,
    local_path,
    open_at_once,
)
from glide_ds.errors import DataError, GlideError, SurroundingsError

OPEN_SHARDS = 256  # with their indexes, per process, at least


# ---- URLs


def expand(patterns: str | Sequence[str]) -> list[str]:
    """Expand brace patterns, globs, folders and lists of them to shard URLs, in the given order.

    Raises DataError naming the pattern, and the nearest existing files, where one matches nothing or where
    a local shard it names does not exist.
    """
    wanted = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    urls = [url for pattern in wanted for url in _expand_one(pattern)]
    if not urls:
        raise DataError("data.shards is empty", remedy="name tar files, a brace pattern, or builtin:shapes")
    if doubled := [url for url, count in Counter(urls).items() if count > 1]:
        raise DataError(
            f"data.shards names {doubled[0]} more than once ({len(doubled)} such shards)",
            "its samples would be read twice an epoch",
            "name each shard once",
        )
    return urls


def _expand_one(pattern: str) -> list[str]:
    try:
        urls = list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(
            f"data.shards pattern {pattern!r} has unbalanced braces", remedy="close them"
        ) from error
    if pattern == "" or not urls:
        raise DataError("data.shards has an empty pattern", remedy="name tar files, or builtin:shapes")
    found = [match for url in urls for match in _matches(url)]
    missing = [path for path in found if not is_remote(path) and not os.path.isfile(local_path(path))]
    if not found or missing:
        raise _missing(pattern, missing or urls, len(found) - len(missing), len(urls))
    return found


def _matches(url: str) -> list[str]:
    if is_remote(url):
        return [url]
    path = local_path(url)
    if os.path.isdir(path):
        return sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
    if glob.has_magic(path) and not os.path.exists(path):
        return sorted(glob.glob(path))
    return [path]


def _missing(pattern: str, missing: list[str], found: int, total: int) -> DataError:
    near = nearest_files(local_path(missing[0]))
    example = "" if missing[0] == pattern else f" (the first is {missing[0]})"
    if found:
        fact = f"data.shards pattern {pattern!r}: {len(missing)} of {total} shards do not exist{example}"
    else:
        fact = f"data.shards pattern {pattern!r} matches no file{example}"
    hint = f"the nearest existing are {', '.join(near)}" if near else "no tar file lies in or near that folder"
    remedy = "correct the pattern, or use data.shards=builtin:shapes to try without data"
    return DataError(f"{fact}; {hint}", remedy=remedy)


def nearest_files(path: str, count: int = 3) -> list[str]:
    """The existing tar files most like a missing path, in its folder or the nearest folder that exists."""
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    tars = sorted(glob.glob(os.path.join(glob.escape(folder), "*.tar")))
    tars = tars or sorted(glob.glob(os.path.join(glob.escape(folder), "*", "*.tar")))[:1000]
    return difflib.get_close_matches(os.path.abspath(path), tars, n=count, cutoff=0.0)


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
