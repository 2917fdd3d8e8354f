"""Kill a two-rank run at random instants, damage its checkpoints, fill its disk: nothing committed may be lost.

    python tests/chaos.py --kills 100 --folder /tmp/chaos --out chaos.json

The ranks are forked, see ranks.py. After every kill the next start has to resume at the newest committed step,
by files that verify, and in the end the joined metrics have to be those of a run that nobody disturbed. The
first violation ends the script.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from ranks import Run, Warm
from train_kit import metrics

from glide_ds import cli
from glide_ds.files import sha256
from glide_ds.training import setup
from glide_ds.training.checkpoint.commit import MANIFEST, Committed, committed, unreadable, verify

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from machine import environment

RANKS = 2
OPTIONS: dict[str, Any] = {
    "train_batch_size": 2,
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2}},
    "checkpoint": {"every": 3, "keep": 3},
    "ema": {"decay": 0.9},
    "data": {"trace": False},
    "run": {"timeout_s": 60},
}


def impatient(words: list[str]) -> int:
    """A rank that lost its peer in a save would wait half a minute."""
    setup.PEERS_S = 5.0
    return cli.main(words)


def start(run: Run, steps: int, **sections: Any) -> None:
    run.start(RANKS, "chaos:impatient", run.words(steps, **sections))


def strike(run: Run, dice: random.Random) -> str:
    """Let the run live a while, then kill one or both ranks. Returns when and whom."""
    moment = dice.choices(["save", "step", "start"], [5, 4, 1])[0]
    if moment == "start":
        time.sleep(dice.uniform(0, 4))
    else:
        while not run.trained() and run.alive():
            time.sleep(0.01)
    if moment == "step":
        time.sleep(dice.uniform(0, 2))
    elif moment == "save":
        while not run.torn() and run.alive():
            time.sleep(0.001)
        time.sleep(dice.uniform(0, 0.25))
    # Before the ranks have met, one that waits for the other is the launcher's to end.
    ranks = [0, 1] if moment == "start" else dice.choice([[0], [1], [0, 1]])
    run.kill(ranks)
    return f"{moment}, {'both ranks' if len(ranks) == RANKS else f'rank {ranks[0]}'}"


def damage(made: Committed, dice: random.Random) -> str:
    """Cut a file of the checkpoint short, or flip one bit of it."""
    assert not made.path.is_symlink()
    path = made.path / dice.choice([MANIFEST, *sorted(made.manifest["files"])])
    size = path.stat().st_size
    if dice.random() < 0.5:
        os.truncate(path, dice.randrange(size - 1))  # a manifest may do without its last line's end
        return "truncated"
    with path.open("r+b") as file:
        file.seek(dice.randrange(size))
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1 << dice.randrange(8)]))
    return "bit flipped"


def sound(run: Run) -> list[Committed]:
    """The committed checkpoints whose files verify, the newest first."""
    return [made for made in committed(run.phase) if not verify(made)]


def resumed_at(run: Run) -> int | None:
    """The step at which this start says that it resumed; 0 from the beginning, None before it said so."""
    text = " ".join(run.said().split())
    found = re.search(r"resumes at step (\d+)", text)
    return int(found[1]) if found else 0 if "starts from" in text else None


def litter(run: Run) -> dict[str, str]:
    """Leave beside the checkpoints what people leave; the oldest becomes a link. Returns the hash of each file."""
    oldest = committed(run.phase)[-1].path
    kept = run.folder / "kept" / oldest.name
    shutil.copytree(oldest, run.phase / f"{oldest.name}.bak")
    shutil.copytree(oldest, run.phase / "step-latest")
    shutil.move(oldest, kept)
    oldest.symlink_to(kept)
    (run.phase / "step-notes.txt").write_text("better with a lower rate")
    return people(run)


def people(run: Run) -> dict[str, str]:
    """The hash of every file that is a person's."""
    own = {made.path for made in committed(run.phase) if not made.path.is_symlink()}
    places = [path for path in run.phase.glob("step-*") if path not in own]
    files = [file for place in places for file in (place.rglob("*") if place.is_dir() else [place])]
    return {str(file): sha256(file) for file in files}


