"""A run stopped at odd steps and gone on with on other numbers of ranks reads what an uninterrupted one reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_kit import write_shards
from ranks import Run, Warm
from train_kit import trace

BATCH = 12
CHAINS = {"straight": ((2, 10),), "elastic": ((2, 3), (1, 5), (3, 10))}  # (ranks, up to step)


def by_slot(folder: Path, chain: tuple[tuple[int, int], ...], key: str) -> list[list[Any]]:
    """A value of every slot of every step, joined over the ranks: slot i R + r is the i-th of rank r."""
    found, done = [], 0
    lines = {rank: {line["step"]: line for line in trace(folder, rank)} for rank in range(max(chain)[0])}
    for ranks, until in chain:
        for step in range(done + 1, until + 1):
            slots: list[Any] = [None] * BATCH
            for rank in range(ranks):
                slots[rank::ranks] = lines[rank][step][key]
            assert sum(step in ranks_lines for ranks_lines in lines.values()) == ranks
            found.append(slots)
        done = until
    return found


@pytest.mark.slow
def test_two_ranks_then_one_then_three_read_the_same_samples(warm: Warm, tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [30, 7, 25, 40])  # 8 batches an epoch: the last steps are in the second
    options: dict[str, Any] = {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": 2,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}},
        "data": {"shards": shards, "workers": 1, "trace": True},
    }
    for name, chain in CHAINS.items():
        run = Run(warm, tmp_path / name, "base", **options)
        for ranks, steps in chain:
            run.train(ranks, steps)
            assert run.wait() == [0] * ranks, f"{name} on {ranks} ranks: {run.said()[-3000:]}"
    for key in ("sample_ids", "timesteps"):
        straight, elastic = (by_slot(tmp_path / name, chain, key) for name, chain in CHAINS.items())
        assert elastic == straight
    epoch = [
        sample for step in by_slot(tmp_path / "elastic", CHAINS["elastic"], "sample_ids")[:8] for sample in step
    ]
    assert len(set(epoch)) == len(epoch)
