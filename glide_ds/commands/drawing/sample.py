"""Draw pictures, a grid of them or files, from an export, a checkpoint or the built-in model, with and without CLIP."""

from __future__ import annotations

import argparse
import os

import torch

from glide_ds.commands.drawing.drawer import BATCH, SAMPLER, STEPS, Drawer, load
from glide_ds.commands.drawing.many import Settings, draw_many, embeddings, identity
from glide_ds.commands.load import Loaded
from glide_ds.commands.train import at_least_one
from glide_ds.diffusion import SAMPLERS, SPACINGS, create_diffusion
from glide_ds.diffusion.guidance import Guidance, check_clip_strength, check_guidance
from glide_ds.diffusion.samplers import make_step
from glide_ds.diffusion.sampling import Options
from glide_ds.environment import rank_of_environment
from glide_ds.errors import ConfigError
from glide_ds.files import check_place, user_path
from glide_ds.inference import enlarge
from glide_ds.inference.canvas import read_canvas
from glide_ds.inference.draw import Row, picture_format, rows_grid, write_picture
from glide_ds.inference.prompts import check_weights, weighted
from glide_ds.inference.requests import Request, read_requests
from glide_ds.model.clip import FrozenClip
from glide_ds.progress import told
from glide_ds.tokenizer import lengths

TEXT_ONLY = (
    "a picture's embedding lies elsewhere in CLIP's space; clip.source=both trains a model that takes either"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", help="an export, a run directory or checkpoint folder, openai, or builtin:tiny"
    )
    _add_requests(parser)
    _add_places(parser)
    _add_strengths(parser)
    _add_solver(parser)


def _add_requests(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument(
        "--clip_mix",
        choices=["average", "compose"],
        default="average",
        help="several pictures and texts: one between them, or each pulls for itself (one more pass for each)",
    )
    parser.add_argument(
        "--inpaint", metavar="FILE", help="a picture to fill in where --mask is white, by an inpainting model"
    )
    parser.add_argument("--mask", metavar="FILE", help="of its size, white where it is drawn anew")
    parser.add_argument(
        "--prompts",
        type=user_path,
        metavar="FILE",
        help="a prompt a line; or a .jsonl: prompt, image, mask, clip_prompt, seed, guidance (files: from its folder)",
    )
    parser.add_argument("--n", type=at_least_one, default=1, help="pictures per caption")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next ones have the next")


def _add_places(parser: argparse.ArgumentParser) -> None:
    out = parser.add_mutually_exclusive_group(required=True)
    out.add_argument("--out", type=user_path, help="a PNG; the grid has one column per picture of a caption")
    out.add_argument(
        "--out_dir",
        type=user_path,
        help="a PNG for each picture, which says how it was drawn, and index.jsonl; over every process it is launched "
        "with; goes on where it ended",
    )
    parser.add_argument("--batch", type=at_least_one, default=BATCH, help="pictures drawn at once")
    parser.add_argument(
        "--rerank",
        type=at_least_one,
        metavar="K",
        help="keep the K of --n that CLIP finds nearest to the prompt",
    )
    parser.add_argument(
        "--rerank_by", metavar="CLIP", help="such as ViT-L/14; default: the model's own encoder"
    )
    parser.add_argument(
        "--upsampler",
        help="a second model, of kind upsample, that enlarges the pictures; openai: the published one",
    )
    parser.add_argument(
        "--upsampler_steps",
        metavar="COUNTS",
        help="steps in each of as many equal sections of its schedule, cleanest first: 10,10,0,0,0 begins at the small "
        "picture instead of noise, for an upsampler that was trained briefly; default: fast27, as published",
    )
    parser.add_argument("--ema", action="store_true", help="of a run: by the average of its weights")
    parser.add_argument(
        "--clip_model",
        metavar="FILE",
        help="where the CLIP encoder's weights are now, or open_clip's tag; default: where they were in training",
    )
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument(
        "--compile", action="store_true", help="compile the model's blocks at the first drawing"
    )


def _add_strengths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--clip", choices=["on", "off", "both"], help="default: on where the model has an adapter"
    )
    parser.add_argument(
        "--guidance", type=float, default=3.0, help="how strongly captions are followed; 1: plainly"
    )
    parser.add_argument(
        "--clip_scale", type=float, default=1.0, help="how strongly CLIP conditions; 0: not at all"
    )
    parser.add_argument(
        "--clip_guidance", type=float, help="a guidance scale of CLIP's own: three passes instead of two"
    )
    parser.add_argument(
        "--guidance_rescale",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="bring guided predictions back to the spread of unguided ones: against harsh contrast, about 0.7",
    )
    parser.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide only at noise levels sigma / alpha within, such as 0.3 5: faster, more varied",
    )


