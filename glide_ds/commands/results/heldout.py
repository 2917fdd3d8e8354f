"""`glide-ds evaluate --shards`: models judged on held-out pictures and captions, over all processes of a launch.

N held-out samples, S image side, D width of the features.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from glide_ds.commands.load import Loaded, load_model
from glide_ds.config import ClipConfig, Config
from glide_ds.config.load import cache_dir
from glide_ds.config.schema import with_changes
from glide_ds.data.loader import Source
from glide_ds.diffusion import create_diffusion
from glide_ds.diffusion.guidance import check_clip_strength
from glide_ds.environment import is_first, read_environment
from glide_ds.errors import ConfigError
from glide_ds.files import write_file
from glide_ds.inference.draw import draw, write_picture
from glide_ds.inference.held_out import Figures
from glide_ds.inference.metrics import LEAST, Quality, as_json, check_installed, compared, quality
from glide_ds.model.clip import FrozenClip
from glide_ds.model.tensor_files import read_state_file, write_state
from glide_ds.progress import Progress
from glide_ds.training.faults.ranks import Ranks, agreed
from glide_ds.training.phases import hash64
from glide_ds.training.validation import load_held_out, open_held_out
from glide_ds.training.zero.group import start_process_group
from glide_ds.types import Batch

CHUNK = 16  # pictures drawn at once, of one seed, by one rank
TIMEOUT_S = 3600.0  # for a rank that draws more slowly than the others


class Judged(NamedTuple):
    """What is measured of one model."""

    figures: Figures
    drawn: dict[float, Tensor]  # by guidance: features [N, D] of its pictures


class Truth(NamedTuple):
    """Features of the real pictures and of their captions, float32 [N, D]."""

    images: Tensor
    texts: Tensor


def run(args: argparse.Namespace) -> None:
    """Print the figures on rank 0; with --out, write them too. Collective."""
    check_arguments(args)
    read_environment()
    device = start_process_group(TIMEOUT_S)
    try:
        truth, judged, encoder = judge_all(args, device)
    finally:
        dist.destroy_process_group()
    if not is_first():
        return
    found = summary(args, truth, judged, encoder)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_file(args.out, json.dumps(found, indent=1) + "\n")


def check_arguments(args: argparse.Namespace) -> None:
    """What can be told before anything is drawn. Raises ConfigError."""
    if args.count < LEAST:
        raise ConfigError(
            f"--count {args.count} is less than {LEAST}",
            "the nearest neighbours of a picture would be most of them, and KID's subsets hold next to none",
            "give some thousands; below 10,000 the distances are for comparing alone",
        )
    doubled = next((name for name in args.model if args.model.count(name) > 1), None)
    if doubled:
        raise ConfigError(f"{doubled} is given twice", "it would be compared with itself", "leave one out")
    check_installed()


def judge_all(args: argparse.Namespace, device: torch.device) -> tuple[Truth, dict[str, Judged], FrozenClip]:
    """Measure every model on the same captions and noise. Collective."""
    lengths = args.ema_length or [False]
    models = {
        f"{name} (EMA {length:g})" if length else name: agreed(partial(load_model, name, device, ema=length))
        for name in args.model
        for length in lengths
    }
    agreed(lambda: check_models(models, args))
    first = next(iter(models.values()))
    encoder = agreed(lambda: feature_encoder(args.features, models, device))
    source = agreed(lambda: open_held_out(held_out_config(first, args), args.shards, None, Ranks()))
    truth = real_features(source, args, first, encoder)
    judged = {}
    for name, loaded in models.items():
        clip = agreed(partial(loaded.encoder, device, "both"))
        judged[name] = judge(name, loaded, clip, encoder, args)
    return truth, judged, encoder


def check_models(models: dict[str, Loaded], args: argparse.Namespace) -> None:
    """Raises ConfigError where they can't be judged, or not by the same pictures."""
    first_name, first = next(iter(models.items()))
    for name, loaded in models.items():
        config = loaded.model.config
        if config.upsamples or config.inpaints:
            raise ConfigError(
                f"{name} is of kind {config.kind}",
                "what it draws is mostly given to it",
                "give a model that draws from captions alone",
            )
        for what, one, other in (
            ("side", first.model.config.image_size, config.image_size),
            ("cropping", first.pictures, loaded.pictures),
        ):
            if one != other:
                raise ConfigError(
                    f"{first_name} and {name} draw pictures of different {what} ({one} and {other})",
                    "they would be judged by different real ones",
                    "evaluate them apart",
                )
    has_clip = any(loaded.clip for loaded in models.values())
    check_clip_strength(args.clip_scale, args.clip_guidance, given=has_clip)
    if args.clip_scale != 1 and not has_clip:
        raise ConfigError(
            f"--clip_scale {args.clip_scale:g}: none of the models has a CLIP adapter",
            "it would do nothing",
            "leave it out",
        )


