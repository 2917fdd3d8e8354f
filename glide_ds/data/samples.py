"""Numbered samples, of tar shards or drawn on the fly: a picture and a caption each."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import partial, reduce
from operator import add
from typing import Any, NamedTuple, Protocol

import numpy as np

from glide_ds.config import DataConfig, FilterConfig, cache_dir
from glide_ds.data.clip_store import picture_hash, text_hash
from glide_ds.data.filters import check as check_rules
from glide_ds.data.pictures.decode import DecodeOptions, decode_at, image_member
from glide_ds.data.pictures.resample import Pixels
from glide_ds.data.shapes import HELD_OUT
from glide_ds.data.shapes import draw as draw_shape
from glide_ds.data.tally import Cause, Unusable
from glide_ds.data.tars.peers import Alone, Peers
from glide_ds.data.tars.shards import ShardSet, open_shards
from glide_ds.data.tars.storage import CacheOptions, Storage, is_remote
from glide_ds.data.texts.captions import TEXT_EXTENSIONS
from glide_ds.data.texts.recaptions import Captions
from glide_ds.errors import DataError

# Where a text says nothing, the JSON record may yet have the caption.
IN_THE_RECORD = (Cause.NO_CAPTION, Cause.EMPTY_CAPTION, Cause.BAD_TEXT)
SHAPES, SHAPES_HELD_OUT = "builtin:shapes", "builtin:shapes-heldout"


class Sample(NamedTuple):
    pixels: Pixels  # uint8 [S, S, 3]
    caption: str
    notes: tuple[str, ...] = ()  # what was tolerated
    hash: int = 0  # of what a CLIP store has the embedding of, where there is one
    clip_pixels: Pixels | None = None  # uint8 [C, C, 3], the same picture for CLIP, where it is to be embedded


class SampleSet(Protocol):
    """Numbered samples."""

    sizes: np.ndarray[Any, np.dtype[np.int64]]  # samples per shard
    part_sizes: list[np.ndarray[Any, np.dtype[np.int64]]]  # the same, by part of a mix
    fingerprint: str
    duplicates: int  # samples with a key that an earlier one of their shard has; read like all others
    clip_side: int | None  # C, where pictures are to be embedded while training

    def __len__(self) -> int: ...

    def span(self, sample: int) -> tuple[int, int]:
        """(first sample, count) of the part of the mix that a sample belongs to."""
        ...

    def load(self, sample: int, draw: float, *, pictured: bool = False) -> Sample:
        """Raises Unusable with the cause, and GlideError where the set itself can't be read.

        `draw` in [0, 1) picks among several captions. `pictured`: what CLIP embeds is the picture, not the caption.
        """
        ...

    def keep_open(self, shards: int) -> None:
        """How many shards are read in turn."""
        ...

    def name(self, sample: int) -> str: ...


def decoded(
    members: Mapping[str, bytes],
    caption: str,
    notes: tuple[str, ...],
    options: DecodeOptions,
    clip_side: int | None,
) -> Sample:
    """A sample of its members and the caption read from them. Raises Unusable where its picture can't be used."""
    pixels, *for_clip = decode_at(
        image_member(members), options, options.size, *([clip_side] if clip_side else [])
    )
    return Sample(pixels, caption, notes, 0, *for_clip)


