"""Global batches from shards or the built-in shapes: the same samples at any number of ranks and workers.

One item of the underlying data set is a whole micro-batch, named by (step, micro-batch number). Which
samples it holds and how each is augmented follows from the seed and those numbers alone (`order`), so the
worker processes that build items share no state, and starting at any step costs nothing.

S image side, B micro-batch, T caption tokens, C side of the pictures that CLIP reads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from glide_ds import tokenizer
from glide_ds.config import ClipConfig, DataConfig, DegradeConfig
from glide_ds.data.clip_notes import encoders
from glide_ds.data.clip_store import Embeddings
from glide_ds.data.filters import Filtered
from glide_ds.data.handover import Packed, Receiver, Sender
from glide_ds.data.order import MixOrder, Order, Words, micro_slots, mix, uniform
from glide_ds.data.pictures.decode import Cropping
from glide_ds.data.pictures.degrade import degraded
from glide_ds.data.pictures.masks import DICE, known_pixels
from glide_ds.data.pictures.resample import Pixels, resize
from glide_ds.data.samples import Sample, SampleSet, ShardSamples, open_samples
from glide_ds.data.tally import Tally, Unusable
from glide_ds.data.tars.peers import Peers
from glide_ds.data.workers import heed_the_trainer
from glide_ds.errors import ConfigError, DataError, GlideError, SurroundingsError
from glide_ds.types import Batch

LOW_RES_FACTOR = 4
SUBSTITUTES = 256  # samples tried in a slot before the set counts as unusable
ENOUGH_TO_JUDGE = 200  # samples read before data.max_bad_fraction can stop a run
PREFETCH = 4  # micro-batches each worker prepares ahead

# What a per-sample random number is for; part of its hash, so the draws are independent.
SUBSTITUTE_DRAW, CAPTION_DRAW, FLIP_DRAW, DROP_DRAW, PICTURE_DRAW, MASK_DRAW, DEGRADE_DRAW = range(7)


class Made(NamedTuple):
    """What a worker hands over: a batch, or what stops the run, and what it counted."""

    batch: Batch | Packed | None
    tally: Tally
    error: GlideError | None = None


def pack(sender: Sender, made: Made) -> Made:
    """The same, ready to leave a worker."""
    if not isinstance(made.batch, Batch):
        return made
    try:
        return made._replace(batch=sender.pack(made.batch))
    except OSError as error:
        why = SurroundingsError(
            f"neither shared memory (/dev/shm) nor {tempfile.gettempdir()} has room for a batch ({error.strerror})",
            "no loader worker can hand one over",
            "give the container more (docker run --shm-size), set TMPDIR to a folder with room, or data.workers=0",
        )
        return made._replace(batch=None, error=why)


# ---- building batches


@dataclass(frozen=True)
class Layout:
    """How this rank cuts its part out of the global batches, and the shapes of a batch."""

    image_size: int
    context_length: int
    global_batch: int
    micro_batch: int
    rank: int
    world_size: int
    seed: int
    low_res: bool = False
    masked: bool = False
    image_share: float = 0.0  # of the samples whose CLIP embedding is the picture's, not the caption's

    @property
    def accumulation(self) -> int:
        return self.global_batch // (self.micro_batch * self.world_size)

    def __post_init__(self) -> None:
        per_pass = self.micro_batch * self.world_size
        if per_pass <= 0 or self.global_batch % per_pass:
            raise ConfigError(
                f"a global batch of {self.global_batch} is no multiple of {self.micro_batch} per "
                f"micro-batch x {self.world_size} ranks = {per_pass}",
                "ranks would get unequal parts",
                f"use {max(per_pass, self.global_batch // per_pass * per_pass) if per_pass > 0 else 1}",
            )
        if not 0 <= self.rank < self.world_size:
            raise ConfigError(f"rank {self.rank} is outside 0..{self.world_size - 1}")


class MicroBatches(Dataset[Made]):
    """Micro-batches by (step, number): everything a worker process needs, and nothing that changes."""

    def __init__(
        self,
        samples: SampleSet,
        order: Order | MixOrder,
        config: DataConfig,
        layout: Layout,
        clip: Embeddings | None = None,
    ) -> None:
        self.samples, self.order, self.config, self.layout, self.clip = samples, order, config, layout, clip

    def __getitem__(self, item: tuple[int, int]) -> Made:
        tally = Tally()
        try:
            return Made(self._make(*item, tally), tally)
        except GlideError as error:  # a worker can't raise it: torch would make another one of it
            return Made(None, tally, error)

    def _make(self, step: int, number: int, tally: Tally) -> Batch:
        """Raises GlideError where a slot can't be filled, or the set or its embeddings can't be read."""
        layout = self.layout
        slots = micro_slots(number, layout.micro_batch, layout.rank, layout.world_size)
        drawn = self.order.draw(step, slots)
        size = layout.image_size
        images = np.empty((len(slots), size, size, 3), np.uint8)
        ids = drawn.ids.copy()
        captions, hashes, for_clip = [], [], []
        dice = uniform(CAPTION_DRAW, layout.seed, drawn.epochs, drawn.ids).tolist()
        pictured = uniform(PICTURE_DRAW, layout.seed, drawn.epochs, drawn.ids) < layout.image_share
        wishes = zip(drawn.ids.tolist(), drawn.epochs.tolist(), dice, pictured.tolist(), strict=True)
        for row, (wanted, epoch, die, shown) in enumerate(wishes):
            ids[row], sample = self._usable(wanted, epoch, die, shown, tally)
            images[row] = sample.pixels
            captions.append(sample.caption)
            hashes.append(sample.hash)
            if sample.clip_pixels is not None:
                for_clip.append(sample.clip_pixels)
        tally.delivered = len(slots)
        batch = assemble(self.config, layout, ids, slots, drawn.epochs, images, tuple(captions))
        if self.clip:
            batch = replace(batch, clip=torch.from_numpy(self.clip.rows(ids, hashes, pictured)))
        if layout.image_share:
            batch = replace(
                batch,
                pictured=torch.from_numpy(pictured),
                clip_images=torch.from_numpy(np.stack(for_clip)) if for_clip else None,
            )
        if drawn.padding.any():
            batch = replace(batch, sample_ids=torch.from_numpy(np.where(drawn.padding, -1 - ids, ids)))
        return batch

    def _usable(self, wanted: int, epoch: int, die: float, pictured: bool, tally: Tally) -> tuple[int, Sample]:
        """The wanted sample, or the first usable one of a sequence that follows from its id and epoch.

        Raises GlideError where there is none, and where the set can't be read.
        """
        seed, candidate = self.layout.seed, wanted
        for attempt in range(1, SUBSTITUTES + 1):
            tally.read += 1
            try:
                # A store may have one embedding per sample: that of the caption its first draw gives.
                draw = 0.0 if self.clip and not self.clip.every else die
                sample = self.samples.load(candidate, draw, pictured=pictured)
            except Filtered as finding:
                tally.filtered[finding.cause] += 1
            except Unusable as finding:
                tally.skip(finding.cause, f"{self.samples.name(candidate)}: {finding.detail or finding.cause}")
            else:
                tally.tolerated.update(sample.notes)
                return candidate, sample
            first, count = self.samples.span(wanted)
            candidate = first + int(mix(SUBSTITUTE_DRAW, seed, epoch, wanted, attempt)[0] % np.uint64(count))
            die = float(uniform(CAPTION_DRAW, seed, epoch, candidate)[0])
        examples = "; ".join(names[0] for names in tally.examples.values()) or "none"
        raise DataError(
            f"no usable sample in {SUBSTITUTES} tried in place of sample {wanted}: {tally.describe()}; for example "
            f"{examples}",
            "a batch can't be filled",
            "mend the data, loosen data.filter, or check that data.shards names image-caption shards",
        )


def assemble(
    config: DataConfig,
    layout: Layout,
    ids: np.ndarray[Any, np.dtype[np.int64]],
    slots: np.ndarray[Any, np.dtype[np.int64]],
    epochs: np.ndarray[Any, np.dtype[np.int64]],
    images: Pixels,
    captions: tuple[str, ...],
) -> Batch:
    """A batch of decoded samples: mirrored, captions dropped and encoded, by draws of their ids and epochs."""
    seed = layout.seed
    mirrored = uniform(FLIP_DRAW, seed, epochs, ids) < config.flip
    images[mirrored] = images[mirrored][:, :, ::-1]
    dice = uniform(DROP_DRAW, seed, epochs, ids)
    drop_both = dice < config.drop_both
    emptied = dice < config.drop_both + config.drop_caption
    texts = ["" if empty else text for text, empty in zip(captions, emptied, strict=True)]
    tokens, mask = tokenizer.encode(texts, layout.context_length)
    return Batch(
        sample_ids=torch.from_numpy(ids),
        slots=torch.from_numpy(slots),
        images=torch.from_numpy(images),
        tokens=tokens,
        mask=mask,
        drop_clip=torch.from_numpy(drop_both),
        captions=captions,
        low_res=torch.from_numpy(_low_res(images, mix(DEGRADE_DRAW, seed, epochs, ids), config.degrade))
        if layout.low_res
        else None,
        known=torch.from_numpy(_known(config, layout, ids, epochs)) if layout.masked else None,
    )


def _known(
    config: DataConfig,
    layout: Layout,
    ids: np.ndarray[Any, np.dtype[np.int64]],
    epochs: np.ndarray[Any, np.dtype[np.int64]],
) -> Pixels:
    """What of each picture an inpainting model is shown: uint8 [B, S, S]."""
    dice = uniform(MASK_DRAW, layout.seed, epochs[:, None], ids[:, None], np.arange(DICE)[None])
    return known_pixels(dice, layout.image_size, config.mask)


def _low_res(images: Pixels, keys: Words, config: DegradeConfig) -> Pixels:
    """The upsampler's input: uint8 [B, S/4, S/4, 3], degraded by a key [B] each."""
    whole = images.shape[1]
    side = whole // LOW_RES_FACTOR
    small = np.stack([resize(image, (0, whole, 0, whole), side, side) for image in images])
    return degraded(small, keys, config) if config.share else small


