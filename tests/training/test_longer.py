"""A phase made longer or shorter: what becomes of its learning rate is told before, and how to keep the curve."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_kit import copy_run, make_config, metrics, train_phase, write_config

from glide_ds.cli import main
from glide_ds.training.checkpoint.commit import committed

pytestmark = pytest.mark.usefixtures("group")
WHOLE = {"lr_scale": {"gates": 3.0}}  # of the fixture's run, which has 5 steps


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    copy_run(trained / "run", tmp_path / "run")
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str], folder: Path, steps: int, *sets: str) -> str:
    """What a dry run says, in one line."""
    config = write_config(folder, train={**WHOLE, "steps": steps}, ema={"decay": 0.5})
    assert main(["train", "--ds_config", str(config), "--dry_run", *(["--set", *sets] if sets else [])]) == 0
    return " ".join(capsys.readouterr().out.replace("!!", "").split())


def test_a_longer_phase_tells_the_jump_and_how_to_keep_the_curve(
    copy: Path, capsys: pytest.CaptureFixture[str]
):
    said = shown(capsys, copy, 50)
    assert "45 to go of 50" in said
    assert (
        "LEARNING RATE: its cosine ends at step 50 instead of 5, so from step 7 on it is 0.985 of its peak"
        in said
    )
    assert "instead of 0.1 (9.8 times as high)" in said
    assert "To keep the curve of before: --set scheduler.params.total_num_steps=5" in said
    kept = shown(capsys, copy, 50, "scheduler.params.total_num_steps=5")
    assert "instead of" not in kept
    assert "5 is less than train.steps = 50: the last 45 steps train at its lowest" in kept
    assert "LEARNING RATE" not in shown(capsys, copy, 5)


def test_another_end_of_the_curve_is_told_whatever_changed_it(copy: Path, capsys: pytest.CaptureFixture[str]):
    """total_num_steps may change on resume, for it is how a curve is kept; by itself it never does so unsaid."""
    said = shown(capsys, copy, 9, "scheduler.params.total_num_steps=20")
    assert "its cosine ends at step 20 instead of 5, so from step 7 on" in said
    assert "To keep the curve of before: --set scheduler.params.total_num_steps=5" in said


def test_what_was_told_is_what_is_trained(copy: Path):
    before = {line["step"]: line["lr"] for line in metrics(copy)}
    scheduler = {"params": {"warmup_num_steps": 2, "cos_min_ratio": 0.1, "total_num_steps": 5}}
    train_phase(make_config(copy, train={**WHOLE, "steps": 6}, ema={"decay": 0.5}, scheduler=scheduler))
    lowest = {line["step"]: line["lr"] for line in metrics(copy)}
    assert {step: lowest[step] for step in before} == before
    assert lowest[6] == pytest.approx(0.1 * 0.001 * 3)
    train_phase(make_config(copy, train={**WHOLE, "steps": 8}, ema={"decay": 0.5}))
    after = {line["step"]: line["lr"] for line in metrics(copy)}
    assert after[7] > 1.5 * lowest[6]  # a line has the rate of the update after it


def test_a_shorter_phase_says_that_nothing_is_left(copy: Path, capsys: pytest.CaptureFixture[str]):
    said = shown(capsys, copy, 3)
    assert "steps none to go: 5 are done, more than train.steps = 3" in said
    before = {path: path.stat().st_mtime_ns for path in (copy / "run" / "phase3").rglob("*")}
    train_phase(make_config(copy, train={**WHOLE, "steps": 3}, ema={"decay": 0.5}))
    assert {path: path.stat().st_mtime_ns for path in (copy / "run" / "phase3").rglob("*")} == before
    assert committed(copy / "run" / "phase3")[0].step == 5
    assert "none to go" in " ".join(capsys.readouterr().out.split())
