"""The one way to put a file on the disk: whole under its name, or not there; and what goes with it.

A writer works on a partial file beside the target, holds a lock on it, and renames it into place once its bytes are on
the disk. A writer that is killed leaves a partial file that nobody holds: the next writer of the same file removes
it. The lock says who is alive, not a process id, which means nothing to another host or container.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from glide_ds.errors import ConfigError

PathLike = str | os.PathLike[str]
PARTIAL = ".partial"
WRITERS = 4  # of one file at once, whose leftovers are found
# A file system without locks can't say whose writer lives, so nothing is removed there.
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def user_path(text: PathLike) -> Path:
    """The path that a person names: a shell leaves the ~ of --out=~/x.png to us.

    Raises ConfigError where there is no such home directory.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"the home directory in {str(text)!r} is unknown", remedy="set HOME, or write the path in full"
        ) from error


@contextmanager
def replacing(path: PathLike, *, sync: bool = True) -> Iterator[Path]:
    """A partial file to write, by name, which becomes `path` at the end; where the body raises, `path` stays as it was.

    `sync=False` leaves it to the system when it comes to the disk: for what can be had again, as in a cache.
    Raises OSError where the place can't be written.
    """
    target = Path(path)
    with _partial(target) as partial:
        try:
            yield partial
            if sync:
                with partial.open("rb+") as written:
                    os.fsync(written.fileno())
            partial.replace(target)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno and error.filename is None:
                error.filename = str(target)  # a write that fails does not know of what
            partial.unlink(missing_ok=True)
            raise
    if sync:
        sync_directory(target.parent)


def write_file(path: PathLike, data: bytes | str) -> None:
    """Write a file, text as UTF-8, so that a reader, a kill or a power cut sees the old one or the whole new one."""
    with replacing(path) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


def point(link: PathLike, target: PathLike) -> None:
    """Let a symbolic link name a neighbour, from one moment to the next. One writer at a time."""
    link = Path(link)
    partial = link.with_name(f".{link.name}{PARTIAL}")
    partial.unlink(missing_ok=True)
    partial.symlink_to(Path(target).name)
    try:
        partial.replace(link)
    except OSError:  # a copy without links left a folder there
        partial.unlink()
        raise


def sync_directory(path: PathLike) -> None:
    """Put a directory's entries on the disk: a rename survives a power cut only after this."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: PathLike) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(path: PathLike) -> Iterator[None]:
    """Only one process at a time within, among all that name the same file; the others wait. It stays, empty."""
    with Path(path).open("a") as file:
        _lock(file, wait=True)
        try:
            yield
        finally:
            _unlock(file)


def probe(folder: PathLike) -> None:
    """Make the folder, and a file in it that is gone again. Raises OSError where that can't be done."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder) / f".probe-{uuid.uuid4().hex[:12]}"
    path.write_bytes(b"")
    path.unlink()


def check_place(folder: PathLike) -> None:
    """Raises ConfigError before anything is made where it could not be written there. Makes the folder."""
    try:
        probe(folder)
    except OSError as error:
        raise ConfigError(
            f"{folder} can't be written ({error.strerror})",
            "what is made would be lost",
            "name another place, or mend its permissions",
        ) from error


@contextmanager
def _partial(target: Path) -> Iterator[Path]:
    """A new file beside the target, its lock held; those of writers that are gone are removed.

    It takes the first of a few fixed names that is free, so that a leftover is found without listing the folder, which
    may hold 100,000 files.
    """
    places = [target.with_name(f".{target.name}.{number}{PARTIAL}") for number in range(WRITERS)]
    for place in places:
        _remove_if_left(place)
    for place in (*places, target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}{PARTIAL}")):
        try:
            file = place.open("xb")
        except FileExistsError:
            continue  # another writer's
        with file:
            _lock(file, wait=True)
            if _is_at(file, place):
                try:
                    yield place
                finally:
                    _unlock(file)
                return
    raise FileExistsError(errno.EEXIST, "another process removes the partial files here", str(target))


def _remove_if_left(place: Path) -> None:
    with suppress(FileNotFoundError), place.open("rb+") as file:  # most often there is none
        if _lock(file, wait=False) and _is_at(file, place):
            place.unlink()


def _is_at(file: IO[bytes], place: Path) -> bool:
    """Whether the open file is still the one of that name: between opening and locking it may have been removed."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(place))
    except FileNotFoundError:
        return False


def _lock(file: IO[bytes] | IO[str], *, wait: bool) -> bool:
    """Take the file's lock; False where another has it, or where the file system knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def _unlock(file: IO[bytes] | IO[str]) -> None:
    """Said, not left to closing: a child forked meanwhile holds the file open too, and with it the lock."""
    with suppress(OSError):  # without locks there is none to give back
        fcntl.flock(file, fcntl.LOCK_UN)
