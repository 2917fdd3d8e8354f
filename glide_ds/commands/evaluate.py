"""What a model has learned of the built-in shapes: drawn pictures read by the judge, and the conditioning gain."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from glide_ds.commands.load import Loaded, load_model, user_path
from glide_ds.data import judge, shapes
from glide_ds.diffusion import create_diffusion
from glide_ds.files import write_file
from glide_ds.inference.draw import draw, grid
from glide_ds.inference.held_out import Gain, HeldOut
from glide_ds.model.clip import FrozenClip
from glide_ds.progress import told

CHUNK = 64  # pictures drawn at once


@dataclass(frozen=True)
class Score:
    """Shares of captions whose picture has every object's colour right, every shape, and the position."""

    count: int
    colour: float
    shape: float
    position: float

    def __str__(self) -> str:
        return (
            f"{self.count} captions drawn: right colours {self.colour:.1%}, right shapes {self.shape:.1%}, "
            f"right positions {self.position:.1%}"
        )


@dataclass(frozen=True)
class Evaluation:
    """Everything `glide-ds evaluate` measures."""

    score: Score | None
    loss_clip_off: float  # eps-MSE over all timesteps, caption kept, CLIP off
    gain_with_caption: Gain | None
    gain_without_caption: Gain | None

    def __str__(self) -> str:
        lines = [str(self.score)] if self.score else []
        lines.append(f"loss with CLIP off: {self.loss_clip_off:.5f}")
        for name, gain in (("kept", self.gain_with_caption), ("emptied", self.gain_without_caption)):
            if gain:
                lines.append(f"conditioning gain, caption {name}: {gain}")
        return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `glide-ds evaluate`."""
    parser.add_argument("model", help="an export, a run directory or checkpoint folder, or builtin:tiny")
    parser.add_argument("--captions", type=int, default=64, help="held-out captions to draw and judge; 0: none")
    parser.add_argument("--samples", type=int, default=256, help="held-out pictures for loss and gain")
    parser.add_argument("--steps", type=int, default=100, help="ancestral sampling steps per picture")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--pictures", type=user_path, metavar="PNG", help="write the drawn grid here")
    parser.add_argument("--out", type=user_path, metavar="JSON", help="write the figures here")


def run(args: argparse.Namespace) -> None:
    """Print the figures; with --out, write them too."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(args.model, device)
    clip = loaded.text_encoder(device)
    found = evaluate(loaded, clip, args.captions, args.samples, args.steps, args.guidance, args.pictures)
    print(found)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_file(args.out, json.dumps(asdict(found), indent=1) + "\n")


def evaluate(
    loaded: Loaded,
    clip: FrozenClip | None,
    captions: int,
    samples: int,
    steps: int,
    guidance: float,
    pictures: Path | None = None,
) -> Evaluation:
    """Measure a model on held-out shapes, CLIP on where it has an adapter."""
    score = None
    if captions:
        score = draw_and_judge(loaded, clip, captions, steps, guidance, pictures)
    figures = held_out_shapes(loaded, clip, samples).measure(loaded.model)
    return Evaluation(score, figures.loss_clip_off, figures.gain_with_caption, figures.gain_without_caption)


def held_out_shapes(loaded: Loaded, clip: FrozenClip | None, count: int) -> HeldOut:
    """The first `count` of the shapes that are in no training set."""
    side = loaded.model.config.image_size
    images, captions = zip(*(shapes.draw(shapes.HELD_OUT + i, side) for i in range(count)), strict=True)
    embedding = clip.encode_text(captions).cpu() if clip else None
    return HeldOut(create_diffusion(loaded.schedule), torch.from_numpy(np.stack(images)), captions, embedding)


def draw_and_judge(
    loaded: Loaded, clip: FrozenClip | None, count: int, steps: int, guidance: float, pictures: Path | None
) -> Score:
    """Draw `count` held-out captions and let the judge, which does not see them, read the pictures."""
    captions = [shapes.caption(shapes.scene(shapes.HELD_OUT + i)) for i in range(count)]
    drawn = []
    for first in range(0, count, CHUNK):
        part = captions[first : first + CHUNK]
        print(f"drawing captions {first + 1} to {first + len(part)} of {count}, {steps} steps", flush=True)
        drawn.append(
            draw(
                loaded.model,
                part,
                schedule=loaded.schedule,
                clip_embedding=clip.encode_text(part) if clip else None,
                guidance=guidance,
                steps=steps,
                seed=first,
                progress=told("drawing", "steps"),
            )
        )
    images = torch.cat(drawn)
    if pictures:
        pictures.parent.mkdir(parents=True, exist_ok=True)
        grid(images, captions).save(pictures)
    grades = [
        judge.grade(image, caption) for image, caption in zip(images.cpu().numpy(), captions, strict=True)
    ]
    shares = {
        name: float(np.mean([getattr(g, name) for g in grades])) for name in ("colour", "shape", "position")
    }
    return Score(count, **shares)
