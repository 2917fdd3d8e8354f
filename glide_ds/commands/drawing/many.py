"""Many pictures into a folder: over every process that is launched, each picture once, started again where it ended.

Requests go in tasks of whole prompts, in fixed order and of fixed size, which the ranks take in turn: what is computed
together is the same whoever computes it. A picture's file is there whole or not at all, and says in itself how it was
drawn; index.jsonl is made of the files by whoever finds them all there. The ranks never wait for each other.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from glide_ds.commands.drawing.drawer import Drawer
from glide_ds.data.pictures.decode import Cropping
from glide_ds.diffusion.sampling import Options
from glide_ds.errors import ConfigError, DataError
from glide_ds.files import sha256, write_file
from glide_ds.inference.prompts import clip_prompt, clip_prompts
from glide_ds.inference.requests import Request
from glide_ds.model.clip import FrozenClip
from glide_ds.progress import Progress

SETTINGS, INDEX = "drawing.json", "index.jsonl"
KEYWORD = "glide_ds"  # of the text in a PNG that says how it was drawn


@dataclass(frozen=True)
class Settings:
    """What decides the pictures, beside the requests; drawing.json holds it."""

    model: str
    upsampler: str | None
    n: int  # drawn per prompt
    keep: int  # the best of them by CLIP; n where all are kept
    ranked_by: str | None  # the encoder that says which
    seed: int
    batch: int
    steps: int | str
    sampler: str
    spacing: str
    guidance: float
    options: dict[str, Any]  # others of diffusion.sample that were given
    clip: bool
    bf16: bool = False
    compiled: bool = False


class Kept(NamedTuple):
    """A picture that is kept, and what is said of it."""

    pixels: Tensor  # uint8 [S, S, 3]
    request: Request
    place: int  # among those of its prompt: as drawn, or from the best on
    seed: int
    score: float | None  # cosine of CLIP's embeddings


def draw_many(
    drawer: Drawer,
    requests: Sequence[Request],
    settings: Settings,
    folder: Path,
    *,
    ranker: FrozenClip | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> None:
    """Draw what of this rank's tasks is not there yet; `ranker` chooses where not all are kept.

    Raises ConfigError where the folder holds other drawings.
    """
    claim(folder, settings, requests)
    there = {entry.name for entry in os.scandir(folder)}
    tasks = tasks_of(requests, settings)[rank::world_size]
    todo = [
        task
        for task in tasks
        if not there.issuperset(name for i in task for name in names(requests[i], settings))
    ]
    count = sum(map(len, todo)) * settings.keep
    done = sum(map(len, tasks)) * settings.keep - count
    print(f"rank {rank}: {count} pictures to draw, {done} are there", flush=True)
    with Progress(f"rank {rank}: drawing", count, "pictures") as progress:
        for task in todo:
            for kept in draw_task(drawer, requests, task, settings, ranker):
                write_file(folder / names(kept.request, settings)[kept.place], png(kept, settings))
                progress.advance()
    write_index(folder, [name for request in requests for name in names(request, settings)])


def tasks_of(requests: Sequence[Request], settings: Settings) -> list[list[int]]:
    """The places of requests that are drawn together: neighbours among those of one guidance."""
    size = max(1, settings.batch // settings.n)
    groups: dict[float | None, list[int]] = {}
    for place, request in enumerate(requests):
        groups.setdefault(request.guidance, []).append(place)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]


def names(request: Request, settings: Settings) -> list[str]:
    """A request's files: its line, and the picture's place where there are several."""
    if settings.keep == 1:
        return [f"{request.line:06d}.png"]
    return [f"{request.line:06d}-{place:02d}.png" for place in range(settings.keep)]


def draw_task(
    drawer: Drawer,
    requests: Sequence[Request],
    task: list[int],
    settings: Settings,
    ranker: FrozenClip | None,
) -> Iterator[Kept]:
    """The pictures of some requests of one guidance, `batch` at a time."""
    rows = [
        (requests[place], (settings.seed + place * settings.n if own is None else own) + k)
        for place in task
        for own in [requests[place].seed]
        for k in range(settings.n)
    ]
    asked = [requests[place] for place in task]
    guidance = requests[task[0]].guidance
    options: Options = {"sampler": settings.sampler, **settings.options}  # type: ignore[typeddict-item]
    wanted = None
    if settings.clip:
        apart = bool(options["clip_weights"])
        wanted = embeddings(drawer.encoder_for(asked), asked, drawer.base.pictures, apart=apart)
    options["guidance"] = settings.guidance if guidance is None else guidance
    drawn: list[Tensor] = []
    for first in range(0, len(rows), settings.batch):
        part = rows[first : first + settings.batch]
        if wanted is not None:
            of = torch.arange(first, first + len(part), device=wanted.device) // settings.n
            options["clip_embedding"] = wanted[of]
        captions, seeds = [request.prompt for request, _ in part], [seed for _, seed in part]
        files = [request.inpaint for request, _ in part]
        small = drawer.draw_small(
            captions, seeds, steps=settings.steps, spacing=settings.spacing, files=files, **options
        )
        drawn.append(small)
    images = torch.cat(drawn)
    chosen: list[int] = list(range(len(images)))
    scores: list[float] = []
    if ranker:
        chosen, scores = best(ranker, images, embeddings(ranker, asked, drawer.base.pictures), settings)
    for first in range(0, len(chosen), settings.batch):
        part = [rows[i] for i in chosen[first : first + settings.batch]]
        of_part = images[chosen[first : first + settings.batch]]
        large = drawer.enlarge(
            of_part,
            [request.prompt for request, _ in part],
            [seed for _, seed in part],
            files=[request.inpaint for request, _ in part],
        )
        for i, (request, seed) in enumerate(part, first):
            yield Kept(large[i - first], request, i % settings.keep, seed, scores[i] if scores else None)


def embeddings(
    encoder: FrozenClip, requests: Sequence[Request], cropping: Cropping, *, apart: bool = False
) -> Tensor:
    """What CLIP is shown for each request, [B, D]: its pictures and texts, else its prompt.

    apart: each of a request's pictures and texts for itself, [B, N, D]; all requests have the same number.
    """
    if apart:
        each = [clip_prompts(encoder, request.images, request.texts, cropping)[0] for request in requests]
        return torch.stack(each)
    seen = encoder.encode_text([request.prompt for request in requests])
    for row, request in enumerate(requests):
        if request.images or request.texts:
            try:
                seen[row] = clip_prompt(encoder, request.images, request.texts, cropping)[0]
            except DataError as error:
                raise DataError(f"line {request.line}: {error}") from error
    return seen


def best(
    ranker: FrozenClip, images: Tensor, target: Tensor, settings: Settings
) -> tuple[list[int], list[float]]:
    """(places, scores) of each prompt's `keep` pictures that CLIP finds nearest to it, the nearest first."""
    seen = torch.cat([ranker.encode_image(part) for part in images.split(settings.batch)])
    likeness = torch.cosine_similarity(seen.view(len(target), settings.n, -1), target[:, None], dim=-1)
    scores, order = likeness.sort(dim=1, descending=True, stable=True)
    starts = torch.arange(len(target), device=order.device)[:, None] * settings.n
    places = (starts + order)[:, : settings.keep].flatten().tolist()
    return places, [round(score, 4) for score in scores[:, : settings.keep].flatten().tolist()]


