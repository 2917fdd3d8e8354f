"""Gradients clipped by role: the adapter's and the pretrained model's to norms of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from glide_ds.config import Config
from glide_ds.config.phases import ADAPTER_ROLES, PRETRAINED_ROLES, ROLES

RUN = 4096  # numbers that a CPU may add in fp32


class RoleClipping:
    """Clip the adapter's gradients (adapter and gates) and the pretrained model's to separate norms.

    Stands in for the ZeRO optimizer's `scaled_global_norm`, which DeepSpeed calls once per update
    between reduction and step, on every rank, and its `unscale_and_clip_grads`, which it then calls for
    each group's flat fp32 gradient. `norms` keeps the last norm of each role, before clipping, as device
    tensors: reading them is a sync point. `judge` may turn the norm [] into infinity, on which DeepSpeed
    skips the update: it reads the norm on the host anyway.
    """

    def __init__(self, zero: Any, config: Config) -> None:
        self.zero = zero
        self.roles = [group["role"] for group in zero.optimizer.param_groups]
        main = float(config.deepspeed.get("gradient_clipping", 0.0))
        self.thresholds = {
            role: config.train.adapter_clipping if role in ADAPTER_ROLES else main for role in ROLES
        }
        self.norms: dict[str, torch.Tensor] = {}
        self._scales: dict[str, torch.Tensor | None] = {}
        self.judge: Callable[[torch.Tensor], torch.Tensor] | None = None
        zero.scaled_global_norm = self
        zero.unscale_and_clip_grads = self._clip
        # In bf16 DeepSpeed first looks through every gradient, and on finding one that is not finite never
        # asks for the norm. The norm says the same, on all ranks, at no further sync point.
        zero.check_grad_overflow = True
        zero.check_overflow = lambda partition_gradients=True: None

    def __call__(self, norm_type: int = 2) -> torch.Tensor:
        zero = self.zero
        gradients = [zero.averaged_gradients[i] for i in range(len(self.roles))]
        squares = torch.stack([square_norm(group, zero.device) for group in gradients])
        dist.all_reduce(squares, group=zero.dp_process_group)
        # DeepSpeed skips the step on all ranks where the norm it gets back is infinite or no number.
        by_group = squares.unbind()  # an index made of numbers would have to be sent to the GPU, and waited for
        self.norms = {role: self._norm(by_group, (role,)) for role in dict.fromkeys(self.roles)}
        for side in (ADAPTER_ROLES, PRETRAINED_ROLES):
            self._scales |= dict.fromkeys(side, self._scale(by_group, side))
        norm = squares.sum().sqrt()
        return self.judge(norm) if self.judge else norm

    def _scale(self, squares: Sequence[torch.Tensor], side: Sequence[str]) -> torch.Tensor | None:
        """What a side's gradients are multiplied by, []; None where they aren't clipped."""
        threshold = self.thresholds[side[0]]
        if threshold <= 0 or not set(side) & set(self.roles):
            return None
        return (threshold / (self._norm(squares, side) + 1e-6)).clamp(max=1.0)

    def _clip(self, gradients: Sequence[torch.Tensor], norm: torch.Tensor) -> None:
        (gradient,) = gradients
        partitions = self.zero.single_partition_of_fp32_groups
        (group,) = (i for i, partition in enumerate(partitions) if partition.grad is gradient)
        scale = self._scales[self.roles[group]]
        if scale is not None:
            gradient.mul_(scale)

    def _norm(self, squares: Sequence[torch.Tensor], roles: Sequence[str]) -> torch.Tensor:
        return torch.stack([squares[i] for i, role in enumerate(self.roles) if role in roles]).sum().sqrt()


def square_norm(gradients: Sequence[torch.Tensor], device: Any) -> torch.Tensor:
    """The squared norm [] of all of them together, float32; infinite where one is not finite."""
    if not gradients:
        return torch.zeros((), device=device)
    norms: Sequence[torch.Tensor]
    if gradients[0].is_cuda:  # sums are trees there
        norms = torch._foreach_norm(list(gradients), 2, dtype=torch.float32)
    else:
        norms = _cpu_norms([gradient.reshape(-1) for gradient in gradients])
    square = torch.cat([norm.reshape(-1) for norm in norms]).square().sum().float()
    return torch.where(square.isfinite(), square, torch.inf)


def _cpu_norms(gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Norms, float64, of pieces that together are all of `gradients`, each [N].

    A CPU adds in one long run, which loses digits in fp32 and takes ten times as long in fp64. Short runs do neither.
    """
    whole = [len(gradient) // RUN * RUN for gradient in gradients]
    rests = [gradient[n:] for gradient, n in zip(gradients, whole, strict=True) if n < len(gradient)]
    runs = [gradient[:n].view(-1, RUN) for gradient, n in zip(gradients, whole, strict=True) if n]
    short = [torch.linalg.vector_norm(run, dim=1).double() for run in runs]
    return [*short, *(torch._foreach_norm(rests, 2, dtype=torch.float64) if rests else ())]
