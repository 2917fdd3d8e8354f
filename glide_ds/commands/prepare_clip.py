"""`glide-ds prepare clip`: CLIP embeddings of whole shards, over every process it is launched with.

    glide-ds prepare clip SHARDS --out clip/
    torchrun --nproc_per_node 8 -m glide_ds prepare clip SHARDS --out clip/

Process r of R takes shards r, r + R, …; no process waits for another. A shard that is as it was when it was embedded is
skipped, and of any other only what the store has no embedding of is computed: so the same command again, on any number
of processes, resumes, and follows captions that were mended and samples that moved.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from glide_ds.config import ClipConfig, DataConfig
from glide_ds.data.clip_notes import Encoder, Places, StoreNote, encoders, read_note
from glide_ds.data.clip_store import Embedded, picture_hash, text_hash, write_store
from glide_ds.data.pictures.decode import Cropping, DecodeOptions, Pixels, decode, image_member
from glide_ds.data.tally import Unusable
from glide_ds.data.tars.peers import Alone
from glide_ds.data.tars.shards import ShardSet, open_shards
from glide_ds.data.texts.recaptions import Captions
from glide_ds.environment import rank_of_environment
from glide_ds.errors import ConfigError, DataError
from glide_ds.files import user_path
from glide_ds.model.clip import SOURCES, FrozenClip, weights_hash
from glide_ds.progress import Progress

NO_PIXELS: Pixels = np.empty((0, 0, 3), np.uint8)
Embeddings = NDArray[np.float16]


class Task(NamedTuple):
    """What is to be embedded, and by what."""

    encoder: Encoder
    captions: Captions
    every: bool  # each of a sample's captions, not the first alone
    batch: int


class Place(NamedTuple):
    """This process among those launched."""

    rank: int
    world_size: int
    device: torch.device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", help="brace patterns, globs, folders or URLs of tar files")
    parser.add_argument("--out", type=user_path, required=True, help="the store's folder, for data.clip_store")
    parser.add_argument("--model", default="ViT-L/14")
    parser.add_argument("--weights", default="openai", help="open_clip's tag or a local file")
    parser.add_argument("--source", choices=SOURCES, default="text", help="as clip.source")
    parser.add_argument("--crop", choices=["center", "pad"], default="center", help="as data.crop, of pictures")
    parser.add_argument("--no_trim", dest="trim", action="store_false", help="as data.trim=false, of pictures")
    parser.add_argument("--captions", help="the run's data.captions, as JSON: each of them is embedded")
    parser.add_argument("--caption_file", type=user_path, help="the run's data.caption_file")
    parser.add_argument("--every_caption", action="store_true", help="embed all captions of a sample, not one")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--index_dir", type=user_path)
    parser.add_argument("--force", action="store_true", help="compute again what is there")


def run(args: argparse.Namespace) -> None:
    place = _place()
    shards = open_shards(args.shards, args.index_dir, salvage=True, peers=Alone((place.rank, place.world_size)))
    captions = _captions(args)
    config = ClipConfig(model=args.model, weights=args.weights, source=args.source)
    clip: FrozenClip | None = None
    for encoder in encoders(config, Cropping(args.crop, args.trim)):
        every = encoder.source == "text" and bool(args.captions or args.every_caption)
        clip = embed_shards(args, place, shards, Task(encoder, captions, every, args.batch), clip)
    if place.rank == 0:
        print(
            f"Next: glide-ds preflight --ds_config ds_configs/phase1.json --set clip.model={args.model} "
            f"data.clip_store={args.out} data.shards=…"
        )


def embed_shards(
    args: argparse.Namespace, place: Place, shards: ShardSet, task: Task, clip: FrozenClip | None
) -> FrozenClip | None:
    """This process's share of the shards, by one kind of embedding. The model goes in and out, once it's loaded."""
    made_by = weights_hash(args.model, args.weights)
    store = Places(args.out)
    mine = range(place.rank, len(shards.urls), place.world_size)
    todo = [n for n in mine if args.force or not _is_done(store, shards, n, task, made_by)]
    print(
        f"rank {place.rank}: {len(todo)} shards to embed by {task.encoder.source}, {len(mine) - len(todo)} are done",
        flush=True,
    )
    if not todo:
        return clip
    known = Embedded([] if args.force else _of_other_shards(store, shards, todo), task.encoder, made_by)
    clip = clip or FrozenClip(args.model, args.weights, place.device, source=args.source)
    became: Counter[str] = Counter()
    with Progress(f"rank {place.rank}: embedding", len(todo), "shards") as progress:
        for shard in progress.over(todo):
            became += embed_shard(args.out, shards, shard, task, clip, known)
    print(
        f"rank {place.rank}: {became['computed']} embeddings computed, {became['kept']} kept that were there, "
        f"{became['missing']} samples have none",
        flush=True,
    )
    return clip


def _captions(args: argparse.Namespace) -> Captions:
    try:
        fields = json.loads(args.captions or "{}")
    except ValueError as error:
        raise ConfigError(
            f"--captions {args.captions!r} is no JSON ({error})",
            remedy='write it as \'{"txt": 1, "json.short": 2}\'',
        ) from error
    data = DataConfig.of({"shards": args.shards, "captions": fields, "caption_file": args.caption_file}, "data")
    return Captions(data.captions, data.caption_file)


def _of_other_shards(store: Places, shards: ShardSet, todo: list[int]) -> list[Path]:
    """The notes of all but those shards of the set that are done: what the rest may have been before."""
    done = set(range(len(shards.urls))) - set(todo)
    fit = {path for n in done for path in store.of(shards.urls[n], shards.fingerprints[n])}
    return [path for path in store.all() if path not in fit]


def _place() -> Place:
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return Place(*rank_of_environment(), device)


def _is_done(store: Places, shards: ShardSet, shard: int, task: Task, made_by: str) -> bool:
    head, url = shards.heads[shard], shards.urls[shard]
    done = False
    for path in store.before(url):
        try:
            note = read_note(path)
        except DataError:
            continue
        if note.encoder.source != task.encoder.source:
            continue
        if note.encoder != task.encoder:
            raise DataError(
                f"{path} holds embeddings of {note.encoder}, not of {task.encoder}",
                remedy="choose another --out",
            )
        fits = (note.fingerprint, note.version, note.weights_hash) == (head.fingerprint, head.version, made_by)
        # Which captions were named isn't noted: those of a side file may be others.
        fits = fits and note.every == task.every and not task.captions.named
        done = done or (fits and path.with_suffix(".npy").exists())
    return done


class Rows:
    """The embeddings of one shard as they come, sample after sample: a row for each caption, or one of the picture."""

    def __init__(self, dim: int) -> None:
        self.first, self.hashes, self._rows = [0], list[int](), list[Embeddings]()
        self._dim, self.missing = dim, 0

    def add(self, hashes: Sequence[int]) -> list[Embeddings]:
        """A sample's rows, to be filled; without any hash it is one that has no embedding."""
        rows = [np.zeros(self._dim, np.float16) for _ in hashes or [0]]
        self.missing += not hashes
        self.hashes += hashes or [0]
        self._rows += rows
        self.first.append(len(self._rows))
        return rows

    def array(self) -> Embeddings:
        return np.stack(self._rows) if self._rows else np.zeros((0, self._dim), np.float16)