def png(kept: Kept, settings: Settings) -> bytes:
    """A PNG that says how it was drawn."""
    record = {
        "prompt": kept.request.prompt,
        "image": list(kept.request.images),
        "clip_prompt": list(kept.request.texts),
        "inpaint": kept.request.inpaint,
        "line": kept.request.line,
        "place": kept.place,
        "seed": kept.seed,
        "guidance": settings.guidance if kept.request.guidance is None else kept.request.guidance,
        "steps": settings.steps,
        "sampler": settings.sampler,
        "spacing": settings.spacing,
        **settings.options,
        "clip": settings.clip,
        "model": settings.model,
        "upsampler": settings.upsampler,
    }
    if kept.score is not None:
        record["score"] = kept.score
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("Description", kept.request.prompt)
    texts.add_itxt(KEYWORD, json.dumps(record, ensure_ascii=False))
    data = io.BytesIO()
    Image.fromarray(kept.pixels.numpy()).save(data, "PNG", pnginfo=texts)
    return data.getvalue()


def claim(folder: Path, settings: Settings, requests: Sequence[Request]) -> None:
    """Say in the folder what it holds, or find that it holds the same. Raises ConfigError for anything else."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = "\n".join(json.dumps(asdict(request), ensure_ascii=False) for request in requests)
    mine = asdict(settings) | {"requests": hashlib.sha256(asked.encode()).hexdigest()}
    path = folder / SETTINGS
    # Looked for first: other ranks write them, but none before that file is there.
    left = [entry.name for entry in os.scandir(folder) if entry.name.endswith(".png")]
    try:
        there = json.loads(path.read_text())
    except FileNotFoundError:
        if left:
            raise ConfigError(
                f"{folder} holds {left[0]} and no {SETTINGS}",
                "it might be overwritten",
                "give --out_dir a new folder",
            ) from None
        write_file(path, json.dumps(mine, indent=1, ensure_ascii=False) + "\n")
        return
    except ValueError as error:
        raise ConfigError(f"{path} can't be read ({error})", remedy="give --out_dir a new folder") from error
    mine = json.loads(json.dumps(mine))
    if wrong := [key for key in mine if there.get(key) != mine[key]]:
        key = wrong[0]
        raise ConfigError(
            f"{folder} holds pictures of another {key} ({there.get(key)}, now {mine[key]})",
            "they would be mixed",
            "give --out_dir a new folder, or start the command that began this one",
        )


def write_index(folder: Path, wanted: Sequence[str]) -> None:
    """index.jsonl, a line for each picture, once all are there."""
    there = {entry.name for entry in os.scandir(folder)}
    if missing := sum(name not in there for name in wanted):
        print(
            f"{missing} pictures are other ranks' and not there yet; the last to end writes {INDEX}", flush=True
        )
        return
    lines = []
    for name in wanted:
        with Image.open(folder / name) as picture:
            record = json.loads(picture.info[KEYWORD])
        lines.append(json.dumps({"file": name} | record, ensure_ascii=False))
    write_file(folder / INDEX, "\n".join(lines) + "\n")
    print(f"wrote {len(wanted)} pictures and {INDEX} to {folder}", flush=True)


def identity(source: str, origin: Path | None) -> str:
    """Words by which the same weights are known again: a file's hash, a checkpoint's folder, or the name."""
    if origin is None:
        return source
    return f"sha256:{sha256(origin)}" if origin.is_file() else "/".join(origin.resolve().parts[-3:])