class Steps(Sampler[tuple[int, int]]):
    """(step, micro-batch number) from a step on, without end."""

    def __init__(self, start_step: int, accumulation: int) -> None:
        self.start_step, self.accumulation = start_step, accumulation

    def __iter__(self) -> Iterator[tuple[int, int]]:
        step = self.start_step
        while True:
            for number in range(self.accumulation):
                yield step, number
            step += 1


# ---- the source


class Source:
    """A BatchSource (types.py) over a set of samples."""

    def __init__(
        self, samples: SampleSet, config: DataConfig, layout: Layout, clip: Embeddings | None = None
    ) -> None:
        self.samples, self.config, self.layout, self.clip = samples, config, layout, clip
        self.order = _order(samples, config, layout)
        in_turn = self.order.shards_in_turn(layout.world_size)
        samples.keep_open(in_turn)
        if clip:
            clip.keep_open(in_turn)
        self._tally = Tally()
        self.began: tuple[int, int] | None = None  # of a stream: the epoch being read, and its first step

    @property
    def fingerprint(self) -> str:
        """Of the samples and their order: a run resumes the same data only where it is the same."""
        return self.samples.fingerprint

    @property
    def batches_per_epoch(self) -> int | None:
        """None where nobody knows before it is read."""
        return self.order.batches_per_epoch

    def facts(self) -> dict[str, Any]:
        """What the run's opening block says of its data."""
        return {
            "shards": len(self.samples.sizes),
            "samples": len(self.samples),
            "duplicate_keys": self.samples.duplicates,
            "batches_per_epoch": self.batches_per_epoch,
            "lanes": self.order.lanes,
            "fingerprint": self.fingerprint,
        }

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Yield this rank's micro-batches of global batches start_step, start_step + 1, … without end.

        With data.drop_last=false, a slot that repeats sample i only to fill the epoch's last batch has the id -1 - i.
        Raises DataError where no usable sample is left for a slot, or more than data.max_bad_fraction of
        those read so far were unusable.
        """
        items = MicroBatches(self.samples, self.order, self.config, self.layout, self.clip)
        workers = self.config.workers
        receiver = Receiver()
        loader: DataLoader[Made] = DataLoader(
            items,
            batch_size=None,
            sampler=Steps(start_step, self.layout.accumulation),
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            collate_fn=partial(pack, Sender(PREFETCH)) if workers else None,
            worker_init_fn=heed_the_trainer,
            generator=torch.Generator(),  # else starting workers would draw from the run's own generator
        )
        for made in loader:
            self._count(made)
            yield receiver.unpack(made.batch) if isinstance(made.batch, Packed) else made.batch

    def one(self, number: int) -> Batch:
        """Micro-batch `number` of this rank's global batch 0, made here and now. Raises DataError."""
        made = MicroBatches(self.samples, self.order, self.config, self.layout, self.clip)[0, number]
        if made.error is not None:
            raise made.error
        assert isinstance(made.batch, Batch)
        return made.batch

    def report(self) -> dict[str, Any]:
        """What this rank's delivered batches read, skipped by cause with examples, tolerated and replaced."""
        return self._tally.to_dict()

    def _count(self, made: Made) -> None:
        """Raises what a worker could not, and DataError where too many samples are unusable."""
        self._tally.add(made.tally)
        if made.error is not None:
            raise made.error
        tally = self._tally
        if tally.read < ENOUGH_TO_JUDGE or tally.bad <= self.config.max_bad_fraction * tally.read:
            return
        examples = "; ".join(names[0] for names in tally.examples.values())
        raise DataError(
            f"{tally.bad} of {tally.read} samples read are unusable, more than "
            f"data.max_bad_fraction={self.config.max_bad_fraction}: {tally.describe()}. For example "
            f"{examples}",
            remedy="mend the data, or raise data.max_bad_fraction",
        )


