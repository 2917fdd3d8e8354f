"""Two real ranks of launch/train.py: stopped in every way, hanging, failing, killed. Slow: processes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from train_kit import metrics, trace, write_config

SERVER = Path(__file__).with_name("forked_ranks.py")
HANG_S = 5.0
pytestmark = [pytest.mark.slow, pytest.mark.alone]


class Forked:
    """Ranks by fork; see forked_ranks.py."""

    def __init__(self, folder: Path) -> None:
        self.log = (folder / "server.log").open("w")
        self.started: list[int] = []
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout
        while (line := self.process.stdout.readline()) != "ready\n":  # what is imported may print
            assert line

    def ask(self, **command: Any) -> int:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = int(self.process.stdout.readline())
        if "start" in command:
            self.started.append(answer)
        else:
            self.started.remove(command["wait"])
        return answer


class Ranks(NamedTuple):
    """A launch of two ranks."""

    server: Forked
    folder: Path
    pids: list[int]

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def updates(self, rank: int = 0) -> int:
        path = self.run / "trace" / f"rank{rank}.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def wait_for_updates(self, number: int) -> None:
        until = time.monotonic() + 240
        while self.updates() < number:
            assert time.monotonic() < until, self.said()
            assert all(psutil.Process(pid).status() != "zombie" for pid in self.pids), self.said()
            time.sleep(0.02)

    def codes(self, timeout: float = 240) -> list[int]:
        """Both exit codes; the launch leaves no process behind, loader workers included."""
        until, group = time.monotonic() + timeout, set(self.pids)
        while any(psutil.pid_exists(p) and psutil.Process(p).status() != "zombie" for p in self.pids):
            assert time.monotonic() < until, self.said()
            time.sleep(0.02)
        gone = time.monotonic() + 20  # the kernel's, to end workers with their trainer
        while workers := [p for p in psutil.process_iter() if p.pid not in group and _group(p.pid) in group]:
            assert time.monotonic() < gone, (workers, self.said())
            time.sleep(0.1)
        return [self.server.ask(wait=pid) for pid in self.pids]

    def said(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("rank*.log")))


def _group(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forked]:
    forked = Forked(tmp_path_factory.mktemp("server"))
    yield forked
    for pid in forked.started:  # those of a test that failed
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    forked.process.terminate()


def start(
    server: Forked,
    folder: Path,
    *sets: str,
    steps: int = 100,
    faults: tuple[str, str] = ("", ""),
    at: int = 3,
    workers: int = 1,
) -> Ranks:
    for log in folder.glob("rank*.log"):
        log.unlink()
    config = write_config(
        folder,
        run={"dir": str(folder / "run"), "timeout_s": 120.0},
        data={"workers": workers},
        train={"steps": steps},
        checkpoint={"every": 1000},
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pids = []
    for rank in range(2):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        arguments = ["--ds_config", str(config), *(["--set", *sets] if sets else [])]
        pids.append(
            server.ask(
                start={
                    "environment": environment,
                    "arguments": arguments,
                    "log": str(folder / f"rank{rank}.log"),
                    "fault": faults[rank],
                    "at": at,
                }
            )
        )
    return Ranks(server, folder, pids)


def marker(ranks: Ranks) -> dict[str, Any]:
    return json.loads((ranks.run / "STOPPED.json").read_text())


def test_a_run_stopped_in_every_way_is_the_uninterrupted_one(server: Forked, tmp_path: Path):
    steps = 30
    straight = start(server, tmp_path / "straight", steps=steps)
    assert straight.codes() == [0, 0], straight.said()
    folder, asked = tmp_path / "stopped", []
    folder.mkdir()

    def stopped(how: str, ranks: Ranks, ask: Any) -> None:
        ranks.wait_for_updates(ranks.updates() + 2)
        begun = time.monotonic()
        before = ranks.updates()
        ask()
        assert ranks.codes() == [0, 0], ranks.said()
        print(f"{how}: {time.monotonic() - begun:.1f} s, {ranks.updates() - before} more updates")
        told = marker(ranks)
        # Of two signals at once either may be heard first.
        assert told["reason"] in ((how, "SIGTERM") if how == "SIGINT" else (how,))
        assert (told["phase"], told["step"]) == ("full", ranks.updates())
        assert (ranks.run / "phase3" / "LAST").readlink().name == f"step-{told['step']:08d}"
        asked.append(told["step"])

    ranks = start(server, folder, steps=steps)
    stopped("SIGTERM", ranks, lambda: os.kill(ranks.pids[1], signal.SIGTERM))
    again = start(server, folder, steps=steps)
    stopped("SIGUSR1", again, lambda: [os.kill(pid, signal.SIGUSR1) for pid in again.pids])
    third = start(server, folder, steps=steps)
    stopped("stop_file", third, (third.run / "STOP").touch)
    assert not (third.run / "STOP").exists()
    fourth = start(server, folder, steps=steps)
    # Ctrl-C: to the whole process group, the loader's workers too; deepspeed's launcher adds SIGTERM.
    stopped(
        "SIGINT",
        fourth,
        lambda: [os.killpg(pid, number) for number in (signal.SIGINT, signal.SIGTERM) for pid in fourth.pids],
    )
    assert asked == sorted(set(asked))
    last = start(server, folder, steps=steps)
    assert last.codes() == [0, 0], last.said()
    assert not (last.run / "STOPPED.json").exists()
    assert metrics(folder, steady=True) == metrics(tmp_path / "straight", steady=True)
    assert [line["step"] for line in metrics(folder)] == list(range(1, steps + 1))
    for rank in range(2):
        assert trace(folder, rank) == trace(tmp_path / "straight", rank)


def test_a_signal_at_set_up_stops_at_the_first_step(server: Forked, tmp_path: Path):
    folder = tmp_path / "early"
    ranks = start(server, folder)
    wait_for_line(ranks, "glide_ds: reading")  # rank 0's first line, long before there is a process group
    os.kill(ranks.pids[0], signal.SIGUSR1)
    assert ranks.codes() == [0, 0], ranks.said()
    assert (marker(ranks)["reason"], marker(ranks)["step"]) == ("SIGUSR1", 0)
    assert not list(ranks.run.glob("phase3/step-*"))


def wait_for_line(ranks: Ranks, text: str) -> None:
    until = time.monotonic() + 240
    while text not in ranks.said():
        assert time.monotonic() < until, ranks.said()
        time.sleep(0.02)


def test_the_same_signal_again_ends_at_once(server: Forked, tmp_path: Path):
    # One rank hangs, so the stop can't come about.
    ranks = start(server, tmp_path / "twice", faults=("", "sleep"))
    ranks.wait_for_updates(3)
    for pid in ranks.pids:
        os.kill(pid, signal.SIGINT)
    time.sleep(2.2)
    for pid in ranks.pids:
        os.kill(pid, signal.SIGINT)
    assert ranks.codes() == [130, 130]
    assert "SIGINT again: ends at once" in ranks.said()


@pytest.mark.parametrize(("workers", "inner"), [(0, "sleep_forever_here"), (1, "data_queue")])
def test_a_rank_that_sleeps_in_the_loader_is_named_with_stacks(
    server: Forked, tmp_path: Path, workers: int, inner: str
):
    ranks = start(server, tmp_path / "hang", f"run.hang_s={HANG_S}", faults=("", "sleep"), workers=workers)
    ranks.wait_for_updates(3)
    begun = time.monotonic()
    assert ranks.codes() == [75, 75], ranks.said()
    took, said = time.monotonic() - begun, ranks.said()
    print(f"all gone {took:.1f} s after the last update\n{said[said.index('no rank') :]}")
    assert took < HANG_S + 10
    assert said.count("no rank has moved") == 1
    assert "late: rank 1\n" in said
    assert re.search(
        r"in 'data' after step 3, batch 1 of global batch 3, last collective \w+ \(number \d+\)", said
    )
    assert re.search(
        r"1 waiting in '(backward|step)' after step 3, last collective \w+ \(number \d+\): rank 0", said
    )
    late, other = ((ranks.run / "hang" / f"rank{rank}.txt").read_text() for rank in (1, 0))
    assert "sleep_forever_here" in late  # in this process or in its worker's
    assert "loop.py" in late
    assert "loop.py" in other


def test_a_rank_that_holds_the_lock_is_named_and_killed(server: Forked, tmp_path: Path):
    ranks = start(server, tmp_path / "lock", f"run.hang_s={HANG_S}", faults=("hold the lock", ""), workers=0)
    ranks.wait_for_updates(3)
    begun = time.monotonic()
    assert ranks.codes() == [-signal.SIGKILL, 75], ranks.said()
    took, said = time.monotonic() - begun, ranks.said()
    print(f"all gone {took:.1f} s after the last update\n{said[-2000:]}")
    assert took < HANG_S + 10
    assert "late: rank 0\n" in said
    assert "does not answer" in said
    assert "faulty" in said  # its stacks, by faulthandler


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_ends_all_with_its_cause_said_once(server: Forked, tmp_path: Path, rank: int):
    faults = ("raise", "") if rank == 0 else ("", "raise")
    ranks = start(server, tmp_path / "raise", faults=faults, workers=0)
    ranks.wait_for_updates(3)
    begun = time.monotonic()
    assert ranks.codes() == [1, 1], ranks.said()
    took, said = time.monotonic() - begun, ranks.said()
    print(f"all gone {took:.1f} s after the last update")
    assert took < 10
    assert said.count("ZeroDivisionError: planted") == said.count("Traceback") == 1, said
    assert f"rank {rank} failed in 'data' after step 3" in said


def test_used_up_memory_is_a_mistake_with_a_remedy(server: Forked, tmp_path: Path):
    ranks = start(server, tmp_path / "memory", faults=("", "memory"), workers=0)
    assert ranks.codes() == [2, 2], ranks.said()
    said = ranks.said()
    assert "Traceback" not in said
    assert "rank 1: GlideError: memory is used up" in said
    assert "train_micro_batch_size_per_gpu=1 instead of 2" in said
    assert "train.recompute=blocks" in said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_other_with_one_line(server: Forked, tmp_path: Path, rank: int):
    ranks = start(server, tmp_path / "killed")
    ranks.wait_for_updates(3)
    begun = time.monotonic()
    os.kill(ranks.pids[rank], signal.SIGKILL)
    codes = ranks.codes()
    said = ranks.said()
    print(f"all gone {time.monotonic() - begun:.1f} s after the kill\n{said[-600:]}")
    assert (codes[rank], codes[1 - rank]) == (-signal.SIGKILL, 75), said
    assert "Traceback" not in said
    assert f"rank {1 - rank} " in said
