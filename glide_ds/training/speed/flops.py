"""How many operations the mathematics of a training step takes, counted on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from glide_ds.config import Config
from glide_ds.model.glide import Glide
from glide_ds.training.speed.compiling import compiler_spared
from glide_ds.training.speed.meta import meta_model, one_image
from glide_ds.types import GlideConfig


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one image."""

    step: int  # forward and backward, nothing computed again
    forward: int
    blocks: Mapping[nn.Module, int]  # the forward pass of each block, which may be computed again


@lru_cache(maxsize=8)
def count_work(model: Glide) -> Work:
    """Operations of one image in matrix products, convolutions and attention, two per multiply-add.

    `model` is on the meta device. What the phase freezes has no gradient and costs none.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        inputs = one_image(model.config)
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with compiler_spared(), _Products():
        with forward:
            output = model(**inputs)
        with backward:
            output.sum().backward()
    model.zero_grad()
    counts = forward.get_flop_counts()
    kind = type(model).__name__
    blocks: dict[nn.Module, int] = {
        block: int(sum(counts.get(f"{kind}.{name}", {}).values())) for name, block in model.blocks().items()
    }
    once = forward.get_total_flops()
    return Work(int(once + backward.get_total_flops()), int(once), blocks)


class _Products(TorchFunctionMode):
    """Leave out functions without products, which take torch most of the time on the meta device.

    What is normalised still passes the weights, so that the backward pass goes as far as they want it to.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.silu, F.gelu):
            return args[0]
        named = kwargs or {}
        if func in (F.group_norm, F.layer_norm):
            return args[0] * (named["weight"] if "weight" in named else args[2]).sum()
        return func(*args, **named)


def step_work(glide: GlideConfig, config: Config) -> int:
    """Operations of one image's training step in the configured phase, what is recomputed left out."""
    return count_work(meta_model(glide, config)).step
