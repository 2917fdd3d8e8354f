"""What tiny upsamplers and inpainting models draw of held-out shapes, beside bicubic enlarging and the base model.

    python benchmarks/kinds.py --upsample runs/tiny-upsample --inpaint runs/tiny-inpaint --out kinds-cpu.json

An upsampler enlarges small pictures, clean and degraded: PSNR, and what the judge reads in them and in the originals.

An inpainting model is asked two things. *object*: the last object's box is hidden, and the caption says what was there;
the judge reads the whole picture. *half*: the right half of that object is hidden, and nothing is said; it is to be
continued, which the judge reads too, and the error of the hidden pixels is told. The same is asked of the plain base
model, kept to the known pixels at each step (RePaint, arXiv 2201.09865, without its resampling) or drawing freely.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import environment
from torch import Tensor

from glide_ds.commands.load import Loaded, load_model
from glide_ds.config import DegradeConfig
from glide_ds.data import shapes
from glide_ds.data.order import mix
from glide_ds.data.pictures.degrade import degraded
from glide_ds.data.pictures.resample import resize
from glide_ds.inference.enlarge import STEPS, Small, compared, enlarge
from glide_ds.inference.inpaint import fill
from glide_ds.inference.judged import CHUNK, Cases, held_out_cases, judged
from glide_ds.model import create_model
from glide_ds.model.weights import load_weights

BASE = "builtin:tiny"
CPU = torch.device("cpu")


def measure_upsampler(loaded: Loaded, count: int, steps: str) -> dict[str, Any]:
    side = loaded.model.config.image_size
    cases = held_out_cases(side, None, count)
    reduced = [resize(image, (0, side, 0, side), side // 4, side // 4) for image in cases.images.numpy()]
    clean = np.stack(reduced)
    worse = degraded(clean, mix(np.arange(count)), DegradeConfig(share=1.0))
    small = Small(
        cases.images,
        cases.captions,
        {"clean": torch.from_numpy(clean), "degraded": torch.from_numpy(worse)},
    )
    report: dict[str, Any] = {"steps": steps, "originals": asdict(judged(cases.images, cases.captions))}
    for name, low_res in small.low_res.items():
        images = enlarge(loaded.model, low_res, cases.captions, schedule=loaded.schedule, steps=steps)
        score = judged(images, cases.captions)
        figures = compared(images, small, name)
        print(name, figures, "·", score, flush=True)
        report[name] = asdict(figures) | asdict(score)
    return report


def hidden_boxes(count: int, side: int, part: float) -> Tensor:
    """Known pixels uint8 [N, S, S]: all but the right `part` of each picture's last object, and a pixel around it."""
    known = torch.ones(count, side, side, dtype=torch.uint8)
    for row, number in enumerate(range(shapes.HELD_OUT, shapes.HELD_OUT + count)):
        shape = shapes.scene(number).shapes[-1]
        left, top = (shape.x - shape.diameter / 2) * side, (shape.y - shape.diameter / 2) * side
        width = shape.diameter * side
        columns = slice(round(left + (1 - part) * width) - (part == 1), round(left + width) + 1)
        known[row, round(top) - 1 : round(top + width) + 1, columns] = 0
    return known


def filled(loaded: Loaded, cases: Cases, known: Tensor, captions: list[str], guidance: float) -> Tensor:
    parts = []
    for first in range(0, len(captions), CHUNK):
        part = slice(first, first + CHUNK)
        how = {
            "schedule": loaded.schedule,
            "seed": first,
            "guidance": guidance,
            "steps": 20,
            "sampler": "dpm++2m",
        }
        parts.append(fill(loaded.model, cases.images[part], known[part], captions[part], **how))
    return torch.cat(parts)


def blindfolded(shown: Loaded) -> Loaded:
    """The base model in its inpainting twin's shape: the new weights are zero, so it sees nothing of the picture."""
    model = create_model(shown.model.config)
    load_weights(model, BASE)
    return shown._replace(model=model.to(memory_format=torch.channels_last).eval())


def measure_inpainting(loaded: Loaded, count: int) -> dict[str, Any]:
    side = loaded.model.config.image_size
    cases, base = held_out_cases(side, None, count), blindfolded(loaded)
    whole, half = hidden_boxes(count, side, 1.0), hidden_boxes(count, side, 0.5)
    everything, empty = torch.zeros_like(half), [""] * count
    drawings: dict[str, tuple[Tensor, Callable[[], Tensor]]] = {
        "object, inpainting model": (whole, lambda: filled(loaded, cases, whole, cases.captions, 5.0)),
        "object, base kept to the known": (whole, lambda: filled(base, cases, whole, cases.captions, 5.0)),
        "half, inpainting model": (half, lambda: filled(loaded, cases, half, empty, 1.0)),
        "half, base kept to the known": (half, lambda: filled(base, cases, half, empty, 1.0)),
        "half, base drawing freely": (half, lambda: filled(base, cases, everything, empty, 1.0)),
    }
    report: dict[str, Any] = {}
    for name, (known, drawn) in drawings.items():
        images = torch.where(known[..., None].bool(), cases.images, drawn())
        score, hidden = judged(images, cases.captions), ~known.bool()
        error = (images[hidden].float() - cases.images[hidden].float()).square().mean().sqrt()
        report[name] = asdict(score) | {"error_of_hidden_levels": round(float(error), 1)}
        print(f"{name}: {score}, error {error:.1f}", flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upsample", help="a run or an export")
    parser.add_argument("--inpaint", help="a run or an export")
    parser.add_argument("--steps", default=STEPS, help="the upsampler's, such as 10,10,0,0,0")
    parser.add_argument("--cases", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    report = json.loads(args.out.read_text()) if args.out.exists() else {}
    report["environment"] = environment("cpu")
    if args.upsample:
        report["upsampler"] = measure_upsampler(load_model(args.upsample, CPU), args.cases, args.steps)
    if args.inpaint:
        report["inpainting"] = measure_inpainting(load_model(args.inpaint, CPU), args.cases)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
