"""From one CLIP embedding to the tokens that DualAttention reads.

B samples, D width of the embedding, W width of a token, K tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glide_ds.model.dual_attention import gate_value, new_gate
from glide_ds.model.layers import LayerNorm, normal_parameter


def unit_rms(embedding_bd: Tensor) -> Tensor:
    """Embeddings [B, D] of any length scaled to root mean square 1 (norm sqrt(D)), in fp32 at least.

    Encoders differ in the length of what they return; only its direction carries meaning.
    """
    wide = embedding_bd.to(torch.promote_types(embedding_bd.dtype, torch.float32))
    return F.normalize(wide, dim=-1) * math.sqrt(wide.shape[-1])


class ClipAdapter(nn.Module):
    """Residual two-layer MLP with a gate, out = proj(x) + g * MLP(LN(x)), then a projection to K tokens.

    A row whose CLIP is dropped uses the learned null embedding instead of its own.
    """

    def __init__(self, clip_dim: int, width: int, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.clip_null_embedding = normal_parameter(clip_dim, std=0.02)
        self.proj = nn.Linear(clip_dim, width)
        self.norm = LayerNorm(clip_dim)
        self.mlp = nn.Sequential(nn.Linear(clip_dim, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.clip_gate = new_gate()
        self.to_tokens = nn.Linear(width, tokens * width)
        self.token_norm = LayerNorm(width)

    def forward(self, embedding_bd: Tensor, drop_b: Tensor, gate_offset: Tensor) -> Tensor:
        """Embeddings [B, D] and drop (bool [B]) -> tokens [B, K, W].

        Dropping is a mask and never a branch: every rank runs the same operations.
        """
        x = unit_rms(embedding_bd).to(self.proj.weight.dtype)
        x = torch.where(drop_b[:, None], self.clip_null_embedding, x)
        h = self.proj(x) + gate_value(self.clip_gate, gate_offset).to(x.dtype) * self.mlp(self.norm(x))
        return self.token_norm(self.to_tokens(h).unflatten(-1, (self.tokens, -1)))
