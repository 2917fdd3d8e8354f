"""What of a shard's samples is to be embedded, read, decoded and tokenised by loader processes beside the encoder.

R embeddings of a part, M of them to be computed, T tokens, S the side of CLIP's pictures, D the embeddings' width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from glide_ds.data.clip_notes import Encoder
from glide_ds.data.clip_store import Embedded, Rows, picture_hash, text_hash
from glide_ds.data.pictures.decode import DecodeOptions, decode, image_member
from glide_ds.data.tally import Unusable
from glide_ds.data.tars.shards import ShardSet
from glide_ds.data.texts.recaptions import Captions
from glide_ds.data.workers import heed_the_trainer
from glide_ds.errors import GlideError

AHEAD = 2  # parts that each process prepares

Inputs = NDArray[Any]  # int64 [M, T] tokens, or uint8 [M, S, S, 3] pictures


@dataclass(frozen=True)
class Task:
    """What is to be embedded, and by what."""

    encoder: Encoder
    captions: Captions
    every: bool  # each of a sample's captions, not the first alone
    batch: int  # what the encoder is given at once; a part is of as many samples


class Part(NamedTuple):
    """Samples of a shard that follow each other."""

    shard: int
    last: bool  # of its shard
    counts: list[int]  # embeddings of each sample, 1 where it has none
    hashes: list[int]  # [R] of what is embedded; 0 where there is nothing
    rows: Rows  # [R, D], those that are known; else zeros
    todo: list[int]  # [M] the rows that are to be computed
    inputs: Inputs


@dataclass(frozen=True)
class Reading(Dataset[Part | GlideError]):
    """Parts by (shard, first sample, end)."""

    shards: ShardSet
    task: Task
    known: Embedded
    dim: int
    tokenize: Callable[[list[str]], Tensor]
    options: DecodeOptions

    def __getitem__(self, place: tuple[int, int, int]) -> Part | GlideError:
        try:
            return self._part(*place)
        except GlideError as error:  # a worker can't raise it: torch would make another one of it
            return error

    def _part(self, shard: int, first: int, end: int) -> Part:
        found = [self._hashed(sample) for sample in range(first, end)]
        hashes = [value for each in found for value, _ in (each or [(0, "")])]
        given = [item for each in found for _, item in (each or [(0, "")])]
        rows = np.zeros((len(hashes), self.dim), np.float16)
        todo = [row for row, value in enumerate(hashes) if value and not self.known.take(value, rows[row])]
        inputs, unusable = self._inputs([given[row] for row in todo])
        for place in reversed(unusable):
            hashes[todo.pop(place)] = 0
        counts = [max(1, len(each)) for each in found]
        return Part(shard, end == self.shards.ends[shard], counts, hashes, rows, todo, inputs)

    def _hashed(self, sample: int) -> list[tuple[int, str | bytes]]:
        """(hash, caption or picture file) of what of a sample is embedded; none where it has no caption or picture."""
        members = self.shards.read(sample)
        try:
            if self.task.encoder.source == "image":
                picture = image_member(members)
                return [(picture_hash(picture), picture)]
            key = partial(self.shards.key, sample)
            captions = self.task.captions
            # 0.0 is the draw that the loader uses with a store of one caption a sample.
            texts = captions.all(members, key) if self.task.every else [captions.read(members, 0.0, key)[0]]
        except Unusable:
            return []
        return [(text_hash(text), text) for text in texts]

    def _inputs(self, given: Sequence[str | bytes]) -> tuple[Inputs, list[int]]:
        """(what the encoder reads, the places of those that can't be)."""
        if self.task.encoder.source == "text":
            texts = [text for text in given if isinstance(text, str)]
            return self.tokenize(texts).numpy() if texts else np.zeros((0, 0), np.int64), []
        pictures, unusable = [], []
        for place, data in enumerate(given):
            assert isinstance(data, bytes)
            try:
                pictures.append(decode(data, self.options))
            except Unusable:
                unusable.append(place)
        side = self.options.size
        return np.stack(pictures) if pictures else np.zeros((0, side, side, 3), np.uint8), unusable

    def places(self, shards: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """The parts of these shards, in order; an empty shard has one."""
        for shard in shards:
            end = int(self.shards.ends[shard])
            first = end - int(self.shards.sizes[shard])
            while True:
                part = min(end, first + self.task.batch)
                yield shard, first, part
                first = part
                if first == end:
                    break

    def over(self, shards: Sequence[int], workers: int) -> Iterator[Part]:
        """The parts of these shards, in order, made by `workers` processes, or here. Raises what they could not."""
        loading: DataLoader[Part | GlideError] = DataLoader(
            self,
            batch_size=None,
            sampler=self.places(shards),
            num_workers=workers,
            prefetch_factor=AHEAD if workers else None,
            collate_fn=_as_it_is,
            worker_init_fn=heed_the_trainer,
            generator=torch.Generator(),
        )
        for part in loading:
            if isinstance(part, GlideError):
                raise part
            yield part


def _as_it_is(part: Any) -> Any:
    return part  # arrays, which go through a pipe: torch's tensors would need room in /dev/shm
