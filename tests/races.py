"""Let two start in one run directory at the same instant, again and again: one trains, the other says so with code 2.

    python tests/races.py --races 100 --folder /tmp/races --out races.json

Whoever trains is killed with SIGKILL once it has committed something, and the next two start at once: nothing that is
left there may keep both out, and no two may ever write. The first violation ends the script. What needs two hosts calls
`compete` on each: it races for the lock alone, with a folder that both see.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from ranks import Run, Warm
from train_kit import metrics

from glide_ds import cli
from glide_ds.errors import ConfigError
from glide_ds.training.faults import lease

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import environment

OPTIONS: dict[str, Any] = {
    "train_batch_size": 1,
    "checkpoint": {"every": 2, "keep": 2},
    "data": {"trace": False},
}
WAIT_S = 120.0


def impatient() -> None:
    """A refused one would wait some seconds for a holder that was just killed."""
    lease.HERE_S = lease.ELSEWHERE_S = 1.0


def start(words: list[str]) -> int:
    impatient()
    return cli.main(words)


def race(runs: list[Run], words: list[str], dice: random.Random) -> str:
    """Returns which of the runs trained."""
    before = runs[0].newest()
    for run in dice.sample(runs, len(runs)):
        run.start(1, "races:start", words)
    until(lambda: not all(run.alive() for run in runs))
    refused, training = sorted(runs, key=Run.alive)
    assert refused.wait() == [2], refused.said()[-3000:]
    assert f"is in use by process {training.pids[0]} on host" in refused.said(), refused.said()[-3000:]
    assert "  loss " not in refused.said()
    training.until(lambda: runs[0].newest() != before, WAIT_S)
    time.sleep(dice.uniform(0, 0.2))
    training.kill()
    assert training.wait() == [-signal.SIGKILL]
    return training.folder.name


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def races(warm: Warm, folder: Path, number: int, seed: int) -> dict[str, Any]:
    """Between two processes of this host. Both name the run directory of the first."""
    started, dice, tally = time.monotonic(), random.Random(seed), Counter[str]()
    runs = [Run(warm, folder / name, **OPTIONS) for name in ("a", "b")]
    runs[1].dir, runs[1].phase = runs[0].dir, runs[0].phase
    words = runs[0].words(10**6)
    for _ in range(number):
        tally[race(runs, words, dice)] += 1
        print(f"{time.monotonic() - started:6.0f} s  {dict(tally)}", flush=True)
    newest = runs[0].newest()
    assert newest is not None
    runs[0].start(1, "races:start", runs[0].words(newest.step + 2))
    assert runs[0].wait() == [0], runs[0].said()[-3000:]
    steps = [line["step"] for line in metrics(runs[0].folder)]
    assert steps == list(range(1, newest.step + 3)), "two have written"
    won = {f"won by {name}": count for name, count in sorted(tally.items())}
    return {"seed": seed, "races": number, **won, "steps": len(steps)}


# --- for the lock alone, on any hosts that see the folder ---


def compete(folder: Path, own: str, other: str, number: int) -> Counter[str]:
    """One of two racers' `number` tries; how often it had the lock, was refused, and was killed with the lock.

    Every try is a process of its own, and starts when both racers are there. Whoever has the lock keeps it until the
    other is refused; every third is killed with it.
    """
    impatient()
    tally = Counter[str]()
    for turn in range(number):
        (folder / f"{turn}.{own}.there").touch()
        until((folder / f"{turn}.{other}.there").exists)
        child = os.fork()
        if not child:
            os._exit(_try(folder, turn, own))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 2:
            (folder / f"{turn}.refused").touch()
        tally[{0: "held", 2: "refused", -signal.SIGKILL: "killed"}[code]] += 1
        (folder / f"{turn}.{own}.gone").touch()
        until((folder / f"{turn}.{other}.gone").exists)
    return tally


def _try(folder: Path, turn: int, own: str) -> int:
    try:
        file = lease.take(folder, WAIT_S)
    except ConfigError:
        return 2
    try:
        (folder / f"{turn}.inside").touch(exist_ok=False)  # by one only
    except FileExistsError:
        return 1
    until((folder / f"{turn}.refused").exists)
    if turn % 3 == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    file.close()
    return 0


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--races", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder to work in")
    parser.add_argument("--compete", nargs=2, metavar=("OWN", "OTHER"), help="race for the lock in the folder")
    parser.add_argument("--out", type=Path, help="write the counts here as JSON")
    args = parser.parse_args(words)
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.compete:
        print(json.dumps(compete(args.folder, *args.compete, args.races)))
        return
    with closing(Warm(args.folder / "warm.txt")) as warm:
        told = races(warm, args.folder, args.races, args.seed)
    if args.out:
        args.out.write_text(json.dumps({"environment": environment("cpu")} | told, indent=1) + "\n")


if __name__ == "__main__":
    main()