def feature_encoder(name: str | None, models: dict[str, Loaded], device: torch.device) -> FrozenClip:
    """The encoder named, or the one that the first model with CLIP reads, or ViT-L/14."""
    own = next((loaded.clip for loaded in models.values() if loaded.clip), ClipConfig())
    if name is not None and name != own.model:
        own = ClipConfig(model=name)
    return FrozenClip(own.model, own.weights, device)


def held_out_config(loaded: Loaded, args: argparse.Namespace, count: int | None = None) -> Config:
    """A configuration whose validation set is the held-out one, for a model of this size."""
    return with_changes(
        Config(clip=loaded.clip or ClipConfig()),
        model={"architecture": replace(loaded.model.config, clip_dim=None)},
        data=loaded.pictures._asdict(),
        train={"phase": "full" if loaded.clip else "base"},
        validation={"every": 1, "samples": count or args.count, "shards": args.shards},
    )


# ---- pictures and their features


def chunks(count: int) -> Iterator[range]:
    """This rank's numbers of samples. What is drawn together does not depend on the number of ranks."""
    for number, first in enumerate(range(0, count, CHUNK)):
        if number % dist.get_world_size() == dist.get_rank():
            yield range(first, min(first + CHUNK, count))


def gathered(parts: Sequence[tuple[range, Tensor]], count: int, width: int, device: torch.device) -> Tensor:
    """All ranks' features as one [N, D], on the host. Collective."""
    whole = torch.zeros(count, width)
    for rows, features in parts:
        whole[rows.start : rows.stop] = features.float().cpu()
    whole = whole.to(device)
    dist.all_reduce(whole)  # what others have is 0 here
    return whole.cpu()


def real_features(source: Source, args: argparse.Namespace, loaded: Loaded, encoder: FrozenClip) -> Truth:
    """Features of the held-out pictures, at the side that the model draws, kept in the cache by content. Collective."""
    about = [
        source.fingerprint,
        args.count,
        loaded.model.config.image_size,
        *loaded.pictures,
        encoder.weights_hash,
    ]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]
    path = cache_dir() / "features" / f"{key}.safetensors"
    there = [path.exists()]
    dist.broadcast_object_list(there)
    if there[0]:
        tensors = agreed(lambda: read_state_file(path).tensors)
        return Truth(tensors["images"], tensors["texts"])

    def computed() -> list[tuple[range, Tensor, Tensor]]:
        found = []
        for rows in chunks(args.count):
            batches = [source.one(row) for row in rows]
            images = torch.cat([batch.images for batch in batches])
            captions = [caption for batch in batches for caption in batch.captions]
            found.append((rows, encoder.encode_image(images), encoder.encode_text(captions)))
        return found

    parts = agreed(computed)
    of_images, of_texts = ([(rows, pair[kind]) for rows, *pair in parts] for kind in (0, 1))
    images = gathered(of_images, args.count, encoder.dim, encoder.device)
    texts = gathered(of_texts, args.count, encoder.dim, encoder.device)
    if dist.get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_state(path, {"images": images, "texts": texts})
    return Truth(images, texts)


def judge(
    name: str, loaded: Loaded, clip: FrozenClip | None, encoder: FrozenClip, args: argparse.Namespace
) -> Judged:
    """Held-out loss and gains of one model, then its pictures, once per guidance scale. Collective."""
    few = held_out_config(loaded, args, min(args.samples, args.count))
    side = clip.image_side if clip and few.clip.pictured else None
    source = agreed(lambda: open_held_out(few, args.shards, side, Ranks()))
    figures = load_held_out(few, source, create_diffusion(loaded.schedule), clip).measure(loaded.model)
    source = agreed(lambda: open_held_out(held_out_config(loaded, args), args.shards, side, Ranks()))
    weights = _digest(loaded)
    drawn = {}
    for guidance in args.guidance:
        about = [
            *(weights, loaded.schedule, source.fingerprint),
            *(args.steps, guidance, args.clip_scale, args.clip_guidance),
        ]
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
        folder = args.out_dir / f"guidance-{guidance:g}-{key}" if args.out_dir else None
        painter = Painter(loaded, clip, source, args, guidance, folder)
        with Progress(
            f"drawing {name}, guidance {guidance:g}", args.count, "pictures", shown=is_first()
        ) as progress:
            parts = agreed(partial(painter.features, encoder, progress))
        drawn[guidance] = gathered(parts, args.count, encoder.dim, encoder.device)
    return Judged(figures, drawn)


