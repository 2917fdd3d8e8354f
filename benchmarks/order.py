"""The order of a set of 100,000 shards x 10,000 samples at 1, 64 and 1,024 ranks, by the functions training uses.

    python benchmarks/order.py [--lanes_checked 4] --out benchmarks/results/order-cpu.json

Seeking is also timed with index files on disk: a million samples in 100 sparse tars, their indexes opened anew and
a global batch's samples looked up in them, at random steps.

What a rank opens is counted at 41,000 shards on 8 ranks, as LAION-400M has them: how often a worker process, which
keeps open what the order says, reads from a shard that is not.

Coverage is checked on whole lanes: every position of a lane must give each sample of its span of the deck once,
and nothing else. Lanes partition both the positions and the deck, so lanes that hold make an epoch that holds.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
from cachetools import LRUCache
from machine import environment

from glide_ds.data.order import Order, micro_slots
from glide_ds.data.tars.index import ShardIndex, build_index, store_index
from glide_ds.data.tars.scan import BLOCK, Member, Scan
from glide_ds.data.tars.shards import open_shards
from glide_ds.data.tars.storage import Storage

RANKS = (1, 64, 1024)
BATCH = 4096
LAION_SHARDS, LAION_RANKS, MICRO = 41_000, 8, 64
SEEKS = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--per_shard", type=int, default=10_000)
    parser.add_argument("--lanes_checked", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    figures = simulate(args.shards, args.per_shard, args.lanes_checked)
    figures |= {f"opens per sample, {workers} workers": opens(workers, args.per_shard) for workers in (1, 4)}
    with tempfile.TemporaryDirectory() as folder:
        figures |= seek(Path(folder), shards=100, per_shard=10_000)
    for name, value in figures.items():
        print(f"{name:48s} {value:12.4g}")
    if args.out:
        report = {"environment": environment("cpu"), "figures": figures}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def simulate(shards: int, per_shard: int, lanes_checked: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    tracemalloc.start()
    start = time.perf_counter()
    order = Order(np.full(shards, per_shard, np.int64), BATCH, seed=0, fingerprint=1)
    order.draw(0, np.arange(BATCH))
    figures["start-up, s"] = time.perf_counter() - start
    figures["state of one epoch, MB"] = tracemalloc.get_traced_memory()[0] / 1e6
    tracemalloc.stop()
    figures["lanes"] = order.lanes
    rng = np.random.default_rng(0)
    for ranks in RANKS:
        rank = int(rng.integers(ranks))
        slots = micro_slots(0, BATCH // ranks, rank, ranks)
        seeks = []
        for number in rng.integers(0, 3 * order.batches_per_epoch, SEEKS).tolist():
            start = time.perf_counter()
            order.draw(number, slots)
            seeks.append(time.perf_counter() - start)
        figures[f"{ranks} ranks: slowest of {SEEKS} random seeks, s"] = max(seeks)
        ids = np.concatenate([order.draw(number, slots).ids for number in range(64)])
        figures[f"{ranks} ranks: shards one rank reads in 64 batches"] = len(np.unique(ids // per_shard))
    for lane in rng.choice(order.lanes, lanes_checked, replace=False).tolist():
        check_lane(order, lane)
    figures["lanes checked exactly"] = lanes_checked
    return figures


def opens(workers: int, per_shard: int, steps: int = 2000) -> float:
    """Shards opened per sample that a rank's workers read, the first time included."""
    order = Order(np.full(LAION_SHARDS, per_shard, np.int64), LAION_RANKS * MICRO, seed=0, fingerprint=1)
    slots, opened = micro_slots(0, MICRO, 0, LAION_RANKS), 0
    for worker in range(workers):
        held: LRUCache[int, bool] = LRUCache(order.shards_in_turn(LAION_RANKS))
        for step in range(worker, steps, workers):
            for shard in (order.draw(step, slots).ids // per_shard).tolist():
                opened += held.get(shard) is None
                held[shard] = True
    return opened / (steps * MICRO)


def seek(folder: Path, shards: int, per_shard: int) -> dict[str, float]:
    """From index files to the bytes of a global batch at a random step, everything opened anew."""
    write_indexes(folder, shards, per_shard)
    rng, opened, found = np.random.default_rng(0), [], []
    for number in rng.integers(0, 3 * shards * per_shard // BATCH, SEEKS).tolist():
        start = time.perf_counter()
        held = open_shards(str(folder))
        opened.append(time.perf_counter() - start)
        start = time.perf_counter()
        order = Order(held.sizes, BATCH, seed=0, fingerprint=1)
        for sample in order.draw(number, np.arange(BATCH)).ids.tolist():
            held.read(sample)
        found.append(time.perf_counter() - start)
    what = f"{shards * per_shard:,} samples, {shards} indexes"
    return {
        f"{what}: slowest opening, s": max(opened),
        f"{what}: slowest of {SEEKS} random seeks, s": max(found),
    }


def write_indexes(folder: Path, shards: int, per_shard: int) -> None:
    """Of tars that have their size and no content."""
    kinds, blocks, members = (("jpg", 40_000), ("json", 400), ("txt", 60)), 0, []
    for number in range(per_shard):
        for kind, size in kinds:
            members.append(Member(f"{number:08d}.{kind}", (blocks + 1) * BLOCK, size))
            blocks += 1 + -(-size // BLOCK)
    index = build_index(Scan((blocks + 2) * BLOCK, members))
    storage = Storage()
    for number in range(shards):
        tar = folder / f"{number:05d}.tar"
        tar.touch()
        os.truncate(tar, index.head.tar_size)
        head = replace(index.head, version=storage.stat(str(tar)).version)
        tables = (index.first, index.blocks, index.sizes, index.kinds)
        store_index(str(tar), ShardIndex(head, *tables), storage)


def check_lane(order: Order, lane: int) -> None:
    """Every sample of the lane's span of the deck exactly once, over the lane's whole epoch."""
    positions = np.arange(lane, order.samples, order.lanes)
    ids = np.sort(order.ids(0, positions))
    assert len(np.unique(ids)) == len(positions), f"lane {lane} repeats a sample"
    runs = np.flatnonzero(np.diff(ids) != 1) + 1
    whole = [run for run in np.split(ids, runs) if len(run) % order.sizes[0]]  # neighbours join
    # A span of the deck is whole shards but for its two ends.
    assert len(whole) <= 2 or order.samples < order.lanes * int(order.sizes[0]), f"lane {lane} has holes"


if __name__ == "__main__":
    main()
