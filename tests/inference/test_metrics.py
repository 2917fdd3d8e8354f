"""The figures of drawn pictures against closed forms, and against what they should do as pictures get worse."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glide_ds.data import shapes
from glide_ds.errors import ConfigError
from glide_ds.inference.metrics import (
    clip_score,
    cmmd,
    compared,
    frechet_distance,
    kernel_distance,
    neighbourhoods,
    quality,
)
from glide_ds.model.clip import FrozenClip

N = 96


def normal(count: int, width: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(x: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """The same samples with exactly these means and standard deviations, uncorrelated."""
    white = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(white.T.cov()), white.T, upper=False).T
    return mean + scale * white


def test_frechet_is_the_closed_form_of_two_gaussians() -> None:
    m1, m2 = torch.tensor([0.0, 1, 2, 3]).double(), torch.tensor([1.0, 1, 0, 3]).double()
    s1, s2 = torch.tensor([1.0, 2, 0.5, 1]).double(), torch.tensor([2.0, 2, 1.5, 0.1]).double()
    expected = float((m1 - m2).square().sum() + (s1 - s2).square().sum())
    one, other = with_moments(normal(400), m1, s1), with_moments(normal(300, seed=1), m2, s2)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)


def test_kid_of_two_halves_is_zero_within_its_error_and_unbiased() -> None:
    found = [
        kernel_distance(normal(100, 8, seed), normal(100, 8, 1000 + seed), 1, 100)[0] for seed in range(60)
    ]
    mean, error = torch.tensor(found).mean(), torch.tensor(found).std() / math.sqrt(len(found))
    assert abs(mean) < 3 * error
    value, spread = kernel_distance(normal(400, 8), normal(400, 8, 1))
    assert abs(value) < 2 * spread
    far, _ = kernel_distance(normal(400, 8), normal(400, 8, 1) + 1)
    assert far > 10 * spread
    assert kernel_distance(normal(400, 8), normal(400, 8, 1)) == (
        value,
        spread,
    )  # the subsets are always the same


def test_kid_is_the_unbiased_estimate_as_written() -> None:
    x, y = normal(12, 4), normal(12, 4, 1) + 0.3

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / 4 + 1) ** 3

    n, off = 12, ~torch.eye(12, dtype=torch.bool)
    expected = (kernel(x, x)[off].sum() + kernel(y, y)[off].sum()) / (n * (n - 1)) - 2 * kernel(x, y).mean()
    assert kernel_distance(x, y, 1, 12)[0] == pytest.approx(float(expected), rel=1e-9)


def test_cmmd_is_the_closed_form_for_two_points() -> None:
    x, y = torch.zeros(3, 2), torch.tensor([[3.0, 4.0]]).expand(3, 2)
    assert cmmd(x, y) == pytest.approx(1000 * 2 * (1 - math.exp(-25 / 200)), rel=1e-9)
    assert cmmd(normal(50), normal(50)) == pytest.approx(0, abs=1e-9)


def test_neighbourhoods_of_points_on_a_line() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])
    drawn = torch.tensor([[0.4], [1.4], [100.0], [101.0]])
    # With k = 1 the real balls reach 1 to each side; 0.4 lies in those of 0 and 1, 1.4 in those of 1 and 2.
    assert neighbourhoods(real, drawn, 1) == pytest.approx(
        {"precision": 2 / 4, "recall": 3 / 6, "density": 4 / 4, "coverage": 3 / 6}
    )
    same = neighbourhoods(real, real, 1)
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)


def test_clip_score_is_a_hundred_times_the_cosine_and_never_below_zero() -> None:
    pictures = torch.tensor([[1.0, 0.0], [0.6, 0.8], [-1.0, 0.0]])
    texts = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    assert clip_score(pictures, texts) == pytest.approx(100 * (1 + 0.6 + 0) / 3)


@pytest.fixture(scope="module")
def clip() -> FrozenClip:
    return FrozenClip("builtin:tiny", "openai", "cpu")


@pytest.fixture(scope="module")
def pictures() -> tuple[Tensor, Tensor, list[str]]:
    """Real pictures, others of the same kind and the captions of the first."""
    drawn = [shapes.draw(shapes.HELD_OUT + i, 32) for i in range(2 * N)]
    images = torch.stack([torch.from_numpy(image) for image, _ in drawn])
    return images[:N], images[N:], [caption for _, caption in drawn[:N]]


def test_every_distance_grows_with_noise_and_blur_and_the_score_falls_with_wrong_captions(
    clip: FrozenClip, pictures: tuple[Tensor, Tensor, list[str]]
) -> None:
    real, _, captions = pictures
    texts, features = clip.encode_text(captions), clip.encode_image(real)
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    noisy = [clip.encode_image((real + s * noise).clamp(0, 255).byte()) for s in (5, 20, 60)]
    planes = real.movedim(3, 1).float()
    blurred = [
        clip.encode_image(
            F.avg_pool2d(F.pad(planes, (s, s, s, s), mode="replicate"), 2 * s + 1, 1).movedim(1, 3).byte()
        )
        for s in (1, 2, 5)
    ]
    for worse in (noisy, blurred):
        found = [quality(features, one, texts) for one in worse]
        for name in ("frechet_distance", "kid", "cmmd"):
            values = [getattr(one, name) for one in found]
            assert values == sorted(values), name
            assert values[0] < values[-1]
        assert found[-1].coverage <= found[0].coverage
    rolled = [torch.cat([texts[:part].roll(1, 0), texts[part:]]) for part in (0, N // 2, N)]
    scores = [clip_score(features, wrong) for wrong in rolled]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > scores[-1]


def test_a_difference_exceeds_its_error_where_there_is_one_and_not_where_there_is_none(
    clip: FrozenClip, pictures: tuple[Tensor, Tensor, list[str]]
) -> None:
    real, others, captions = pictures
    texts, features = clip.encode_text(captions), clip.encode_image(real)
    noise = torch.randn(others.shape, generator=torch.Generator().manual_seed(0))
    good = clip.encode_image(others)
    bad = clip.encode_image((others + 60 * noise).clamp(0, 255).byte())
    worse = compared(features, texts, good, bad, halves=12)
    for name in ("frechet_distance", "kid", "cmmd"):
        assert worse[name].value > 0
        assert worse[name].real, name
    same = compared(features, texts, good, good[torch.arange(N).roll(1)], halves=12)
    assert not any(same[name].real for name in ("frechet_distance", "kid", "cmmd", "coverage"))


def test_without_torchmetrics_it_says_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ConfigError, match=r"launch/env\.sh --extras evaluate"):
        frechet_distance(normal(9), normal(9))
