"""Where the time of a training step goes on a GPU: the longest kernels, and where the host waits for the device.

python benchmarks/profile_step.py --size base --micro 32
"""

from __future__ import annotations

import argparse
import traceback
import warnings
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from step import SIZES, Trainee, variants
from torch.profiler import ProfilerActivity, profile

from glide_ds.training.distributed import read_environment, start_process_group

STEPS = 3
SHOWN = 20


def waits(trainee: Trainee) -> Counter[str]:
    """The places in this project that make the host wait for the device, in one step."""
    found: Counter[str] = Counter()

    def note(message: Any, *_: Any, **__: Any) -> None:
        frames = [f for f in traceback.extract_stack() if "glide_ds" in f.filename or "deepspeed" in f.filename]
        last = frames[-1] if frames else traceback.extract_stack()[-2]
        found[f"{'/'.join(last.filename.split('/')[-2:])}:{last.lineno} {last.line}"] += 1

    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        trainee.step(2)
    torch.cuda.set_sync_debug_mode("default")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--micro", type=int, default=32)
    parser.add_argument("--variant", default="+ compile", help="one of step.py's suite options")
    args = parser.parse_args()
    read_environment()
    device = start_process_group(600)
    if device.type != "cuda":
        parser.error("this needs a GPU")
    (variant,) = [v for v in variants("options", [args.micro], True) if v.name == args.variant]
    trainee = Trainee(variant, args.size, device)
    for number in range(3):
        trainee.step(number)
    print(f"the host waits for the device, in one step of {variant.name!r}:")
    for place, count in waits(trainee).most_common():
        print(f"  {count} x {place}")
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        for number in range(STEPS):
            trainee.step(number)
        torch.cuda.synchronize()
    kernels = [
        event
        for event in found.key_averages()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    total = sum(event.self_device_time_total for event in kernels)
    launches = sum(event.count for event in kernels) // STEPS
    print(f"kernels: {total / STEPS / 1e3:.1f} ms per step in {launches} launches")
    for event in sorted(kernels, key=lambda e: -e.self_device_time_total)[:SHOWN]:
        spent = event.self_device_time_total
        times = f"{spent / total:6.1%} {spent / STEPS / 1e3:8.2f} ms {event.count // STEPS:5d} x"
        print(f"  {times} {event.key[:110]}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
