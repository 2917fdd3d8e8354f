"""Filling in: what is known comes back exactly, whatever sampler draws the rest; what does not fit is refused."""

from __future__ import annotations

import pytest
import torch
from model.tiny_glide import tiny_model

from glide_ds.diffusion import SAMPLERS
from glide_ds.errors import ConfigError
from glide_ds.inference.inpaint import fill, masked

IMAGES = torch.randint(256, (2, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
KNOWN = torch.zeros(2, 16, 16, dtype=torch.uint8)
KNOWN[0, :, 4:9] = 1
CAPTIONS = ["a red circle", ""]


def filled(
    images: torch.Tensor, known: torch.Tensor, sampler: str = "ddpm", kind: str = "base-inpaint"
) -> torch.Tensor:
    return fill(
        tiny_model(kind=kind, image_size=16),
        images,
        known,
        CAPTIONS,
        schedule="linear",
        steps=4,
        sampler=sampler,
    )


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_known_pixels_are_exact_and_the_others_drawn(sampler: str) -> None:
    result, known = filled(IMAGES, KNOWN, sampler), KNOWN.bool()
    assert torch.equal(result[known], IMAGES[known])
    assert (result[~known] != IMAGES[~known]).float().mean() > 0.9


def test_what_is_hidden_is_never_looked_at_and_what_is_known_is() -> None:
    other = torch.where(KNOWN[..., None].bool(), IMAGES, 7)
    assert torch.equal(filled(IMAGES, KNOWN), filled(other, KNOWN))
    brighter = torch.where(KNOWN[..., None].bool(), 255 - IMAGES, IMAGES)
    hidden = ~KNOWN[0].bool()
    assert not torch.equal(filled(IMAGES, KNOWN)[0][hidden], filled(brighter, KNOWN)[0][hidden])


def test_all_known_is_the_picture_itself() -> None:
    assert torch.equal(filled(IMAGES, torch.ones_like(KNOWN)), IMAGES)


def test_people_are_shown_grey_for_what_the_model_is_not() -> None:
    seen, known = masked(IMAGES, KNOWN), KNOWN.bool()
    assert torch.equal(seen[known], IMAGES[known])
    assert seen[~known].unique().tolist() == [128]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="give one of kind base-inpaint"):
        filled(IMAGES, KNOWN, kind="base")
    with pytest.raises(ConfigError, match="resize both to 16 px"):
        filled(IMAGES, KNOWN[:, :8])
    with pytest.raises(ConfigError, match="resize both to 16 px"):
        filled(IMAGES[:, :8, :8], KNOWN[:, :8, :8])
