"""What a rank takes in all, and train.recompute=auto: the least recomputing that fits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from glide_ds.config import BatchArithmetic, Config, with_changes
from glide_ds.environment import ranks_here
from glide_ds.errors import ConfigError
from glide_ds.model.glide import RECOMPUTED, Glide
from glide_ds.training.speed.flops import count_work
from glide_ds.training.speed.memory import gib, memory_estimate
from glide_ds.training.speed.meta import meta_model
from glide_ds.training.speed.recompute import count_activations, recomputed
from glide_ds.types import GlideConfig

# Of a device's memory that an estimate may fill. It is within a tenth of what was measured (benchmarks/memory.py), and
# the allocator loses some between its blocks.
USABLE = 0.85
GPU_WORKSPACE = 1.5 * 2**30  # bytes of context, cuDNN and cuBLAS
# Parameters of CLIP's text tower and of both, by clip.model.
CLIP_PARAMETERS = {
    "ViT-B/32": (63.4e6, 151.3e6),
    "ViT-B/16": (63.4e6, 149.6e6),
    "ViT-L/14": (123.7e6, 427.6e6),
    "builtin:tiny": (0.3e6, 0.6e6),
}


class Fit(NamedTuple):
    """What train.recompute=auto chose."""

    dial: str
    needs: Mapping[str, float]  # bytes per rank by dial, from the least recomputing to the chosen
    limit: float  # bytes that a rank may take
    cost: float = 0.0  # computed again, as a share of a training step's operations

    @property
    def fits(self) -> bool:
        return self.needs[self.dial] <= self.limit

    def describe(self) -> str:
        """The choice, why, and how to make another one."""
        lighter = [f"{dial} would take {gib(need)}" for dial, need in self.needs.items() if dial != self.dial]
        taken = f"takes about {gib(self.needs[self.dial])} of {gib(self.limit)}" + (
            "" if self.fits else ", MORE THAN FITS"
        )
        why = f"; {', '.join(lighter)}" if lighter else ""
        cost = f", {self.cost:.0%} of a step computed twice" if self.cost else ""
        return f"{self.dial} (auto): {taken}{cost}{why}; train.recompute={'|'.join(RECOMPUTED)} fixes it"


def rank_memory(
    model: Glide,
    config: Config,
    arithmetic: BatchArithmetic,
    dial: str,
    *,
    cpu: bool,
) -> dict[str, float]:
    """Bytes per rank by part, for a `meta_model`, with the frozen encoder and a GPU's workspace."""
    parts = memory_estimate(model, config, arithmetic, dial, cpu=cpu)
    towers = CLIP_PARAMETERS.get(config.clip.model, CLIP_PARAMETERS["ViT-L/14"])
    if config.uses_clip:
        parts["CLIP"] = 4 * towers[config.clip.pictured > 0]
    parts["workspace"] = 0.0 if cpu else GPU_WORKSPACE
    return parts


def fit(model: Glide, config: Config, arithmetic: BatchArithmetic, limit: float, *, cpu: bool) -> Fit:
    """The least recomputing with which a rank takes no more than `limit` bytes; where nothing does, all blocks.

    `model` is a `meta_model`. A CUDA graph can't recompute, so that nothing else is tried for one.
    """
    needs: dict[str, float] = {}
    for dial in ("none",) if config.train.cuda_graph else RECOMPUTED:
        needs[dial] = sum(rank_memory(model, config, arithmetic, dial, cpu=cpu).values())
        if needs[dial] <= limit:
            break
    cost = 0.0
    if again := recomputed(count_activations(model, cpu=cpu), config, arithmetic, dial):
        work = count_work(model)
        cost = sum(work.blocks[block] for block in again) / work.step
    return Fit(dial, needs, limit, cost)


def fitted(
    config: Config, arithmetic: BatchArithmetic, glide: GlideConfig, limit: float, *, cpu: bool
) -> tuple[Config, Fit | None]:
    """The configuration with train.recompute=auto resolved, and the choice; as it is where there is nothing to choose.

    Raises ConfigError where train.cuda_graph rules out what would fit.
    """
    if config.train.recompute != "auto":
        return config, None
    chosen = fit(meta_model(glide, config), config, arithmetic, limit, cpu=cpu)
    if config.train.cuda_graph and not chosen.fits:
        raise ConfigError(
            f"train.cuda_graph=true goes with train.recompute=none, which takes about {gib(chosen.needs['none'])} of "
            f"{gib(limit)} per rank",
            "it would run out of memory",
            "lower train_micro_batch_size_per_gpu, or set train.cuda_graph=false",
        )
    return resolved(config, chosen), chosen


def resolved(config: Config, chosen: Fit) -> Config:
    return with_changes(config, train={"recompute": chosen.dial})


def limit_here(device: torch.device) -> float:
    """Bytes that this rank may take: of its GPU what others leave, of the host's free memory its part."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return USABLE * (free + torch.cuda.memory_reserved(device))
    return USABLE * host_memory() / (ranks_here() or 1)


def host_memory() -> float:
    """Bytes of the host that can still be taken, within the limit of a container."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024.0
    most, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if most.is_file() and used.is_file() and (limit := most.read_text().strip()) != "max":
        free = min(free, float(limit) - float(used.read_text()))
    return free
