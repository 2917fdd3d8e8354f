"""Runs of launch/train.py's main() on several ranks, forked from a process that has imported everything.

A start takes a second or two instead of ten. The process must run no torch operations of its own before.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import imported  # noqa: F401
from train_kit import document

from glide_ds.config.phases import PHASES
from glide_ds.training import run as product
from glide_ds.training import setup
from glide_ds.training.checkpoint.commit import LAST, Committed, committed

setup.PEERS_S = 5.0  # a rank that lost its peer in a save would wait half a minute


class ForkedRun:
    """One run directory and the ranks that work on it, if any do."""

    def __init__(self, folder: Path, phase: str = "full", **options: Any) -> None:
        self.folder, self.options, self.name = folder, options, phase
        self.phase = folder / "run" / PHASES[phase].folder
        self.log = folder / "log.txt"
        self.pids: list[int] = []
        self.started = 0.0
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, ranks: int, steps: int, **options: Any) -> None:
        """Train up to `steps`; `options` are sections laid over the run's own."""
        path = self.folder / "config.json"
        sections = {**self.options, "train": {"steps": steps}, **options}
        path.write_text(json.dumps(document(self.folder, self.name, **sections)))
        self.launch(ranks, [str(path)])

    def launch(self, ranks: int, paths: list[str], sets: tuple[str, ...] = ()) -> None:
        """Start the command `--ds_config paths --set sets`."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        self.log.unlink(missing_ok=True)
        self.started = time.time()
        self.pids = [self._fork(rank, ranks, port, paths, sets) for rank in range(ranks)]

    def _fork(self, rank: int, ranks: int, port: str, paths: list[str], sets: tuple[str, ...]) -> int:
        if pid := os.fork():
            return pid
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in numbers.items()}, MASTER_ADDR="127.0.0.1")
        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = 1  # unless all goes well: an error's traceback is in the log
        try:
            product.main(paths, None, sets)
            code = 0
        finally:
            sys.excepthook(*sys.exc_info()) if code else None  # type: ignore[arg-type]
            sys.stdout.flush()
            os._exit(code)

    def kill(self, ranks: list[int]) -> None:
        for rank in ranks:
            os.kill(self.pids[rank], signal.SIGKILL)

    def wait(self, limit_s: float = 300) -> list[int]:
        """The exit codes; a rank that is still there after `limit_s` is a violation."""
        codes, end = [], time.monotonic() + limit_s
        for pid in self.pids:
            while True:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    break
                if time.monotonic() > end:
                    for other in self.pids:
                        os.kill(other, signal.SIGKILL)
                    raise AssertionError(f"a rank outlived its peer by {limit_s} s:\n{self.said()[-3000:]}")
                time.sleep(0.02)
            codes.append(os.waitstatus_to_exitcode(status))
        self.pids = []
        return codes

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def trained(self) -> bool:
        """Whether this start has come to its first update."""
        return "  loss " in self.said()

    def alive(self) -> bool:
        return all(Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" for pid in self.pids)

    def torn(self) -> bool:
        """Whether this start has begun a save and not committed it: a folder newer than what is committed."""
        newest = max(self.phase.glob("step-*"), default=None)
        last = self.phase / LAST
        if newest is None or (last.is_symlink() and newest.name <= last.readlink().name):
            return False
        try:
            return newest.stat().st_mtime > self.started  # else it's what an earlier kill left
        except FileNotFoundError:
            return False  # just being cleared

    def newest(self) -> Committed | None:
        return next(iter(committed(self.phase)), None)
