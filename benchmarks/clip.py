"""What CLIP's strength and mixed prompts do to the pictures of a trained model, as the judge of the shapes reads them.

    python benchmarks/clip.py runs/quickstart/export/model.pt --out benchmarks/results/clip-cpu.json

Strength: held-out cases drawn from CLIP alone (caption emptied), by text and by picture, at each scale.
Mixes: pairs of held-out pictures of one object each, in different colours, drawn from both at 0.5/0.5: from their
average, and composed (--clip_mix). A mix shows its pair where every colour of the pair is in the picture; chance is
how often it shows the colours of another pair, and `one` how often a picture drawn from the first of the pair alone
shows both.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import count as numbers
from pathlib import Path
from typing import Any

import torch
from machine import environment
from torch import Tensor

from glide_ds.commands.load import Loaded, load_model
from glide_ds.data import shapes
from glide_ds.data.judge import judge
from glide_ds.inference.draw import draw
from glide_ds.inference.judged import CHUNK, held_out_cases, judged
from glide_ds.model.clip import FrozenClip
from glide_ds.progress import Progress

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def drawn(
    loaded: Loaded,
    embedding: Tensor,
    scale: float,
    args: argparse.Namespace,
    weights: tuple[float, ...] = (),
) -> Tensor:
    """Pictures uint8 [B, S, S, 3] of CLIP embeddings [B, D] alone, or of [B, N, D] composed."""
    parts = []
    for first in range(0, len(embedding), CHUNK):
        part = embedding[first : first + CHUNK]
        images = draw(
            loaded.model,
            [""] * len(part),
            schedule=loaded.schedule,
            clip_embedding=part,
            clip_scale=scale,
            clip_weights=weights,
            guidance=args.guidance,
            steps=args.steps,
            seed=args.seed * 10_000 + first,
        )
        parts.append(images.cpu())
    return torch.cat(parts)


def pairs(clip: FrozenClip, count: int) -> tuple[Tensor, list[tuple[str, str]]]:
    """Embeddings [count, 2, D] of pictures of one object each, and the pair's two different colours."""
    embeddings: list[Tensor] = []
    colours: list[tuple[str, str]] = []
    waiting: tuple[str, Tensor] | None = None
    for index in numbers(shapes.HELD_OUT):
        told = shapes.describe(shapes.scene(index)).objects
        if len(told) > 1:
            continue
        picture = torch.from_numpy(shapes.draw(index, clip.image_side)[0])[None]
        found = told[0].colour, clip.encode_image(picture)[0].cpu()
        if waiting is None or waiting[0] == found[0]:
            waiting = found
            continue
        embeddings.append(torch.stack([waiting[1], found[1]]))
        colours.append((waiting[0], found[0]))
        waiting = None
        if len(colours) == count:
            break
    return torch.stack(embeddings), colours


def share_showing(images: Tensor, colours: list[tuple[str, str]]) -> float:
    """The share of pictures in which the judge sees both colours."""
    seen = [{thing.colour for thing in judge(image)} for image in images.numpy()]
    return sum(set(pair) <= colour for pair, colour in zip(colours, seen, strict=True)) / len(colours)


def measured_mixes(loaded: Loaded, clip: FrozenClip, args: argparse.Namespace) -> dict[str, float]:
    both, colours = pairs(clip, args.captions)
    mixes = drawn(loaded, both.mean(1), 1.0, args)
    composed = drawn(loaded, both, 1.0, args, (1.0, 1.0))
    # Of pairs without a colour in common, so that what is right for one is by chance for the other.
    others = [
        next((o for o in colours[i + 1 :] + colours if not {*o} & {*c}), c) for i, c in enumerate(colours)
    ]
    return {
        "averaged": share_showing(mixes, colours),
        "averaged, chance": share_showing(mixes, others),
        "composed": share_showing(composed, colours),
        "composed, chance": share_showing(composed, others),
        "one": share_showing(drawn(loaded, both[:, 0], 1.0, args), colours),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--captions", type=int, default=64)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    loaded = load_model(args.model, torch.device("cpu"))
    clip = loaded.encoder(torch.device("cpu"), "both")
    assert clip is not None
    cases = held_out_cases(loaded.model.config.image_size, clip, args.captions)
    assert cases.text is not None
    assert cases.pictures is not None
    found: dict[str, Any] = {"environment": environment("cpu"), "seed": args.seed, "strength": {}}
    with Progress("drawing", 2 * len(SCALES), "scales") as progress:
        for way, embedding in (("text", cases.text), ("picture", cases.pictures)):
            found["strength"][way] = {}
            for scale in SCALES:
                score = judged(drawn(loaded, embedding, scale, args), cases.captions)
                found["strength"][way][scale] = asdict(score)
                progress.line(f"{way} at {scale:g}: {score}")
                progress.advance()
    found["mixes"] = measured_mixes(loaded, clip, args)
    print(found["mixes"])
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
