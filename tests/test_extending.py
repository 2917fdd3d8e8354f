"""What it takes to add a phase, an optimizer, a metric, a sampler: tried on a copy of the package, edit by edit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from train_kit import document, read_lines, without_launcher

pytestmark = pytest.mark.slow


class Copy:
    """The package in a folder of its own, and which files were changed there."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.folder, self.touched = folder, set[str]()
        shutil.copytree(root / "glide_ds", folder / "glide_ds", ignore=shutil.ignore_patterns("__pycache__"))

    def edit(self, name: str, old: str, new: str) -> None:
        path = self.folder / "glide_ds" / name
        text = path.read_text()
        assert text.count(old) == 1, f"{name}: {old!r}"
        path.write_text(text.replace(old, new))
        self.touched.add(name)

    def run(self, *words: str) -> str:
        environment = {**without_launcher(), "PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "glide_ds", *words],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout


@pytest.fixture
def package(root: Path, tmp_path: Path) -> Copy:
    return Copy(root, tmp_path)


def train(package: Copy, **sections: object) -> Path:
    """A run of two steps by the copy."""
    whole = document(package.folder, **sections)
    whole["glide_ds"]["train"]["steps"] = 2
    path = package.folder / "new.json"
    path.write_text(json.dumps(whole))
    package.run("train", "--ds_config", str(path))
    return package.folder / "run"


def test_a_phase_is_a_row_and_a_json(package: Copy):
    package.edit(
        "config/phases.py",
        '        Phase("full",',
        '        Phase("text_only", "phase4", ("text",), ("adapter_gates",)),\n        Phase("full",',
    )
    run = train(package, phase="text_only")
    assert (run / "phase4" / "LAST").is_symlink()
    assert set(read_lines(run / "metrics.jsonl")[-1]["lr_by_role"]) == {"text"}
    assert package.touched == {"config/phases.py"}


def test_an_optimizer_is_two_files(package: Copy):
    package.edit(
        "config/deepspeed.py", 'Literal["AdamW", "AdamW8bit"]', 'Literal["AdamW", "AdamW8bit", "NAdam"]'
    )
    package.edit(
        "training/zero/optimizer.py",
        '    "AdamW8bit": Kind(AdamW8bit, 2.1),\n',
        '    "AdamW8bit": Kind(AdamW8bit, 2.1),\n    "NAdam": Kind(torch.optim.NAdam, 8.0),\n',
    )
    run = train(package, optimizer={"type": "NAdam", "params": {"lr": 1e-3}})
    assert read_lines(run / "metrics.jsonl")[-1]["step"] == 2
    assert len(package.touched) == 2


def test_a_metric_is_one_file(package: Copy):
    package.edit(
        "training/metrics.py",
        '            "lr": max(rates.values()),\n',
        '            "lr": max(rates.values()),\n            "lr_least": min(rates.values()),\n',
    )
    run = train(package)
    assert "lr_least" in read_lines(run / "metrics.jsonl")[-1]
    assert len(package.touched) == 1


def test_a_sampler_is_one_file(package: Copy):
    package.edit(
        "diffusion/samplers.py",
        '    "ddpm": ddpm_step,',
        '    "still": ddim_step,\n    "ddpm": ddpm_step,',
    )
    out = package.folder / "x.png"
    package.run(
        *("sample", "builtin:tiny", "--prompt", "a red circle", "--steps", "2"),
        *("--sampler", "still", "--out", str(out)),
    )
    assert os.path.getsize(out) > 100
    assert len(package.touched) == 1
