"""What a model has learned of the built-in shapes: drawn pictures read by the judge, and the conditioning gain."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from glide_ds.commands.load import Loaded, load_model, user_path
from glide_ds.data import judge, shapes
from glide_ds.diffusion import create_diffusion
from glide_ds.diffusion.samplers import Progress
from glide_ds.files import write_file
from glide_ds.inference.draw import Row, draw, rows_grid
from glide_ds.inference.held_out import Gain, HeldOut
from glide_ds.model.clip import FrozenClip
from glide_ds.progress import told

CHUNK = 64  # pictures drawn at once
SHOWN = 8  # cases in the written grid


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


@dataclass(frozen=True)
class Evaluation:
    """Everything `glide-ds evaluate` measures. Without an adapter there are no figures of CLIP."""

    score: Score | None  # caption and CLIP, as the model was trained
    score_caption_only: Score | None
    score_clip_text: Score | None  # caption emptied, CLIP's text embedding of it
    score_clip_image: Score | None  # caption emptied, a held-out picture as the prompt
    score_off: Score | None  # neither: the floor
    loss_clip_off: float  # eps-MSE over all timesteps, caption kept, CLIP off
    gain_with_caption: Gain | None
    gain_without_caption: Gain | None
    gain_of_pictures: Gain | None

    def __str__(self) -> str:
        lines = []
        if self.score:
            lines.append(
                f"{self.score.count} held-out cases drawn, shares that are right ± one standard error:"
            )
            lines += [
                f"  {told:24} {score}"
                for name, told in TOLD.items()
                if (score := getattr(self, name)) is not None
            ]
        lines.append(f"loss with CLIP off: {self.loss_clip_off:.5f}")
        for given, gain in (
            ("caption kept", self.gain_with_caption),
            ("caption emptied", self.gain_without_caption),
            ("a picture alone", self.gain_of_pictures),
        ):
            if gain:
                lines.append(f"conditioning gain, {given}: {gain}")
        return "\n".join(lines)


TOLD = {
    "score": "caption and CLIP",
    "score_caption_only": "caption alone",
    "score_clip_text": "CLIP alone, by text",
    "score_clip_image": "CLIP alone, by picture",
    "score_off": "neither",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `glide-ds evaluate`."""
    parser.add_argument("model", help="an export, a run directory or checkpoint folder, or builtin:tiny")
    parser.add_argument(
        "--captions", type=int, default=64, help="held-out cases to draw in each way and judge; 0: none"
    )
    parser.add_argument("--samples", type=int, default=256, help="held-out pictures for loss and gain")
    parser.add_argument("--steps", type=int, default=100, help="ancestral sampling steps per picture")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--clip_scale", type=float, default=1.0, help="how strongly CLIP conditions")
    parser.add_argument("--clip_guidance", type=float, help="a guidance scale of CLIP's own")
    parser.add_argument("--pictures", type=user_path, metavar="PNG", help="write a grid of them here")
    parser.add_argument("--out", type=user_path, metavar="JSON", help="write the figures here")


