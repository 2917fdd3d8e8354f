"""Two nodes of a real Slurm cluster that go for one run directory at the same instant."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from slurm_kit import Cluster

pytestmark = pytest.mark.cluster
RACES = 100
NODES = ("n1", "n2")


def test_the_lock_is_one_nodes_at_a_time_and_never_stale(cluster: Cluster):
    folder = cluster.folder / "races"

    def compete(own: str, other: str) -> dict[str, int]:
        words = ["tests/races.py", "--compete", own, other, "--races", str(RACES), "--folder", str(folder)]
        out = cluster.on("ctl", "srun", "--nodes=1", f"--nodelist={own}", sys.executable, *words)
        told: dict[str, int] = json.loads(out.splitlines()[-1])
        return told

    with ThreadPoolExecutor() as pool:
        both = list(pool.map(compete, NODES, reversed(NODES)))
    assert [sum(told.values()) for told in both] == [RACES] * 2
    had = [told.get("held", 0) + told.get("killed", 0) for told in both]
    assert sum(had) == sum(told.get("refused", 0) for told in both) == RACES
    assert sum(told.get("killed", 0) for told in both) == len(range(0, RACES, 3))
