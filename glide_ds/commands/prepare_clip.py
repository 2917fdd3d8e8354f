"""`glide-ds prepare clip`: CLIP embeddings of whole shards, over every process it is launched with.

    glide-ds prepare clip SHARDS --out clip/
    torchrun --nproc_per_node 8 -m glide_ds prepare clip SHARDS --out clip/

Process r of R takes shards r, r + R, …; no process waits for another. A shard that is as it was when it was embedded is
skipped, and of any other only what the store has no embedding of is computed: so the same command again, on any number
of processes, resumes, and follows captions that were mended and samples that moved. Batches hold what is to be computed
of several shards, so another run may round an embedding otherwise in float16's last bit.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from glide_ds.config import ClipConfig, DataConfig
from glide_ds.data.clip_inputs import Part, Reading, Task
from glide_ds.data.clip_notes import Places, StoreNote, encoders, read_note
from glide_ds.data.clip_store import Embedded, Rows, write_store
from glide_ds.data.pictures.decode import Cropping, DecodeOptions
from glide_ds.data.tars.peers import Alone
from glide_ds.data.tars.shards import ShardSet, open_shards
from glide_ds.data.texts.recaptions import Captions
from glide_ds.environment import rank_of_environment, ranks_here
from glide_ds.errors import ConfigError, DataError
from glide_ds.files import check_place, user_path
from glide_ds.model.clip import SOURCES, FrozenClip, weights_hash
from glide_ds.progress import Progress

TEXT_BATCHES = 16  # of captions are sorted by their length at once
ENOUGH_WORKERS = 16
BF16_ERROR = 1e-3  # of the cosine: what a picture's embedding differs by otherwise, by float16 and resampling


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
    parser.add_argument(
        "--workers", type=int, help="processes that read and decode (default: this rank's cores)"
    )
    parser.add_argument(
        "--precision", choices=["fp32", "bf16"], help="of matrix products (default: bf16 on GPUs)"
    )
    parser.add_argument("--index_dir", type=user_path)
    parser.add_argument("--force", action="store_true", help="compute again what is there")


def run(args: argparse.Namespace) -> None:
    if args.batch < 1 or (args.workers or 0) < 0:
        raise ConfigError(
            f"--batch {args.batch} --workers {args.workers} embeds nothing", remedy="give 1 and 0 at least"
        )
    check_place(args.out)
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
    if clip is None:
        clip = FrozenClip(args.model, args.weights, place.device, source=args.source)
        clip.bf16 = args.precision == "bf16" if args.precision else place.device.type == "cuda"
    workers = _workers() if args.workers is None else args.workers
    embedding = Embedding(args.out, shards, task, clip, workers)
    options = DecodeOptions(clip.image_side, task.encoder.crop or "center", task.encoder.trim is not False)
    reading = Reading(shards, task, known, clip.dim, clip.tokenize, options)
    samples = int(shards.sizes[todo].sum())
    with Progress(f"rank {place.rank}: embedding", samples, "samples") as progress:
        for part in reading.over(todo, workers):
            embedding.add(part)
            progress.advance(len(part.counts))
        embedding.encode(len(embedding))
    embedding.threads.give_back()
    became = embedding.became
    print(
        f"rank {place.rank}: {became['computed']} embeddings computed, {became['kept']} kept that were there, "
        f"{became['missing']} samples have none",
        flush=True,
    )
    return clip


def _workers() -> int:
    return min(ENOUGH_WORKERS, max(1, len(os.sched_getaffinity(0)) // (ranks_here() or 1)))


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


class Growing:
    """The embeddings of a shard as its parts come."""

    def __init__(self) -> None:
        self.first, self.hashes, self.rows = [0], list[int](), list[Rows]()
        self.whole, self.waiting = False, 0  # for rows that are still to be computed

    def add(self, part: Part) -> None:
        for count in part.counts:
            self.first.append(self.first[-1] + count)
        self.hashes += part.hashes
        self.rows.append(part.rows)
        self.whole, self.waiting = part.last, self.waiting + len(part.todo)


class Threads:
    """How many threads the encoder takes on a CPU where workers decode beside it: all, or those that are left.

    To wait for a thread that finds no core takes longer than to do without it: 0.47 ms a picture instead of 0.12, by
    the built-in encoder beside two workers on two cores. A large encoder, which the workers wait for, wants all. Each
    is tried on a batch of the first three, of which the very first pays for what is made once.
    """

    def __init__(self, workers: int) -> None:
        self._all = torch.get_num_threads()
        left = max(1, self._all - workers)
        self._to_try = [left, left, self._all] if workers and left < self._all else []
        self._tried: list[tuple[float, int]] = []

    def run(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        if not self._to_try:
            return encode(inputs)
        threads = self._to_try.pop(0)
        torch.set_num_threads(threads)
        began = time.perf_counter()
        embeddings = encode(inputs)
        self._tried.append(((time.perf_counter() - began) / len(inputs), threads))
        if not self._to_try:
            torch.set_num_threads(min(self._tried[1:])[1])
        return embeddings

    def give_back(self) -> None:
        torch.set_num_threads(self._all)


class Embedding:
    """Gathers batches of what is to be computed, over the shards, and stores each shard once it is whole."""

    def __init__(self, out: str, shards: ShardSet, task: Task, clip: FrozenClip, workers: int) -> None:
        self._out, self._shards, self._task, self._clip = out, shards, task, clip
        self._growing: dict[int, Growing] = {}
        self._given: list[tuple[Growing, NDArray[np.float16], NDArray[Any]]] = []  # (shard, row, input)
        self._is_text, self._unjudged = task.encoder.source == "text", clip.bf16
        self.became = Counter[str]()
        # Captions are tokens in no time: their workers take no core.
        shared = clip.device.type == "cpu" and not self._is_text
        self.threads = Threads(workers if shared else 0)

    def __len__(self) -> int:
        """How many wait to be computed."""
        return len(self._given)

    def add(self, part: Part) -> None:
        shard = self._growing.setdefault(part.shard, Growing())
        shard.add(part)
        self._given += [(shard, part.rows[row], item) for row, item in zip(part.todo, part.inputs, strict=True)]
        self.became.update(
            computed=len(part.todo),
            missing=part.hashes.count(0),
            kept=len(part.hashes) - part.hashes.count(0) - len(part.todo),
        )
        if len(self._given) >= self._task.batch * (TEXT_BATCHES if self._is_text else 1):
            self.encode(len(self._given) // self._task.batch * self._task.batch)
        self._store()

    def encode(self, count: int) -> None:
        """Compute the first of what waits, captions of like length together, and store the shards that are whole."""
        given, self._given = self._given[:count], self._given[count:]
        if self._is_text:
            given.sort(key=lambda each: int(np.flatnonzero(each[2])[-1]))
        for first in range(0, len(given), self._task.batch):
            batch = given[first : first + self._task.batch]
            inputs = torch.from_numpy(np.stack([item for _, _, item in batch]))
            for (shard, row, _), embedding in zip(batch, self._encoded(inputs), strict=True):
                row[:] = embedding
                shard.waiting -= 1
        self._store()

    def _encoded(self, inputs: Tensor) -> Rows:
        """Of int64 [B, T] tokens or uint8 [B, S, S, 3] pictures: float16 [B, D]."""
        clip = self._clip
        if self._is_text and clip.plain:
            inputs = inputs[:, : int(inputs.any(0).nonzero().max()) + 1]
        encode = clip.encode_tokens if self._is_text else clip.encode_image
        embeddings = self.threads.run(encode, inputs)
        if self._unjudged:
            clip.bf16 = self._unjudged = False
            exact = encode(inputs)
            error = float((1 - torch.cosine_similarity(embeddings, exact)).max())
            clip.bf16 = error <= BF16_ERROR
            print(
                f"bf16 changes the cosine of these embeddings by up to {error:.1e} (the first {len(inputs)})"
                + ("" if clip.bf16 else f", more than {BF16_ERROR}: they are computed in fp32"),
                flush=True,
            )
            embeddings = embeddings if clip.bf16 else exact
        return embeddings.to(torch.float16).cpu().numpy()

    def _store(self) -> None:
        for number, shard in list(self._growing.items()):
            if not shard.whole or shard.waiting:
                continue
            del self._growing[number]
            head = self._shards.heads[number]
            note = StoreNote(
                encoder=self._task.encoder,
                weights_hash=self._clip.weights_hash,
                fingerprint=head.fingerprint,
                version=head.version,
                samples=head.samples,
                dim=self._clip.dim,
                missing=shard.hashes.count(0),
                every=self._task.every,
            )
            hashes, first = np.array(shard.hashes, np.uint64), shard.first if self._task.every else None
            write_store(self._out, self._shards.urls[number], np.concatenate(shard.rows), hashes, note, first)
