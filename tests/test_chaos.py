"""A few of the kills that chaos.py is for; benchmarks/results/chaos-cpu.json has a hundred."""

from __future__ import annotations

import json
from pathlib import Path

import chaos
import pytest
from ranks import Warm

KILLS = 3


@pytest.mark.slow
def test_kills_damage_and_a_full_disk_lose_nothing_that_was_committed(warm: Warm, tmp_path: Path):
    options = ["--kills", str(KILLS), "--damage_every", str(KILLS), "--seed", "3"]
    chaos.main([*options, "--folder", str(tmp_path / "runs"), "--out", str(tmp_path / "out.json")], warm)
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["kills"] == KILLS
    assert told.get("truncated", 0) + told.get("bit flipped", 0) == 1
    assert told["end"]["equal_lines"] == told["end"]["steps"] > 6
