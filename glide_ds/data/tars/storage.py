"""Byte ranges of files, wherever they lie: local paths by pread, any fsspec URL in cached blocks.

A remote file is read in aligned blocks, so one request serves the samples that follow as well. Blocks live in
memory, per process, or with `cache_dir` on the node's disk: shared by its processes, bounded, keyed by URL,
version (ETag) and block, and each written under its name only when whole.

A file that can't be read is no fault of the sample in it. `fault` says what it is: one of the surroundings, or data
that changed.
"""

from __future__ import annotations

import errno
import hashlib
import inspect
import os
import resource
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from cachetools import LRUCache
from numpy.typing import NDArray

from glide_ds.errors import ConfigError, DataError, GlideError, SurroundingsError
from glide_ds.files import probe, replacing
from glide_ds.masking import bare

BLOCK_BYTES = 4 << 20
BLOCKS_IN_MEMORY = 16
ATTEMPTS = 8
FIRST_WAIT = 0.1  # seconds before the second attempt, on average; doubles up to MAX_WAIT
MAX_WAIT = 10.0
# What another attempt would not change: the file is not there, or not ours to read, or can't be written.
FINAL = (FileNotFoundError, PermissionError, DataError, NotImplementedError)
EVICT_EVERY = 32  # blocks written between two looks at the cache's size
KEEP_AFTER_EVICTION = 0.9  # of the bound

LISTED = 8  # shards of a folder that are worth a listing
UNLISTED = ("http://", "https://")
IN_THE_EXTRA = ("http", "https", "s3", "s3a")  # `remote` of pyproject.toml

FILES_OF_A_SHARD = 2  # its tar, and its embeddings where there is a store
OTHER_FILES = 512  # open files that a process is left for everything else

T = TypeVar("T")


def fault(place: str, error: OSError | EOFError) -> GlideError:
    """What it means that `place` can't be read."""
    if isinstance(error, EOFError):
        return DataError(
            str(error),
            "it was cut off or replaced since its index was made",
            "put it back as it was, or run `glide-ds prepare index --force` to accept it as it is",
        )
    return SurroundingsError(
        f"{place} can't be read: {error}",
        "the samples in it can't be had, and leaving them out would be another training",
        "look after the disk, mount, network or cache that it names, then start the same command again",
    )


@contextmanager
def reading(place: str) -> Iterator[None]:
    """Raise what `fault` says where the body can't read."""
    try:
        yield
    except (OSError, EOFError) as error:
        raise fault(place, error) from error


