"""CLIP's text tower on its own, so that training needs no import of open_clip and, by it, torchvision, timm and
torch's compiler: half of what a rank imports. tests/model/test_clip.py holds it equal to open_clip's.

B captions of T tokens, width W, embedding D.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

PLAIN = frozenset({"context_length", "vocab_size", "width", "heads", "layers"})


class TextTower(nn.Module):
    """The transformer of Radford et al. 2021, section 2.4: causal, normalised before each layer, the embedding read
    at the end token, which has the largest id. Parameters have open_clip's names.
    """

    def __init__(self, embed_dim: int, text: Mapping[str, int], quick_gelu: bool) -> None:
        super().__init__()
        length, width = text["context_length"], text["width"]
        self.token_embedding = nn.Embedding(text["vocab_size"], width)
        self.positional_embedding = nn.Parameter(torch.empty(length, width))
        layers = nn.ModuleList(Layer(width, text["heads"], quick_gelu) for _ in range(text["layers"]))
        self.transformer = nn.ModuleDict({"resblocks": layers})
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, embed_dim))
        self.register_buffer("mask", torch.full((length, length), -torch.inf).triu(1), persistent=False)

    @staticmethod
    def builds(architecture: Mapping[str, Any]) -> bool:
        """Whether an open_clip architecture has this tower: OpenAI's models, and most of LAION's."""
        known = {"embed_dim", "quick_gelu", "text_cfg", "vision_cfg"}
        return architecture.keys() <= known and architecture["text_cfg"].keys() == PLAIN

    def encode_text(self, tokens: Tensor) -> Tensor:
        """int64 [B, T] -> [B, D], of any length."""
        x = self.token_embedding(tokens) + self.positional_embedding
        for layer in self.transformer["resblocks"].children():
            x = layer(x, self.mask)
        x = self.ln_final(x)
        return x[torch.arange(len(x), device=x.device), tokens.argmax(-1)] @ self.text_projection


class Layer(nn.Module):
    """Self-attention and an MLP, [B, T, W] -> [B, T, W]."""

    def __init__(self, width: int, heads: int, quick_gelu: bool) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU() if quick_gelu else nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class QuickGELU(nn.Module):
    """x·σ(1.702x), an approximation that OpenAI's models were trained with (Hendrycks & Gimpel 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)
