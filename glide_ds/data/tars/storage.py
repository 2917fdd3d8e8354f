"""Byte ranges of files, wherever they lie: local paths by pread, any fsspec URL in cached blocks.

A remote file is read in aligned blocks, so one request serves the samples that follow as well. Blocks live in
memory, per process, or with `cache_dir` on the node's disk: shared by its processes, bounded, keyed by URL,
version (ETag) and block, and each written under its name only when whole.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from glide_ds.errors import DataError

BLOCK_BYTES = 4 << 20
BLOCKS_IN_MEMORY = 16
ATTEMPTS = 8
FIRST_WAIT = 0.1  # seconds before the second attempt; doubles, with jitter, up to MAX_WAIT
MAX_WAIT = 10.0
EVICT_EVERY = 32  # blocks written between two looks at the cache's size
KEEP_AFTER_EVICTION = 0.9  # of the bound

T = TypeVar("T")


def is_remote(url: str) -> bool:
    return "://" in url and not url.startswith("file://")


def local_path(url: str) -> str:
    return url.removeprefix("file://")


class Stat(NamedTuple):
    size: int
    version: str  # changes when the content does: ETag, or time of last change


@dataclass(frozen=True)
class CacheOptions:
    """Where remote blocks are kept; without a folder, in memory."""

    folder: str | None = None
    max_bytes: int = 50 << 30


class LocalFile:
    """Byte ranges of a local file. A forked child may share it: pread moves no position."""

    def __init__(self, url: str) -> None:
        self.url, self.descriptor = url, os.open(local_path(url), os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes, or OSError or EOFError."""
        data = os.pread(self.descriptor, size, offset)
        if len(data) != size:
            raise _cut_off(self.url, offset + len(data), offset + size)
        return data


class RemoteFile:
    """Byte ranges of a remote file of known size and version, through its storage's blocks."""

    def __init__(self, storage: Storage, url: str, stat: Stat) -> None:
        self.url, self._storage, self._stat = url, storage, stat

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes, or OSError or EOFError."""
        data = self._storage.remote.read(self.url, offset, size, self._stat)
        if len(data) != size:
            raise _cut_off(self.url, offset + len(data), offset + size)
        return data


def _cut_off(url: str, end: int, expected: int) -> EOFError:
    return EOFError(f"{url} ends after {end} bytes, {expected} expected")


class Storage:
    """Files by URL. Holds nothing that a fork or a pickle could break: connections open where they are used."""

    def __init__(self, cache: CacheOptions | None = None) -> None:
        self.cache = cache or CacheOptions()
        self._connect()

    def _connect(self) -> None:
        self._process, self._connected = os.getpid(), RemoteFiles(self.cache)

    @property
    def remote(self) -> RemoteFiles:
        if self._process != os.getpid():  # a child must not share its parent's connections
            self._connect()
        return self._connected

    def __reduce__(self) -> tuple[type[Storage], tuple[CacheOptions]]:
        return Storage, (self.cache,)

    def stat(self, url: str) -> Stat:
        """Raises OSError where the file can't be found."""
        if is_remote(url):
            return self.remote.stat(url)
        status = os.stat(local_path(url))
        return Stat(status.st_size, f"mtime {status.st_mtime_ns}")

    def open(self, url: str, stat: Stat | None = None) -> LocalFile | RemoteFile:
        """Raises OSError where it can't be. A known `stat` saves a remote file's request for it."""
        return RemoteFile(self, url, stat or self.remote.stat(url)) if is_remote(url) else LocalFile(url)

    def read_all(self, url: str) -> bytes:
        """A whole small file. Raises FileNotFoundError where there is none."""
        return self.remote.read_all(url) if is_remote(url) else Path(local_path(url)).read_bytes()

    def write_all(self, url: str, data: bytes) -> None:
        """Store a whole remote file in one request. Raises OSError where the store does not take it."""
        self.remote.write_all(url, data)


