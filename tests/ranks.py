"""Ranks forked from one warm process that has imported all they need: a start takes a second instead of ten.

    run = Run(warm, folder, checkpoint={"every": 2})  # `warm`: a fixture, or Warm(log) where no test runs
    run.train(2, steps=6)
    assert run.wait() == [0, 0], run.said()

As a script this file is the warm process. It runs no torch operation of its own, which would start threads that
a fork loses. A rank is a process as a launcher makes them: it leads a process group, and ends as Python ends.
"""

from __future__ import annotations

import gc
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from train_kit import write_config

from glide_ds.config.phases import PHASES
from glide_ds.files import PARTIAL
from glide_ds.training.checkpoint.commit import Committed, committed

ROOT = Path(__file__).parents[1]
COMMAND = "glide_ds.cli:main"  # as launch/train.py and `python -m glide_ds` call it
PRELOADED = (  # what a rank comes by that train_kit does not import
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "glide_ds.training.run",
    "ftfy",
    "pytest",  # functions of test files run on ranks
    "sympy",  # by counting on the meta device
)


class Warm:
    """The process that ranks are forked from, for any number of runs; what it says of itself is in `log`."""

    def __init__(self, log: Path) -> None:
        self._log = log
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for the tests, and they end what they started
            )

    def ask(self, command: str, what: Any = None) -> int:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps([command, what]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, self._log.read_text()[-3000:]
        return int(answer)

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


class Ranks:
    """The ranks at work in a folder, if any are. What rank N says is in FOLDER/rankN.log."""

    def __init__(self, warm: Warm, folder: Path) -> None:
        self.warm, self.folder = warm, folder.resolve()
        self.pids: list[int] = []  # by rank, until `wait` has told how they ended
        self.started = 0.0
        folder.mkdir(parents=True, exist_ok=True)

    def start(self, ranks: int, function: str, *arguments: Any) -> None:
        """Call `function`, "module:name", on so many ranks; what it returns is for sys.exit.

        The arguments are what JSON has, and the same for all ranks.
        """
        for log in self.folder.glob("rank*.log"):
            log.unlink()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        self.started = time.time()
        for rank in range(ranks):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            said = str(self.folder / f"rank{rank}.log")
            self.pids.append(self.warm.ask("fork", [function, arguments, own | shared, said]))

    def kill(self, ranks: Iterable[int] | None = None) -> None:
        """SIGKILL to these, or to all; to nothing where `wait` has seen their end."""
        for rank in range(len(self.pids)) if ranks is None else ranks:
            os.kill(self.pids[rank], signal.SIGKILL)

    def alive(self) -> bool:
        """Whether none has ended."""
        return not any(map(_ended, self.pids))

    def until(self, condition: Callable[[], bool], limit_s: float = 240, every_s: float = 0.02) -> None:
        """Wait for something that the ranks do; to end before is a violation, and to take longer."""
        end = time.monotonic() + limit_s
        while not condition():
            assert self.alive(), f"a rank has ended:\n{self.said()[-3000:]}"
            assert time.monotonic() < end, f"not in {limit_s} s:\n{self.said()[-3000:]}"
            time.sleep(every_s)

    def wait(self, limit_s: float = 300) -> list[int]:
        """The exit codes, negative for a signal.

        A rank that is there after `limit_s` is a violation, and so is a process that it leaves behind, such as a
        loader worker.
        """
        end = time.monotonic() + limit_s
        while not all(map(_ended, self.pids)):
            if time.monotonic() > end:
                self.warm.ask("end")
                raise AssertionError(f"ranks are there after {limit_s} s:\n{self.said()[-3000:]}")
            time.sleep(0.02)
        pids, self.pids = self.pids, []
        codes = [self.warm.ask("reap", pid) for pid in pids]
        end = time.monotonic() + 20  # the kernel's, to end workers with their trainer
        while left := [rank for rank, pid in enumerate(pids) if _has_members(pid)]:
            assert time.monotonic() < end, f"ranks {left} left processes behind:\n{self.said()[-3000:]}"
            time.sleep(0.02)
        return codes

    def said(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("rank*.log")))


class Run(Ranks):
    """Ranks that train: train_kit's tiny phase with `sections` laid over it, in FOLDER/run."""

    def __init__(self, warm: Warm, folder: Path, phase: str = "full", **sections: Any) -> None:
        super().__init__(warm, folder)
        self.dir = self.folder / "run"
        self.name, self.sections = phase, sections
        self.phase = self.dir / PHASES[phase].folder

    def words(self, steps: int, *sets: str, **sections: Any) -> list[str]:
        """The command that trains up to `steps`; `sections` are laid over the run's own."""
        config = write_config(
            self.folder, self.name, **{**self.sections, "train": {"steps": steps}, **sections}
        )
        return ["train", "--ds_config", str(config), *(["--set", *sets] if sets else [])]

    def train(self, ranks: int, steps: int, *sets: str, **sections: Any) -> None:
        self.start(ranks, COMMAND, self.words(steps, *sets, **sections))

    def updates(self) -> int:
        """How many rank 0 has traced, of all phases."""
        path = self.dir / "trace" / "rank0.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def trained(self) -> bool:
        """Whether this start has come to its first update."""
        return "  loss " in self.said()

    def torn(self) -> bool:
        """Whether this start has begun a save and not committed it."""
        for path in self.phase.glob(f".step-*{PARTIAL}"):
            with suppress(FileNotFoundError):  # just put in place
                if path.stat().st_mtime > self.started:  # else it's what an earlier kill left
                    return True
        return False

    def newest(self) -> Committed | None:
        return next(iter(committed(self.phase)), None)


def _ended(pid: int) -> bool:
    """Whether a rank is a zombie: until it is reaped its number stays its own."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _has_members(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# --- the warm process ---


def serve() -> None:
    """A command a line: fork answers a new rank's process id, reap its exit code, end ends all that are left.

    Where no more commands come, for whatever reason, no rank is left either.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is imported may print
    for name in PRELOADED:
        import_module(name)
    gc.collect()
    gc.freeze()  # collecting garbage would walk all this in every rank, and copy its memory
    pids: set[int] = set()
    for line in sys.stdin:
        command, what = json.loads(line)
        answer = 0
        if command == "fork":
            answer = os.fork()
            os.setpgid(answer, answer)  # here and there: whichever is first
            if not answer:
                answers.close()
                become_rank(*what)
            pids.add(answer)
        elif command == "reap":
            pids.remove(what)
            answer = os.waitstatus_to_exitcode(os.waitpid(what, 0)[1])
        else:
            end(pids)
        print(answer, file=answers, flush=True)
    end(pids)


def become_rank(function: str, arguments: list[Any], environment: dict[str, str], log: str) -> NoReturn:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests that are run by nohup hand down that it is ignored
    os.environ.update(environment)
    for descriptor, path in enumerate((os.devnull, log, log)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), descriptor)
    sys.exit(pkgutil.resolve_name(function)(*arguments))


def end(pids: set[int]) -> None:
    while pids:
        pid = pids.pop()
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    serve()
