"""Shards that are read from their beginning to their end: compressed tars, commands, stores without ranges.

What a stream is cut off at, or goes on with behind its end mark, it does not tell by itself: tarfile ends at the
first header that it can't read, and webdataset with it. Here every stream is read to its last byte, and how it
ended is looked at.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from glide_ds.data.tars.scan import BLOCK
from glide_ds.data.tars.signatures import check_is_tar, compression
from glide_ds.data.tars.storage import Storage, fault, is_remote, local_path
from glide_ds.errors import DataError, GlideError
from glide_ds.masking import masked

COMMAND = "pipe:"
CHUNK = 1 << 20


class Damaged(Exception):  # noqa: N818 - a finding about a shard, not a program's error
    """A stream that is no whole tar: what was read of it so far is sound."""


class Share(NamedTuple):
    """Of one shard, the samples whose place in it modulo `of` is at least `first` and below `end`."""

    shard: int
    first: int
    end: int
    of: int

    def has(self, row: int) -> bool:
        return self.first <= row % self.of < self.end


def shares(turn: NDArray[np.int64], reader: int, readers: int) -> list[Share]:
    """What one of `readers` reads of the shards in the order of `turn`: 1/readers of the deck.

    Where the shards don't divide by the readers, those at a border are read by both sides, each a part of their
    samples: shards of one size give shares that differ by a sample or two, at any number of both.
    """
    begin, end = reader * len(turn), (reader + 1) * len(turn)
    return [
        Share(int(turn[at]), max(begin - at * readers, 0), min(end - at * readers, readers), readers)
        for at in range(begin // readers, -(-end // readers))
    ]


def members(url: str, storage: Storage) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the files in a tar, as they come.

    Raises Damaged where it is cut short, unreadable or followed by more; SurroundingsError where its disk, network or
    command fails; DataError where it is no tar at all.
    """
    raw = _Raw(_opened(url, storage), url)
    damage, refused = "", None
    try:
        try:
            yield from _files(_unpacked(io.BufferedReader(raw, CHUNK), url))
        except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            damage = str(error) or type(error).__name__
        except DataError as error:
            refused = error
        raw.finish()  # before anything is said of its bytes: a command that fails says so only at its end
    finally:
        raw.abandon()
    if refused:
        raise refused
    if damage:
        raise Damaged(damage)


class _Source(Protocol):
    """What webdataset's gopen, open and fsspec give."""

    def read(self, size: int, /) -> bytes: ...

    def close(self) -> None: ...


class _Raw(io.RawIOBase):
    """A stream whose faults are those of the surroundings, told from what its bytes are."""

    def __init__(self, source: _Source, url: str) -> None:
        self._source, self._url, self._done, self._at_end = source, url, False, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._at_end:  # a client of web servers complains where it is asked again and again
            return 0
        try:
            data = self._source.read(len(buffer))
        except Exception as error:  # every backend of fsspec raises its own
            raise _fault(self._url, error) from error
        buffer[: len(data)] = data
        self._at_end = not data
        return len(data)

    def finish(self) -> None:
        """Read to the end, and hear how a command ended."""
        buffer = bytearray(CHUNK)
        while self.readinto(buffer):
            pass
        self._done = True
        try:
            self._source.close()
        except OSError as error:
            raise _fault(self._url, error) from error

    def abandon(self) -> None:
        """Close what need not be read to its end: a command ends by it, and that is no failure."""
        if self._done:
            return
        if process := getattr(self._source, "proc", None):
            process.kill()
        with suppress(OSError):
            self._source.close()


def _fault(url: str, error: Exception) -> GlideError:
    if isinstance(error, GlideError):
        return error
    return fault(masked(url), OSError(masked(f"{type(error).__name__}: {error}")))


def _opened(url: str, storage: Storage) -> _Source:
    try:
        if url.startswith(COMMAND):
            from webdataset.gopen import gopen  # here, not on top: it costs other runs time

            command: _Source = gopen(url)
            return command
        if is_remote(url):
            return storage.remote.stream(url)
        return open(local_path(url), "rb")
    except Exception as error:
        raise _fault(url, error) from error


def _unpacked(raw: io.BufferedReader, url: str) -> Any:
    """The tar's bytes. Raises DataError for what is none and for what can't be unpacked here."""
    start = raw.peek(BLOCK)[:BLOCK]
    kind = compression(start)
    if not kind:
        check_is_tar(masked(url), start)
        return raw
    if kind == "gzip":
        return gzip.GzipFile(fileobj=raw)
    if kind in ("xz", "lzma"):
        return lzma.LZMAFile(raw)
    if kind == "bzip2":
        return bz2.BZ2File(raw)
    if kind in ("zstd", "lz4"):
        try:
            import pyarrow
        except ImportError as error:
            raise DataError(
                f"{masked(url)}: unpacking {kind} needs pyarrow", remedy="pip install 'glide_ds[pack]'"
            ) from error
        return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), kind)
    raise DataError(
        f"shard {masked(url)} is {kind}-compressed, which can't be unpacked here",
        remedy="data.shards='pipe:COMMAND …' reads what a command unpacks",
    )


class _Strict(tarfile.TarInfo):
    """A header; what is none is an error, where tarfile ends as if the tar did."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Strict:
        if len(buf) < BLOCK:
            raise tarfile.ReadError("it ends without its end mark: it was cut short")
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if bytes(buf).strip(b"\0"):
                raise tarfile.ReadError(f"a header can't be read ({error})") from error
            raise  # the end mark


def _files(stream: Any) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Strict) as tar:
        remembered: Any = tar
        for info in tar:
            if info.isreg() and (file := tar.extractfile(info)):
                yield info.name, file.read()
            remembered.members = []  # else it remembers every one
        inner: Any = tar.fileobj
        while rest := inner.read(CHUNK):
            if rest.strip(b"\0"):
                raise tarfile.ReadError("more than padding follows its end mark: another tar, or rubbish")
