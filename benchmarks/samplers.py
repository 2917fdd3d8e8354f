"""Samplers by what the judge reads in their pictures, and by time: the built-in tiny GLIDE on held-out captions.

    python benchmarks/samplers.py --parts /tmp/parts --out benchmarks/results/samplers-cpu.json

Each variant draws the same captions by the same seeds, in parts that take turns, so that a shared machine's wandering
speed meets all of them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
from machine import environment

from glide_ds.commands.drawing.drawer import BATCH, load
from glide_ds.inference.judged import held_out_cases, judged

VARIANTS = (
    ("ddpm", 100, "uniform"),
    ("dpm++2m", 20, "uniform"),
    ("plms", 20, "uniform"),
    ("dpm++2m-sde", 20, "uniform"),
    ("dpm++2m", 20, "trailing"),
    ("dpm++2m", 20, "karras"),
    ("ddim", 20, "uniform"),
    ("dpm++2m", 10, "uniform"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--captions", type=int, default=256)
    parser.add_argument("--variants", type=int, default=len(VARIANTS), help="the first of them only")
    parser.add_argument(
        "--parts", type=Path, required=True, help="what is drawn is kept here, and not drawn again"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    drawer = load(args.model)
    cases = held_out_cases(drawer.base.model.config.image_size, None, args.captions)
    variants = VARIANTS[: args.variants]
    seconds, drawn = dict.fromkeys(variants, 0.0), {variant: [] for variant in variants}
    args.parts.mkdir(parents=True, exist_ok=True)
    for first in range(0, args.captions, BATCH):
        captions = cases.captions[first : first + BATCH]
        for sampler, steps, spacing in variants:
            part = args.parts / f"{sampler}-{steps}-{spacing}-{first}-{len(captions)}.pt"
            if not part.exists():
                start = time.perf_counter()
                seeds = range(first, first + len(captions))
                images = drawer.draw(
                    captions, seeds, steps=steps, spacing=spacing, sampler=sampler, guidance=3.0
                )
                torch.save({"images": images, "seconds": time.perf_counter() - start}, part)
            made = torch.load(part, weights_only=True)
            seconds[sampler, steps, spacing] += made["seconds"]
            drawn[sampler, steps, spacing].append(made["images"])
    rows = []
    for variant in variants:
        score = judged(torch.cat(drawn[variant]), cases.captions)
        errors = {
            name: round(math.sqrt(share * (1 - share) / score.count), 4)
            for name, share in asdict(score).items()
            if name != "count"
        }
        rows.append(
            dict(zip(("sampler", "steps", "spacing"), variant, strict=True))
            | {"seconds": round(seconds[variant], 2)}
            | {"time_ratio": round(seconds[variant] / seconds[variants[0]], 3)}
            | asdict(score)
            | {"standard_error": errors}
        )
        print(variant, f"{rows[-1]['time_ratio']:.3f} of the time:", score, flush=True)
    report = {"environment": environment(str(drawer.device)), "variants": rows}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
