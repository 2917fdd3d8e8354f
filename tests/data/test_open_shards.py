"""What a rank goes back to stays open: 41,000 shards of 10,000 samples, as LAION-400M has them, on 8 ranks."""

from __future__ import annotations

import pickle
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_kit import write_shards
from test_clip_store import ENCODER, fill, hashes

from glide_ds.data import clip_store
from glide_ds.data.clip_store import ClipStore
from glide_ds.data.order import MixOrder, Order, micro_slots
from glide_ds.data.tars import shards as shards_module
from glide_ds.data.tars.catalog import Catalog, Entry
from glide_ds.data.tars.shards import ShardSet, open_shards
from glide_ds.data.tars.storage import Stat

RANKS, MICRO, PER_SHARD = 8, 64, 10_000


class Nothing:
    """An index whose samples have no members."""

    def read(self, *_: Any) -> dict[str, bytes]:
        return {}


class NoFiles:
    """A storage that counts what is opened."""

    def __init__(self) -> None:
        self.opened: Counter[str] = Counter()

    def open(self, url: str, stat: Stat) -> str:
        self.opened[url] += 1
        return url


def many_shards(
    count: int, per_shard: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[ShardSet, NoFiles, list[str]]:
    """Shards that are nowhere, what they open, and the indexes they load."""
    storage, loaded = NoFiles(), []

    def load(url: str, *_: Any) -> Nothing:
        loaded.append(url)
        return Nothing()

    monkeypatch.setattr(shards_module, "index_of", load)
    urls = [f"{number}" for number in range(count)]
    catalog = Catalog.of([Entry(per_shard, 0, "", "", 0, ("jpg",), ())]).take(np.zeros(count, np.int64))
    return ShardSet(urls, catalog, storage), storage, loaded  # type: ignore[arg-type]


def read_as(
    shards: ShardSet, order: Order | MixOrder, rank: int, ranks: int, worker: int, workers: int, n: int
) -> int:
    """Read what a worker process reads of the first `n` micro-batches of its rank; how many samples."""
    read = 0
    for step in range(worker, n, workers):
        for sample in order.draw(step, micro_slots(0, MICRO, rank, ranks)).ids.tolist():
            shards.read(sample)
            read += 1
    return read


@pytest.mark.parametrize(
    ("count", "per_shard", "workers"), [(41_000, PER_SHARD, 1), (41_000, PER_SHARD, 4), (1000, 1000, 2)]
)
def test_a_rank_opens_its_shards_once(
    monkeypatch: pytest.MonkeyPatch, count: int, per_shard: int, workers: int
) -> None:
    order = Order(np.full(count, per_shard, np.int64), RANKS * MICRO, seed=0, fingerprint=1)
    steps, read, opened, indexes = 500, 0, 0, 0
    for worker in range(workers):
        shards, files, loaded = many_shards(count, per_shard, monkeypatch)
        shards.keep_open(order.shards_in_turn(RANKS))
        read += read_as(shards, order, 3, RANKS, worker, workers, steps)
        opened += files.opened.total()
        indexes += len(loaded)
    assert read == steps * MICRO
    assert indexes <= 0.05 * read
    assert opened <= 0.05 * read


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 8])
@pytest.mark.parametrize(("count", "per_shard"), [(500, 50), (200, 600), (20, 5000), (1000, 97)])
def test_what_is_kept_is_what_is_read(
    monkeypatch: pytest.MonkeyPatch, ranks: int, count: int, per_shard: int
) -> None:
    """Whatever the lanes, the windows and the ranks: after all is open, next to nothing is opened again."""
    order = Order(np.full(count, per_shard, np.int64), ranks * MICRO, seed=0, fingerprint=1, window=4096)
    shards, files, _ = many_shards(count, per_shard, monkeypatch)
    shards.keep_open(order.shards_in_turn(ranks))
    steps = min(150, order.batches_per_epoch)
    read = read_as(shards, order, 0, ranks, 0, 1, steps)
    again = files.opened.total() - len(files.opened)
    assert again <= 0.02 * read, (order.lanes, order.shards_in_turn(ranks))


def test_a_mix_keeps_all_lanes_of_its_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a set's samples fall in a batch says nothing of the rank, so each rank reads every lane."""
    parts = tuple(Order(np.full(1000, 500, np.int64), 2 * MICRO, 0, n) for n in range(2))
    order = MixOrder(parts, (1.0, 2.0))
    shards, files, _ = many_shards(2000, 500, monkeypatch)
    shards.keep_open(order.shards_in_turn(2))
    read = read_as(shards, order, 1, 2, 0, 1, 200)
    assert files.opened.total() - len(files.opened) <= 0.02 * read


def test_embeddings_stay_open_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s").mkdir()
    shards = open_shards(write_shards(tmp_path / "s", [2] * 9))
    fill(tmp_path / "c", shards)
    store = ClipStore(tmp_path / "c", shards, ENCODER)
    monkeypatch.setattr(clip_store, "OPEN_ARRAYS", 1)
    opened = []
    whole = clip_store._Array
    monkeypatch.setattr(clip_store, "_Array", lambda path: opened.append(path) or whole(path))
    for kept, wanted in ((9, 9), (4, 18)):
        store.keep_open(kept)
        opened.clear()
        for sample in (*range(0, 18, 2), *range(1, 18, 2)):
            wanted_hash = hashes(shards, np.array([sample]))
            assert store.rows(np.array([sample]), wanted_hash)[0, 0] == sample + 1
        assert len(opened) == wanted


def test_a_hundred_thousand_shards_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No object per shard but its URL: each rank, and each of its workers, has all of them."""
    urls = [f"/data/laion/{number:06d}.tar" for number in range(100_000)]
    versions = np.random.default_rng(0).integers(10**18, size=len(urls))
    rows = Catalog.of([Entry(PER_SHARD, 10**9, f"mtime {10**18}", "f" * 32, 0, ("jpg", "txt"), ())])
    catalog = rows.take(np.zeros(len(urls), np.int64))
    catalog.rows["version"] = np.char.add(b"mtime ", versions.astype("S19"))
    tracemalloc.start()
    stored = Catalog.from_bytes(catalog.to_bytes("x"), "x")
    shards = pickle.loads(pickle.dumps(ShardSet(urls, stored, NoFiles())))  # type: ignore[arg-type]
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert shards.heads[99_999].version == f"mtime {versions[99_999]}"
    assert held < 50e6  # of which 9 MB are the URLs
