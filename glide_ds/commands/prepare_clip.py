"""`glide-ds prepare clip`: CLIP embeddings of whole shards, over every process it is launched with.

    glide-ds prepare clip SHARDS --out clip/
    torchrun --nproc_per_node 8 -m glide_ds prepare clip SHARDS --out clip/

Process r of R takes shards r, r + R, …; no process waits for another. A shard that is as it was when it was embedded is
skipped, and of any other only what the store has no embedding of is computed: so the same command again, on any number
of processes, resumes, and follows captions that were mended and samples that moved.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from glide_ds.config import ClipConfig
from glide_ds.data.captions import read_caption
from glide_ds.data.clip_notes import Encoder, Places, StoreNote, encoders, read_note
from glide_ds.data.clip_store import Embedded, Hashes, Rows, picture_hash, text_hash, write_store
from glide_ds.data.pictures.decode import Cropping, DecodeOptions, Pixels, decode, image_member
from glide_ds.data.tally import Unusable
from glide_ds.data.tars.peers import Alone
from glide_ds.data.tars.shards import ShardSet, open_shards
from glide_ds.environment import rank_of_environment
from glide_ds.errors import DataError
from glide_ds.files import user_path
from glide_ds.model.clip import SOURCES, FrozenClip, weights_hash
from glide_ds.progress import Progress


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
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--index_dir", type=user_path)
    parser.add_argument("--force", action="store_true", help="compute again what is there")


def run(args: argparse.Namespace) -> None:
    place = _place()
    shards = open_shards(args.shards, args.index_dir, salvage=True, peers=Alone((place.rank, place.world_size)))
    config = ClipConfig(model=args.model, weights=args.weights, source=args.source)
    clip: FrozenClip | None = None
    for encoder in encoders(config, Cropping(args.crop, args.trim)):
        clip = embed_shards(args, place, shards, encoder, clip)


def embed_shards(
    args: argparse.Namespace, place: Place, shards: ShardSet, encoder: Encoder, clip: FrozenClip | None
) -> FrozenClip | None:
    """This process's share of the shards, by one kind of embedding. The model goes in and out, once it's loaded."""
    made_by = weights_hash(args.model, args.weights)
    store = Places(args.out)
    mine = range(place.rank, len(shards.urls), place.world_size)
    todo = [n for n in mine if args.force or not _is_done(store, shards, n, encoder, made_by)]
    print(
        f"rank {place.rank}: {len(todo)} shards to embed by {encoder.source}, {len(mine) - len(todo)} are done",
        flush=True,
    )
    if not todo:
        return clip
    known = Embedded([] if args.force else _of_other_shards(store, shards, todo), encoder, made_by)
    clip = clip or FrozenClip(args.model, args.weights, place.device, source=args.source)
    became: Counter[str] = Counter()
    with Progress(f"rank {place.rank}: embedding", len(todo), "shards") as progress:
        for shard in progress.over(todo):
            became += embed_shard(args.out, shards, shard, encoder, clip, args.batch, known)
    print(
        f"rank {place.rank}: {became['computed']} embeddings computed, {became['kept']} kept that were there, "
        f"{became['missing']} samples have none",
        flush=True,
    )
    return clip


def _of_other_shards(store: Places, shards: ShardSet, todo: list[int]) -> list[Path]:
    """The notes of all but those shards of the set that are done: what the rest may have been before."""
    done = set(range(len(shards.urls))) - set(todo)
    fit = {path for n in done for path in store.of(shards.urls[n], shards.fingerprints[n])}
    return [path for path in store.all() if path not in fit]


def _place() -> Place:
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return Place(*rank_of_environment(), device)


def _is_done(store: Places, shards: ShardSet, shard: int, encoder: Encoder, made_by: str) -> bool:
    head, url = shards.heads[shard], shards.urls[shard]
    done = False
    for path in store.before(url):
        try:
            note = read_note(path)
        except DataError:
            continue
        if note.encoder.source != encoder.source:
            continue
        if note.encoder != encoder:
            raise DataError(
                f"{path} holds embeddings of {note.encoder}, not of {encoder}", remedy="choose another --out"
            )
        fits = (note.fingerprint, note.version, note.weights_hash) == (head.fingerprint, head.version, made_by)
        done = done or (fits and path.with_suffix(".npy").exists())
    return done


def embed_shard(
    out: str,
    shards: ShardSet,
    shard: int,
    encoder: Encoder,
    clip: FrozenClip,
    batch: int,
    known: Embedded,
) -> Counter[str]:
    """Store the embeddings of one shard, computing those that aren't known; counts what became of its samples.

    Samples without a caption or picture get zeros.
    """
    head = shards.heads[shard]
    rows = np.zeros((head.samples, clip.dim), np.float16)
    hashes = np.zeros(head.samples, np.uint64)
    computed = 0
    options = DecodeOptions(clip.image_side, encoder.crop or "center", encoder.trim is not False)
    for numbers, inputs in _batches(shards, shard, encoder.source, options, batch, known, rows, hashes):
        rows[numbers] = _encode(clip, encoder.source, inputs)
        computed += len(numbers)
    missing = int((hashes == 0).sum())
    note = StoreNote(
        encoder=encoder,
        weights_hash=clip.weights_hash,
        fingerprint=head.fingerprint,
        version=head.version,
        samples=head.samples,
        dim=clip.dim,
        missing=missing,
    )
    write_store(out, shards.urls[shard], rows, hashes, note)
    return Counter(computed=computed, kept=head.samples - computed - missing, missing=missing)


def _batches(
    shards: ShardSet,
    shard: int,
    source: str,
    options: DecodeOptions,
    batch: int,
    known: Embedded,
    rows: Rows,
    hashes: Hashes,
) -> Iterator[tuple[list[int], list[str | Pixels]]]:
    """(sample numbers in the shard, captions or pictures) of what is to be computed; puts what is known into `rows`."""
    first = int(shards.ends[shard] - shards.sizes[shard])
    numbers: list[int] = []
    inputs: list[str | Pixels] = []
    for number in range(int(shards.sizes[shard])):
        try:
            members = shards.read(first + number)
            # 0.0 is the draw that the loader uses with a store, where several captions could be chosen.
            given = read_caption(members, 0.0)[0] if source == "text" else image_member(members)
            hashed = text_hash(given) if isinstance(given, str) else picture_hash(given)
            if not known.take(hashed, rows[number]):
                inputs.append(given if isinstance(given, str) else decode(given, options))
                numbers.append(number)
        except Unusable:
            continue
        hashes[number] = hashed
        if len(numbers) == batch:
            yield numbers, inputs
            numbers, inputs = [], []
    if numbers:
        yield numbers, inputs


def _encode(clip: FrozenClip, source: str, inputs: list[str | Pixels]) -> np.ndarray:
    if source == "text":
        embeddings = clip.encode_text([str(text) for text in inputs])
    else:
        embeddings = clip.encode_image(torch.from_numpy(np.stack([np.asarray(item) for item in inputs])))
    return embeddings.to(torch.float16).cpu().numpy()
