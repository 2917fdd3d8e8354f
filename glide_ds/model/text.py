"""GLIDE's text transformer: bidirectional, pre-LayerNorm, exact GELU. No attention is masked.

B samples, T tokens, W width, H heads, D head width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from glide_ds.model.attention import Attending
from glide_ds.model.layers import Block, LayerNorm


class TextEncoding(NamedTuple):
    """What the UNet reads of a caption; reusable as long as caption and weights stay the same."""

    pooled: Tensor  # [B, 4 * model_channels], added to the timestep embedding
    tokens: Tensor  # [B, T, W], the keys and values of every attention block


class Attention(Attending):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.c_qkv = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x_btw: Tensor) -> Tensor:
        # Each head owns one contiguous [q, k, v] slab of the channels.
        slabs = self.c_qkv(x_btw).unflatten(-1, (self.heads, 3, -1))
        q, k, v = (part.transpose(1, 2) for part in slabs.unbind(3))
        attended_bhtd = self.attend(q, k, v)
        return self.c_proj(attended_bhtd.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class ResidualAttentionBlock(Block):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = LayerNorm(width)
        self.mlp = MLP(width)
        self.ln_2 = LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """[B, T, W] -> [B, T, W]."""

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.resblocks:
            assert isinstance(block, Block)
            x = block.run(x)
        return x