def torment(
    run: Run, kills: int, damage_every: int, seed: int, limit_s: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Kill the run `kills` times, or for `limit_s`; before every `damage_every`-th start damage its newest one."""
    dice, tally, during_save = random.Random(seed), Counter[str](), 0
    damaged: set[Path] = set()  # and not written anew since
    end, number = time.monotonic() + limit_s, -1
    for number in range(kills):
        good = sound(run)
        if number % damage_every == damage_every - 1 and len(good) > 1 and not good[0].path.is_symlink():
            tally[damage(good[0], dice)] += 1
            damaged.add(good.pop(0).path)
        expected = good[0].step if good else 0
        fallback = any(path.name > f"step-{expected:08d}" for path in damaged)
        start(run, 10**6)
        tally[strike(run, dice)] += 1
        codes = run.wait()
        assert any(codes), "nobody died"
        during_save += run.torn()
        at = resumed_at(run)
        assert at in (expected, None), (
            f"run {number} resumed at {at} instead of {expected}:\n{run.said()[-3000:]}"
        )
        assert ("DAMAGED CHECKPOINT" in run.said()) == fallback or at is None, run.said()[-3000:]
        good = sound(run)
        newest = good[0].step if good else 0
        assert newest >= expected, f"run {number} lost a commit"
        bad = {made.path for made in committed(run.phase) if made not in good} | set(unreadable(run.phase))
        assert bad <= damaged, f"run {number} committed a damaged checkpoint: {bad - damaged}"
        damaged = bad
        say(f"{number + 1}/{kills}: resumed at {at}, newest {newest}, torn {run.torn()}")
        if time.monotonic() > end:
            break
    return {"kills": number + 1, "during_a_save": during_save, **tally}


def finish(run: Run, reference: Run, more: int) -> dict[str, Any]:
    """Let the run end well, and hold its metrics against those of an undisturbed one."""
    newest = run.newest()
    steps = (newest.step if newest else 0) + more
    start(run, steps)
    assert run.wait() == [0, 0], run.said()[-3000:]
    start(reference, steps, checkpoint={"every": 10**6})
    assert reference.wait(3600) == [0, 0], reference.said()[-3000:]
    joined, straight = (metrics(r.folder, steady=True) for r in (run, reference))
    assert joined == straight, "the joined metrics differ from the undisturbed run's"
    return {"steps": steps, "equal_lines": len(joined)}


def fill_disk(warm: Warm, folder: Path) -> dict[str, Any]:
    """A disk with room for one checkpoint and a half; then it is given more."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64M", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        return {"skipped": f"a tmpfs can't be mounted here: {mounted.stderr.strip()}"}
    try:
        run = Run(warm, folder, **OPTIONS)
        start(run, 6, checkpoint={"every": 3, "keep": 1})
        codes = run.wait()
        newest = run.newest()
        assert all(codes), f"the last save failed and nobody said so: {codes}"
        assert "CHECKPOINT NOT SAVED" in run.said(), run.said()[-2000:]
        assert newest is not None, "the first save fits"
        assert newest.step == 3
        assert not verify(newest)
        subprocess.run(["mount", "-o", "remount,size=256M", str(folder)], check=True)
        start(run, 6, checkpoint={"every": 3, "keep": 1})
        assert run.wait() == [0, 0], run.said()[-3000:]
        assert resumed_at(run) == 3
        assert [line["step"] for line in metrics(folder)] == list(range(1, 7))
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    return {"survived": True}


def everything(
    warm: Warm, folder: Path, kills: int, damage_every: int, seed: int, limit_s: float
) -> dict[str, Any]:
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {text}", flush=True)

    run = Run(warm, folder / "tormented", **OPTIONS)
    start(run, 2 * OPTIONS["checkpoint"]["every"])  # something to lose
    assert run.wait() == [0, 0], run.said()[-3000:]
    theirs = litter(run)
    counts = torment(run, kills, damage_every, seed, limit_s, say)
    assert theirs.items() <= people(run).items(), "something of a person's was touched"
    say(str(counts))
    counts |= {"end": finish(run, Run(warm, folder / "undisturbed", **OPTIONS), more=4)}
    say(str(counts["end"]))
    counts |= {"full_disk": fill_disk(warm, folder / "full")}
    say(str(counts["full_disk"]))
    return {"seed": seed, **counts, "seconds": round(time.monotonic() - started)}


def main(words: Sequence[str] | None = None, warm: Warm | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--damage_every", type=int, default=5, help="kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit_s", type=float, default=math.inf, help="end the killing then")
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder to work in")
    parser.add_argument("--out", type=Path, help="write the counts here as JSON")
    args = parser.parse_args(words)
    args.folder.mkdir(parents=True, exist_ok=True)
    with nullcontext(warm) if warm else closing(Warm(args.folder / "warm.txt")) as warm:
        told = everything(warm, args.folder, args.kills, args.damage_every, args.seed, args.limit_s)
    if args.out:
        args.out.write_text(json.dumps({"environment": environment("cpu")} | told, indent=1) + "\n")


if __name__ == "__main__":
    main()
