"""Pieces that text transformer, UNet and adapter share."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class GroupNorm(nn.GroupNorm):
    """GroupNorm over 32 groups, in fp32 at least."""

    def __init__(self, channels: int) -> None:
        super().__init__(32, channels)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        h = F.group_norm(x.to(wide), self.num_groups, self.weight.to(wide), self.bias.to(wide), self.eps)
        return h.to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """LayerNorm in fp32 at least."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        h = F.layer_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.bias.to(wide), self.eps)
        return h.to(x.dtype)


class PointwiseConv1d(nn.Conv1d):
    """A 1-wide convolution over tokens [B, N, C]: the published weight shape [out, in, 1], a plain matmul."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x_bnc: Tensor) -> Tensor:
        return F.linear(x_bnc, self.weight.squeeze(-1), self.bias)


def zero_init(module: AnyModule) -> AnyModule:
    """Zero every parameter of `module` and return it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def normal_parameter(*shape: int, std: float) -> nn.Parameter:
    """A parameter drawn from N(0, std^2)."""
    return nn.Parameter(nn.init.normal_(torch.empty(shape), std=std))


def run_block(block: nn.Module, *inputs: Any, recompute: bool) -> Tensor:
    """Call `block`; with `recompute`, keep its inputs only and compute it again in the backward pass."""
    if recompute:
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
