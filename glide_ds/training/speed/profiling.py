"""A trace of a few updates by torch.profiler, for Perfetto and TensorBoard, and what took longest, for the log."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from glide_ds.config import Config
from glide_ds.errors import ConfigError
from glide_ds.files import replacing

FOLDER = "profile"  # below the run directory
SHOWN = 10  # kernels in the log


class Tracer:
    """Traces the updates of `train.profile_steps` on the ranks of `train.profile_ranks`."""

    def __init__(self, config: Config, device: torch.device, say: Callable[[str], None]) -> None:
        self.say, self.device = say, device
        self.folder, self.phase = Path(config.run.dir) / FOLDER, config.train.phase
        self.window = config.train.profiled if dist.get_rank() in config.train.profile_ranks else range(0)
        self.profile: profile | None = None
        self.first = self.last = 0  # updates in the trace

    def at(self, done: int) -> None:
        """Before update number `done` + 1."""
        inside = done + 1 in self.window
        if self.profile is None and inside:
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] * (self.device.type == "cuda")
            self.profile, self.first = profile(activities=activities), done + 1
            self.profile.start()
        elif not inside:
            self.close()
        self.last = done + 1

    def close(self) -> None:
        """Write the trace, where one is under way: its window is over, or the phase."""
        if self.profile is None:
            return
        made, self.profile = self.profile, None
        made.stop()
        name = f"{self.phase}-rank{dist.get_rank()}-steps{self.first}-{self.last}.pt.trace.json"
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / name) as partial:
            made.export_chrome_trace(str(partial))
        order = "self_device_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
        table = made.key_averages().table(sort_by=order, row_limit=SHOWN, max_name_column_width=60)
        self.say(f"traced steps {self.first} to {self.last}: {self.folder / name}\n{table}")


def check_ranks(config: Config, world_size: int) -> None:
    """Raises ConfigError where a rank is to be traced that is not there."""
    ranks = config.train.profile_ranks
    if config.train.profiled and max(ranks) >= world_size:
        raise ConfigError(
            f"train.profile_ranks = {list(ranks)} with {world_size} ranks, numbered from 0",
            "some would never be traced",
            "name ranks that there are",
        )
