"""Draw a grid of pictures from an export, a checkpoint or the built-in model, with and without CLIP."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from glide_ds.commands.export import assembled, clip_of, find_checkpoint
from glide_ds.config import PRESETS, ClipConfig
from glide_ds.diffusion import SAMPLERS
from glide_ds.errors import ConfigError, WeightsError
from glide_ds.inference.draw import draw, grid
from glide_ds.model import create_model
from glide_ds.model.clip import FrozenClip
from glide_ds.model.glide import Glide
from glide_ds.model.tensor_files import StateFile, sidecar
from glide_ds.model.weights import load_state, load_weights, stored_config
from glide_ds.types import GlideConfig


class Loaded(NamedTuple):
    """A model ready to draw."""

    model: Glide
    schedule: str
    clip: ClipConfig | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="an export, a run directory or checkpoint folder, openai, or builtin:tiny"
    )
    parser.add_argument("--prompt", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True, help="a PNG; the grid has one column per prompt")
    parser.add_argument(
        "--clip", choices=["on", "off", "both"], help="default: on where the model has an adapter"
    )
    parser.add_argument("--ema", action="store_true", help="of a run: by the average of its weights")
    parser.add_argument("--upsampler", help="a second model, of kind upsample, that enlarges the pictures")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--sampler", choices=list(SAMPLERS), default="ddpm")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(args.model, device, ema=args.ema)
    modes = {"both": ["on", "off"], None: ["on" if loaded.clip else "off"]}.get(args.clip, [args.clip])
    if "on" in modes and loaded.clip is None:
        raise ConfigError(f"--clip {args.clip}: {args.model} has no CLIP adapter; use --clip off")
    options: dict[str, Any] = {"guidance": args.guidance, "seed": args.seed, "progress": tqdm}
    embedding = None
    if "on" in modes and loaded.clip:
        encoder = FrozenClip(loaded.clip.model, loaded.clip.weights, device, source="text")
        embedding = encoder.encode_text(args.prompt)
    rows = []
    for mode in modes:
        images = draw(
            loaded.model,
            args.prompt,
            schedule=loaded.schedule,
            clip_embedding=embedding if mode == "on" else None,
            steps=args.steps,
            sampler=args.sampler,
            **options,
        )
        if args.upsampler:
            images = enlarge(images, args.upsampler, args.prompt, device, args.seed)
        rows.append(images)
    labels = [
        f"{prompt} (CLIP {mode})" if len(modes) > 1 else prompt for mode in modes for prompt in args.prompt
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    grid(torch.cat(rows), labels, columns=len(args.prompt)).save(args.out)
    print(f"wrote {args.out}")


def load_model(source: str, device: torch.device, *, ema: bool = False) -> Loaded:
    """A model in eval mode from an export, a run or checkpoint folder, `openai` or `builtin:tiny`.

    `ema` takes the average of a run's weights; an export either is one or isn't.
    """
    if ema and not Path(source).is_dir():
        raise ConfigError(
            f"--ema: {source} is no run directory; an export holds the average if it was made with --ema"
        )
    if Path(source).is_dir():
        checkpoint = find_checkpoint(Path(source))
        model = create_model(GlideConfig(**checkpoint.manifest["model"]))
        load_state(model, StateFile(checkpoint.path, assembled(checkpoint, ema=ema)), source=source)
        about = checkpoint.manifest
    else:
        about = (sidecar(source) or {}) if Path(source).is_file() else {}
        model = create_model(_architecture(source))
        load_weights(model, source)
    upsamples = model.config.upsamples
    schedule = about.get("schedule", "linear" if upsamples else "squaredcos_cap_v2")
    if device.type == "cpu":  # NHWC convolutions are up to 2.5 times as fast there
        model = model.to(memory_format=torch.channels_last)
    return Loaded(model.to(device).eval(), schedule, clip_of(about) if model.config.clip_dim else None)


def _architecture(source: str) -> GlideConfig:
    if source == "builtin:tiny":
        return PRESETS["tiny"]()
    if source == "openai":
        return GlideConfig.published("base")
    if not Path(source).is_file():
        raise WeightsError(f"{source!r} is neither a file, a folder, openai nor builtin:tiny; correct the path")
    return stored_config(source)


def enlarge(
    images: torch.Tensor, upsampler: str, prompts: list[str], device: torch.device, seed: int
) -> torch.Tensor:
    """uint8 [B, S, S, 3] → uint8 [B, 4S, 4S, 3], as published: 27 DDIM steps, noise × 0.997, no guidance."""
    loaded = load_model(upsampler, device)
    wanted = loaded.model.config.image_size // 4
    if not loaded.model.config.upsamples or images.shape[1] != wanted:
        raise ConfigError(
            f"--upsampler {upsampler} is of kind {loaded.model.config.kind!r} and reads {wanted} px; the "
            f"pictures have {images.shape[1]} px: give an upsampler that fits"
        )
    low_res = images.permute(0, 3, 1, 2).float() / 127.5 - 1
    return draw(
        loaded.model,
        prompts,
        schedule=loaded.schedule,
        guidance=1.0,
        steps="fast27",
        sampler="ddim",
        noise_scale=0.997,
        seed=seed,
        low_res=low_res.to(device),
        progress=tqdm,
    )
