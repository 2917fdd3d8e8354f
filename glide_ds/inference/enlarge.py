"""Small pictures enlarged by an upsampler, and how much nearer to the originals it comes than bicubic enlarging.

N pictures, S image side, D CLIP width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from glide_ds.diffusion.pixels import to_signed
from glide_ds.diffusion.sampling import Options, Progress
from glide_ds.inference.draw import draw
from glide_ds.inference.judged import CHUNK
from glide_ds.model.glide import Glide

# As published: the upsampler's own steps, a little less noise, and no guidance.
STEPS, GUIDANCE = "fast27", 1.0
DRAWN: Options = {"sampler": "ddim", "noise_scale": 0.997}
LEAST_ERROR = 0.01  # of squared levels: what caps the PSNR of a perfect picture at 68 dB


class Small(NamedTuple):
    """Held-out pictures to be enlarged."""

    images: Tensor  # uint8 [N, S, S, 3], the originals
    captions: list[str]
    low_res: Mapping[str, Tensor]  # uint8 [N, S/4, S/4, 3], by what was done to them
    embedding: Tensor | None = None  # [N, D]


@dataclass(frozen=True)
class Enlarged:
    """Mean PSNR in dB over the pictures' own."""

    count: int
    psnr: float
    psnr_bicubic: float

    def __str__(self) -> str:
        gain = self.psnr - self.psnr_bicubic
        return f"PSNR {self.psnr:.2f} dB, {gain:+.2f} dB against bicubic's {self.psnr_bicubic:.2f}"


def enlarge(
    model: Glide,
    low_res: Tensor,
    captions: list[str],
    *,
    schedule: str,
    embedding: Tensor | None = None,
    seed: int = 0,
    steps: int | str = STEPS,
    progress: Progress | None = None,
) -> Tensor:
    """Pictures uint8 [N, S/4, S/4, 3] as uint8 [N, S, S, 3] on the host, drawn as published."""
    device, drawn = next(model.parameters()).device, []
    for first in range(0, len(captions), CHUNK):
        part = slice(first, first + CHUNK)
        options: Options = {
            **DRAWN,
            "clip_embedding": None if embedding is None else embedding[part].to(device),
            "guidance": GUIDANCE,
            "low_res": to_signed(low_res[part]).to(device),
            "progress": progress,
        }
        images = draw(model, captions[part], schedule=schedule, steps=steps, seed=seed + first, **options)
        drawn.append(images.cpu())
    return torch.cat(drawn)


def bicubic(low_res: Tensor, side: int) -> Tensor:
    """uint8 [N, S/4, S/4, 3] to uint8 [N, S, S, 3] as Pillow does it."""
    pictures = (Image.fromarray(pixels) for pixels in low_res.numpy())
    large = [np.array(picture.resize((side, side), Image.Resampling.BICUBIC)) for picture in pictures]
    return torch.from_numpy(np.stack(large))


def psnr(images: Tensor, originals: Tensor) -> float:
    """The mean over pictures, uint8 [N, S, S, 3], of their peak signal-to-noise ratios in dB."""
    error = (images.double() - originals.double()).square().flatten(1).mean(1).clamp(min=LEAST_ERROR)
    return float((10 * torch.log10(255**2 / error)).mean())


def enlarged(model: Glide, small: Small, schedule: str, progress: Progress) -> Iterator[tuple[str, Tensor]]:
    """The pictures enlarged, uint8 [N, S, S, 3], by what was done to what the model saw."""
    for name, low_res in small.low_res.items():
        yield (
            name,
            enlarge(
                model,
                low_res,
                small.captions,
                schedule=schedule,
                embedding=small.embedding,
                progress=progress,
            ),
        )


def compared(images: Tensor, small: Small, name: str) -> Enlarged:
    """How near enlarged pictures come to the originals."""
    by_bicubic = bicubic(small.low_res[name], images.shape[1])
    return Enlarged(len(images), psnr(images, small.images), psnr(by_bicubic, small.images))
