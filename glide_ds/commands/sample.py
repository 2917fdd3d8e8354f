"""Draw a grid of pictures from an export, a checkpoint or the built-in model, with and without CLIP."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from glide_ds.commands.load import Loaded, load_model, user_path
from glide_ds.diffusion import SAMPLERS
from glide_ds.diffusion.pixels import to_signed
from glide_ds.errors import ConfigError
from glide_ds.inference.draw import draw, grid
from glide_ds.progress import told


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="an export, a run directory or checkpoint folder, openai, or builtin:tiny"
    )
    parser.add_argument("--prompt", nargs="+", required=True)
    parser.add_argument(
        "--out", type=user_path, required=True, help="a PNG; the grid has one column per prompt"
    )
    parser.add_argument(
        "--clip", choices=["on", "off", "both"], help="default: on where the model has an adapter"
    )
    parser.add_argument("--ema", action="store_true", help="of a run: by the average of its weights")
    parser.add_argument(
        "--upsampler",
        help="a second model, of kind upsample, that enlarges the pictures; openai: the published one",
    )
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--sampler", choices=list(SAMPLERS), default="ddpm")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(args.model, device, ema=args.ema)
    modes = {"both": ["on", "off"], None: ["on" if loaded.clip else "off"]}.get(args.clip, [args.clip])
    if "on" in modes and loaded.clip is None:
        raise ConfigError(f"--clip {args.clip}: {args.model} has no CLIP adapter", remedy="use --clip off")
    upsampler = load_upsampler(args.upsampler, loaded, device) if args.upsampler else None
    encoder = loaded.text_encoder(device) if "on" in modes else None
    embedding = encoder.encode_text(args.prompt) if encoder else None
    rows = []
    for mode in modes:
        images = draw(
            loaded.model,
            args.prompt,
            schedule=loaded.schedule,
            clip_embedding=embedding if mode == "on" else None,
            guidance=args.guidance,
            steps=args.steps,
            sampler=args.sampler,
            seed=args.seed,
            progress=told("drawing", "steps"),
        )
        rows.append(enlarge(images, upsampler, args.prompt, args.seed) if upsampler else images)
    labels = [
        f"{prompt} (CLIP {mode})" if len(modes) > 1 else prompt for mode in modes for prompt in args.prompt
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    grid(torch.cat(rows), labels, columns=len(args.prompt)).save(args.out)
    print(f"wrote {args.out}")


def load_upsampler(source: str, base: Loaded, device: torch.device) -> Loaded:
    """The model that enlarges what `base` draws. Raises ConfigError where it is no upsampler or reads another size."""
    upsampler = load_model(source, device, kind="upsample")
    config, side = upsampler.model.config, base.model.config.image_size
    if not config.upsamples or config.image_size // 4 != side:
        raise ConfigError(
            f"--upsampler {source} is of kind {config.kind!r} and reads {config.image_size // 4} px; the pictures "
            f"have {side} px",
            remedy="give an upsampler that fits",
        )
    return upsampler


def enlarge(images: Tensor, upsampler: Loaded, prompts: list[str], seed: int) -> Tensor:
    """uint8 [B, S, S, 3] → uint8 [B, 4S, 4S, 3], as published: 27 DDIM steps, noise × 0.997, no guidance."""
    return draw(
        upsampler.model,
        prompts,
        schedule=upsampler.schedule,
        guidance=1.0,
        steps="fast27",
        sampler="ddim",
        noise_scale=0.997,
        seed=seed,
        low_res=to_signed(images).to(next(upsampler.model.parameters()).device),
        progress=told("enlarging", "steps"),
    )
