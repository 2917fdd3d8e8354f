"""Batches from shards that are read from beginning to end, through webdataset's pipeline.

An epoch's shards, in an order of its own, are cut into equal shares, one for each loader process of each rank
(tars/stream.py), and each process mixes its share in a buffer. The share's samples go through the same code as
those of indexed shards. How many of them are usable nobody knows before they are read, so the ranks agree as they
go: a step is delivered where all ranks have their part of it, and the epoch ends for all where one of them
has not. What the others then still have is the epoch's tail: read, counted as left out, and not trained on.

A run that goes on reads its epoch again from the beginning up to its step, which gives the very same batches with
the same ranks and data.workers. With others the shares are cut anew: that epoch may repeat some samples and miss as
many, and the next is exact again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from glide_ds.config import ClipConfig, DataConfig
from glide_ds.data import loader
from glide_ds.data.handover import Packed, Receiver, Sender
from glide_ds.data.loader import PREFETCH, Layout, Made, Source, pack
from glide_ds.data.order import micro_slots
from glide_ds.data.samples import SampleSet
from glide_ds.data.streams.reading import Plan, Reading, stream_plan
from glide_ds.data.tally import Tally
from glide_ds.data.tars.peers import Alone, Peers
from glide_ds.data.workers import heed_the_trainer
from glide_ds.errors import DataError
from glide_ds.types import Batch

AHEAD = 4  # steps the ranks agree on at once: it is a collective, and on GPUs the host waits for it


class StreamSource(Source):
    """A BatchSource (types.py) over streams. All ranks read it together: `batches` is collective."""

    def __init__(self, plan: Plan, peers: Peers | None = None) -> None:
        self.plan, self.config, self.layout, self.clip = plan, plan.config, plan.layout, None
        self._peers, self._tally, self._left_out = peers or Alone(), Tally(), 0
        self.began = (0, 0)

    @property
    def fingerprint(self) -> str:
        """Of the shards' names: what is in them nobody knows before they are read."""
        return f"stream-{self.plan.fingerprint:016x}"

    @property
    def batches_per_epoch(self) -> None:
        return None

    def facts(self) -> dict[str, Any]:
        return {"shards": len(self.plan.urls), "samples": None, "fingerprint": self.fingerprint}

    def batches(self, start_step: int) -> Iterator[Batch]:
        """As Source's. `began` is where it starts: an epoch and its first step, at most `start_step`.

        Raises on all ranks what any of them meets, and DataError where an epoch has no whole global batch.
        """
        epoch, step = self.began or (0, 0)
        while True:
            self.began, before = (epoch, step), step
            for micros in self._steps(epoch):
                if step >= start_step:
                    for number, batch in enumerate(micros):
                        self._tally.delivered += len(batch)
                        yield self._placed(batch, number)
                step += 1
            if step == before:
                raise DataError(
                    f"the streams of data.shards hold no whole global batch of {self.layout.global_batch} usable "
                    f"samples over {self.layout.world_size} ranks; this one read: {self._tally.describe()}",
                    remedy="lower train_batch_size, add shards, or mend the data",
                )
            epoch += 1

    def report(self) -> dict[str, Any]:
        return super().report() | {"left_out": self._left_out}

    def one(self, number: int) -> Batch:
        raise DataError("a stream's samples can't be read by number", remedy="set data.reader=indexed")

    def _placed(self, batch: Batch, number: int) -> Batch:
        layout = self.layout
        slots = micro_slots(number, layout.micro_batch, layout.rank, layout.world_size)
        return replace(batch, slots=torch.from_numpy(slots))

    def _steps(self, epoch: int) -> Iterator[list[Batch]]:
        """This rank's micro-batches, step by step, as long as every rank has its part."""
        parts = self._parts(epoch)
        wanted = self.layout.micro_batch * self.layout.accumulation
        held: list[Batch] = []

        def fill() -> int:
            """How many whole steps there are, at most AHEAD."""
            while sum(map(len, held)) < AHEAD * wanted and (part := next(parts, None)):
                held.append(part)
            return min(AHEAD, sum(map(len, held)) // wanted)

        agreed = AHEAD
        while agreed == AHEAD:
            agreed = min(self._peers.each(fill))
            micros = [taken(held, self.layout.micro_batch) for _ in range(agreed * self.layout.accumulation)]
            for at in range(0, len(micros), self.layout.accumulation):
                yield micros[at : at + self.layout.accumulation]
        self._peers.each(lambda: self._leave_out(held, parts))

    def _leave_out(self, held: list[Batch], parts: Iterator[Batch]) -> None:
        """Read and count the epoch's tail: what is damaged in it is found too."""
        self._left_out += sum(map(len, held)) + sum(map(len, parts))

    def _parts(self, epoch: int) -> Iterator[Batch]:
        """What the loader processes hand over, in turns."""
        workers, receiver = self.config.workers, Receiver()
        loading: DataLoader[Made] = DataLoader(
            Reading(self.plan, epoch),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            collate_fn=partial(pack, Sender(PREFETCH)) if workers else None,
            worker_init_fn=heed_the_trainer,
            generator=torch.Generator(),  # else starting workers would draw from the run's own generator
        )
        for made in loading:
            self._count(made)
            if made.batch is not None:
                yield receiver.unpack(made.batch) if isinstance(made.batch, Packed) else made.batch


def taken(held: list[Batch], count: int) -> Batch:
    """The first `count` samples of those held, which must be enough; they are held no more."""
    pieces = []
    while count:
        first = held.pop(0)
        if len(first) > count:
            first, rest = cut(first, count)
            held.insert(0, rest)
        pieces.append(first)
        count -= len(first)
    return pieces[0] if len(pieces) == 1 else _joined(pieces)


def cut(batch: Batch, at: int) -> tuple[Batch, Batch]:
    """A batch's first `at` samples, and the others. CLIP's pictures go with the rows they are of."""
    shown = int(batch.pictured[:at].sum()) if batch.pictured is not None else 0
    sides: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for field in fields(batch):
        value = getattr(batch, field.name)
        where = shown if field.name == "clip_images" else at
        for side, part in zip(sides, (slice(where), slice(where, None)), strict=True):
            side[field.name] = None if value is None or not len(value[part]) else value[part]
    return Batch(**sides[0]), Batch(**sides[1])


def _joined(batches: list[Batch]) -> Batch:
    joined: dict[str, Any] = {}
    for field in fields(Batch):
        values = [value for batch in batches if (value := getattr(batch, field.name)) is not None]
        if not values:
            joined[field.name] = None
        elif isinstance(values[0], Tensor):
            joined[field.name] = torch.cat(values)
        else:
            joined[field.name] = tuple(text for value in values for text in value)
    return Batch(**joined)


def build_source(
    config: DataConfig,
    *,
    image_size: int,
    context_length: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    seed: int,
    low_res: bool = False,
    masked: bool = False,
    clip: ClipConfig | None = None,
    clip_side: int | None = None,
    peers: Peers | None = None,
    opened: SampleSet | None = None,
) -> Source:
    """This rank's source of micro-batches by data.reader: the indexed one's arguments and errors are loader.py's.

    A stream keeps `peers`: ranks that read together agree through them on every epoch's end.
    """
    if config.reader != "stream":
        return loader.build_source(
            config,
            image_size=image_size,
            context_length=context_length,
            global_batch=global_batch,
            micro_batch=micro_batch,
            rank=rank,
            world_size=world_size,
            seed=seed,
            low_res=low_res,
            masked=masked,
            clip=clip,
            clip_side=clip_side,
            peers=peers,
            opened=opened,
        )
    layout = Layout(
        image_size,
        context_length,
        global_batch,
        micro_batch,
        rank,
        world_size,
        seed,
        low_res=low_res,
        masked=masked,
        image_share=clip.pictured if clip else 0.0,
    )
    return StreamSource(stream_plan(config, layout, clip_side, peers), peers)
