"""The benchmarks that measure here run, at their smallest size: nobody would notice otherwise until the next figure.

Left out for their time, half a minute and more each: checkpoint.py, loader.py, memory.py, scaling.py and startup.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from train_kit import without_launcher

ROOT = Path(__file__).parents[1]
SMALLEST = {
    "step.py": ["options", "--size", "tiny", "--rounds", "1", "--only", "+ AdamW8bit"],
    "optimizer.py": ["--size", "100000", "--rounds", "1"],
    "samplers.py": ["--captions", "2", "--variants", "1", "--parts", "parts"],
    "stratified.py": ["--batches", "3", "--parts", "parts.pt"],
    "drawing.py": ["--pictures", "40", "--captions", "1"],
    "order.py": ["--shards", "100", "--per_shard", "100"],
    "convergence.py": ["base", "--variants", "AdamW", "--steps", "2", "--seeds", "0", "--samples", "8"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_a_benchmark_writes_what_it_measured_and_where(name: str, tmp_path: Path):
    out = tmp_path / "out.json"
    command = [sys.executable, str(ROOT / "benchmarks" / name), *SMALLEST[name], "--out", str(out)]
    environment = {**without_launcher(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert {"cpu", "torch", "python", "commit", "command"} <= report["environment"].keys()
    assert len(report) > 1
