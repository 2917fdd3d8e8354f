"""What one loader process reads of an epoch's streams: its share, through webdataset's pipeline."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from braceexpand import braceexpand
from torch.utils.data import IterableDataset, get_worker_info

from glide_ds.config import DataConfig
from glide_ds.data.filters import Filtered
from glide_ds.data.filters import check as check_rules
from glide_ds.data.loader import CAPTION_DRAW, PICTURE_DRAW, Layout, Made, assemble
from glide_ds.data.order import mix, uniform
from glide_ds.data.samples import Sample, decode_options, decoded
from glide_ds.data.tally import Tally, Unusable
from glide_ds.data.tars.patterns import expand
from glide_ds.data.tars.peers import Alone, Peers
from glide_ds.data.tars.storage import Storage
from glide_ds.data.tars.stream import COMMAND, Damaged, Share, members, shares
from glide_ds.data.texts.recaptions import Captions
from glide_ds.errors import DataError, GlideError
from glide_ds.masking import bare, masked
from glide_ds.types import Batch

DAMAGED, TWICE = "damaged shard", "a member twice in a sample, the first taken"
SHARD_BITS = 32  # a sample's number is its shard's, and its own within it below that


def stream_urls(patterns: str | Sequence[str]) -> list[str]:
    """The shards and commands that data.shards names. Raises DataError as `expand` does."""
    urls: list[str] = []
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        urls += braceexpand(pattern) if pattern.startswith(COMMAND) else expand(pattern)
    if len(set(map(bare, urls))) < len(urls):
        raise DataError(
            "data.shards names a stream more than once",
            "its samples would be read twice an epoch",
            "name each once",
        )
    return urls


@dataclass(frozen=True)
class Plan:
    """What every loader process of a rank reads by."""

    urls: tuple[str, ...]
    fingerprint: int
    config: DataConfig
    layout: Layout
    clip_side: int | None
    captions: Captions

    def order(self, epoch: int) -> tuple[int, np.ndarray[Any, np.dtype[np.int64]]]:
        """(the epoch's key, its order of the shards)."""
        key = int(mix(self.layout.seed, self.fingerprint, epoch)[0])
        shards = np.arange(len(self.urls))
        return key, np.argsort(mix(key, shards), kind="stable") if self.config.shuffle else shards


def stream_plan(
    config: DataConfig, layout: Layout, clip_side: int | None = None, peers: Peers | None = None
) -> Plan:
    """What is read; the first rank's names are everyone's. Raises DataError where they can't be found."""
    urls = (peers or Alone()).first(lambda: stream_urls(config.shards))
    digest = hashlib.blake2b("\n".join(map(bare, urls)).encode(), digest_size=8).digest()
    captions = Captions(config.captions, config.caption_file)
    return Plan(tuple(urls), int.from_bytes(digest, "big"), config, layout, clip_side, captions)


class Row(NamedTuple):
    """A usable sample of a stream."""

    id: int
    pictured: bool
    sample: Sample


class Reading(IterableDataset[Made]):
    """One epoch's micro-batches of a process's share; the last may be smaller, and the very last hold none."""

    def __init__(self, plan: Plan, epoch: int) -> None:
        self.plan, self.epoch, self._tally = plan, epoch, Tally()

    def __iter__(self) -> Iterator[Made]:
        try:
            rows = self._rows()
            while found := list(islice(rows, self.plan.layout.micro_batch)):
                yield Made(self._batch(found), self._counted())
            yield Made(None, self._counted())  # what was read since the last usable sample
        except GlideError as error:  # a worker can't raise it: torch would make another one of it
            yield Made(None, self._counted(), error)

    def _counted(self) -> Tally:
        tally, self._tally = self._tally, Tally()
        return tally

    def _rows(self) -> Iterator[Row]:
        for number, key, found in self._samples():
            self._tally.read += 1
            try:
                row = self._row(number, key, found)
            except Filtered as finding:
                self._tally.filtered[finding.cause] += 1
            except Unusable as finding:
                name = masked(f"{self.plan.urls[number >> SHARD_BITS]} {key}")
                self._tally.skip(finding.cause, f"{name}: {finding.detail or finding.cause}")
            else:
                self._tally.tolerated.update(row.sample.notes)
                yield row

    def _row(self, number: int, key: str, found: dict[str, bytes]) -> Row:
        plan, seed = self.plan, self.plan.layout.seed
        pictured = bool(uniform(PICTURE_DRAW, seed, self.epoch, number)[0] < plan.layout.image_share)
        check_rules(found, plan.config.filter)
        die = float(uniform(CAPTION_DRAW, seed, self.epoch, number)[0])
        caption, notes = plan.captions.read(found, die, lambda: key)
        options = decode_options(plan.config, plan.layout.image_size)
        return Row(
            number, pictured, decoded(found, caption, notes, options, plan.clip_side if pictured else None)
        )

    def _batch(self, rows: list[Row]) -> Batch:
        """Of any number of rows; their slots are known once all ranks agree on the step."""
        layout, ids = self.plan.layout, np.array([row.id for row in rows], np.int64)
        images = np.stack([row.sample.pixels for row in rows])
        captions = tuple(row.sample.caption for row in rows)
        epochs = np.full(len(rows), self.epoch, np.int64)
        batch = assemble(self.plan.config, layout, ids, np.zeros_like(ids), epochs, images, captions)
        if layout.image_share:
            for_clip = [row.sample.clip_pixels for row in rows if row.sample.clip_pixels is not None]
            batch = replace(
                batch,
                pictured=torch.tensor([row.pictured for row in rows]),
                clip_images=torch.from_numpy(np.stack(for_clip)) if for_clip else None,
            )
        return batch

    # ---- webdataset's stages

    def _samples(self) -> Iterator[tuple[int, str, dict[str, bytes]]]:
        """(number, key, members by extension) of the share's samples, mixed."""
        import webdataset as wds  # here, not on top: it costs other runs time
        from webdataset.tariterators import group_by_keys

        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        layout = self.plan.layout
        reader, readers = layout.rank * workers + worker, layout.world_size * workers
        key, turn = self.plan.order(self.epoch)
        stages = [
            partial(self._members, shares(turn, reader, readers)),
            partial(group_by_keys, handler=self._twice),
            self._own,
        ]
        if self.plan.config.shuffle:
            size = self.plan.config.shuffle_buffer
            stages.append(wds.shuffle(size, initial=size, rng=random.Random(int(mix(key, reader)[0]))))
        yield from wds.DataPipeline(*stages)

    def _members(self, taken: list[Share]) -> Iterator[dict[str, Any]]:
        storage = Storage()
        for share in taken:
            url = self.plan.urls[share.shard]
            try:
                for name, data in members(url, storage):
                    yield {"fname": name, "data": data, "__url__": share}
            except Damaged as finding:
                self._damaged(masked(f"{url}: {finding}"))
            yield {}  # webdataset's mark that a sample ends here in any case

    def _damaged(self, what: str) -> None:
        if self.plan.config.damaged_shards != "salvage":
            raise DataError(
                f"a shard is damaged: {what}",
                "samples would be missing",
                "fetch it again, or set data.damaged_shards=salvage to train on what comes before the damage",
            )
        self._tally.read += 1
        self._tally.skip(DAMAGED, what)

    def _twice(self, error: Exception) -> bool:
        """What group_by_keys does with its one error: a member of a name that the sample has already."""
        self._tally.tolerated[TWICE] += 1
        return True

    def _own(self, found: Iterator[dict[str, Any]]) -> Iterator[tuple[int, str, dict[str, bytes]]]:
        share, row = None, 0
        for sample in found:
            if sample["__url__"] is not share:
                share, row = sample["__url__"], 0
            if share.has(row):
                contents = {key: value for key, value in sample.items() if not key.startswith("__")}
                yield share.shard << SHARD_BITS | row, sample["__key__"], contents
            row += 1
