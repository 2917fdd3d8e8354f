"""A few of the kills that chaos.py is for; benchmarks/results/chaos-cpu.json has a hundred."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 3


@pytest.mark.slow
def test_kills_damage_and_a_full_disk_lose_nothing_that_was_committed(root: Path, tmp_path: Path):
    options = ["--kills", str(KILLS), "--damage_every", str(KILLS), "--seed", "3"]
    places = ["--folder", str(tmp_path / "runs"), "--out", str(tmp_path / "out.json")]
    command = [sys.executable, "tests/chaos.py", *options, *places]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    told = json.loads((tmp_path / "out.json").read_text())
    assert told["kills"] == KILLS
    assert told.get("truncated", 0) + told.get("bit flipped", 0) == 1
    assert told["end"]["equal_lines"] == told["end"]["steps"] > 6
