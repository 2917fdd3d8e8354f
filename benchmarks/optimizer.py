"""AdamW8bit against torch's AdamW: time of a step, bytes of state, error of the map.

    OMP_NUM_THREADS=1 python benchmarks/optimizer.py --out benchmarks/results/optimizer-cpu.json

The variants take turns within each round, and what is reported is the median over rounds of the ratio to fused
AdamW in the same round: on a shared machine the times wander, the ratios hold. On a GPU the same command with
--device cuda times with events.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import environment
from torch import Tensor

from glide_ds.training.zero import optimizer as ours


def make_variants(size: int, device: str) -> dict[str, torch.optim.Optimizer]:
    """One optimizer per variant, each over its own flat parameter with a gradient."""

    def parameter() -> Tensor:
        p = torch.nn.Parameter(torch.randn(size, device=device))
        p.grad = torch.randn(size, device=device) * 1e-3
        return p

    return {
        "AdamW fused": torch.optim.AdamW([parameter()], fused=True),
        "AdamW foreach": torch.optim.AdamW([parameter()], foreach=True),
        "AdamW8bit": ours.AdamW8bit([parameter()]),
        "AdamW8bit torch operations": ours.AdamW8bit([parameter()]),
    }


def seconds(step: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def by_torch_operations(optimizer: torch.optim.Optimizer) -> None:
    """A step of the reference implementation, whatever kernel the device has."""
    chosen, ours._implementation = ours._implementation, lambda _: ours._step_torch
    try:
        optimizer.step()
    finally:
        ours._implementation = chosen


def time_steps(size: int, rounds: int, device: str) -> dict[str, dict[str, float]]:
    variants = make_variants(size, device)
    steps: dict[str, Callable[[], Any]] = {name: o.step for name, o in variants.items()}
    reference = "AdamW8bit torch operations"
    steps[reference] = lambda: by_torch_operations(variants[reference])
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(seconds(step, device))
    fused = times["AdamW fused"]
    return {
        name: {
            "ns_per_parameter": statistics.median(ts) / size * 1e9,
            "ratio_to_fused": statistics.median(t / f for t, f in zip(ts, fused, strict=True)),
            "state_bytes_per_parameter": state_bytes(variants[name]) / size,
        }
        for name, ts in times.items()
    }


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def map_errors() -> dict[str, float]:
    """Relative error (rms) of one round trip of normal deviates, and of the roots of their squares."""
    x = torch.randn(2**20, generator=torch.Generator().manual_seed(0))
    result = {}
    for name, values, signed in (("exp_avg", x, True), ("root of exp_avg_sq", x.abs(), False)):
        restored = ours.dequantize(*ours.quantize(values, signed), signed)
        result[name] = ((restored - values).norm() / values.norm()).item()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=8_000_000, help="parameters (default 8,000,000)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    timings = time_steps(args.size, args.rounds, args.device)
    errors = map_errors()
    print(f"{'':28}{'ns/param':>10}{'x fused':>10}{'B/param':>10}")
    for name, row in timings.items():
        print(f"{name:28}" + "".join(f"{value:10.2f}" for value in row.values()))
    print("round-trip error: " + ", ".join(f"{name} {error:.2%}" for name, error in errors.items()))
    if args.out:
        report = {"environment": environment(args.device), "size": args.size, "rounds": args.rounds}
        args.out.write_text(
            json.dumps({**report, "steps": timings, "round_trip_error": errors}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
