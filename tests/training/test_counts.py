"""Counts that are kept on disk are found again for an equal model, and for no other."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from glide_ds.model.layers import Block
from glide_ds.training.speed import counts
from glide_ds.training.speed.counts import remembered


class Small(nn.Module):
    config = "small"

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width, device="meta")
        self.block = Block()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GLIDE_DS_CACHE", str(tmp_path))
    return tmp_path


def counted(model: Any, what: str = "things") -> bool:
    """Whether `remembered` has to count."""
    calls: list[None] = []
    assert remembered(what, model, lambda: calls.append(None) or [1, {"a": 2}]) == [1, {"a": 2}]
    return bool(calls)


def test_an_equal_model_is_not_counted_again():
    assert [counted(Small()) for _ in range(2)] == [True, False]
    assert counted(Small(), "other things")


@pytest.mark.parametrize(
    "change",
    [
        lambda model: Small(5),
        lambda model: model.bfloat16(),
        lambda model: model.eval(),
        lambda model: model.layer.requires_grad_(False),
        lambda model: setattr(model.block, "recompute", True),
        lambda model: model.register_buffer("more", torch.zeros(1)),
        lambda model: setattr(model, "config", "other"),
    ],
)
def test_another_model_is(change: Callable[[Any], Any]):
    model = Small()
    assert counted(model)
    other = change(model)
    assert counted(other if isinstance(other, Small) else model)


def test_other_code_counts_anew(monkeypatch: pytest.MonkeyPatch):
    assert counted(Small())
    monkeypatch.setattr(counts, "_code", lambda: "another version of the model")
    assert counted(Small())


def test_a_cache_that_is_damaged_or_cannot_be_written(cache: Path, caplog: pytest.LogCaptureFixture):
    assert counted(Small())
    (file,) = (cache / "counts").iterdir()
    file.write_text("[1, {")
    assert [counted(Small()) for _ in range(2)] == [True, False]
    assert file.name in caplog.text
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("in the way")
    with caplog.at_level(logging.INFO):
        assert [counted(Small()) for _ in range(2)] == [True, True]
    assert "count again" in caplog.text
