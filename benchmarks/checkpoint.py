"""What a background save costs the training, beside a synchronous one, and what memory an export takes.

    python benchmarks/checkpoint.py --out benchmarks/results/checkpoint-cpu.json

The two kinds of save take turns on the same engine; what is reported is the median, over rounds, of the ratio in
the same round. The export runs in a process of its own: its peak is VmHWM above that after the imports.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from machine import environment
from train_kit import make_config, opened

from glide_ds.config import CheckpointConfig
from glide_ds.training.checkpoint.saver import Saver
from glide_ds.training.loop import save
from glide_ds.training.setup import PhaseRun

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
    folder = run.saver.folder
    savers = {
        kind: Saver(
            run.engine, folder, CheckpointConfig(keep=1, async_save=kind == "background"), run.saver.owner, 600
        )
        for kind in ("synchronous", "background")
    }
    times: dict[str, list[float]] = {kind: [] for kind in savers}
    for number in range(2 * (rounds + 1)):
        kind = list(savers)[number % 2]
        run.saver = savers[kind]
        started = time.perf_counter()
        save(run, number + 1, 0.0)
        times[kind].append(time.perf_counter() - started)
        run.saver.finish()
    pairs = list(
        zip(times["background"][1:], times["synchronous"][1:], strict=True)
    )  # the first fills the buffers
    return {
        "synchronous_s": statistics.median(sync for _, sync in pairs),
        "stall_s": statistics.median(stall for stall, _ in pairs),
        "ratio": statistics.median(stall / sync for stall, sync in pairs),
        "first_stall_s": times["background"][0],
    }


def measure(name: str, rounds: int, folder: Path) -> dict[str, Any]:
    model = {"preset": "tiny", "weights": "random"}
    config = make_config(folder, "base", model={**model, **SIZES[name]})
    with opened(config) as run:
        parameters = sum(p.numel() for p in run.model.parameters())
        step(run)
        saves = time_saves(run, rounds)
        run.saver = Saver(run.engine, run.saver.folder, CheckpointConfig(), run.saver.owner, 600)
    command = [sys.executable, "-c", EXPORT, str(folder / "run"), str(folder / "x.pt")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return {"parameters": parameters, "saves": saves, "export": json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    from glide_ds.environment import read_environment
    from glide_ds.training.zero.group import start_process_group

    read_environment()
    start_process_group(600)
    results = {}
    for name in args.sizes:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measure(name, args.rounds, Path(folder))
        print(name, json.dumps(results[name]), flush=True)
    torch.distributed.destroy_process_group()
    if args.out:
        report = {"environment": environment("cpu"), "rounds": args.rounds, "sizes": results}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