def _add_solver(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=at_least_one, default=STEPS)
    parser.add_argument("--sampler", choices=list(SAMPLERS), default=SAMPLER)
    parser.add_argument("--spacing", choices=list(SPACINGS), default="uniform", help="how steps lie in time")
    parser.add_argument("--eta", type=float, default=0.0, help="ddim's share of noise")


def run(args: argparse.Namespace) -> None:
    """Write the grid, or the files."""
    check_words(args)
    requests, empty = read_requests(args.prompts) if args.prompts else (command_line(args), 0)
    if empty:
        print(f"{args.prompts}: {empty} empty lines left out", flush=True)
    rank, world_size = rank_of_environment()
    if args.out and world_size > 1:
        raise ConfigError(
            f"--out was launched on {world_size} processes", "all would draw the same", "give --out_dir"
        )
    drawer = load(
        args.model,
        args.upsampler,
        own_device(),
        ema=args.ema,
        clip_model=args.clip_model,
        bf16=args.bf16,
        compiled=args.compile,
        upsampler_steps=args.upsampler_steps or enlarge.STEPS,
    )
    has_clip = drawer.base.clip is not None
    modes = {"both": ["on", "off"], None: ["on" if has_clip else "off"]}.get(args.clip, [args.clip])
    check_prompts(args, requests, drawer.base, modes)
    if args.out:
        write_grid(args, requests, drawer, modes)
    else:
        draw_many(
            drawer,
            requests,
            settings_of(args, drawer, modes),
            args.out_dir,
            ranker=ranker_of(args, drawer),
            rank=rank,
            world_size=world_size,
        )
    if rank == 0:
        judged = "--shards 'shards/held-out/*.tar' --count 1000 " if args.model != "builtin:tiny" else ""
        print(
            f"Next: glide-ds evaluate {args.model} {judged}--out figures.json; glide-ds sample --help: other ways"
        )


