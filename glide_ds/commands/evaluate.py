"""What a model has learned of the built-in shapes: drawn pictures read by the judge, and the conditioning gain."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from glide_ds.commands.load import Loaded, ema_length, load_model
from glide_ds.commands.results import heldout
from glide_ds.diffusion import create_diffusion
from glide_ds.environment import is_first
from glide_ds.errors import ConfigError
from glide_ds.files import check_place, user_path, write_file
from glide_ds.inference.draw import Row, rows_grid, write_picture
from glide_ds.inference.held_out import Gain, HeldOut
from glide_ds.inference.judged import TOLD, Cases, Drawing, Score, draw_ways, held_out_cases, judged
from glide_ds.model.clip import FrozenClip
from glide_ds.training.checkpoint.start import RUN_FILE

SHOWN = 8  # cases in the written grid


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `glide-ds evaluate`."""
    parser.add_argument(
        "model",
        nargs="+",
        help="an export, a run directory or checkpoint folder, or builtin:tiny; several: --shards",
    )
    parser.add_argument(
        "--shards",
        nargs="+",
        help="held-out shards to judge on instead of the built-in shapes, or builtin:shapes-heldout: Fréchet distance, "
        "KID, CMMD, CLIP score, precision, recall, density, coverage (docs/results.md), over every process it is "
        "launched with",
    )
    parser.add_argument("--count", type=int, default=1000, help="with --shards: pictures to draw")
    parser.add_argument(
        "--features",
        metavar="NAME",
        help="with --shards: the CLIP encoder whose features are compared, as clip.model is written; default: the "
        "model's own, or ViT-L/14",
    )
    parser.add_argument(
        "--out_dir",
        type=user_path,
        help="with --shards: keep the pictures here; the same command again draws those that are missing",
    )
    parser.add_argument(
        "--captions", type=int, default=64, help="held-out cases to draw in each way and judge; 0: none"
    )
    parser.add_argument("--samples", type=int, default=256, help="held-out pictures for loss and gain")
    parser.add_argument("--steps", type=int, default=100, help="ancestral sampling steps per picture")
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[3.0], help="several: with --shards, a curve"
    )
    parser.add_argument(
        "--ema_length",
        type=ema_length,
        nargs="+",
        metavar="SHARE",
        help="with --shards: instead of a run's weights their averages of these lengths (ema.snapshot_every)",
    )
    parser.add_argument("--clip_scale", type=float, default=1.0, help="how strongly CLIP conditions")
    parser.add_argument(
        "--clip_model",
        metavar="FILE",
        help="where the CLIP encoder's weights are now, or open_clip's tag; default: where they were in training",
    )
    parser.add_argument("--clip_guidance", type=float, help="a guidance scale of CLIP's own")
    parser.add_argument("--pictures", type=user_path, metavar="PNG", help="write a grid of them here")
    parser.add_argument("--out", type=user_path, metavar="JSON", help="write the figures here")


def run(args: argparse.Namespace) -> None:
    """Print the figures; with --out, write them too."""
    for path in (args.out, args.pictures):
        if path:
            check_place(path.parent)
    if args.shards:
        args.shards = args.shards[0] if len(args.shards) == 1 else tuple(args.shards)
        heldout.run(args)
    else:
        _on_shapes(args)
    if is_first():
        print(_next(args))


def _next(args: argparse.Namespace) -> str:
    """What a person does next: a report needs the run's directory, and figures in a file."""
    run = next((model for model in args.model if (Path(model) / RUN_FILE).exists()), "RUN")
    figures = f" --evaluation {args.out}" if args.out else ""
    return f"Next: glide-ds report {run}{figures} --out report.html" + (
        "" if args.out else "; with --out F.json here, --evaluation F.json there"
    )


def _on_shapes(args: argparse.Namespace) -> None:
    _check_on_shapes(args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(args.model[0], device, clip_model=args.clip_model)
    drawing = Drawing(
        loaded.schedule,
        args.steps,
        args.guidance[0],
        args.clip_scale,
        args.clip_guidance,
        by_pictures=sees_pictures(loaded),
    )
    clip = loaded.encoder(device, "both")
    found = evaluate(loaded, clip, args.captions, drawing, args.samples, args.pictures)
    print(found)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_file(args.out, json.dumps(asdict(found), indent=1) + "\n")


def _check_on_shapes(args: argparse.Namespace) -> None:
    """Raises ConfigError for what only --shards can do."""
    asked = [f"{len(args.model)} models"] * (len(args.model) > 1)
    asked += [f"{len(args.guidance)} scales in --guidance"] * (len(args.guidance) > 1)
    asked += [f"--{name}" for name in ("features", "out_dir", "ema_length") if getattr(args, name) is not None]
    if asked:
        raise ConfigError(
            f"{asked[0]} without --shards",
            "the built-in shapes are judged one model and one scale at a time",
            "add --shards builtin:shapes-heldout, or leave it out",
        )


def evaluate(
    loaded: Loaded,
    clip: FrozenClip | None,
    captions: int,
    drawing: Drawing,
    samples: int,
    pictures: Path | None = None,
) -> Evaluation:
    """Measure a model on held-out shapes, CLIP on where it has an adapter."""
    scores: dict[str, Score | None] = dict.fromkeys(TOLD)
    if captions:
        cases = held_out_cases(loaded.model.config.image_size, clip, captions)
        drawn = dict(draw_ways(loaded.model, cases, drawing))
        scores |= {name: judged(images, cases.captions) for name, images in drawn.items()}
        scores["score"] = scores["score"] or scores["score_caption_only"]
        if pictures:
            write_picture(pictures, picture_grid(cases, drawn))
    figures = held_out_shapes(loaded, clip, samples).measure(loaded.model)
    return Evaluation(
        **scores,
        loss_clip_off=figures.loss_clip_off,
        gain_with_caption=figures.gain_with_caption,
        gain_without_caption=figures.gain_without_caption,
        gain_of_pictures=figures.gain_of_pictures,
    )


def held_out_shapes(loaded: Loaded, clip: FrozenClip | None, count: int) -> HeldOut:
    """What measures loss and gain, by the embedding that the model was trained on first."""
    cases = held_out_cases(loaded.model.config.image_size, clip, count)
    return HeldOut(
        create_diffusion(loaded.schedule),
        cases.images,
        cases.captions,
        cases.pictures if sees_pictures(loaded) else cases.text,
        picture_embedding=cases.pictures,
    )


def sees_pictures(loaded: Loaded) -> bool:
    """Whether it was trained on the embeddings of pictures alone."""
    return loaded.clip is not None and loaded.clip.source == "image"


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
