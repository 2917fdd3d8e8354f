"""Models on the meta device, where nothing is computed and no memory taken: for counting."""

from __future__ import annotations

from functools import lru_cache

import torch

from glide_ds.config import Config
from glide_ds.model import create_model
from glide_ds.model.glide import Glide
from glide_ds.training.phases import role_of, trained_roles
from glide_ds.types import GlideConfig


def meta_model(glide: GlideConfig, config: Config) -> Glide:
    """The phase's model without memory: its precision, its frozen parameters."""
    return _meta_model(glide, trained_roles(config), weight_bytes(config))


@lru_cache(maxsize=8)  # all that is counted before a phase is counted of one and the same
def _meta_model(glide: GlideConfig, roles: tuple[str, ...], width: int) -> Glide:
    with torch.device("meta"):
        model = create_model(glide)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(role_of(name) in roles)
    return model.bfloat16() if width == 2 else model


def weight_bytes(config: Config) -> int:
    """Of one parameter in the module."""
    return 2 if config.deepspeed.get("bf16", {}).get("enabled") else 4


def one_image(config: GlideConfig) -> dict[str, torch.Tensor]:
    """The inputs of a forward pass of one image, on the default device."""
    side, context = config.image_size, config.text_ctx
    inputs = {
        "x": torch.empty(1, 3, side, side),
        "timesteps": torch.zeros(1, dtype=torch.int64),
        "tokens": torch.zeros(1, context, dtype=torch.int64),
        "mask": torch.ones(1, context, dtype=torch.bool),
    }
    if config.upsamples:
        inputs["low_res"] = torch.empty(1, 3, side // 4, side // 4)
    if config.inpaints:
        inputs["inpaint_image"] = torch.empty(1, 3, side, side)
        inputs["inpaint_mask"] = torch.empty(1, 1, side, side)
    if config.clip_dim:
        inputs["clip_embedding"] = torch.empty(1, config.clip_dim)
        inputs["clip_drop"] = torch.zeros(1, dtype=torch.bool)
    return inputs


def zeros(
    glide: GlideConfig, config: Config, micro_batch: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """The inputs of a training step of `micro_batch` images, all zero, in the layout that it has."""
    inputs = {
        name: torch.zeros(micro_batch, *tensor.shape[1:], dtype=tensor.dtype, device=device)
        for name, tensor in one_image(glide).items()
    }
    if config.train.channels_last:
        inputs["x"] = inputs["x"].contiguous(memory_format=torch.channels_last)
    return inputs
