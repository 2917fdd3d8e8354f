"""One run at a time in a run directory: rank 0 holds a lock there as long as it lives.

The kernel, or the file server for another host, gives the lock of a process that is gone back, so none is ever stale.
A file system without locks guards nothing; that is said.
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from glide_ds.errors import ConfigError
from glide_ds.files import NO_LOCKS
from glide_ds.training.faults.ranks import agreed

LOCK_FILE = ".lock"
HERE_S = 3.0  # for a process of this host to end that was just killed
ELSEWHERE_S = 120.0  # an NFS server gives the locks of a host that is gone back after 90 s
POLL_S = 0.2


@contextmanager
def leased(folder: Path, patience_s: float) -> Iterator[None]:
    """Hold the run directory for all ranks. Collective; raises ConfigError on all of them where another run has it.

    Waits for the lock of a host that may be gone at most `patience_s`.
    """
    file = agreed(lambda: take(folder, patience_s) if dist.get_rank() == 0 else None)
    try:
        yield
    finally:
        if file is not None:
            file.close()  # a lock of fcntl's belongs to the process: forked workers don't hold it


def take(folder: Path, patience_s: float) -> IO[str]:
    """The lock of the run directory, until the file is closed. Raises ConfigError where another process has it."""
    # Opened once: closing any other handle on the file would give the lock back.
    file = (folder / LOCK_FILE).open("a+", encoding="utf-8")
    started = time.monotonic()
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in NO_LOCKS:
                print(
                    f"!! {folder} is on a file system without locks: nothing keeps a second run out", flush=True
                )
                break
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                file.close()
                raise
        holder = _holder(file)
        limit = HERE_S if holder.get("host") == socket.gethostname() else min(ELSEWHERE_S, patience_s)
        if time.monotonic() - started > limit:
            file.close()
            raise ConfigError(
                f"run.dir: {folder} is in use by process {holder.get('pid', '?')} on host {holder.get('host', '?')} "
                f"since {holder.get('since', '?')}",
                "two runs would write over each other",
                f"wait for it, stop it (touch {folder / 'STOP'}), or choose another run.dir",
            )
        time.sleep(POLL_S)
    file.truncate(0)
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}))
    file.flush()
    return file


def holder(folder: Path) -> dict[str, Any] | None:
    """Host, process id and since when of the run that holds the directory; None where none does. Takes no lock."""
    try:
        with (folder / LOCK_FILE).open(encoding="utf-8") as file:
            asked = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind = struct.unpack("hhqqi", fcntl.fcntl(file, fcntl.F_GETLK, asked))[0]
            return None if kind == fcntl.F_UNLCK else _holder(file)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None


def _holder(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    try:
        return dict(json.loads(file.read()))
    except ValueError:
        return {}  # it has only just taken the lock
