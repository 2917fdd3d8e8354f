"""The share of a step that goes to collectives: sending, and waiting for ranks that come later.

Each is noted on the watch too, so that a hang's report can name the last.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from glide_ds.training.faults.watchdog import Watch

# Of deepspeed.comm: what ZeRO and the trainer's clipping call.
COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
)


class Traffic:
    """Times DeepSpeed's collectives from `open` to `close`; a GPU's by events, which make nobody wait."""

    def __init__(self, device: torch.device, watch: Watch) -> None:
        self.watch, self.on_gpu = watch, device.type == "cuda"
        self.seconds = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.originals: dict[str, Callable[..., Any]] = {}

    def open(self) -> None:
        import deepspeed.comm as comm

        for name in COLLECTIVES:
            self.originals[name] = getattr(comm, name)
            setattr(comm, name, self._timed(name, self.originals[name]))

    def close(self) -> None:
        import deepspeed.comm as comm

        for name, original in self.originals.items():
            setattr(comm, name, original)

    def read(self) -> float:
        """Seconds since the last reading. A sync point on a GPU."""
        for begin, end in self.events:
            end.synchronize()
            self.seconds += begin.elapsed_time(end) / 1e3
        self.events.clear()
        read, self.seconds = self.seconds, 0.0
        return read

    def _timed(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(collective)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.watch.calls(name)
            if self.on_gpu:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                result = collective(*args, **kwargs)
                end.record()
                self.events.append((begin, end))
                return result
            started = time.perf_counter()
            result = collective(*args, **kwargs)
            self.seconds += time.perf_counter() - started
            return result

        return call
