"""The hidden part of a picture, drawn by an inpainting model.

B pictures, S image side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from glide_ds.diffusion.pixels import to_signed
from glide_ds.errors import ConfigError
from glide_ds.inference.draw import draw
from glide_ds.model.glide import Glide

HIDDEN = 128  # the grey in which people are shown what a model is not


def fill(model: Glide, images: Tensor, known: Tensor, captions: list[str], **drawing: Any) -> Tensor:
    """Pictures uint8 [B, S, S, 3] drawn anew where `known` [B, S, S] is 0; the others' pixels stay exactly as they are.

    `drawing` is what `draw` takes beside; an upsampler also needs its low_res. What of `images` is not known is never
    looked at. Raises ConfigError for a model that does not inpaint, or of another size.
    """
    if not model.config.inpaints:
        raise ConfigError(
            f"a model of kind {model.config.kind!r} can't fill in a part of a picture",
            remedy=f"give one of kind {model.config.kind}-inpaint",
        )
    side = model.config.image_size
    if images.shape[1:] != (side, side, 3) or known.shape != images.shape[:3]:
        raise ConfigError(
            f"pictures {list(images.shape)} with masks {list(known.shape)} for a model of {side} px",
            remedy=f"resize both to {side} px",
        )
    device = next(model.parameters()).device
    image, mask = to_signed(images).to(device), known[:, None].float().to(device)
    drawn = draw(model, captions, inpaint_image=image, inpaint_mask=mask, **drawing).cpu()
    return torch.where(known[..., None].bool(), images, drawn)


def masked(images: Tensor, known: Tensor) -> Tensor:
    """Pictures uint8 [B, S, S, 3] with the hidden part in grey, for people."""
    return torch.where(known[..., None].bool(), images, HIDDEN).to(images.dtype)
