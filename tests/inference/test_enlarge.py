"""Enlarging: what it is measured by, and that parts of a batch are drawn as the whole."""

from __future__ import annotations

import pytest
import torch
from model.tiny_glide import tiny_model

from glide_ds.errors import ConfigError
from glide_ds.inference.draw import draw
from glide_ds.inference.enlarge import Small, bicubic, compared, enlarge, psnr

LOW = torch.randint(256, (3, 4, 4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_psnr_is_the_mean_of_the_pictures_own() -> None:
    original = torch.full((2, 8, 8, 3), 100, dtype=torch.uint8)
    image = original.clone()
    image[0] += 10
    image[1] += 1
    assert psnr(image, original) == pytest.approx((28.1308 + 48.1308) / 2, abs=1e-3)  # 20 log10(255 / error)
    assert 60 < psnr(original, original) < 100


def test_bicubic_gains_nothing_on_itself_and_a_perfect_picture_does() -> None:
    originals = torch.randint(256, (3, 16, 16, 3), dtype=torch.uint8)
    small = Small(originals, ["a"] * 3, {"clean": LOW})
    by_bicubic, perfect = compared(bicubic(LOW, 16), small, "clean"), compared(originals, small, "clean")
    assert by_bicubic.psnr == by_bicubic.psnr_bicubic < perfect.psnr
    assert "+0.00 dB" in str(by_bicubic)
    assert perfect.count == 3


def test_an_upsampler_enlarges_by_four_in_its_published_steps() -> None:
    model = tiny_model(kind="upsample", image_size=16)
    steps: list[int] = []
    images = enlarge(
        model, LOW, ["a", "b", ""], schedule="linear", progress=lambda found: steps.extend(found) or found
    )
    assert (images.shape, images.dtype) == ((3, 16, 16, 3), torch.uint8)
    assert len(steps) == 27
    assert not torch.equal(images, enlarge(model, 255 - LOW, ["a", "b", ""], schedule="linear"))


def test_only_an_upsampler_can_leave_out_the_noisiest_steps() -> None:
    short = enlarge(
        tiny_model(kind="upsample", image_size=16), LOW, ["a"] * 3, schedule="linear", steps="3,0,0"
    )
    assert short.shape == (3, 16, 16, 3)
    with pytest.raises(ConfigError, match="only an upsampler has a picture to begin at"):
        draw(tiny_model(image_size=16), ["a"], schedule="linear", steps="3,0,0")
