"""Attention that also reads CLIP tokens, through keys, values and a softmax of their own.

h = attn(text, image) + g * attn_clip(q, clip tokens), g = sigmoid(logit + offset): additive, as IP-Adapter
(arXiv 2308.06721, equation 5), so an opening gate takes nothing away from the caption.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from glide_ds.model.unet import AttentionBlock, ClipContext, Context

CLOSED_LOGIT = -10.0  # sigmoid = 4.5e-5; the schedule's offset opens the gate, or the optimizer does


def new_gate() -> nn.Parameter:
    """The logit of a closed gate, [1]."""
    return nn.Parameter(torch.full((1,), CLOSED_LOGIT))


def gate_value(logit: Tensor, offset: Tensor) -> Tensor:
    """How far a gate stands open, between 0 and 1, in fp32 at least."""
    wide = torch.promote_types(logit.dtype, torch.float32)
    return torch.sigmoid(logit.to(wide) + offset.to(wide))


def missed(added: Tensor, said: Tensor, emptied_b: Tensor) -> Tensor:
    """How far `added` is from what a caption would have said where it is emptied, and from nothing where it is kept.

    added and said [B, ...]; emptied bool [B]. Returns fp32 [B]: the mean squared difference over the mean square of
    what the caption says, and 0 where it says nothing.
    """
    said = said.float().flatten(1)
    scale = said.square().mean(1)
    distance = (added.float().flatten(1) - said * emptied_b[:, None]).square().mean(1)
    return torch.where(scale > 0, distance / torch.where(scale > 0, scale, 1.0), 0.0)


class DualAttention(AttentionBlock):
    """AttentionBlock plus gated cross-attention to CLIP tokens.

    The value half of `clip_kv` starts at zero, weight and bias: a fresh block computes exactly what the plain
    block does, at any gate. Keys start random, so that values receive a gradient from the first step.
    """

    def __init__(self, channels: int, head_channels: int, text_width: int, clip_width: int) -> None:
        super().__init__(channels, head_channels, text_width)
        self.clip_kv = nn.Linear(clip_width, 2 * channels)
        self.clip_gate = new_gate()
        with torch.no_grad():
            for parameter in self.clip_kv.parameters():
                parameter.unflatten(0, (self.heads, 2, head_channels))[:, 1].zero_()

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        h = super()._attend(q, k, v, context)
        return h if context.clip is None else h + self._attend_clip(q, context.clip)

    def _attend_clip(self, q: Tensor, clip: ClipContext) -> Tensor:
        """What the CLIP tokens add for these queries, both [B, heads, N, C / heads]."""
        clip_k, clip_v = self._split_heads(self.clip_kv(clip.tokens), 2)
        gate = gate_value(self.clip_gate, clip.gate_offset).to(q.dtype) * clip.scale
        return gate * self.attend(q, clip_k, clip_v)

    def missed(self, x: Tensor, emptied_b: Tensor, empty: Tensor, full: Tensor, clip: ClipContext) -> Tensor:
        """`missed` of what the CLIP tokens add in this block: [B].

        x [B, C, H, W]: what the block was given in a pass whose caption was emptied in some rows; empty and full
        [B, T, W]: the encoded empty caption and the real one. Gradients reach what CLIP adds, and nothing else.
        """
        with torch.no_grad():
            q, k, v = self._read(x)
            said = super()._attend(q, k, v, Context(full)) - super()._attend(q, k, v, Context(empty))
        return missed(self._attend_clip(q, clip), said, emptied_b)
