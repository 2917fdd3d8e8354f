"""How long a person waits: for the first line on the terminal, and for the first optimizer step.

    python benchmarks/startup.py --out benchmarks/results/startup-cpu.json

The tiny phase 3 on two ranks, by deepspeed's launcher, by torchrun and without one (as srun starts ranks) in turns,
once to warm the caches and then `--rounds` times; bytecode is there since launch/env.sh. The launchers import PyTorch
before they start anything, which deepspeed's does twice; `train.py` is what this project adds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import environment

DIRECTLY = """
export WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=29517
RANK=1 LOCAL_RANK=1 "$0" "$@" &
RANK=0 LOCAL_RANK=0 "$0" "$@" && wait $!
"""
ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
LAUNCHERS = {
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2"],
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"],
    "directly": ["bash", "-c", DIRECTLY, sys.executable],
}
MOMENTS = {
    "train.py's first line": "glide_ds: reading",
    "what will happen": "── glide_ds",
    "first update": "full step 1/",
}


def launch(command: list[str], folder: Path) -> dict[str, float]:
    """Seconds from the command to each moment, and from train.py's start to its first line."""
    sets = [f"run.dir={folder}", "train.steps=1", "log.samples_every=0", "checkpoint.every=1000"]
    arguments = ["launch/train.py", "--ds_config", "ds_configs/tiny/phase3.json", "--set", *sets]
    seen: dict[str, float] = {}
    started = time.monotonic()
    with subprocess.Popen(
        [*command, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            now = time.monotonic() - started
            seen.setdefault("first line of all", now)
            for name, text in MOMENTS.items():
                if text in line:
                    seen.setdefault(name, now)
    if process.returncode or len(seen) <= len(MOMENTS):
        sys.exit(f"{' '.join(command)} ended with {process.returncode} and showed {list(seen)}")
    return seen


def alone() -> float:
    """Seconds from the start of train.py, without a launcher, to its first line."""
    started = time.monotonic()
    command = [sys.executable, "launch/train.py", "--ds_config", "ds_configs/tiny/phase3.json", "--dry_run"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        seconds = time.monotonic() - started
        process.stdout.read()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in LAUNCHERS}
    bare = []
    for number in range(args.rounds + 1):
        for name, command in LAUNCHERS.items():
            with tempfile.TemporaryDirectory() as folder:
                seconds = launch(command, Path(folder))
            if number:
                found[name].append(seconds)
        bare.append(alone())
        print(f"round {number} of {args.rounds} done", flush=True)
    figures = {
        name: {moment: statistics.median(r[moment] for r in rounds) for moment in rounds[0]}
        for name, rounds in found.items()
    }
    figures["train.py without a launcher"] = {"first line of all": statistics.median(bare[1:])}
    for name, row in figures.items():
        print(f"{name:30}" + ", ".join(f"{moment} {seconds:.1f} s" for moment, seconds in row.items()))
    if args.out:
        args.out.write_text(
            json.dumps({"environment": environment("cpu"), "seconds": figures}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
