"""What a background save costs the training, beside a synchronous one; what a load takes; what memory an export takes.

    python benchmarks/checkpoint.py --against /path/to/another/clone --out benchmarks/results/checkpoint-cpu.json

The two kinds of save take turns on the same engine; each reported ratio of them is the median over rounds. The sources
of this clone and those of another take turns in processes of their own; what compares them is the median over turns of
the ratio in the same turn. The export runs in a process of its own: its peak is VmHWM above that after the imports.
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
from typing import Any

import torch

import glide_ds

# The script times whichever sources are imported, with their own tests/train_kit.py.
sys.path.insert(0, str(Path(glide_ds.__file__).parents[1] / "tests"))
from machine import environment
from train_kit import make_config, opened

from glide_ds.config import CheckpointConfig
from glide_ds.training.checkpoint.commit import committed
from glide_ds.training.loop import save
from glide_ds.training.setup import PhaseRun
from glide_ds.training.zero.elastic import load_engine

WIDE = {"model_channels": 96, "channel_mult": [1, 2, 3, 4], "num_res_blocks": 3, "attention_ds": [2, 4, 8]}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "112 M": {"architecture": {**WIDE, "xf_width": 384, "xf_layers": 8}},
}
EXPORT = """
import json, sys
from pathlib import Path
from glide_ds.commands.export import export
from glide_ds.commands.load import find_checkpoint
def peak():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
checkpoint = find_checkpoint(Path(sys.argv[1]))
before = peak()
(written,) = export(checkpoint, Path(sys.argv[2])).values()
size = 4 * written.values
grown = peak() - before
print(json.dumps({"weights_mib": size / 2**20, "peak_mib": grown / 2**20, "ratio": grown / size}))
"""


def step(run: PhaseRun) -> None:
    """One update by made-up gradients, so that the optimizer has its moments: what a save costs doesn't ask."""
    loss = sum(parameter.square().mean() for parameter in run.model.parameters() if parameter.requires_grad)
    run.engine.backward(loss)
    run.engine.step()


def time_saves(run: PhaseRun, rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {"synchronous": [], "background": []}
    for number in range(2 * (rounds + 1)):
        kind = list(times)[number % 2]
        run.saver.config = CheckpointConfig(keep=1, async_save=kind == "background")
        started = time.perf_counter()
        save(run, number + 1, 0.0)
        times[kind].append(time.perf_counter() - started)
        run.saver.finish()
    # The first fills the buffers.
    pairs = list(zip(times["background"][1:], times["synchronous"][1:], strict=True))
    return {
        "synchronous_s": statistics.median(sync for _, sync in pairs),
        "stall_s": statistics.median(stall for stall, _ in pairs),
        "stall_ratio": statistics.median(stall / sync for stall, sync in pairs),
        "first_synchronous_s": times["synchronous"][0],
    }


def time_loads(run: PhaseRun, rounds: int) -> dict[str, float]:
    made = committed(run.saver.folder)[0]
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        load_engine(run.engine, made)
        times.append(time.perf_counter() - started)
    size = sum(entry["size"] for entry in made.manifest["files"].values())
    return {"load_s": statistics.median(times), "size_mib": size / 2**20}


def measure(name: str, rounds: int, folder: Path) -> dict[str, float]:
    """Of the sources that are imported."""
    model = {"preset": "tiny", "weights": "random"}
    config = make_config(folder, "base", model={**model, **SIZES[name]}, ema={"decay": 0.9})
    with opened(config) as run:
        parameters = sum(p.numel() for p in run.model.parameters())
        step(run)
        told = time_saves(run, rounds) | time_loads(run, rounds)
    command = [sys.executable, "-c", EXPORT, str(folder / "run"), str(folder / "x.pt")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    export = json.loads(done.stdout.splitlines()[-1])
    return {"parameters": parameters, **told, **{f"export_{key}": value for key, value in export.items()}}


def one(name: str, rounds: int) -> None:
    """Print what this process's sources take."""
    from glide_ds.environment import read_environment
    from glide_ds.training.zero.group import start_process_group

    read_environment()
    start_process_group(600)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(name, rounds, Path(folder))), flush=True)
    torch.distributed.destroy_process_group()


def by_turns(name: str, rounds: int, turns: int, trees: dict[str, Path]) -> dict[str, Any]:
    """The median of every figure for each tree and, where there are two, of the first's over the second's."""
    figures: dict[str, list[dict[str, float]]] = {tree: [] for tree in trees}
    command = [sys.executable, __file__, "--rounds", str(rounds), "--one", name]
    for turn in range(turns):
        for tree, root in trees.items():
            environ = {**os.environ, "PYTHONPATH": str(root)}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environ)
            figures[tree].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, turn, tree, json.dumps(figures[tree][-1]), flush=True)
    told = {tree: medians(rows) for tree, rows in figures.items()}
    if len(trees) == 2:
        now, before = figures.values()
        both = [{key: new[key] / old[key] for key in new} for new, old in zip(now, before, strict=True)]
        told["now/before"] = medians(both)
    return told


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="saves of each kind, and loads, in a process")
    parser.add_argument("--turns", type=int, default=3, help="processes of each sources")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--against", type=Path, help="another clone, to compare with")
    parser.add_argument("--one", choices=list(SIZES), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    if args.one:
        one(args.one, args.rounds)
        return
    trees = {"now": Path(__file__).parents[1]} | ({"before": args.against} if args.against else {})
    results = {name: by_turns(name, args.rounds, args.turns, trees) for name in args.sizes}
    if args.out:
        report = {"environment": environment("cpu"), "rounds": args.rounds, "turns": args.turns}
        if args.against:
            said = subprocess.run(
                ["git", "rev-parse", "--short", "HEAD"], cwd=args.against, capture_output=True, text=True
            )
            report["before"] = said.stdout.strip()
        args.out.write_text(json.dumps(report | {"sizes": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
