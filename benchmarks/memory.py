"""The planner's memory figures against what a step really takes.

    OMP_NUM_THREADS=1 python benchmarks/memory.py --out benchmarks/results/memory-cpu.json

Each case is a process of its own that first trains a tiny model for two steps, so that libraries, kernels and the
process group are there, and notes its memory; then it trains the case for two steps. What is compared with the
plan is the highest anonymous memory above that note. Files mapped into memory are not in it. glibc gives freed
memory back at once (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_), as a caching allocator's own count would show
it. On a GPU the same command compares torch.cuda.max_memory_allocated in the second and third step: in the first,
cuDNN's search for the fastest algorithms tries them with whatever memory there is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from machine import environment

ROOT = Path(__file__).parents[1]
HALF = {"model_channels": 96, "num_head_channels": 32, "xf_width": 256, "xf_layers": 8, "xf_heads": 8}
CASES: dict[str, dict[str, Any]] = {
    "full, AdamW, nothing computed again": {
        "phase": "full",
        "architecture": {**HALF, "image_size": 32},
        "micro": 8,
        "recompute": "none",
        "optimizer": "AdamW",
    },
    "full, AdamW8bit, blocks computed again": {
        "phase": "full",
        "architecture": {**HALF, "image_size": 64},
        "micro": 4,
        "recompute": "blocks",
        "optimizer": "AdamW8bit",
    },
    "adapter_only, AdamW, nothing computed again": {
        "phase": "adapter_only",
        "architecture": {**HALF, "image_size": 64},
        "micro": 4,
        "recompute": "none",
        "optimizer": "AdamW",
    },
    "full, AdamW8bit, bf16, nothing computed again": {
        "phase": "full",
        "architecture": {**HALF, "image_size": 64},
        "micro": 4,
        "recompute": "none",
        "optimizer": "AdamW8bit",
        "bf16": True,
    },
    "adapter_only, AdamW, bf16, nothing computed again": {
        "phase": "adapter_only",
        "architecture": {**HALF, "image_size": 64},
        "micro": 4,
        "recompute": "none",
        "optimizer": "AdamW",
        "bf16": True,
    },
}


class HighWater:
    """The highest anonymous memory of this process, in bytes, seen by a thread that looks all the time."""

    def __init__(self) -> None:
        self.highest, self._stop = anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self.highest = max(self.highest, anonymous())

    def read(self) -> int:
        self._stop.set()
        self._thread.join()
        return self.highest


def anonymous() -> int:
    """Bytes of anonymous memory that this process has in RAM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon; this benchmark needs Linux")


def write_config(folder: Path, case: dict[str, Any]) -> Path:
    document = json.loads((ROOT / "ds_configs" / "tiny" / "phase3.json").read_text())
    document["train_batch_size"] = document["train_micro_batch_size_per_gpu"] = case["micro"]
    document["zero_optimization"]["reduce_bucket_size"] = 5_000_000
    document["optimizer"]["type"] = case["optimizer"]
    document["bf16"] = {"enabled": case.get("bf16", False)}
    block = document["glide_ds"]
    block["run"] = {"dir": str(folder / "run")}
    block["model"] = {
        "preset": case.get("preset", "base"),
        "weights": "random",
        "architecture": case["architecture"],
    }
    block["data"] |= {"workers": 0}
    block["train"] = {
        "phase": case["phase"],
        "steps": 2,
        "recompute": case["recompute"],
        "channels_last": True,
    }
    block["checkpoint"] = {"every": 1000}
    block["log"] = {"every": 1, "tensorboard": False, "samples_every": 0}
    path = folder / "config.json"
    path.write_text(json.dumps(document))
    return path


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """One case, in this process: planned and measured bytes."""
    from glide_ds.config import load_config
    from glide_ds.environment import read_environment
    from glide_ds.training.setup import glide_config
    from glide_ds.training.speed.memory import memory_estimate
    from glide_ds.training.speed.meta import meta_model
    from glide_ds.training.zero.group import start_process_group

    read_environment()
    device = start_process_group(600)
    warm = {**case, "preset": "tiny", "architecture": {}, "micro": 2}
    with tempfile.TemporaryDirectory() as folder:
        steps(load_config(write_config(Path(folder), warm))[0], device)
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(write_config(Path(folder), case))[0]
        arithmetic = config.batch_arithmetic(1)
        model = meta_model(glide_config(config), config)
        plan = memory_estimate(model, config, arithmetic, case["recompute"], cpu=device.type == "cpu")
        del model
        measured = steps(config, device)
    torch.distributed.destroy_process_group()
    return {"plan": plan, "planned": sum(plan.values()), "measured": measured}


def steps(config: Any, device: Any) -> int:
    """Two updates, on a GPU after one more; the bytes above what was there before."""
    import gc

    from glide_ds.training.objective import Objective
    from glide_ds.training.setup import phase_run

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if device.type == "cuda" else anonymous()
    watch = HighWater()
    with phase_run(config, device) as run:
        objective = Objective(config, run.diffusion, run.engine, run.clip)
        batches = run.source.batches(0)
        run.engine.train()
        on_gpu = device.type == "cuda"
        for step in range(2 + on_gpu):
            if on_gpu and step == 1:
                torch.cuda.reset_peak_memory_stats()
            for _ in range(run.arithmetic.accumulation):
                run.engine.backward(objective(next(batches).to(device), step).total)
                run.engine.step()
    highest = watch.read()
    return (torch.cuda.max_memory_allocated() if device.type == "cuda" else highest) - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the table as JSON")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(CASES[args.case])), flush=True)
        return
    results = {}
    for name in CASES:
        start = time.monotonic()
        variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
        command = [sys.executable, __file__, "--case", name]
        done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
        result = json.loads(done.stdout.splitlines()[-1])
        results[name] = result | {"ratio": result["planned"] / result["measured"]}
        print(
            f"{name:<52} plan {result['planned'] / 2**20:7.0f} MiB, measured {result['measured'] / 2**20:7.0f} MiB, "
            f"ratio {results[name]['ratio']:.3f}   ({time.monotonic() - start:.0f} s)",
            flush=True,
        )
        print(
            "    " + ", ".join(f"{part} {size / 2**20:.0f}" for part, size in result["plan"].items()),
            flush=True,
        )
    if args.out:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        report = {"environment": environment(device), "cases": results}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
