"""What a model has learned of the built-in shapes: drawn pictures read by the judge, and the conditioning gain.

B samples, S image side, D CLIP width.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from glide_ds.data import judge, shapes
from glide_ds.diffusion import Diffusion, create_diffusion
from glide_ds.model.clip import FrozenClip
from glide_ds.sample import Loaded, load_model
from glide_ds.tokenizer import encode
from glide_ds.training.logging import grid
from glide_ds.training.objective import to_signed
from glide_ds.training.samples import draw

CHUNK = 64  # pictures per forward pass
GAIN_TIMESTEPS = (250, 950)  # below, the picture shows through the noise and nothing needs conditioning


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
class Gain:
    """By how much the right CLIP embedding lowers the squared error of the predicted x0.

    Fractions of the error with embeddings shuffled between the samples, and of the error with CLIP off.
    """

    over_shuffled: float
    over_off: float

    def __str__(self) -> str:
        return f"{self.over_shuffled:+.1%} against shuffled embeddings, {self.over_off:+.1%} against CLIP off"


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
    parser.add_argument("--pictures", type=Path, metavar="PNG", help="write the drawn grid here")
    parser.add_argument("--out", type=Path, metavar="JSON", help="write the figures here")


def run(args: argparse.Namespace) -> None:
    """Print the figures; with --out, write them too."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(args.model, device)
    clip = None
    if loaded.clip:
        clip = FrozenClip(loaded.clip.model, loaded.clip.weights, device, source="text")
    found = evaluate(loaded, clip, args.captions, args.samples, args.steps, args.guidance, args.pictures)
    print(found)
    if args.out:
        args.out.write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")


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
    held_out = HeldOut(loaded, clip, samples)
    return Evaluation(
        score,
        held_out.loss(),
        held_out.gain(keep_caption=True) if clip else None,
        held_out.gain(keep_caption=False) if clip else None,
    )


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
            )
        )
    images = torch.cat(drawn)
    if pictures:
        grid(images, captions).save(pictures)
    grades = [judge.grade(image, caption) for image, caption in zip(images.numpy(), captions, strict=True)]
    shares = {
        name: float(np.mean([getattr(g, name) for g in grades])) for name in ("colour", "shape", "position")
    }
    return Score(count, **shares)


class HeldOut:
    """Held-out pictures under fixed noise and timesteps: figures of two models can be compared."""

    def __init__(self, loaded: Loaded, clip: FrozenClip | None, count: int) -> None:
        self.model = loaded.model
        self.device = next(loaded.model.parameters()).device
        self.diffusion: Diffusion = create_diffusion(loaded.schedule)
        side = self.model.config.image_size
        images, captions = zip(*(shapes.draw(shapes.HELD_OUT + i, side) for i in range(count)), strict=True)
        self.captions = list(captions)
        self.x0 = to_signed(torch.from_numpy(np.stack(images)))
        self.noise = torch.randn(self.x0.shape, generator=torch.Generator().manual_seed(0))
        self.embedding = clip.encode_text(self.captions).cpu() if clip else None

    def loss(self) -> float:
        """Mean eps-MSE with the caption and CLIP off, timesteps even over all T."""
        t = torch.linspace(0, self.diffusion.num_timesteps - 1, len(self.x0)).long()

        def error(eps: Tensor, rows: slice, _x_t: Tensor) -> Tensor:
            return (eps - self.noise[rows]) ** 2

        return self._mean(t, self.captions, None, error)

    def gain(self, *, keep_caption: bool) -> Gain:
        """The conditioning gain: right against shuffled embeddings and against none.

        The error is of the predicted x0, at timesteps even in GAIN_TIMESTEPS: the loss hides it, for
        steps with little noise dominate that and need no conditioning.
        """
        assert self.embedding is not None
        captions = self.captions if keep_caption else [""] * len(self.captions)
        t = torch.linspace(*GAIN_TIMESTEPS, len(self.x0)).long()
        # Samples next to each other have nearly the same timestep, so a rotation shuffles fairly.
        shuffled = self.embedding.roll(1, 0)

        def error(eps: Tensor, rows: slice, x_t: Tensor) -> Tensor:
            return (self.diffusion.predict_x0(eps, x_t, t[rows]) - self.x0[rows]) ** 2

        right, wrong, off = (self._mean(t, captions, e, error) for e in (self.embedding, shuffled, None))
        return Gain(over_shuffled=1 - right / wrong, over_off=1 - right / off)

    @torch.no_grad()
    def _mean(
        self,
        t: Tensor,
        captions: Sequence[str],
        embedding: Tensor | None,
        error: Callable[[Tensor, slice, Tensor], Tensor],
    ) -> float:
        total = 0.0
        for first in range(0, len(t), CHUNK):
            rows = slice(first, first + CHUNK)
            x_t = self.diffusion.q_sample(self.x0[rows], t[rows], self.noise[rows])
            tokens, mask = encode(captions[rows], self.model.config.text_ctx)
            output = self.model(
                x_t.to(self.device),
                t[rows].to(self.device),
                tokens=tokens.to(self.device),
                mask=mask.to(self.device),
                clip_embedding=None if embedding is None else embedding[rows].to(self.device),
            )
            total += float(error(output[:, :3].cpu(), rows, x_t).double().sum())
        return total / self.x0.numel()
