"""The same model the plain way, to measure the trainer's own by: what a fine-tuner writes on a Sunday.

Attention by einsum with a softmax in fp32, activations in PyTorch's default layout, AdamW over lists of tensors
(foreach), one gradient norm over everything, no compilation, nothing recomputed, no DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def einsum_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, N, D] by [B, H, M, D] twice to [B, H, N, D], by way of the whole matrix [B, H, N, M]."""
    scale = q.shape[-1] ** -0.25
    weights = torch.einsum("bhnd,bhmd->bhnm", q * scale, k * scale)
    weights = weights.float().softmax(-1).to(weights.dtype)
    return torch.einsum("bhnm,bhmd->bhnd", weights, v)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention by einsum, wherever a model asks for torch's own."""
    fused = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = einsum_attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


class PlainLoop:
    """Stands where Objective and the loop expect an engine: the bare module and an optimizer of torch's."""

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, clipping: float, einsum: bool
    ) -> None:
        self.module, self.optimizer, self.clipping, self.einsum = module, optimizer, clipping, einsum

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.einsum:
            with plain_attention():
                output: Tensor = self.module(*args, **kwargs)
                return output
        return self.module(*args, **kwargs)  # type: ignore[no-any-return]

    def train(self) -> None:
        self.module.train()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, self.clipping)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