class RemoteFiles:
    """fsspec files in blocks, with retries."""

    def __init__(self, cache: CacheOptions) -> None:
        self._systems: dict[str, Any] = {}
        self._stats: dict[str, Stat] = {}
        self._blocks: OrderedDict[tuple[str, str, int], bytes] = OrderedDict()
        self._disk = DiskCache(Path(cache.folder), cache.max_bytes) if cache.folder else None

    def stat(self, url: str) -> Stat:
        if url not in self._stats:
            info = _retry(url, lambda: self._system(url).info(url))
            if info.get("size") is None:
                raise OSError(f"{url}: the server does not tell its size, so it can't be read in ranges")
            version = next(
                (info[key] for key in ("ETag", "etag", "LastModified", "mtime") if info.get(key)), ""
            )
            self._stats[url] = Stat(int(info["size"]), str(version))
        return self._stats[url]

    def read(self, url: str, offset: int, size: int, stat: Stat) -> bytes:
        end = min(offset + size, stat.size)
        blocks = range(offset // BLOCK_BYTES, -(-end // BLOCK_BYTES))
        whole = b"".join(self._block(url, number, stat) for number in blocks)
        start = offset - blocks.start * BLOCK_BYTES
        return whole[start : start + end - offset]

    def read_all(self, url: str) -> bytes:
        return _retry(url, lambda: bytes(self._system(url).cat_file(url)))

    def write_all(self, url: str, data: bytes) -> None:
        try:
            _retry(url, lambda: self._system(url).pipe_file(url, data))
        except NotImplementedError as error:
            raise OSError(f"{url} can't be written") from error

    def _block(self, url: str, number: int, stat: Stat) -> bytes:
        key = (url, stat.version, number)
        data = self._blocks.pop(key, None)
        if data is None and self._disk:
            data = self._disk.get(key)
        if data is None:
            data = self._fetch(url, number, stat)
            if self._disk:
                self._disk.put(key, data)
        if len(self._blocks) >= BLOCKS_IN_MEMORY:
            self._blocks.popitem(last=False)
        self._blocks[key] = data
        return data

    def _fetch(self, url: str, number: int, stat: Stat) -> bytes:
        start = number * BLOCK_BYTES
        end = min(start + BLOCK_BYTES, stat.size)

        def fetch() -> bytes:
            data = bytes(self._system(url).cat_file(url, start=start, end=end))
            if len(data) != end - start:
                raise OSError(f"{url}: {len(data)} bytes came for a range of {end - start}")
            return data

        return _retry(url, fetch)

    def _system(self, url: str) -> Any:
        protocol = url.split("://", 1)[0]
        if protocol not in self._systems:
            import fsspec  # here, not on top: it costs local runs 60 ms

            try:
                self._systems[protocol] = fsspec.filesystem(protocol, skip_instance_cache=True)
            except (ImportError, ValueError) as error:
                raise DataError(f"{url} can't be read: {error}. Install what fsspec needs for it") from error
        return self._systems[protocol]


def _retry(url: str, request: Callable[[], T]) -> T:
    """Repeat a request that fails, unless the file is not there or not ours to read."""
    wait = FIRST_WAIT
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return request()
        except (FileNotFoundError, PermissionError, DataError, NotImplementedError):
            raise
        except Exception as error:  # every backend of fsspec raises its own
            if attempt == ATTEMPTS:
                raise OSError(f"{url}: {ATTEMPTS} attempts failed, the last with {error!r}") from error
        time.sleep(wait * random.uniform(0.5, 1.5))
        wait = min(2 * wait, MAX_WAIT)
    raise AssertionError("unreachable")


class DiskCache:
    """Blocks as files of one folder, the least recently used going first."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._written = 0

    def get(self, key: tuple[str, str, int]) -> bytes | None:
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        return data

    def put(self, key: tuple[str, str, int], data: bytes) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_bytes(data)
        partial.replace(path)
        if self._written % EVICT_EVERY == 0:
            self._evict()
        self._written += 1

    def _path(self, key: tuple[str, str, int]) -> Path:
        name = hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()
        return self._folder / name[:2] / name

    def _evict(self) -> None:
        files = []
        for path in self._folder.glob("*/*"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process evicts as well
                continue
            files.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in files)
        if total <= self._max_bytes:
            return
        for _, size, path in sorted(files):
            path.unlink(missing_ok=True)
            total -= size
            if total <= self._max_bytes * KEEP_AFTER_EVICTION:
                return
