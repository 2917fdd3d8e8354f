"""Pieces that text transformer, UNet and adapter share."""

from __future__ import annotations

from collections.abc import Callable
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
        norm = _by_channel if x.is_cuda and torch.compiler.is_compiling() else F.group_norm
        h = norm(x.to(wide), self.num_groups, self.weight.to(wide), self.bias.to(wide), self.eps)
        return h.to(x.dtype)


def _by_channel(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """F.group_norm on [B, C, H, W] by each channel's mean and variance.

    For the compiler: of channels-last activations a group's own sum would read a few channels at a time from far
    apart, a channel's reads all that lies side by side; and what is left to do per pixel is one multiply-add,
    which takes the scale, the shift and the activation that follow along.
    """
    variance, mean = (part.unflatten(1, (groups, -1)) for part in torch.var_mean(x, (2, 3), correction=0))
    mean_of_group = mean.mean(2, keepdim=True)
    variance_of_group = (variance + (mean - mean_of_group).square()).mean(2, keepdim=True)
    scale = torch.rsqrt(variance_of_group + eps) * weight.unflatten(0, (groups, -1))
    shift = bias.unflatten(0, (groups, -1)) - mean_of_group * scale
    return torch.addcmul(shift.flatten(1)[..., None, None], x, scale.flatten(1)[..., None, None])


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
    values = torch.empty(shape)
    if not values.is_meta:  # there it draws nothing, and imports torch's compiler to do so: 3 s
        nn.init.normal_(values, std=std)
    return nn.Parameter(values)


class Block(nn.Module):
    """A part of the model that is recomputed and compiled as one: both in training only, both exact.

    `recompute` keeps the inputs only and computes the block again in the backward pass. `compiled` stands in for
    `forward`; drawing and validating go without it, for every batch size would be compiled anew.
    """

    recompute = False
    compiled: Callable[..., Tensor] | None = None

    def run(self, *inputs: Any) -> Tensor:
        """Call the block the way it was set up."""
        if not (self.training and torch.is_grad_enabled()):
            return self(*inputs)
        call = self.compiled or self
        return checkpoint(call, *inputs, use_reentrant=False) if self.recompute else call(*inputs)
