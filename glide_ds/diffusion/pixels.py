"""Pictures as files hold them, and as the diffusion process works on them.

B samples, S image side.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_signed(images: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] to float [B, 3, S, S] in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def shown(x0: Tensor, low_res: Tensor | None, known: Tensor | None) -> dict[str, Tensor]:
    """What a model is given of pictures x0 [B, 3, S, S], by the names of its inputs.

    low_res uint8 [B, S/4, S/4, 3] is for an upsampler; known [B, S, S], 1 where it is shown the picture, for an
    inpainting model.
    """
    given = {} if low_res is None else {"low_res": to_signed(low_res)}
    if known is not None:
        given |= {"inpaint_image": x0, "inpaint_mask": known[:, None].to(x0.dtype)}
    return given


def to_bytes(images: Tensor) -> Tensor:
    """Float [B, 3, S, S] in [-1, 1] to uint8 [B, S, S, 3]."""
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
