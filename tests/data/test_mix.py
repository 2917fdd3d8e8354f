"""A mix holds its proportions at every step, runs through every set, and is the same at any world size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_kit import json_bytes, sample, source, take, write_tar

from glide_ds.config import DataConfig
from glide_ds.data.order import MixOrder, Order
from glide_ds.errors import ConfigError


def test_proportions_coverage_and_epochs() -> None:
    parts = tuple(Order(np.array([n]), 12, 0, n, drop_last=False) for n in (100, 7, 40))
    mixed = MixOrder(parts, (0.5, 0.2, 0.3))
    draws = [mixed.draw(n, np.arange(12)) for n in range(50)]
    ids = np.concatenate([d.ids for d in draws])
    for steps in (5, 50):
        part = np.searchsorted([100, 107, 147], ids[: 12 * steps], side="right")
        assert np.abs(np.bincount(part) - 12 * steps * np.array([0.5, 0.2, 0.3])).max() <= 2
    epochs = np.concatenate([d.epochs for d in draws])
    for epoch in (0, 1):
        assert sorted(ids[(ids < 100) & (epochs == epoch)]) == list(range(100))
    small = ids[(ids >= 100) & (ids < 107)]
    assert np.bincount(small - 100).max() - np.bincount(small - 100).min() <= 1
    half = mixed.draw(33, np.arange(1, 12, 2))
    assert np.array_equal(half.ids, draws[33].ids[1::2])


@pytest.fixture
def mix(tmp_path: Path) -> dict[str, Any]:
    for name, first in (("a", 0), ("b", 30)):
        samples = [
            (f"{n:03d}", sample(n, json=json_bytes(similarity=n % 10 / 10))) for n in range(first, first + 30)
        ]
        write_tar(tmp_path / f"{name}.tar", samples)
    return {
        "a": {"shards": str(tmp_path / "a.tar"), "weight": 3},
        "b": {"shards": str(tmp_path / "b.tar"), "weight": 1, "filter": {"min_similarity": 0.5}},
    }


def test_the_loader_mixes_with_each_sets_own_filter(mix: dict[str, Any]) -> None:
    made = source("builtin:shapes", batch=8, mix=mix)
    batches = take(made, 10)
    captions = [int(text.split()[1]) for batch in batches for text in batch.captions]
    ours = [n for n in captions if n >= 30]
    assert len(ours) == 20
    assert all(n % 10 >= 5 for n in ours)
    assert {n % 10 for n in captions if n < 30} == set(range(10))
    assert made.report()["filtered"]["min_similarity"] > 0
    for rank in range(2):
        parts = take(source("builtin:shapes", batch=8, mix=mix, rank=rank, ranks=2), 10)
        assert all(
            torch.equal(part.sample_ids, batch.sample_ids[rank::2])
            for part, batch in zip(parts, batches, strict=True)
        )


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"shard": "x.tar"}, r"data\.mix\.p\.shards is missing"),
        ({"shards": "x.tar", "wieght": 2}, "nearest known: 'weight'"),
        ({"shards": "x.tar", "weight": 0}, "positive"),
        ({"shards": "builtin:shapes"}, "it can't be mixed"),
        ({"shards": "x.tar", "filter": {"min_sise": 2}}, r"data\.mix\.p\.filter\.min_sise"),
    ],
)
def test_mistakes_are_named(part: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DataConfig.of({"mix": {"p": part}}, "data")
