"""Two real ranks of `glide-ds train`: stopped in every way, hanging, failing, killed. Slow: processes."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Run, Warm
from train_kit import metrics, trace

from glide_ds import cli
from glide_ds.data.loader import MicroBatches

HANG_S = 5.0
pytestmark = [pytest.mark.slow, pytest.mark.alone]


# --- on the ranks; the training code knows nothing of it ---


def train(words: list[str], faults: tuple[str, str], at: int) -> int:
    put_in(faults[int(os.environ["RANK"])], at)
    return cli.main(words)


def sleep_forever_here() -> None:
    time.sleep(1e6)


def put_in(fault: str, at: int) -> None:
    """Change what building the micro-batch of global batch `at` does; every one takes 50 ms."""
    build = MicroBatches.__getitem__

    def faulty(self: MicroBatches, item: tuple[int, int]) -> Any:
        time.sleep(0.05)
        if item[0] >= at:
            if fault == "sleep":
                sleep_forever_here()
            if fault == "raise":
                raise ZeroDivisionError("planted")
            if fault == "memory":
                torch.empty(1 << 46)
            if fault == "hold the lock":
                sys.setswitchinterval(1e6)
                while True:
                    pass
        return build(self, item)

    MicroBatches.__getitem__ = faulty  # type: ignore[method-assign]


# --- in the tests ---


def start(
    warm: Warm,
    folder: Path,
    *sets: str,
    steps: int = 100,
    faults: tuple[str, str] = ("", ""),
    at: int = 3,
    workers: int = 1,
) -> Run:
    run = Run(warm, folder, data={"workers": workers}, checkpoint={"every": 1000})
    words = run.words(steps, *sets, run={"dir": str(run.dir), "timeout_s": 120.0})
    run.start(2, "test_ranks_stop:train", words, faults, at)
    return run


def wait_for_updates(run: Run, number: int) -> None:
    run.until(lambda: run.updates() >= number)


def marker(ranks: Run) -> dict[str, Any]:
    return json.loads((ranks.dir / "STOPPED.json").read_text())


def test_a_run_stopped_in_every_way_is_the_uninterrupted_one(warm: Warm, tmp_path: Path):
    steps = 30
    straight = start(warm, tmp_path / "straight", steps=steps)
    assert straight.wait() == [0, 0], straight.said()
    folder, asked = tmp_path / "stopped", []
    folder.mkdir()

    def stopped(how: str, ranks: Run, ask: Any) -> None:
        wait_for_updates(ranks, ranks.updates() + 2)
        begun = time.monotonic()
        before = ranks.updates()
        ask()
        assert ranks.wait() == [0, 0], ranks.said()
        print(f"{how}: {time.monotonic() - begun:.1f} s, {ranks.updates() - before} more updates")
        told = marker(ranks)
        # Of two signals at once either may be heard first.
        assert told["reason"] in ((how, "SIGTERM") if how == "SIGINT" else (how,))
        assert (told["phase"], told["step"]) == ("full", ranks.updates())
        assert (ranks.dir / "phase3" / "LAST").readlink().name == f"step-{told['step']:08d}"
        asked.append(told["step"])

    ranks = start(warm, folder, steps=steps)
    stopped("SIGTERM", ranks, lambda: os.kill(ranks.pids[1], signal.SIGTERM))
    again = start(warm, folder, steps=steps)
    stopped("SIGUSR1", again, lambda: [os.kill(pid, signal.SIGUSR1) for pid in again.pids])
    third = start(warm, folder, steps=steps)
    stopped("stop_file", third, (third.dir / "STOP").touch)
    assert not (third.dir / "STOP").exists()
    fourth = start(warm, folder, steps=steps)
    # Ctrl-C: to the whole process group, the loader's workers too; deepspeed's launcher adds SIGTERM.
    stopped(
        "SIGINT",
        fourth,
        lambda: [os.killpg(pid, number) for number in (signal.SIGINT, signal.SIGTERM) for pid in fourth.pids],
    )
    fifth = start(warm, folder, steps=steps)
    stopped("SIGHUP", fifth, lambda: [os.killpg(pid, signal.SIGHUP) for pid in fifth.pids])
    sixth = start(warm, folder, steps=steps)
    stopped("SIGUSR2", sixth, lambda: os.kill(sixth.pids[0], signal.SIGUSR2))
    assert asked == sorted(set(asked))
    last = start(warm, folder, steps=steps)
    assert last.wait() == [0, 0], last.said()
    assert not (last.dir / "STOPPED.json").exists()
    assert metrics(folder, steady=True) == metrics(tmp_path / "straight", steady=True)
    assert [line["step"] for line in metrics(folder)] == list(range(1, steps + 1))
    for rank in range(2):
        assert trace(folder, rank) == trace(tmp_path / "straight", rank)


def test_a_signal_at_set_up_stops_at_the_first_step(warm: Warm, tmp_path: Path):
    folder = tmp_path / "early"
    ranks = start(warm, folder)
    ranks.until(
        lambda: "glide_ds: reading" in ranks.said()
    )  # rank 0's first line, long before there is a process group
    os.kill(ranks.pids[0], signal.SIGUSR1)
    assert ranks.wait() == [0, 0], ranks.said()
    assert (marker(ranks)["reason"], marker(ranks)["step"]) == ("SIGUSR1", 0)
    assert not list(ranks.dir.glob("phase3/step-*"))


def test_the_same_signal_again_ends_at_once(warm: Warm, tmp_path: Path):
    # One rank hangs, so the stop can't come about.
    ranks = start(warm, tmp_path / "twice", faults=("", "sleep"))
    wait_for_updates(ranks, 3)
    for pid in ranks.pids:
        os.kill(pid, signal.SIGINT)
    time.sleep(2.2)
    for pid in ranks.pids:
        os.kill(pid, signal.SIGINT)
    assert ranks.wait() == [130, 130]
    assert "SIGINT again: ends at once" in ranks.said()


@pytest.mark.parametrize(("workers", "inner"), [(0, "sleep_forever_here"), (1, "data_queue")])
def test_a_rank_that_sleeps_in_the_loader_is_named_with_stacks(
    warm: Warm, tmp_path: Path, workers: int, inner: str
):
    ranks = start(warm, tmp_path / "hang", f"run.hang_s={HANG_S}", faults=("", "sleep"), workers=workers)
    wait_for_updates(ranks, 3)
    begun = time.monotonic()
    assert ranks.wait() == [75, 75], ranks.said()
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
    late, other = ((ranks.dir / "hang" / f"rank{rank}.txt").read_text() for rank in (1, 0))
    assert "sleep_forever_here" in late  # in this process or in its worker's
    assert "loop.py" in late
    assert "loop.py" in other


def test_a_rank_that_holds_the_lock_is_named_and_killed(warm: Warm, tmp_path: Path):
    ranks = start(warm, tmp_path / "lock", f"run.hang_s={HANG_S}", faults=("hold the lock", ""), workers=0)
    wait_for_updates(ranks, 3)
    begun = time.monotonic()
    assert ranks.wait() == [-signal.SIGKILL, 75], ranks.said()
    took, said = time.monotonic() - begun, ranks.said()
    print(f"all gone {took:.1f} s after the last update\n{said[-2000:]}")
    assert took < HANG_S + 10
    assert "late: rank 0\n" in said
    assert "does not answer" in said
    assert "faulty" in said  # its stacks, by faulthandler


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_ends_all_with_its_cause_said_once(warm: Warm, tmp_path: Path, rank: int):
    faults = ("raise", "") if rank == 0 else ("", "raise")
    ranks = start(warm, tmp_path / "raise", faults=faults, workers=0)
    wait_for_updates(ranks, 3)
    begun = time.monotonic()
    assert ranks.wait() == [1, 1], ranks.said()
    took, said = time.monotonic() - begun, ranks.said()
    print(f"all gone {took:.1f} s after the last update")
    assert took < 10
    assert said.count("ZeroDivisionError: planted") == said.count("Traceback") == 1, said
    assert f"rank {rank} failed in 'data' after step 3" in said


def test_used_up_memory_is_a_mistake_with_a_remedy(warm: Warm, tmp_path: Path):
    ranks = start(warm, tmp_path / "memory", faults=("", "memory"), workers=0)
    assert ranks.wait() == [2, 2], ranks.said()
    said = ranks.said()
    assert "Traceback" not in said
    assert "rank 1: GlideError: memory is used up" in said
    assert "train_micro_batch_size_per_gpu=1 instead of 2" in said
    assert "train.recompute=blocks" in said


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_other_with_one_line(warm: Warm, tmp_path: Path, rank: int):
    ranks = start(warm, tmp_path / "killed")
    wait_for_updates(ranks, 3)
    begun = time.monotonic()
    os.kill(ranks.pids[rank], signal.SIGKILL)
    codes = ranks.wait()
    said = ranks.said()
    print(f"all gone {time.monotonic() - begun:.1f} s after the kill\n{said[-600:]}")
    assert (codes[rank], codes[1 - rank]) == (-signal.SIGKILL, 75), said
    assert "Traceback" not in said
    assert f"rank {1 - rank} " in said
