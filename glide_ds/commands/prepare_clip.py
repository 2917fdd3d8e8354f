"""`glide-ds prepare clip`: CLIP embeddings of whole shards, over every process it is launched with.

    glide-ds prepare clip SHARDS --out clip/
    torchrun --nproc_per_node 8 -m glide_ds prepare clip SHARDS --out clip/

Process r of R takes shards r, r + R, …; no process waits for another. A shard whose embeddings are there is
skipped, so the same command again, on any number of processes, resumes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from glide_ds.data.captions import read_caption
from glide_ds.data.clip_store import Encoder, StoreNote, read_note, store_path, write_store
from glide_ds.data.pictures.decode import DecodeOptions, Pixels, decode, image_member
from glide_ds.data.tally import Unusable
from glide_ds.data.tars.shards import ShardSet, open_shards
from glide_ds.errors import DataError
from glide_ds.model.clip import FrozenClip
from glide_ds.progress import Progress

PICTURE_SIDE = 224  # what pictures are decoded at before the encoder resizes them to its own input


class Place(NamedTuple):
    """This process among those launched."""

    rank: int
    world_size: int
    device: torch.device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", help="brace patterns, globs, folders or URLs of tar files")
    parser.add_argument("--out", required=True, help="the store's folder, for data.clip_store")
    parser.add_argument("--model", default="ViT-L/14")
    parser.add_argument("--weights", default="openai", help="open_clip's tag or a local file")
    parser.add_argument("--source", choices=["text", "image"], default="text")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--index_dir")
    parser.add_argument("--force", action="store_true", help="compute again what is there")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # deepspeed's launcher


def run(args: argparse.Namespace) -> None:
    place = _place(args.local_rank)
    shards = open_shards(args.shards, args.index_dir, salvage=True, part=(place.rank, place.world_size))
    encoder = Encoder(args.model, args.weights, args.source)
    mine = range(place.rank, len(shards.urls), place.world_size)
    todo = [n for n in mine if args.force or not _is_done(args.out, shards, n, encoder)]
    print(f"rank {place.rank}: {len(todo)} shards to embed, {len(mine) - len(todo)} are done", flush=True)
    if not todo:
        return
    clip = FrozenClip(args.model, args.weights, place.device, source=args.source)
    with Progress(f"rank {place.rank}: embedding", len(todo), "shards") as progress:
        for shard in progress.over(todo):
            embed_shard(args.out, shards, shard, encoder, clip, args.batch)


def _place(local_rank: int) -> Place:
    local_rank = int(os.environ.get("LOCAL_RANK", local_rank))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    return Place(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), device)


def _is_done(out: str, shards: ShardSet, shard: int, encoder: Encoder) -> bool:
    path = store_path(out, shards.urls[shard], shards.key_hashes[shard])
    try:
        note = read_note(path.with_suffix(".json"))
    except DataError:
        return False
    if note.encoder != encoder:
        raise DataError(
            f"{path} holds embeddings of {note.encoder}, not of {encoder}",
            remedy="choose another --out, or --force",
        )
    return path.exists()


def embed_shard(
    out: str, shards: ShardSet, shard: int, encoder: Encoder, clip: FrozenClip, batch: int
) -> StoreNote:
    """Compute and store the embeddings of one shard; samples without a caption or picture get zeros."""
    samples = int(shards.sizes[shard])
    rows = np.zeros((samples, clip.dim), np.float16)
    for numbers, inputs in _batches(shards, shard, encoder.source, batch):
        rows[numbers] = _encode(clip, encoder.source, inputs)
    note = StoreNote(
        encoder=encoder,
        weights_hash=clip.weights_hash,
        key_hash=shards.key_hashes[shard],
        samples=samples,
        dim=clip.dim,
        missing=int((~rows.any(axis=1)).sum()),
    )
    write_store(store_path(out, shards.urls[shard], shards.key_hashes[shard]), rows, note)
    return note


def _batches(
    shards: ShardSet, shard: int, source: str, batch: int
) -> Iterator[tuple[list[int], list[str | Pixels]]]:
    """(sample numbers in the shard, captions or pictures), leaving out what cannot be used."""
    first = int(shards.ends[shard] - shards.sizes[shard])
    options = DecodeOptions(PICTURE_SIDE)
    numbers: list[int] = []
    inputs: list[str | Pixels] = []
    for number in range(int(shards.sizes[shard])):
        try:
            members = shards.read(first + number)
            # 0.0 is the draw that the loader uses with a store, where several captions could be chosen.
            item = read_caption(members, 0.0)[0] if source == "text" else decode(image_member(members), options)
        except Unusable:
            continue
        numbers.append(number)
        inputs.append(item)
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