def _order(samples: SampleSet, config: DataConfig, layout: Layout) -> Order | MixOrder:
    fingerprint = int(mix(*samples.fingerprint.encode())[0])
    parts = [
        Order(
            sizes,
            layout.global_batch,
            layout.seed,
            fingerprint + number,
            shuffle=config.shuffle,
            # A part of a mix runs on from epoch to epoch, so it may be smaller than a batch.
            drop_last=config.drop_last and not config.mix,
        )
        for number, sizes in enumerate(samples.part_sizes)
    ]
    if config.mix:
        return MixOrder(tuple(parts), tuple(part.weight for part in config.mix_parts))
    return parts[0]


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
    """This rank's source of micro-batches. Raises DataError or ConfigError before anything is trained.

    `clip` says which encoder the embeddings of data.clip_store must come from, and what they are made of.
    `clip_side` is the side of the pictures that the encoder reads: batches bring them where its embeddings are made
    of pictures and are not in a store. `peers` are the ranks, where all of them open the data at once;
    `opened` saves opening the same set again, for batches of other shapes.
    """
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
    samples = deepcopy(opened) if opened is not None else open_samples(config, image_size, peers)
    store = _open_store(config, samples, clip, peers)
    if not store:
        samples.clip_side = clip_side
    return Source(samples, config, layout, store)


def _open_store(
    config: DataConfig, samples: SampleSet, clip: ClipConfig | None, peers: Peers | None
) -> Embeddings | None:
    if config.clip_store is None or clip is None:
        return None
    if not isinstance(samples, ShardSamples):
        raise DataError(
            f"data.clip_store={config.clip_store} can't go with {config.shards}, which has no shards",
            remedy="unset it",
        )
    samples.hashed = True
    made_by = encoders(clip, Cropping(config.crop, config.trim))
    store = Embeddings(config.clip_store, samples.shards, made_by, peers)
    store.check_captions(config.captions)
    return store
