"""Degraded inputs of an upsampler: as strong as asked for, in the share asked for, the same wherever they are made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_kit import photo, source, take, write_shards

from glide_ds.config import DegradeConfig
from glide_ds.data.order import mix
from glide_ds.data.pictures.degrade import degraded
from glide_ds.types import Batch

KEYS = mix(np.arange(64))
PHOTOS = np.stack([photo(number, 16, 16) for number in range(64)])
GREY = np.full((64, 16, 16, 3), 128, np.uint8)
NOTHING: dict[str, Any] = {"share": 1.0, "blur": 0.0, "noise": 0.0, "jpeg": 100}


def made(pictures: np.ndarray, **changes: Any) -> np.ndarray:
    return degraded(pictures, KEYS, DegradeConfig(**{**NOTHING, **changes}))


def test_each_way_is_as_strong_as_it_may_be_and_no_stronger() -> None:
    assert np.array_equal(made(PHOTOS), PHOTOS)
    noise = made(GREY, noise=40.0).astype(float).std((1, 2, 3))
    assert noise.max() < 42
    assert noise.mean() == pytest.approx(20, abs=6)
    assert noise.min() < 5  # the strength is drawn
    contrast = [made(PHOTOS, blur=blur).astype(float).std() for blur in (0.0, 1.0, 3.0)]
    assert contrast[0] > contrast[1] > contrast[2]
    errors = [np.abs(made(PHOTOS, jpeg=jpeg).astype(float) - PHOTOS).mean() for jpeg in (95, 40, 5)]
    assert 0 < errors[0] < errors[1] < errors[2]
    for change in ({"blur": 3.0}, {"jpeg": 5}):  # so are these
        assert len(np.unique(made(np.repeat(PHOTOS[:1], 64, 0), **change), axis=0)) > 20


def test_a_share_is_degraded_and_each_by_its_own_key() -> None:
    half = made(PHOTOS, share=0.5, noise=40.0)
    changed = (half != PHOTOS).any((1, 2, 3))
    assert 20 < changed.sum() < 44
    again = degraded(PHOTOS[::-1], KEYS[::-1], DegradeConfig(**{**NOTHING, "share": 0.5, "noise": 40.0}))
    assert np.array_equal(again[::-1], half)


def low_res(batch: Batch) -> dict[int, torch.Tensor]:
    assert batch.low_res is not None
    return dict(zip(batch.sample_ids.tolist(), batch.low_res, strict=True))


def test_the_loader_degrades_inputs_alone_and_alike_on_any_rank(tmp_path: Path) -> None:
    shards, degrade = write_shards(tmp_path, [16]), {"share": 0.5, "noise": 60.0}
    clean = source(shards, batch=16, low_res=True).one(0)
    worse = source(shards, batch=16, low_res=True, degrade=degrade).one(0)
    assert torch.equal(worse.images, clean.images)
    same = sum(torch.equal(low_res(worse)[number], small) for number, small in low_res(clean).items())
    assert 2 < same < 14
    for rank in (0, 1):
        part = low_res(source(shards, batch=16, rank=rank, ranks=2, low_res=True, degrade=degrade).one(0))
        assert all(torch.equal(small, low_res(worse)[number]) for number, small in part.items())
    asked: dict[str, Any] = {"batch": 16, "low_res": True, "degrade": degrade}
    for other in (take(source(shards, **asked), 2)[1], source(shards, seed=1, **asked).one(0)):
        again = sum(torch.equal(low_res(worse)[number], small) for number, small in low_res(other).items())
        assert again < 10  # another epoch or seed: those that are clean in both