@dataclass(frozen=True)
class Painter:
    """Draws a model's pictures of the held-out captions at one guidance scale."""

    loaded: Loaded
    clip: FrozenClip | None
    source: Source
    args: argparse.Namespace
    guidance: float
    folder: Path | None  # where pictures are kept

    def features(self, encoder: FrozenClip, progress: Progress) -> list[tuple[range, Tensor]]:
        """Of this rank's pictures."""
        found = []
        for rows in chunks(self.args.count):
            found.append((rows, encoder.encode_image(self.pictures(rows))))
            left = self.args.count - progress.done
            progress.advance(min(left, len(rows) * dist.get_world_size()))
        return found

    def pictures(self, rows: range) -> Tensor:
        """Of these samples' captions, uint8 [B, S, S, 3]: those kept before, or drawn now."""
        paths = [self.folder / f"{row:06d}.png" for row in rows] if self.folder else []
        kept = _read(paths)
        if kept is not None:
            return kept
        batches = [self.source.one(row) for row in rows]
        captions = [caption for batch in batches for caption in batch.captions]
        images = draw(
            self.loaded.model,
            captions,
            schedule=self.loaded.schedule,
            clip_embedding=self._embedding(batches, captions),
            clip_scale=self.args.clip_scale,
            guidance=self.guidance,
            clip_guidance=self.args.clip_guidance if self.clip else None,
            steps=self.args.steps,
            seed=[hash64(0, row) for row in rows],
        ).cpu()
        for path, image in zip(paths, images, strict=False):
            write_picture(path, Image.fromarray(image.numpy()))
        return images

    def _embedding(self, batches: Sequence[Batch], captions: list[str]) -> Tensor | None:
        """What CLIP says beside the captions, [B, D]: of the pictures where the model was trained on theirs."""
        if self.clip is None:
            return None
        pictures = [batch.clip_images for batch in batches if batch.clip_images is not None]
        if pictures and self.loaded.clip is not None and self.loaded.clip.source == "image":
            return self.clip.encode_image(torch.cat(pictures))
        return self.clip.encode_text(captions)


def _read(paths: Sequence[Path]) -> Tensor | None:
    """The pictures in these files, where all are there and whole."""
    try:
        read = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    except (FileNotFoundError, UnidentifiedImageError):
        return None
    return torch.from_numpy(np.stack(read)) if read else None


def _digest(loaded: Loaded) -> str:
    """Of the weights, whatever file they are from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(loaded.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---- what is told


def summary(
    args: argparse.Namespace, truth: Truth, judged: dict[str, Judged], encoder: FrozenClip
) -> dict[str, Any]:
    """All figures as JSON has them, and printed. Rank 0 alone."""
    if args.count < encoder.dim:
        print(
            f"!! {args.count} pictures are fewer than the {encoder.dim} numbers of a feature: the Fréchet distance is "
            "for comparing models on these captions alone"
        )
    models: dict[str, Any] = {}
    for name, found in judged.items():
        print(
            f"{name}: held-out loss {found.figures.loss:.5f}, with CLIP off {found.figures.loss_clip_off:.5f}"
        )
        by_guidance: dict[str, Quality] = {}
        for guidance, features in found.drawn.items():
            by_guidance[f"{guidance:g}"] = quality(truth.images, features, truth.texts)
            print(f"  guidance {guidance:g}: {by_guidance[f'{guidance:g}']}", flush=True)
        models[name] = {
            "held_out": asdict(found.figures),
            "guidance": {scale: asdict(one) for scale, one in by_guidance.items()},
        }
    differences: dict[str, Any] = {}
    first, *others = judged
    for other in others:
        for guidance in args.guidance:
            pair = judged[first].drawn[guidance], judged[other].drawn[guidance]
            apart = compared(truth.images, truth.texts, *pair)
            differences.setdefault(f"{first} → {other}", {})[f"{guidance:g}"] = as_json(apart)
            print(f"{first} → {other}, guidance {guidance:g} (* exceeds its error):")
            for figure, one in apart.items():
                print(f"  {figure:16} {one.value:+.4g} ± {one.error:.2g}{' *' * one.real}")
    return {
        "shards": args.shards,
        "count": args.count,
        "features": encoder.name,
        "steps": args.steps,
        "models": models,
        "differences": differences,
    }
