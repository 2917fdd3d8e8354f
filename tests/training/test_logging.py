"""What the log says of the run's speed."""

from __future__ import annotations

import pytest
import torch

from glide_ds.inference.draw import Row
from glide_ds.training.logging import StepProgress, diagnosis, folded


def reading(wait: float, communication: float = 0.0) -> dict[str, float]:
    shares = {"data_wait_share": wait, "communication_share": communication, "mfu": 0.4}
    return {"loss": 1.0, "images_per_s": 10.0, "memory_gib": 1.0, **shares}


def test_waiting_for_data_is_diagnosed_with_its_share_and_remedy():
    assert "data wait is 43% of the step" in (diagnosis(reading(0.43)) or "")
    assert "data.workers" in (diagnosis(reading(0.43)) or "")
    assert diagnosis(reading(0.05)) is None


def test_communication_is_diagnosed_where_it_takes_more():
    assert "communication is 52% of the step" in (diagnosis(reading(0.3, 0.52)) or "")
    assert "data wait is 40%" in (diagnosis(reading(0.4, 0.35)) or "")
    assert diagnosis(reading(0.0, 0.1)) is None


def test_a_diagnosis_is_said_once_and_not_while_loaders_start(capsys: pytest.CaptureFixture[str]):
    progress = StepProgress("full", 0, 10, shown=True)
    said = []
    for step in range(1, 6):
        progress.step(step, reading(0.5))
        said.append("raise data.workers" in capsys.readouterr().out)
    assert said == [False, False, True, False, False]


def test_a_rate_that_was_measured_too_low_is_not_shown_as_a_fact(capsys: pytest.CaptureFixture[str]):
    progress = StepProgress("full", 0, 10, shown=True)
    progress.step(1, reading(0.0) | {"mfu": 1.7})
    progress.step(2, reading(0.0))
    out = capsys.readouterr().out
    assert ("MFU unknown" in out, "MFU 40%" in out, "170%" in out) == (True, True, False)


def test_a_grid_is_folded_so_that_what_belongs_together_stays_together():
    images = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 2, 2, 3)
    drawn, real = Row(images, list("abcdef")), Row(images[:3], ["original"] * 3)
    assert [row.labels for row in folded([drawn, real], 4)] == [list("abcd"), ["original"] * 3, list("ef")]
    assert folded([drawn], 4)[1].images[:, 0, 0, 0].tolist() == [4, 5]
