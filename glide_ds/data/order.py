"""Which sample when: pure functions from (seed, epoch, fingerprint, batch number) to sample ids.

Nothing here knows about worker processes, nor keeps a shuffle buffer, so any number of ranks and
workers, and a run resumed anywhere, read the same samples in the same global batches.

An epoch's order is made in three steps, each computable at any single position:

1. The shards are permuted and laid end to end: the deck.
2. The deck is cut into `lanes` equal spans, and positions deal over them in turn: position p reads lane
   p mod lanes. Where the world size divides `lanes` and the batch, a lane belongs to one rank, which
   therefore opens only its own lanes' shards.
3. Each lane is shuffled in windows of consecutive samples by a keyed Feistel permutation (Luby & Rackoff
   1988, cycle-walking as in Black & Rogaway 2002), evaluated per position: no table, no state.

Quality: a set of up to `window` samples (65,536) in fewer than 16 shards is one window, hence shuffled over
its whole length. Beyond that, at least `window` samples from `lanes` (or more) shards mix at any time,
and the shards meet in another order every epoch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glide_ds.errors import DataError

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

WINDOW = 1 << 16
# Divisible by the world sizes in use at each scale; 3072 = 3 * 1024.
LANES = (1, 2, 4, 8, 24, 120, 720, 3072)
SHARDS_PER_LANE = 8
FEISTEL_ROUNDS = 6
FEW = 12  # values that take as long one by one as in an array
_STIR = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def mix(*values: int | Ints | Words) -> Words:
    """Hash integers, or arrays of them broadcast together, to uniform 64-bit words (splitmix64's finaliser)."""
    state = np.zeros(np.broadcast_shapes(*(np.shape(v) for v in values)) or (1,), np.uint64)
    for value in values:
        word = np.uint64(value & 0xFFFFFFFFFFFFFFFF) if isinstance(value, int) else np.asarray(value)
        state = _stir(state, word.astype(np.uint64))
    return state


def _stir(state: Words, word: Words | np.uint64) -> Words:
    """Take one more word into a hash."""
    state = (state ^ word) + np.uint64(_STIR[0])
    state = (state ^ (state >> np.uint64(30))) * np.uint64(_STIR[1])
    state = (state ^ (state >> np.uint64(27))) * np.uint64(_STIR[2])
    return state ^ (state >> np.uint64(31))


def uniform(*values: int | Ints | Words) -> NDArray[np.float64]:
    """Hash integers to float64 in [0, 1)."""
    return (mix(*values) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permute(index: Ints, size: Ints | np.int64, key: Words) -> Ints:
    """Map each index in [0, size) to its place under the permutation of [0, size) that `key` names.

    All three broadcast. A balanced Feistel network permutes the next even power of two; values that fall
    outside are walked on along their cycle until they fall inside, which keeps it a bijection.
    """
    index, sizes, key = np.broadcast_arrays(index, size, key)
    bits = np.ceil(np.log2(np.maximum(sizes, 2)) / 2).astype(np.uint64)
    keys = np.stack([mix(key, number) for number in range(FEISTEL_ROUNDS)])
    out = index.astype(np.uint64)
    todo = np.arange(out.size)
    limit = sizes.astype(np.uint64)
    while True:
        out[todo] = _feistel(out[todo], bits[todo], keys[:, todo])
        todo = todo[out[todo] >= limit[todo]]
        if todo.size <= FEW:
            break
    for place in todo.tolist():
        out[place] = _walk_on(int(out[place]), int(limit[place]), int(bits[place]), keys[:, place].tolist())
    return out.astype(np.int64)


def _feistel(value: Words, bits: Words, keys: Words) -> Words:
    low_mask = (np.uint64(1) << bits) - np.uint64(1)
    left, right = value >> bits, value & low_mask
    for key in keys:
        left, right = right, left ^ (_stir(key, right) & low_mask)
    return (left << bits) | right


def _walk_on(value: int, limit: int, bits: int, keys: list[int]) -> int:
    """What `permute` does to one value that fell outside of [0, limit), in plain integers."""
    low_mask, word = (1 << bits) - 1, (1 << 64) - 1
    while value >= limit:
        left, right = value >> bits, value & low_mask
        for key in keys:
            state = (key ^ right) + _STIR[0] & word
            state = (state ^ state >> 30) * _STIR[1] & word
            state = (state ^ state >> 27) * _STIR[2] & word
            left, right = right, left ^ ((state ^ state >> 31) & low_mask)
        value = left << bits | right
    return value


def default_lanes(shards: int) -> int:
    """How many lanes a set of that many shards is read in: a property of the set, never of the run."""
    return max(lanes for lanes in LANES if lanes == 1 or lanes * SHARDS_PER_LANE <= shards)


class Draw(NamedTuple):
    """The slots of a global batch: which sample, in which of its set's epochs, and whether it only pads."""

    ids: Ints
    epochs: Ints
    padding: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Order:
    """The order of one data set of `sizes[i]` samples per shard, read in global batches of `batch` samples.

    `drop_last` leaves the last samples of an epoch's order out where they fill no batch; else the last batch is
    filled with the epoch's first samples, marked as padding.
    """

    sizes: Ints
    batch: int
    seed: int
    fingerprint: int
    shuffle: bool = True
    drop_last: bool = True
    window: int = WINDOW
    lanes: int = 0

    def __post_init__(self) -> None:
        if not self.lanes:
            object.__setattr__(self, "lanes", default_lanes(len(self.sizes)))
        if self.samples < (self.batch if self.drop_last else 1):
            raise DataError(
                f"the data has {self.samples} samples, fewer than one global batch of {self.batch}",
                "an epoch would hold no batch",
                f"lower train_batch_size to {max(self.samples, 1)} or less, add shards, or set "
                "data.drop_last=false",
            )

    @property
    def samples(self) -> int:
        return int(self.sizes.sum())

    @property
    def batches_per_epoch(self) -> int:
        if self.drop_last:
            return self.samples // self.batch
        return -(-self.samples // self.batch)

    def draw(self, number: int, slots: Ints) -> Draw:
        """The samples of global batch `number` at the given slots. Costs the same at any number."""
        epoch, batch = divmod(number, self.batches_per_epoch)
        position = batch * self.batch + slots
        padding = position >= self.samples
        ids = self.ids(epoch, position % self.samples)
        return Draw(ids, np.full(len(slots), epoch, np.int64), padding)

    def ids(self, epoch: int, position: Ints) -> Ints:
        """Sample ids at positions of one epoch's order; a bijection of [0, samples)."""
        if not self.shuffle:
            return np.asarray(position, np.int64)
        key = int(mix(self.seed, self.fingerprint, epoch)[0])
        return self._deck(key).sample(self._shuffled(key, np.asarray(position, np.int64)))

    def shards_in_turn(self, ranks: int) -> int:
        """About how many shards one of that many ranks reads by turns: its lanes', each over a window."""
        lanes = self.lanes // math.gcd(self.lanes, ranks)
        in_lane = self.window / self.lanes * len(self.sizes) / max(1, self.samples) if self.shuffle else 0.0
        return min(len(self.sizes), math.ceil(lanes * (in_lane + 1.25)) + 8)

    def _shuffled(self, key: int, position: Ints) -> Ints:
        """Positions of the epoch to places in the deck."""
        lane, step = position % self.lanes, position // self.lanes
        short, extra = divmod(self.samples, self.lanes)
        start = lane * short + np.minimum(lane, extra)
        length = short + (lane < extra)
        window = -(-self.window // self.lanes)
        first = step // window * window
        width = np.minimum(window, length - first)
        return start + first + permute(step - first, width, mix(key, lane, first))

    def _deck(self, key: int) -> _Deck:
        return _deck(self, key)


class _Deck(NamedTuple):
    """Shards laid end to end in an epoch's order."""

    ends: Ints  # place in the deck where each shard of the order ends
    shift: Ints  # sample id minus place in the deck, per shard of the order

    def sample(self, place: Ints) -> Ints:
        return place + self.shift[np.searchsorted(self.ends, place, side="right")]


@lru_cache(maxsize=4)
def _deck(order: Order, key: int) -> _Deck:
    # Sorting hashes is a permutation that needs no generator whose stream a numpy release could change.
    turn = np.argsort(mix(key, np.arange(len(order.sizes))), kind="stable")
    first = np.cumsum(order.sizes) - order.sizes
    ends = np.cumsum(order.sizes[turn])
    return _Deck(ends, first[turn] - (ends - order.sizes[turn]))


@dataclass(frozen=True, eq=False)
class MixOrder:
    """Global batches from several sets in fixed proportions; each set runs through its own epochs.

    Of the first P samples of the run, set 0 gives floor(P w0 / W), set 1 its share of the rest, and so on, so
    the proportions hold at every step to within one sample per set and every set's stream has no gaps.
    """

    parts: tuple[Order, ...]
    weights: tuple[float, ...]

    @property
    def samples(self) -> int:
        return sum(part.samples for part in self.parts)

    @property
    def lanes(self) -> int:
        return min(part.lanes for part in self.parts)

    @property
    def batches_per_epoch(self) -> int:
        return max(1, self.samples // self.parts[0].batch)

    def draw(self, number: int, slots: Ints) -> Draw:
        """The samples of global batch `number` at the given slots, as ids over the sets laid end to end."""
        batch, seed = self.parts[0].batch, self.parts[0].seed
        begin, end = self._given(number * batch), self._given((number + 1) * batch)
        counts = np.array(end) - np.array(begin)
        # A slot's rank must not tell its set, so the sets' runs are spread over the slots.
        turn = permute(slots, np.int64(batch), mix(seed, number))
        which = np.searchsorted(np.cumsum(counts), turn, side="right")
        ids, epochs = np.empty(len(slots), np.int64), np.empty(len(slots), np.int64)
        first, base = 0, 0
        for part, order in enumerate(self.parts):
            mine = which == part
            position = begin[part] + turn[mine] - first
            epochs[mine] = position // order.samples
            found = np.empty(len(position), np.int64)
            for epoch in np.unique(epochs[mine]).tolist():
                here = epochs[mine] == epoch
                found[here] = order.ids(epoch, position[here] % order.samples)
            ids[mine] = base + found
            first, base = first + int(counts[part]), base + order.samples
        return Draw(ids, epochs, np.zeros(len(slots), np.bool_))

    def shards_in_turn(self, ranks: int) -> int:
        """As Order's, of any number of ranks: where a set's samples fall in a batch says nothing of the rank."""
        return sum(part.shards_in_turn(1) for part in self.parts)

    def _given(self, total: int) -> list[int]:
        """How many of the first `total` samples each set gives."""
        scaled = [max(1, round(weight / sum(self.weights) * 2**32)) for weight in self.weights]
        given, rest = [], sum(scaled)
        for weight in scaled:
            given.append(total * weight // rest)  # whole numbers: exact at any total, and never decreasing
            total, rest = total - given[-1], rest - weight
        return given


def micro_slots(micro: int, micro_batch: int, rank: int, world_size: int) -> Ints:
    """The slots of a rank's micro-batch number `micro`: a run of those congruent to rank modulo world_size."""
    turn = np.arange(micro * micro_batch, (micro + 1) * micro_batch, dtype=np.int64)
    return turn * world_size + rank
