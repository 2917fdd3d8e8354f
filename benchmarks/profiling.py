"""Where a training step's time goes on a GPU: the kernels that take longest, and what makes the host wait."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

STEPS = 2


def waits(step: Callable[[], Any]) -> dict[str, int]:
    """The places that make the host wait for the device in one step, and how often."""
    found: Counter[str] = Counter()

    def note(*_: Any, **__: Any) -> None:
        frames = [f for f in traceback.extract_stack() if "glide_ds" in f.filename or "deepspeed" in f.filename]
        if frames:
            found[f"{'/'.join(frames[-1].filename.split('/')[-2:])}:{frames[-1].lineno} {frames[-1].line}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    return dict(found.most_common())


def kernels(step: Callable[[], Any], shown: int = 60) -> dict[str, Any]:
    """Milliseconds and launches of a step's kernels, all and the longest by name."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    events = [
        event
        for event in found.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    longest = sorted(events, key=lambda event: -event.self_device_time_total)[:shown]
    return {
        "ms": sum(event.self_device_time_total for event in events) / STEPS / 1e3,
        "launches": sum(event.count for event in events) // STEPS,
        "longest": [
            {
                "name": event.key[:160],
                "ms": event.self_device_time_total / STEPS / 1e3,
                "launches": event.count // STEPS,
            }
            for event in longest
        ],
    }


def show(found: dict[str, Any]) -> None:
    print(f"  kernels: {found['kernels']['ms']:.1f} ms in {found['kernels']['launches']} launches")
    for row in found["kernels"]["longest"][:20]:
        print(f"    {row['ms']:8.2f} ms {row['launches']:5d} x {row['name'][:100]}")
    print(f"  the host waits for the device: {found['waits']}", flush=True)
