"""A run stopped at odd steps and gone on with on other numbers of ranks reads what an uninterrupted one reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from data_kit import write_shards
from elastic_trace import BATCH, CHAINS
from train_kit import trace


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
def test_two_ranks_then_one_then_three_read_the_same_samples(root: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [30, 7, 25, 40])  # 8 batches an epoch: the last steps are in the second
    path = os.pathsep.join([str(root / "tests"), str(root)])
    done = subprocess.run(
        [sys.executable, str(root / "tests" / "data" / "elastic_trace.py"), shards, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for key in ("sample_ids", "timesteps"):
        straight, elastic = (by_slot(tmp_path / name, chain, key) for name, chain in CHAINS.items())
        assert elastic == straight
    epoch = [
        sample for step in by_slot(tmp_path / "elastic", CHAINS["elastic"], "sample_ids")[:8] for sample in step
    ]
    assert len(set(epoch)) == len(epoch)
