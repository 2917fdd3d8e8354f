"""From one CLIP embedding to what the UNet reads of it: tokens for DualAttention, a vector beside the timestep.

unCLIP conditions GLIDE both ways (arXiv 2204.06125, section 2.1), as GLIDE does with its own caption. Attention
sits in a few blocks, the vector reaches every residual block: it brings colours and places, the tokens shapes.

B samples, D width of the embedding, W width of a token, K tokens, E width of the timestep embedding.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glide_ds.model.dual_attention import gate_value, new_gate
from glide_ds.model.layers import LayerNorm, normal_parameter, zero_init


def unit_rms(embedding_bd: Tensor) -> Tensor:
    """Embeddings [B, D] of any length scaled to root mean square 1 (norm sqrt(D)), in fp32 at least.

    Encoders differ in the length of what they return; only its direction carries meaning.
    """
    wide = embedding_bd.to(torch.promote_types(embedding_bd.dtype, torch.float32))
    return F.normalize(wide, dim=-1) * math.sqrt(wide.shape[-1])


class ClipAdapter(nn.Module):
    """Residual two-layer MLP with a gate, out = proj(x) + g * MLP(LN(x)), then a projection to K tokens.

    Like ClipVector it sees the caption, so that the tokens can leave unsaid what is said already: blind to it they
    cost 1.7 to 2.6 % of x0 error beside a caption, seeing it 0.1 % (docs/clip.md).
    """

    def __init__(self, clip_dim: int, width: int, tokens: int, emb_width: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.clip_null_embedding = normal_parameter(clip_dim, std=0.02)
        self.proj = nn.Linear(clip_dim, width)
        self.norm = LayerNorm(clip_dim)
        self.mlp = nn.Sequential(nn.Linear(clip_dim, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.clip_gate = new_gate()
        self.caption_norm = LayerNorm(emb_width)
        self.from_caption = zero_init(nn.Linear(emb_width, width, bias=False))
        self.to_tokens = nn.Linear(width, tokens * width)
        self.token_norm = LayerNorm(width)

    def read(self, embedding_bd: Tensor, drop_b: Tensor) -> Tensor:
        """Embeddings [B, D] at unit RMS, and the learned null embedding in rows whose CLIP is dropped (bool [B]).

        Dropping is a mask and never a branch: every rank runs the same operations.
        """
        x = unit_rms(embedding_bd).to(self.proj.weight.dtype)
        return torch.where(drop_b[:, None], self.clip_null_embedding, x)

    def forward(self, x_bd: Tensor, caption_be: Tensor, gate_offset: Tensor) -> Tensor:
        """What `read` returned and the pooled caption [B, E] -> tokens [B, K, W]."""
        gate = gate_value(self.clip_gate, gate_offset).to(x_bd.dtype)
        h = (
            self.proj(x_bd)
            + gate * self.mlp(self.norm(x_bd))
            + self.from_caption(self.caption_norm(caption_be))
        )
        return self.token_norm(self.to_tokens(h).unflatten(-1, (self.tokens, -1)))


class ClipVector(nn.Module):
    """A gated two-layer MLP, whose last layer starts at zero: what CLIP adds to the timestep embedding.

    It sees what GLIDE adds for the caption, so as to leave unsaid what the caption says already: both together
    would push twice the same way, and the picture suffer (docs/clip.md).
    """

    def __init__(self, clip_dim: int, emb_width: int) -> None:
        super().__init__()
        self.from_clip = nn.Linear(clip_dim, emb_width)
        self.norm = LayerNorm(emb_width)
        # Zero at first: beside the caption's many numbers a random layer would hardly hear the embedding's few.
        self.from_caption = zero_init(nn.Linear(emb_width, emb_width, bias=False))
        self.out = zero_init(nn.Linear(emb_width, emb_width))
        self.clip_gate = new_gate()

    def forward(self, x_bd: Tensor, caption_be: Tensor, gate_offset: Tensor) -> Tensor:
        """Embeddings [B, D] as ClipAdapter.read returns them and the pooled caption [B, E] -> [B, E]."""
        gate = gate_value(self.clip_gate, gate_offset).to(x_bd.dtype)
        return gate * self.out(F.silu(self.from_clip(x_bd) + self.from_caption(self.norm(caption_be))))
