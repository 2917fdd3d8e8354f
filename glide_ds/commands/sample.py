"""Draw a grid of pictures from an export, a checkpoint or the built-in model, with and without CLIP."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from glide_ds.commands.load import Loaded, load_model
from glide_ds.diffusion import SAMPLERS
from glide_ds.diffusion.guidance import check_clip_strength
from glide_ds.diffusion.pixels import to_signed
from glide_ds.errors import ConfigError
from glide_ds.files import user_path
from glide_ds.inference.draw import Row, draw, picture_format, rows_grid, write_picture
from glide_ds.inference.prompts import check_weights, clip_prompt, weighted
from glide_ds.progress import told

TEXT_ONLY = (
    "a picture's embedding lies elsewhere in CLIP's space; clip.source=both trains a model that takes either"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="an export, a run directory or checkpoint folder, openai, or builtin:tiny"
    )
    parser.add_argument("--prompt", nargs="+", default=[], help="captions; none: CLIP prompts alone")
    parser.add_argument(
        "--image",
        nargs="+",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="pictures for CLIP to see: variations of them; several, and texts beside them, are averaged",
    )
    parser.add_argument(
        "--clip_prompt",
        nargs="+",
        default=[],
        metavar="TEXT[:WEIGHT]",
        help="texts for CLIP to read instead of the captions",
    )
    parser.add_argument("--n", type=_at_least_one, default=1, help="pictures per caption")
    parser.add_argument(
        "--out", type=user_path, required=True, help="a PNG; the grid has one column per picture of a caption"
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
    parser.add_argument(
        "--clip_scale", type=float, default=1.0, help="how strongly CLIP conditions; 0: not at all"
    )
    parser.add_argument(
        "--clip_guidance", type=float, help="a guidance scale of CLIP's own: three passes instead of two"
    )
    parser.add_argument(
        "--clip_model",
        metavar="FILE",
        help="where the CLIP encoder's weights are now, or open_clip's tag; default: where they were in training",
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--sampler", choices=list(SAMPLERS), default="ddpm")
    parser.add_argument("--seed", type=int, default=0)


def _at_least_one(text: str) -> int:
    if (count := int(text)) < 1:
        raise argparse.ArgumentTypeError("at least 1 picture can be drawn")
    return count


def run(args: argparse.Namespace) -> None:
    picture_format(args.out)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_model(args.model, device, ema=args.ema, clip_model=args.clip_model)
    modes = {"both": ["on", "off"], None: ["on" if loaded.clip else "off"]}.get(args.clip, [args.clip])
    check_prompts(args, loaded, modes)
    upsampler = load_upsampler(args.upsampler, loaded, device) if args.upsampler else None
    captions = [caption for caption in args.prompt or [""] for _ in range(args.n)]
    embedding = embed(args, loaded, captions, device) if "on" in modes else None
    shown = [caption or " + ".join([*args.image, *args.clip_prompt]) for caption in captions]
    rows = []
    for mode in modes:
        images = draw(
            loaded.model,
            captions,
            schedule=loaded.schedule,
            clip_embedding=embedding if mode == "on" else None,
            clip_scale=args.clip_scale,
            guidance=args.guidance,
            clip_guidance=args.clip_guidance if mode == "on" else None,
            steps=args.steps,
            sampler=args.sampler,
            seed=args.seed,
            progress=told("drawing", "steps"),
        )
        images = enlarge(images, upsampler, captions, args.seed) if upsampler else images
        labels = [f"{text} (CLIP {mode})" if len(modes) > 1 else text for text in shown]
        across = args.n if args.n > 1 else len(captions)
        rows += [Row(images[i : i + across], labels[i : i + across]) for i in range(0, len(captions), across)]
    write_picture(args.out, rows_grid(rows))
    print(f"wrote {args.out}")


def check_prompts(args: argparse.Namespace, loaded: Loaded, modes: list[str]) -> None:
    """Raises ConfigError for what asks nothing, and for what asks CLIP where it is not asked."""
    prompts = [f"--image {' '.join(args.image)}"] * bool(args.image)
    prompts += [f"--clip_prompt {' '.join(args.clip_prompt)}"] * bool(args.clip_prompt)
    if not prompts and not args.prompt:
        raise ConfigError("there is nothing to draw", remedy="give --prompt, --image or --clip_prompt")
    asked = prompts + [f"--clip {args.clip}"] * (args.clip in ("on", "both"))
    asked += [f"--clip_scale {args.clip_scale:g}"] * (args.clip_scale != 1)
    asked += [f"--clip_guidance {args.clip_guidance}"] * (args.clip_guidance is not None)
    if asked and loaded.clip is None:
        raise ConfigError(
            f"{asked[0]}: {args.model} has no CLIP adapter",
            "CLIP says nothing to it",
            "leave it out, or give an export of a phase with CLIP",
        )
    if asked and "on" not in modes:
        raise ConfigError(f"{asked[0]} with --clip off", "it would do nothing", "leave one of them out")
    check_clip_strength(args.clip_scale, args.clip_guidance, given=loaded.clip is not None)
    check_weights([*weighted(args.image, files=True), *weighted(args.clip_prompt)])
    if args.image and loaded.clip and loaded.clip.source == "text":
        print(f"!! {args.model} was trained on text embeddings alone: {TEXT_ONLY}")


def embed(args: argparse.Namespace, loaded: Loaded, captions: list[str], device: torch.device) -> Tensor:
    """What CLIP is shown, [B, D]: the CLIP prompts, or else the captions."""
    encoder = loaded.encoder(device, "both" if args.image else "text")
    assert encoder is not None
    if not args.image and not args.clip_prompt:
        return encoder.encode_text(captions)
    prompt = clip_prompt(encoder, args.image, args.clip_prompt, loaded.pictures)
    return prompt.expand(len(captions), -1)


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