def embed_shard(
    out: str, shards: ShardSet, shard: int, task: Task, clip: FrozenClip, known: Embedded
) -> Counter[str]:
    """Store the embeddings of one shard, computing those that aren't known; counts what became of its samples.

    Samples without a caption or picture get zeros.
    """
    head, rows, computed = shards.heads[shard], Rows(clip.dim), 0
    encoder = task.encoder
    options = DecodeOptions(clip.image_side, encoder.crop or "center", encoder.trim is not False)
    for places, inputs in _batches(shards, shard, task, options, known, rows):
        for place, embedding in zip(places, _encode(clip, task.encoder.source, inputs), strict=True):
            place[:] = embedding
        computed += len(places)
    note = StoreNote(
        encoder=task.encoder,
        weights_hash=clip.weights_hash,
        fingerprint=head.fingerprint,
        version=head.version,
        samples=head.samples,
        dim=clip.dim,
        missing=rows.missing,
        every=task.every,
    )
    write_store(
        out,
        shards.urls[shard],
        rows.array(),
        np.array(rows.hashes, np.uint64),
        note,
        rows.first if task.every else None,
    )
    kept = len(rows.hashes) - rows.missing - computed
    return Counter(computed=computed, kept=kept, missing=rows.missing)


def _batches(
    shards: ShardSet, shard: int, task: Task, options: DecodeOptions, known: Embedded, rows: Rows
) -> Iterator[tuple[list[Embeddings], list[str | Pixels]]]:
    """(rows to fill, captions or pictures) of what is to be computed; fills the rows of what is known."""
    first = int(shards.ends[shard] - shards.sizes[shard])
    places: list[Embeddings] = []
    inputs: list[str | Pixels] = []
    for sample in range(first, int(shards.ends[shard])):
        given, hashes = _inputs(shards, sample, task, options, known)
        for item, hashed, place in zip(given, hashes, rows.add(hashes), strict=False):
            if not known.take(hashed, place):
                places.append(place)
                inputs.append(item)
            if len(places) == task.batch:
                yield places, inputs
                places, inputs = [], []
    if places:
        yield places, inputs


def _inputs(
    shards: ShardSet, sample: int, task: Task, options: DecodeOptions, known: Embedded
) -> tuple[list[str | Pixels], list[int]]:
    """What of a sample is embedded, and its hashes; nothing where it has no caption or picture."""
    members = shards.read(sample)
    key = partial(shards.key, sample)
    try:
        if task.encoder.source == "image":
            picture = image_member(members)
            hashed = picture_hash(picture)
            # Where it is known there is nothing to decode.
            given = NO_PIXELS if hashed in known else decode(picture, options)
            return [given], [hashed]
        # 0.0 is the draw that the loader uses with a store of one caption a sample.
        texts = task.captions.all(members, key) if task.every else [task.captions.read(members, 0.0, key)[0]]
    except Unusable:
        return [], []
    return list(texts), [text_hash(text) for text in texts]


def _encode(clip: FrozenClip, source: str, inputs: list[str | Pixels]) -> np.ndarray:
    if source == "text":
        embeddings = clip.encode_text([str(text) for text in inputs])
    else:
        embeddings = clip.encode_image(torch.from_numpy(np.stack([np.asarray(item) for item in inputs])))
    return embeddings.to(torch.float16).cpu().numpy()