def own_device() -> torch.device:
    """This process' GPU, where there is one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))))


def command_line(args: argparse.Namespace) -> list[Request]:
    """What the command line asks for, a request for each caption."""
    images, texts = tuple(args.image), tuple(args.clip_prompt)
    inpaint = (args.inpaint, args.mask) if args.inpaint else None
    return [
        Request(line, prompt, images, texts, inpaint=inpaint)
        for line, prompt in enumerate(args.prompt or [""], 1)
    ]


def write_grid(args: argparse.Namespace, requests: list[Request], drawer: Drawer, modes: list[str]) -> None:
    """The short way: a row for each caption and mode, or one for all captions."""
    captions = [request.prompt for request in requests for _ in range(args.n)]
    seeds = range(args.seed, args.seed + len(captions))
    wanted = None
    if "on" in modes:
        encoder = drawer.encoder_for(requests)
        apart = args.clip_mix == "compose"
        wanted = embeddings(encoder, requests, drawer.base.pictures, apart=apart).repeat_interleave(args.n, 0)
    shown = [caption or " + ".join([*args.image, *args.clip_prompt]) for caption in captions]
    rows = []
    for mode in modes:
        parts = []
        for first in range(0, len(captions), args.batch):
            part = slice(first, first + args.batch)
            options = options_of(args)
            if mode == "on" and wanted is not None:
                options["clip_embedding"] = wanted[part]
            else:
                options["clip_guidance"] = None
            options["progress"] = told("drawing", "steps")
            files = [requests[0].inpaint] * len(captions[part])
            small = drawer.draw_small(
                captions[part], seeds[part], steps=args.steps, spacing=args.spacing, files=files, **options
            )
            parts.append(drawer.enlarge(small, captions[part], seeds[part], told("enlarging", "steps"), files))
        images = torch.cat(parts)
        labels = [f"{text} (CLIP {mode})" if len(modes) > 1 else text for text in shown]
        across = args.n if args.n > 1 else len(captions)
        rows += [Row(images[i : i + across], labels[i : i + across]) for i in range(0, len(captions), across)]
    write_picture(args.out, rows_grid(rows))
    print(f"wrote {args.out}")


def options_of(args: argparse.Namespace) -> Options:
    """What the command line says of diffusion.sample's options."""
    return {
        "sampler": args.sampler,
        "eta": args.eta,
        "guidance": args.guidance,
        "guidance_rescale": args.guidance_rescale,
        "guidance_interval": tuple(args.guidance_interval) if args.guidance_interval else None,
        "clip_scale": args.clip_scale,
        "clip_guidance": args.clip_guidance,
        "clip_weights": pulls(args) if args.clip_mix == "compose" else (),
    }


def pulls(args: argparse.Namespace) -> tuple[float, ...]:
    """How strongly each CLIP prompt pulls where they are composed: 1 on average."""
    weights = check_weights([*weighted(args.image, files=True), *weighted(args.clip_prompt)])
    return tuple(weight * len(weights) / sum(weights) for weight in weights)


def ranker_of(args: argparse.Namespace, drawer: Drawer) -> FrozenClip | None:
    """What chooses for --rerank: the CLIP encoder that is named, else the model's own."""
    if args.rerank is None:
        return None
    return FrozenClip(args.rerank_by, device=drawer.device) if args.rerank_by else drawer.encoder("both")


def settings_of(args: argparse.Namespace, drawer: Drawer, modes: list[str]) -> Settings:
    options = dict(options_of(args))
    for name in ("sampler", "guidance"):
        del options[name]
    if args.upsampler_steps:
        options["upsampler_steps"] = args.upsampler_steps
    return Settings(
        model=identity(args.model, drawer.base.origin),
        upsampler=identity(args.upsampler, drawer.upsampler.origin) if drawer.upsampler else None,
        n=args.n,
        keep=args.rerank or args.n,
        ranked_by=(args.rerank_by or "its own") if args.rerank else None,
        seed=args.seed,
        batch=args.batch,
        steps=args.steps,
        sampler=args.sampler,
        spacing=args.spacing,
        guidance=args.guidance,
        options=options,
        clip=modes == ["on"],
        bf16=args.bf16,
        compiled=args.compile,
    )


