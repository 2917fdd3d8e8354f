"""A GLIDE of a few hundred thousand parameters for tests, with nothing left at zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glide_ds.model import GlideConfig, create_model
from glide_ds.model.glide import Glide
from glide_ds.tokenizer import encode

CLIP_DIM = 24


def tiny_config(**changes: Any) -> GlideConfig:
    sizes: dict[str, Any] = {
        "image_size": 16,
        "text_ctx": 12,
        "xf_width": 32,
        "xf_layers": 2,
        "xf_heads": 2,
        "model_channels": 32,
        "num_res_blocks": 1,
        "channel_mult": (1, 2),
        "attention_ds": (2,),
        "num_head_channels": 16,
    }
    return GlideConfig(**(sizes | changes))


def tiny_model(seed: int = 0, **changes: Any) -> Glide:
    """In eval mode, its zero-initialised layers given values, as after training (CLIP's stay untouched)."""
    torch.manual_seed(seed)
    model = create_model(tiny_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "clip" not in name and not parameter.any():
                parameter.normal_(std=0.05)
    return model.eval()


def tiny_inputs(model: Glide, batch: int = 2) -> dict[str, Tensor]:
    """Keyword arguments of a forward pass without CLIP; the last caption is empty."""
    config = model.config
    generator = torch.Generator().manual_seed(7)
    captions = [f"a red circle above {count} blue squares" for count in range(1, batch)]
    tokens, mask = encode([*captions, ""], config.text_ctx)
    inputs = {
        "x": torch.randn(batch, 3, config.image_size, config.image_size, generator=generator),
        "timesteps": torch.randint(0, 1000, (batch,), generator=generator),
        "tokens": tokens,
        "mask": mask,
    }
    if config.upsamples:
        inputs["low_res"] = inputs["x"][:, :, ::4, ::4].tanh()
    return inputs


def tiny_embeddings(batch: int = 2, seed: int = 3) -> Tensor:
    return torch.randn(batch, CLIP_DIM, generator=torch.Generator().manual_seed(seed))