def open_at_once(shards: int) -> int:
    """Of how many of `shards` this process may hold the files open: the tar, and the array of embeddings.

    Raises the soft limit of open files as far as that needs and the hard one allows.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FILES_OF_A_SHARD * shards + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return shards
    soft = needed if hard == resource.RLIM_INFINITY else max(soft, min(needed, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, min(shards, (soft - OTHER_FILES) // FILES_OF_A_SHARD))


def is_remote(url: str) -> bool:
    return "://" in url and not url.startswith("file://")


def local_path(url: str) -> str:
    return url.removeprefix("file://")


def common_start(texts: Sequence[str]) -> str:
    """What all of them begin with."""
    first, last = min(texts), max(texts)
    return first[
        : next((n for n, chars in enumerate(zip(first, last, strict=False)) if len({*chars}) > 1), len(first))
    ]


class Stat(NamedTuple):
    size: int
    version: str  # changes when the content does: ETag, or time of last change


@dataclass(frozen=True)
class CacheOptions:
    """Where remote blocks are kept; without a folder, in memory."""

    folder: str | None = None
    max_bytes: int = 50 << 30

    def check(self) -> None:
        """Raises ConfigError where the folder can't be written."""
        if self.folder:
            try:
                probe(self.folder)
            except OSError as error:
                raise ConfigError(
                    f"data.cache_dir: {self.folder} can't be written ({error.strerror})",
                    "no block of a remote shard could be kept there",
                    "choose another data.cache_dir, or mend its permissions or free space",
                ) from error


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

    def listed(self, urls: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.bytes_]] | None:
        """The sizes and versions of remote files by listing their folders; a size of -1 for those that no listing has.

        None where nothing can be listed. Raises DataError where nothing is installed that reads such URLs.
        """
        for url in {url.partition("://")[0]: url for url in urls if is_remote(url)}.values():
            self.remote.check(url)
        folders: dict[str, list[int]] = {}
        for number, url in enumerate(urls):
            if is_remote(url) and not url.startswith(UNLISTED):
                folders.setdefault(url.rpartition("/")[0], []).append(number)
        sizes, versions = np.full(len(urls), -1, np.int64), [b""] * len(urls)
        for folder, numbers in folders.items():
            if len(numbers) < LISTED:
                continue
            bases = [urls[number].rpartition("/")[2] for number in numbers]
            try:
                found = self.remote.stats_in(folder, common_start(bases))
            except (
                OSError,
                NotImplementedError,
            ):  # a store that lists nothing, or not to us: each is asked for
                continue
            for number, base in zip(numbers, bases, strict=True):
                if stat := found.get(base):
                    sizes[number], versions[number] = stat.size, stat.version.encode()
        return (sizes, np.array(versions, np.bytes_)) if (sizes >= 0).any() else None

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
        self._blocks: LRUCache[tuple[str, str, int], bytes] = LRUCache(BLOCKS_IN_MEMORY)
        self._disk = DiskCache(Path(cache.folder), cache.max_bytes) if cache.folder else None

    def stat(self, url: str) -> Stat:
        info = _retry(url, lambda: self._info(url))
        if info.get("size") is None:
            raise OSError(f"{url}: the server does not tell its size, so it can't be read in ranges")
        return _stat(info)

    def _info(self, url: str) -> dict[str, Any]:
        try:
            return dict(self._system(url).info(url))
        except FileNotFoundError as error:  # as fsspec calls every failure of a web server, overload too
            if getattr(error.__cause__, "status", 404) >= 500:
                raise OSError(f"{url}: {error.__cause__}") from error
            raise

    def check(self, url: str) -> None:
        """Raises DataError where nothing is installed that reads such a URL."""
        self._system(url)

    def stats_in(self, folder: str, prefix: str) -> dict[str, Stat]:
        """By name, what a listing says of a folder's files that begin with `prefix`. Raises OSError."""
        system = self._system(folder)
        if prefix and "prefix" in inspect.signature(getattr(system, "_find", system.find)).parameters:
            found = _retry(folder, lambda: system.find(folder, prefix=prefix, detail=True)).values()
        else:
            found = _retry(folder, lambda: system.ls(folder, detail=True))
        start = folder.partition("://")[2] + "/"
        stats = {info["name"].lstrip("/"): _stat(info) for info in found if info.get("size") is not None}
        return {name.removeprefix(start): stat for name, stat in stats.items() if name.startswith(start)}

    def read(self, url: str, offset: int, size: int, stat: Stat) -> bytes:
        end = min(offset + size, stat.size)
        parts = []
        for number in range(offset // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            first = number * BLOCK_BYTES
            length = min(BLOCK_BYTES, stat.size - first)
            wanted = slice(max(0, offset - first), min(length, end - first))
            parts.append(self._part(url, number, length, wanted, stat))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_all(self, url: str) -> bytes:
        return _retry(url, lambda: bytes(self._system(url).cat_file(url)))

    def stream(self, url: str) -> Any:
        """A file to be read from its beginning, once. Raises what its backend raises."""
        # No ranges asked for.
        whole = {"block_size": 0} if url.startswith(("http://", "https://", "hf://")) else {}
        # Else the hub's client lists the whole folder for every file that it opens.
        alone = {"expand_info": True} if url.startswith("hf://") else {}
        return _retry(url, lambda: self._system(url, **alone).open(url, "rb", **whole))

    def list(self, url: str) -> list[str]:
        """The files that a pattern with `*`, `?` or `[]` names, or the tars below a folder. Raises OSError."""
        system = self._system(url)
        if url.endswith("/"):
            names = [name for name in _retry(url, lambda: system.find(url)) if name.lower().endswith(".tar")]
        else:
            names = _retry(url, lambda: system.glob(url))
        return sorted(str(system.unstrip_protocol(name)) for name in names)

    def write_all(self, url: str, data: bytes) -> None:
        try:
            _retry(url, lambda: self._system(url).pipe_file(url, data))
        except NotImplementedError as error:
            raise OSError(f"{url} can't be written") from error

    def _part(self, url: str, number: int, length: int, wanted: slice, stat: Stat) -> bytes:
        """Some bytes of the block `number`, which is `length` long."""
        key = (bare(url), stat.version, number)
        block = self._blocks.get(key)
        if block is None and self._disk:
            # Not the whole of it: reads go to and fro among more blocks than memory holds.
            found = self._disk.read(key, length, wanted)
            if found is not None:
                return found
        if block is None:
            block = self._fetch(url, number * BLOCK_BYTES, length)
            if self._disk:
                self._disk.put(key, block)
            self._blocks[key] = block
        return block[wanted]

    def _fetch(self, url: str, start: int, length: int) -> bytes:
        def fetch() -> bytes:
            data = bytes(self._system(url).cat_file(url, start=start, end=start + length))
            if len(data) != length:
                raise OSError(f"{url}: {len(data)} bytes came for a range of {length}")
            return data

        return _retry(url, fetch)

    def _system(self, url: str, **more: bool) -> Any:
        protocol = url.split("://", 1)[0]
        kind = f"{protocol} {more}" if more else protocol
        if kind not in self._systems:
            import fsspec  # here, not on top: it costs local runs 60 ms

            try:
                # Without listings kept, which would be old ones, and take a kilobyte for each file.
                options = {"skip_instance_cache": True, "use_listings_cache": False, **more}
                self._systems[kind] = fsspec.filesystem(protocol, **options)
            except (ImportError, ValueError) as error:
                extra = "pip install 'glide_ds[remote]'" if protocol in IN_THE_EXTRA else ""
                raise DataError(
                    f"{url} can't be read: {error}", remedy=extra or "install what fsspec needs for it"
                ) from error
        return self._systems[kind]


def _stat(info: dict[str, Any]) -> Stat:
    version = next((info[key] for key in ("ETag", "etag", "LastModified", "mtime") if info.get(key)), "")
    return Stat(int(info["size"]), str(version))


def _retry(url: str, request: Callable[[], T]) -> T:
    """Repeat a request that fails, unless that would change nothing."""
    import tenacity  # here, not on top: it costs local runs 30 ms

    # Every backend of fsspec raises its own.
    repeat = tenacity.retry_if_exception_type(Exception) & tenacity.retry_if_not_exception_type(FINAL)
    wait = tenacity.wait_random_exponential(2 * FIRST_WAIT, 2 * MAX_WAIT)  # from 0 to that
    try:
        return tenacity.Retrying(stop=tenacity.stop_after_attempt(ATTEMPTS), wait=wait, retry=repeat)(request)
    except tenacity.RetryError as failed:
        error = failed.last_attempt.exception()
        raise OSError(f"{url}: {ATTEMPTS} attempts failed, the last with {error!r}") from error


class DiskCache:
    """Blocks as files of one folder, the least recently used going first.

    Measured against diskcache, whose SQLite every process writes at every read: 4 MiB blocks are read in 0.26 ms
    instead of 0.73 and written in 2.8 instead of 8.2, by two processes at once in 3.1 instead of 16.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._written = 0

    def read(self, key: tuple[str, str, int], length: int, wanted: slice) -> bytes | None:
        """Some bytes of a block of that length; None where it is not here, or a power cut left less of it."""
        path = self._path(key)
        try:
            with path.open("rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size != length:
                    return None
                data = os.pread(file.fileno(), wanted.stop - wanted.start, wanted.start)
            os.utime(path)
        except FileNotFoundError:  # never here, or evicted meanwhile
            return None
        return data

    def put(self, key: tuple[str, str, int], data: bytes) -> None:
        """Raises OSError where the folder can't take it."""
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, sync=False) as partial:
                partial.write_bytes(data)
        except OSError as error:
            why = f"the cache {self._folder} (data.cache_dir) takes no block: {error.strerror}"
            raise OSError(error.errno or errno.EIO, why) from error
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