def run(args: argparse.Namespace) -> None:
    """Print the figures; with --out, write them too."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(args.model, device)
    drawing = Drawing(args.captions, args.steps, args.guidance, args.clip_scale, args.clip_guidance)
    found = evaluate(loaded, loaded.encoder(device, "both"), drawing, args.samples, args.pictures)
    print(found)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_file(args.out, json.dumps(asdict(found), indent=1) + "\n")


class Drawing(NamedTuple):
    """How cases are drawn."""

    cases: int
    steps: int
    guidance: float = 3.0
    clip_scale: float = 1.0
    clip_guidance: float | None = None


class Cases(NamedTuple):
    """Held-out shapes."""

    images: Tensor  # uint8 [B, S, S, 3]
    captions: list[str]
    text: Tensor | None = None  # [B, D], CLIP's embeddings of the captions, on the host
    pictures: Tensor | None = None  # [B, D], of the pictures


def evaluate(
    loaded: Loaded, clip: FrozenClip | None, drawing: Drawing, samples: int, pictures: Path | None = None
) -> Evaluation:
    """Measure a model on held-out shapes, CLIP on where it has an adapter."""
    scores: dict[str, Score | None] = dict.fromkeys(TOLD)
    if drawing.cases:
        cases = held_out_cases(loaded, clip, drawing.cases)
        drawn = dict(draw_ways(loaded, cases, drawing))
        scores |= {name: judged(images, cases.captions) for name, images in drawn.items()}
        scores["score"] = scores["score"] or scores["score_caption_only"]
        if pictures:
            pictures.parent.mkdir(parents=True, exist_ok=True)
            picture_grid(cases, drawn).save(pictures)
    figures = held_out_shapes(loaded, clip, samples).measure(loaded.model)
    return Evaluation(
        **scores,
        loss_clip_off=figures.loss_clip_off,
        gain_with_caption=figures.gain_with_caption,
        gain_without_caption=figures.gain_without_caption,
        gain_of_pictures=figures.gain_of_pictures,
    )


def held_out_cases(loaded: Loaded, clip: FrozenClip | None, count: int) -> Cases:
    """The first `count` of the shapes that are in no training set; CLIP sees them at its own side."""
    numbers = range(shapes.HELD_OUT, shapes.HELD_OUT + count)
    images, captions = zip(*(shapes.draw(i, loaded.model.config.image_size) for i in numbers), strict=True)
    cases = Cases(torch.from_numpy(np.stack(images)), list(captions))
    if clip is None:
        return cases
    seen = torch.from_numpy(np.stack([shapes.draw(i, clip.image_side)[0] for i in numbers]))
    return cases._replace(text=clip.encode_text(captions).cpu(), pictures=clip.encode_image(seen).cpu())


def held_out_shapes(loaded: Loaded, clip: FrozenClip | None, count: int) -> HeldOut:
    """What measures loss and gain, by the embedding that the model was trained on first."""
    cases = held_out_cases(loaded, clip, count)
    by_pictures = loaded.clip is not None and loaded.clip.source == "image"
    return HeldOut(
        create_diffusion(loaded.schedule),
        cases.images,
        cases.captions,
        cases.pictures if by_pictures else cases.text,
        picture_embedding=cases.pictures,
    )


def draw_ways(loaded: Loaded, cases: Cases, drawing: Drawing) -> Iterator[tuple[str, Tensor]]:
    """The cases drawn in every way of TOLD that the model can be asked in, uint8 [B, S, S, 3] each."""
    empty = [""] * len(cases.captions)
    by_pictures = loaded.clip is not None and loaded.clip.source == "image"
    ways: dict[str, tuple[list[str], Tensor | None]] = {
        "score": (cases.captions, cases.pictures if by_pictures else cases.text),
        "score_caption_only": (cases.captions, None),
        "score_clip_text": (empty, cases.text),
        "score_clip_image": (empty, cases.pictures),
        "score_off": (empty, None),
    }
    for name, (captions, embedding) in ways.items():
        if embedding is not None or name in ("score_caption_only", "score_off"):
            yield name, _drawn(loaded, captions, embedding, drawing, told(f"drawing {TOLD[name]}", "steps"))


def _drawn(
    loaded: Loaded, captions: list[str], embedding: Tensor | None, drawing: Drawing, progress: Progress
) -> Tensor:
    device, drawn = next(loaded.model.parameters()).device, []
    for first in range(0, len(captions), CHUNK):
        part = slice(first, first + CHUNK)
        images = draw(
            loaded.model,
            captions[part],
            schedule=loaded.schedule,
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


def picture_grid(cases: Cases, drawn: dict[str, Tensor]) -> Image.Image:
    """The first cases: a row for each way, what CLIP saw above what was drawn of it alone."""
    count = min(SHOWN, len(cases.captions))
    captions = cases.captions[:count]
    rows = [
        Row(drawn[name][:count], [f"{caption} ({TOLD[name]})" for caption in captions])
        for name in ("score", "score_caption_only")
        if name in drawn
    ]
    if "score_clip_text" in drawn:
        rows.append(Row(drawn["score_clip_text"][:count], ["the same (CLIP alone)"] * count))
        rows.append(Row(cases.images[:count], ["a picture that CLIP sees"] * count))
        rows.append(Row(drawn["score_clip_image"][:count], ["drawn from it alone"] * count))
    return rows_grid(rows)
