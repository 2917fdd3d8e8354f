"""The rate that matrix products reach on this machine: what a step's own rate is measured against."""

from __future__ import annotations

import time
from functools import lru_cache

import torch

SIDES = {"cpu": 1024, "cuda": 8192}
SIDE_BF16_CPU = 2048  # at 1,024, two cores with matrix units (AMX) reach half of their rate in bf16
ROUNDS = {"cpu": 4, "cuda": 10}


@lru_cache
def matrix_peak(device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    """Operations per second of a square product of random numbers, the best of a few; fp32 as TF32 is set."""
    side, rounds = SIDES[device.type], ROUNDS[device.type]
    if device.type == "cpu" and dtype == torch.bfloat16:
        side = SIDE_BF16_CPU
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best
