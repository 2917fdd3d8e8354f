"""Masks of inpainting: every kind as often as asked for, alike at every side, the same wherever they are drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from data_kit import source, take, write_shards

from glide_ds.config import MaskConfig
from glide_ds.data.order import uniform
from glide_ds.data.pictures.masks import DICE, KINDS, known_pixels
from glide_ds.types import Batch

ONLY = {name: MaskConfig(**{other: float(other == name) for other in KINDS}) for name in KINDS}


def dice(count: int) -> np.ndarray:
    return uniform(np.arange(count)[:, None], np.arange(DICE)[None])


def test_each_kind_hides_what_its_name_says() -> None:
    hidden = {name: 1 - known_pixels(dice(200), 32, shares).mean((1, 2)) for name, shares in ONLY.items()}
    assert (hidden["everything"] == 1).all()
    assert (hidden["nothing"] == 0).all()
    for name, least, most in (("boxes", 0.03, 0.97), ("strokes", 0.005, 0.75), ("halves", 0.1, 0.9)):
        assert least < hidden[name].min()
        assert hidden[name].max() < most


def test_kinds_come_in_their_shares_and_one_of_share_0_never() -> None:
    shares = MaskConfig(boxes=0, strokes=0, halves=0, everything=3, nothing=1)
    means = known_pixels(dice(2000), 8, shares).mean((1, 2))
    assert set(means.tolist()) == {0.0, 1.0}
    assert means.mean() == pytest.approx(0.25, abs=0.04)  # 4 standard deviations


@pytest.mark.parametrize("name", ["boxes", "strokes", "halves"])
def test_a_mask_looks_alike_at_every_side(name: str) -> None:
    small, large = (known_pixels(dice(30), side, ONLY[name]) for side in (32, 128))
    shrunk = large.reshape(30, 32, 4, 32, 4).mean((2, 4))
    assert np.abs(small - shrunk).mean() < 0.03
    assert small.mean() == pytest.approx(large.mean(), abs=0.01)


def masks(batch: Batch) -> dict[int, torch.Tensor]:
    assert batch.known is not None
    assert batch.known.dtype == torch.uint8
    return dict(zip(batch.sample_ids.tolist(), batch.known, strict=True))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_samples_mask_depends_on_epoch_and_seed_and_not_on_ranks_and_workers(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [24])
    (one,) = take(source(shards, batch=24, masked=True), 1)
    assert one.known is not None
    assert one.known.shape == (24, 16, 16)
    assert len(one.known.flatten(1).unique(dim=0)) > 15
    two = [take(source(shards, batch=24, rank=r, ranks=2, workers=1, masked=True), 1)[0] for r in (0, 1)]
    assert all(torch.equal(mask, masks(one)[number]) for part in two for number, mask in masks(part).items())
    for other in (
        take(source(shards, batch=24, masked=True), 2)[1],
        source(shards, batch=24, seed=1, masked=True).one(0),
    ):
        assert sum(torch.equal(mask, masks(one)[number]) for number, mask in masks(other).items()) < 12
    assert source(shards).one(0).known is None


def test_a_picture_is_mirrored_and_its_mask_is_not(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, [8])
    plain, mirrored = (source(shards, masked=True, flip=flip).one(0) for flip in (0.0, 1.0))
    assert torch.equal(plain.images.flip(2), mirrored.images)
    assert plain.known is not None
    assert mirrored.known is not None
    assert torch.equal(plain.known, mirrored.known)
