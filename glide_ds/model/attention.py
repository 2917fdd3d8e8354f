"""Attention in the precision that the matrix units work in.

B samples, H heads, N queries, M keys, D head width.

On a GPU the fused kernel for fp32 is several times as slow as the one for fp16: on an H100 it took a quarter of the
whole step of the base model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glide_ds.model.reduced import Reducible, gradient_scale

LARGEST = 2.0**6  # what the largest gradient of a call is brought to: fp16 reaches from 2^-24 to 2^16


class Attending(Reducible):
    """A module that attends."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """softmax(q k^T / sqrt(D)) v: [B, H, N, D] by [B, H, M, D] twice to [B, H, N, D], in their dtype."""
        if self.reduced and q.dtype == torch.float32:
            output: Tensor = _Reduced.apply(q, k, v)
            return output
        if q.dtype == torch.bfloat16 and q.device.type == "cpu":
            # The kernel's backward pass takes 1.2 to 10 times as long in bf16: the fewer the keys, the longer.
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).bfloat16()
        return F.scaled_dot_product_attention(q, k, v)


class _Reduced(torch.autograd.Function):
    """Flash attention (Dao 2023, arXiv 2307.08691) on fp16 copies of fp32 tensors."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        half = q.half(), k.half(), v.half()
        output, logsumexp, cum_q, cum_k, max_q, max_k, seed, offset, _ = (
            torch.ops.aten._scaled_dot_product_flash_attention(*half)
        )
        ctx.save_for_backward(*half, output, logsumexp, cum_q, cum_k, seed, offset)
        ctx.most = max_q, max_k
        return output.float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        (gradient,) = gradients
        q, k, v, output, logsumexp, cum_q, cum_k, seed, offset = ctx.saved_tensors
        scale = gradient_scale(gradient, LARGEST)
        found = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            (gradient * scale).half(),
            q,
            k,
            v,
            output,
            logsumexp,
            cum_q,
            cum_k,
            *ctx.most,
            0.0,
            False,
            seed,
            offset,
        )
        return tuple(part.float() / scale for part in found)
