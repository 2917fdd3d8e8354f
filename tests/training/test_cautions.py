"""The `!!` lines of the opening block: what a person may not have meant, with its remedy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from train_kit import make_config

from glide_ds.training.cautions import cautions
from glide_ds.training.checkpoint.start import Start

SHARDS = {"data": {"shards": "/data/{00..09}.tar"}}
CASES: list[tuple[dict[str, Any], str, int | None, int, list[str]]] = [
    # sections, weights, samples, parameters; the lines
    ({}, "random", 64, 2_000_000, [r"RANDOM START, as model.weights=random asks.* built-in shapes"]),
    (
        {"model": {"weights": "auto"}},
        "random",
        64,
        2_000_000,
        [r"RANDOM START, for no weights were given.*Give"],
    ),
    (SHARDS, "random", 10**6, 2_000_000, [r"RANDOM START, as .* on your shards: GLIDE's own took months"]),
    (
        {"model": {"preset": "base", "architecture": {}}},
        "openai",
        64,
        1,
        [r"BUILT-IN DATA.*coloured shapes.*pack", "NO PARENT"],
    ),
    ({}, "builtin:tiny", 64, 1, [r"NO PARENT"]),
    (SHARDS, "/x.pt", 200, 1, []),
    (
        SHARDS | {"train": {"steps": 166_650}},
        "/x.pt",
        200,
        1,
        [r"3,333 EPOCHS.* train.steps=5,000 shows each 100"],
    ),
    (SHARDS, "/x.pt", None, 1, []),
    (SHARDS, "/x.pt", 3, 1, [r"FEWER PICTURES THAN A BATCH: of 3 .*batch of 4. Lower train_batch_size to 3"]),
    (SHARDS, "/x.pt", 1000, 400_000_000, [r"NO GPU.*400,000,000 parameters.*glide-ds doctor"]),
]


@pytest.mark.parametrize(("sections", "weights", "samples", "parameters", "lines"), CASES)
def test_what_a_person_may_not_have_meant_is_told_and_nothing_else(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sections: dict[str, Any],
    weights: str,
    samples: int | None,
    parameters: int,
    lines: list[str],
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = make_config(tmp_path, **sections)
    facts = {"samples": samples}
    told = list(cautions(config, config.batch_arithmetic(1), Start(weights=weights), facts, parameters))
    assert len(told) == len(lines), told
    assert all(re.search(line, text) for line, text in zip(lines, told, strict=True)), told
