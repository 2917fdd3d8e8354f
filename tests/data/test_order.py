"""The order is a bijection, the same at any world size, well shuffled, and found at once at any place."""

from __future__ import annotations

import time

import numpy as np
import pytest

from glide_ds.data.order import Order, micro_slots, permute, uniform
from glide_ds.errors import DataError

SETS = {
    "one": [1],
    "uneven": [7, 3, 1, 200, 64],
    "eight": [500] * 8,
    "lanes": list(range(1, 400)),  # 24 lanes
    "windows": [70_000, 70_000],
}


def order(sizes: list[int], batch: int = 1, seed: int = 5, **changes: object) -> Order:
    return Order(np.array(sizes, np.int64), batch, seed, fingerprint=77, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("sizes", SETS.values(), ids=SETS.keys())
def test_an_epoch_holds_every_sample_once(sizes: list[int]) -> None:
    made = order(sizes)
    for epoch in (0, 3):
        ids = made.ids(epoch, np.arange(made.samples))
        assert np.array_equal(np.sort(ids), np.arange(made.samples))


def test_permute_is_a_bijection_for_every_size() -> None:
    for size in (1, 2, 3, 15, 16, 17, 1000):
        out = permute(np.arange(size), np.int64(size), np.full(size, 9, np.uint64))
        assert np.array_equal(np.sort(out), np.arange(size))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_ranks_and_micro_batches_partition_each_global_batch(ranks: int) -> None:
    made = order(SETS["lanes"], batch=48)
    whole = made.draw(17, np.arange(48)).ids
    micro = 48 // ranks // 2
    parts = [(micro_slots(m, micro, rank, ranks)) for rank in range(ranks) for m in range(2)]
    slots = np.concatenate(parts)
    assert np.array_equal(np.sort(slots), np.arange(48))
    assert {int(s) % ranks for s in micro_slots(1, micro, ranks - 1, ranks)} == {ranks - 1}
    assert np.array_equal(made.draw(17, slots).ids, whole[slots])


def test_seed_epoch_and_data_change_the_order() -> None:
    here = order([300]).ids(0, np.arange(300))
    others = [
        order([300], seed=6).ids(0, np.arange(300)),
        order([300]).ids(1, np.arange(300)),
        Order(np.array([300]), 1, 5, fingerprint=78).ids(0, np.arange(300)),
    ]
    assert all((here != other).mean() > 0.9 for other in others)


def test_without_shuffle_the_order_is_the_shards() -> None:
    assert np.array_equal(order([5, 6], shuffle=False).ids(2, np.arange(11)), np.arange(11))


def test_shuffle_quality() -> None:
    """A small set is shuffled over its whole length: like draws without replacement, not locally."""
    made = order([1000] * 8)
    ids = made.ids(0, np.arange(8000))
    assert abs(np.corrcoef(ids, np.arange(8000))[0, 1]) < 0.05
    shards_in_a_batch = len(np.unique(ids[:64] // 1000))
    assert shards_in_a_batch == 8
    # Neighbours in a shard land anywhere: their distance is a third of the length on average.
    place = np.empty(8000, np.int64)
    place[ids] = np.arange(8000)
    assert 0.30 < np.abs(np.diff(place)).mean() / 8000 < 0.37


def test_large_sets_mix_lanes_and_read_them_in_windows() -> None:
    made = order([1000] * 960)  # 120 lanes
    assert made.lanes == 120
    ids = made.ids(0, np.arange(120 * 50))
    assert len(np.unique(ids[:120] // 1000)) >= 100
    # One lane stays within its window of one or two shards: what a remote reader fetches is local.
    assert len(np.unique(ids[7::120] // 1000)) <= 2


def test_a_lane_belongs_to_one_rank() -> None:
    made = order([1000] * 960, batch=48)
    shards_of = [
        {int(i) // 1000 for n in range(50) for i in made.draw(n, micro_slots(0, 12, rank, 4)).ids}
        for rank in range(4)
    ]
    shared = sum(len(a & b) for i, a in enumerate(shards_of) for b in shards_of[i + 1 :])
    assert shared <= 6  # only where a window crosses the edge of two lanes


def test_drop_last() -> None:
    dropped, padded = order([10], batch=4), order([10], batch=4, drop_last=False)
    assert (dropped.batches_per_epoch, padded.batches_per_epoch) == (2, 3)
    last = padded.draw(2, np.arange(4))
    assert last.padding.tolist() == [False, False, True, True]
    epoch = np.concatenate([padded.draw(n, np.arange(4)).ids for n in range(3)])
    assert sorted(epoch[:10]) == list(range(10))
    assert np.array_equal(epoch[10:], epoch[:2])
    assert padded.draw(3, np.arange(4)).epochs.tolist() == [1] * 4


def test_too_few_samples_name_both_numbers() -> None:
    with pytest.raises(DataError, match=r"3 samples.*global batch of 8.*train_batch_size"):
        order([3], batch=8)


def test_seek_costs_the_same_anywhere() -> None:
    made = order([10_000] * 100, batch=1024)
    start = time.perf_counter()
    made.draw(10**6, np.arange(1024))
    assert time.perf_counter() - start < 1


def test_uniform_is_uniform() -> None:
    values = uniform(3, np.arange(100_000))
    assert abs(values.mean() - 0.5) < 0.005
    assert np.histogram(values, 10, (0, 1))[0].min() > 9_500