class ShardSamples:
    """Samples of tar shards."""

    def __init__(
        self,
        parts: Sequence[tuple[ShardSet, FilterConfig]],
        options: DecodeOptions,
        captions: Captions | None = None,
    ) -> None:
        self.captions = captions or Captions()
        self.shards, self.options = reduce(add, (shards for shards, _ in parts)), options
        self.part_sizes = [shards.sizes for shards, _ in parts]
        self._ends = np.cumsum([len(shards) for shards, _ in parts]).tolist()
        self._filters = [filter for _, filter in parts]
        self._unread = [
            frozenset() if self.captions.reads_record else unread(shards, filter) for shards, filter in parts
        ]
        self.sizes, self.fingerprint = self.shards.sizes, self.shards.fingerprint
        self.duplicates, self.name = self.shards.duplicates, self.shards.name
        self.clip_side: int | None = None
        self.hashed = False  # whether a CLIP store wants to know what its embeddings are of

    def __len__(self) -> int:
        return len(self.shards)

    def span(self, sample: int) -> tuple[int, int]:
        part = bisect_right(self._ends, sample)
        first = self._ends[part - 1] if part else 0
        return first, self._ends[part] - first

    def load(self, sample: int, draw: float, *, pictured: bool = False) -> Sample:
        part = bisect_right(self._ends, sample)
        members = self.shards.read(sample, self._unread[part])
        check_rules(members, self._filters[part])
        try:
            caption, notes = self._caption(members, draw, sample)
        except Unusable as error:
            if not self._unread[part] or error.cause not in IN_THE_RECORD:
                raise
            caption, notes = self._caption(self.shards.read(sample), draw, sample)
        clip_side = self.clip_side if pictured else None
        made = decoded(members, caption, notes, self.options, clip_side)
        if self.hashed:
            made = made._replace(hash=picture_hash(image_member(members)) if pictured else text_hash(caption))
        return made

    def hash(self, sample: int, *, pictured: bool) -> int:
        """Of what a CLIP store has the embedding of. Raises Unusable, and GlideError where the set can't be read."""
        members = self.shards.read(sample)
        if pictured:
            return picture_hash(image_member(members))
        return text_hash(self._caption(members, 0.0, sample)[0])

    def _caption(self, members: Mapping[str, bytes], draw: float, sample: int) -> tuple[str, tuple[str, ...]]:
        return self.captions.read(members, draw, partial(self.shards.key, sample))

    def keep_open(self, shards: int) -> None:
        self.shards.keep_open(shards)


def unread(shards: ShardSet, filter: FilterConfig) -> frozenset[str]:
    """What samples are first read without: the JSON record, where no rule asks for it and captions are texts."""
    texts = all(not set(TEXT_EXTENSIONS).isdisjoint(extensions) for extensions in shards.heads.forms)
    return frozenset({"json"}) if texts and not filter.active else frozenset()


class ShapeSamples:
    """The built-in shapes, drawn on the fly."""

    def __init__(self, samples: int, size: int, *, held_out: bool = False) -> None:
        self.sizes = np.array([samples], np.int64)
        self.fingerprint = f"shapes-{'heldout-' if held_out else ''}{samples}"
        self.part_sizes, self.duplicates = [self.sizes], 0
        self.clip_side: int | None = None
        self._size, self._first = size, HELD_OUT if held_out else 0

    def __len__(self) -> int:
        return int(self.sizes[0])

    def span(self, sample: int) -> tuple[int, int]:
        return 0, len(self)

    def load(self, sample: int, draw: float, *, pictured: bool = False) -> Sample:
        number = self._first + sample
        for_clip = draw_shape(number, self.clip_side)[0] if pictured and self.clip_side else None
        return Sample(*draw_shape(number, self._size), clip_pixels=for_clip)

    def keep_open(self, shards: int) -> None:
        """Nothing is opened."""

    def name(self, sample: int) -> str:
        return f"shape {self._first + sample}"


def _patterns(shards: str | tuple[str, ...]) -> tuple[str, ...]:
    return (shards,) if isinstance(shards, str) else shards


def open_samples(config: DataConfig, image_size: int, peers: Peers | None = None) -> SampleSet:
    """The samples that `data.mix`, or else `data.shards`, names; opened together with `peers`, if there are some."""
    peers = peers or Alone()
    if not config.mix:
        if config.shards in (SHAPES, SHAPES_HELD_OUT):
            return ShapeSamples(config.shapes_samples, image_size, held_out=config.shards == SHAPES_HELD_OUT)
        if isinstance(config.shards, str) and config.shards.startswith("builtin:"):
            raise DataError(
                f"data.shards={config.shards} does not exist", remedy=f"there is {SHAPES} and {SHAPES_HELD_OUT}"
            )
    cache = CacheOptions(config.cache_dir or str(cache_dir() / "blocks"), int(config.cache_gb * 2**30))
    if any(is_remote(pattern) for part in config.mix_parts for pattern in _patterns(part.shards)):
        peers.each(cache.check)
    storage, salvage = Storage(cache), config.damaged_shards == "salvage"
    parts = [
        (
            open_shards(part.shards, config.index_dir, storage=storage, salvage=salvage, peers=peers),
            part.filter,
        )
        for part in config.mix_parts
    ]
    captions = Captions(config.captions, config.caption_file)
    return ShardSamples(parts, decode_options(config, image_size), captions)


def decode_options(config: DataConfig, image_size: int) -> DecodeOptions:
    return DecodeOptions(image_size, config.crop, config.trim, config.min_side, config.max_pixels)
