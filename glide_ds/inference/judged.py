"""How well pictures of the built-in shapes show what was asked for, in every way in which a model can be asked.

B cases, S image side, D CLIP width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from glide_ds.data import judge, shapes
from glide_ds.diffusion.sampling import Progress
from glide_ds.inference.draw import draw
from glide_ds.model.clip import FrozenClip
from glide_ds.model.glide import Glide
from glide_ds.progress import told

CHUNK = 16  # pictures drawn at once: on a CPU 1.3 times as fast as 64, whose activations no cache holds
TOLD = {
    "score": "caption and CLIP",
    "score_caption_only": "caption alone",
    "score_clip_text": "CLIP alone, by text",
    "score_clip_image": "CLIP alone, by picture",
    "score_off": "neither",
}


@dataclass(frozen=True)
class Score:
    """Shares of cases whose picture has every object's colour right, every shape, and the position."""

    count: int
    colour: float
    shape: float
    position: float

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {share:.1%} ± {math.sqrt(share * (1 - share) / self.count):.1%}"
            for name, share in (("colours", self.colour), ("shapes", self.shape), ("positions", self.position))
        )


class Drawing(NamedTuple):
    """How cases are drawn."""

    schedule: str
    steps: int
    guidance: float = 3.0
    clip_scale: float = 1.0
    clip_guidance: float | None = None
    by_pictures: bool = (
        False  # CLIP beside a caption sees the picture, as a model of clip.source=image was trained
    )


class Cases(NamedTuple):
    """Held-out shapes."""

    images: Tensor  # uint8 [B, S, S, 3]
    captions: list[str]
    text: Tensor | None = None  # [B, D], CLIP's embeddings of the captions, on the host
    pictures: Tensor | None = None  # [B, D], of the pictures


def held_out_cases(side: int, clip: FrozenClip | None, count: int) -> Cases:
    """The first `count` of the shapes that are in no training set; CLIP sees them at its own side."""
    numbers = range(shapes.HELD_OUT, shapes.HELD_OUT + count)
    images, captions = zip(*(shapes.draw(i, side) for i in numbers), strict=True)
    cases = Cases(torch.from_numpy(np.stack(images)), list(captions))
    if clip is None:
        return cases
    seen = torch.from_numpy(np.stack([shapes.draw(i, clip.image_side)[0] for i in numbers]))
    return cases._replace(text=clip.encode_text(captions).cpu(), pictures=clip.encode_image(seen).cpu())


def draw_ways(
    model: Glide,
    cases: Cases,
    drawing: Drawing,
    progress: Callable[[str], Progress] = lambda what: told(f"drawing {what}", "steps"),
) -> Iterator[tuple[str, Tensor]]:
    """The cases drawn in every way of TOLD that the model can be asked in, uint8 [B, S, S, 3] each."""
    empty = [""] * len(cases.captions)
    ways: dict[str, tuple[list[str], Tensor | None]] = {
        "score": (cases.captions, cases.pictures if drawing.by_pictures else cases.text),
        "score_caption_only": (cases.captions, None),
        "score_clip_text": (empty, cases.text),
        "score_clip_image": (empty, cases.pictures),
        "score_off": (empty, None),
    }
    for name, (captions, embedding) in ways.items():
        if embedding is not None or name in ("score_caption_only", "score_off"):
            yield name, _drawn(model, captions, embedding, drawing, progress(TOLD[name]))


def _drawn(
    model: Glide, captions: list[str], embedding: Tensor | None, drawing: Drawing, progress: Progress
) -> Tensor:
    device, drawn = next(model.parameters()).device, []
    for first in range(0, len(captions), CHUNK):
        part = slice(first, first + CHUNK)
        images = draw(
            model,
            captions[part],
            schedule=drawing.schedule,
            clip_embedding=None if embedding is None else embedding[part].to(device),
            clip_scale=drawing.clip_scale,
            guidance=drawing.guidance,
            clip_guidance=None if embedding is None else drawing.clip_guidance,
            steps=drawing.steps,
            seed=first,
            progress=progress,
        )
        drawn.append(images.cpu())
    return torch.cat(drawn)


def judged(images: Tensor, captions: list[str]) -> Score:
    """What the judge, which does not see the captions, reads in pictures (uint8 [B, S, S, 3])."""
    grades = [judge.grade(image, caption) for image, caption in zip(images.numpy(), captions, strict=True)]
    shares = {
        name: float(np.mean([getattr(g, name) for g in grades])) for name in ("colour", "shape", "position")
    }
    return Score(len(captions), **shares)
