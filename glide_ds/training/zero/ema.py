"""An exponential moving average of the trained weights, sharded like ZeRO-2's fp32 masters: 4/W bytes each.

Polyak & Juditsky 1992; the warm-up of the decay is TensorFlow's ExponentialMovingAverage's `num_updates`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from glide_ds.config import EmaConfig
from glide_ds.model.tensor_files import State
from glide_ds.training.checkpoint.commit import Committed
from glide_ds.training.zero.elastic import own_part

UPDATES = "updates"
OLD_FILE = "ema_rank_{rank}.pt"  # of checkpoints of before


class Ema:
    """The average of this rank's part of every parameter group. A phase's starts at its first weights."""

    def __init__(self, engine: Any, config: EmaConfig) -> None:
        self.zero, self.config = engine.optimizer, config
        self.parts: list[Tensor] = [
            master.detach().clone() for master in self.zero.single_partition_of_fp32_groups
        ]
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of one more update in; where its step was skipped, none."""
        if self.zero.overflow:
            return
        self.updates += 1
        masters = [master.detach() for master in self.zero.single_partition_of_fp32_groups]
        torch._foreach_lerp_(self.parts, masters, 1 - decay_at(self.config, self.updates))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The averaged weights in the module, for sampling and validation; after it the trained ones, bit for bit.

        Collective: every rank gathers all parts, before and after.
        """
        masters = self.zero.single_partition_of_fp32_groups
        weights = self.zero.parallel_partitioned_bit16_groups
        if masters[0].is_set_to(weights[0][0]):  # engine.share_weights: about to be written over
            masters = [master.detach().clone() for master in masters]
        self._publish(self.parts)
        try:
            yield
        finally:
            self._publish(masters)

    def _publish(self, parts: Sequence[Tensor]) -> None:
        """Have ZeRO gather `parts` into the module, as it does with the masters after a step."""
        masters, self.zero.single_partition_of_fp32_groups = self.zero.single_partition_of_fp32_groups, parts
        self.zero.update_lp_params()
        self.zero.single_partition_of_fp32_groups = masters

    def files(self) -> dict[str, State]:
        """This rank's file of a checkpoint, by name: its part of each parameter group by the group's number."""
        parts = {str(i): part for i, part in enumerate(self.parts)}
        return {file_name(dist.get_rank()): {**parts, UPDATES: torch.tensor(self.updates)}}

    def facts(self, step: int) -> dict[str, Any]:
        """What the manifest has of it."""
        return {}

    def load(self, checkpoint: Committed) -> bool:
        """Take the average of a checkpoint of any number of ranks; False, and no change, where it holds none."""
        if not has_average(checkpoint):
            return False
        ranks, self.updates = read_average(checkpoint)
        take(self.parts, self.zero, ranks)
        return True


def take(parts: Sequence[Tensor], zero: Any, ranks: Sequence[Sequence[Tensor]]) -> None:
    """Fill this rank's part of each parameter group from those of the ranks that wrote them, as many or others."""
    for i, (own, group) in enumerate(zip(parts, zero.bit16_groups, strict=True)):
        total = sum(parameter.numel() for parameter in group)
        own.copy_(own_part([rank[i] for rank in ranks], total, own.numel()))


def averaged(ema: Ema | None) -> AbstractContextManager[None]:
    """The averaged weights in the module, where an average is kept."""
    return ema.applied() if ema else nullcontext()


def decay_at(config: EmaConfig, update: int) -> float:
    """How much of the average stays at update number `update`, counted from 1."""
    return min(config.decay, (1 + update) / (config.warmup + update))


def file_name(rank: int) -> str:
    return f"ema-rank-{rank}.safetensors"


def has_average(checkpoint: Committed) -> bool:
    return not checkpoint.manifest["files"].keys().isdisjoint((file_name(0), OLD_FILE.format(rank=0)))


def read_average(checkpoint: Committed) -> tuple[list[list[Tensor]], int]:
    """Every rank's part of each parameter group, memory-mapped, and how many updates the average has seen."""
    ranks = range(checkpoint.world_size)
    if file_name(0) not in checkpoint.manifest["files"]:
        old = [checkpoint.read(OLD_FILE.format(rank=rank)) for rank in ranks]
        return [file["parts"] for file in old], old[0]["updates"]
    files = [checkpoint.read(file_name(rank)) for rank in ranks]
    parts = [[file[str(i)] for i in range(len(file) - 1)] for file in files]
    return parts, int(files[0][UPDATES])