def check_words(args: argparse.Namespace) -> None:
    """Raises ConfigError for what can't be drawn whatever the model is, before one is loaded."""
    if args.out:
        picture_format(args.out)
    if args.guidance < 0:
        print(
            f"!! --guidance {args.guidance:g} draws away from what is asked for: is {-args.guidance:g} meant?"
        )
    composed = args.clip_mix == "compose"
    alone = [f"--{name}" for name in ("prompt", "image", "clip_prompt", "inpaint") if getattr(args, name)]
    for wrong, fact, remedy in (
        (args.prompts and alone, f"--prompts and {' '.join(alone)}", "write all of it in the file"),
        (args.inpaint and not args.mask, "--inpaint and no --mask", "give both"),
        (args.mask and not args.inpaint, "--mask and no --inpaint", "give both"),
        (args.prompts and args.out, "--prompts and --out", "give --out_dir for files, or --prompt for a grid"),
        (args.rerank and args.out, "--rerank and --out", "give --out_dir: its files are the best ones"),
        (args.upsampler_steps and not args.upsampler, "--upsampler_steps and no --upsampler", "give both"),
        (args.rerank_by and not args.rerank, "--rerank_by and no --rerank", "say how many to keep"),
        (args.out_dir and args.clip == "both", "--out_dir and --clip both", "draw on and off into two folders"),
        ((args.rerank or 0) > args.n, f"--rerank {args.rerank} of --n {args.n}", "draw more, or keep fewer"),
        (composed and args.prompt, "--clip_mix compose and --prompt", "compose CLIP prompts alone"),
        (
            composed and args.clip_guidance is not None,
            "--clip_mix compose and --clip_guidance",
            "give --guidance",
        ),
    ):
        if wrong:
            raise ConfigError(f"{fact} don't go together", remedy=remedy)
    if composed and len(args.image) + len(args.clip_prompt) < 2:
        raise ConfigError(
            "--clip_mix compose with fewer than two CLIP prompts",
            "there is nothing to compose",
            "give two or more --image or --clip_prompt",
        )
    if not (args.prompt or args.prompts or args.image or args.clip_prompt or args.inpaint):
        raise ConfigError(
            "there is nothing to draw", remedy="give --prompt, --prompts, --image, --clip_prompt or --inpaint"
        )
    if args.inpaint:
        read_canvas([(args.inpaint, args.mask)], 16)
    any_process = create_diffusion("squaredcos_cap_v2", respacing=args.steps, spacing=args.spacing)
    make_step(args.sampler, any_process, args.eta)
    create_diffusion("linear", respacing=args.upsampler_steps)
    options = options_of(args)
    how = Guidance(options["guidance"], options["guidance_rescale"], options["guidance_interval"])
    check_guidance(how, args.clip_guidance)
    check_weights([*weighted(args.image, files=True), *weighted(args.clip_prompt)])
    check_place(args.out.parent if args.out else args.out_dir)


def check_prompts(args: argparse.Namespace, requests: list[Request], loaded: Loaded, modes: list[str]) -> None:
    """Raises ConfigError for what asks CLIP where it is not asked."""
    asked = [f"--image {' '.join(args.image)}"] * bool(args.image)
    asked += [f"--clip_prompt {' '.join(args.clip_prompt)}"] * bool(args.clip_prompt)
    if args.prompts:
        lines = [request.line for request in requests if request.images or request.texts]
        asked += [f"{args.prompts}, line {line}" for line in lines[:1]]
    asked += [f"--clip {args.clip}"] * (args.clip in ("on", "both"))
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
    if args.rerank and not args.rerank_by and loaded.clip is None:
        raise ConfigError(
            f"--rerank {args.rerank}: {args.model} has no CLIP adapter, and so no encoder of its own",
            remedy="name one: --rerank_by ViT-L/14",
        )
    if any(request.inpaint for request in requests) and not loaded.model.config.inpaints:
        kind = loaded.model.config.kind
        raise ConfigError(
            f"{args.model} is of kind {kind!r}",
            "it can't fill in a part of a picture",
            f"give a model of kind {kind}-inpaint",
        )
    check_clip_strength(args.clip_scale, args.clip_guidance, given=loaded.clip is not None)
    tell_cut(requests, loaded.model.config.text_ctx)
    pictured = any(request.images for request in requests)
    if pictured and loaded.clip and loaded.clip.source == "text":
        print(f"!! {args.model} was trained on text embeddings alone: {TEXT_ONLY}")


def tell_cut(requests: list[Request], context: int) -> None:
    """Say which prompts the model does not read whole: the first, and how many more."""
    counted = zip(requests, lengths([request.prompt for request in requests]), strict=True)
    cut = [(request, tokens) for request, tokens in counted if tokens > context]
    if cut:
        request, tokens = cut[0]
        others = f"; so it is with {len(cut) - 1} more prompts" if len(cut) > 1 else ""
        print(
            f"!! of {request.prompt[:40]!r} … the model reads {context} tokens of {tokens}: the end is cut off{others}"
        )
