"""Loss terms against the integrals they stand for."""

import math

import pytest
import torch

from glide_ds.diffusion.losses import (
    Gaussian,
    discretized_nll,
    gaussian_kl,
    min_snr_weight,
    reverse_kl,
    vb_bits,
)


def normal(mean: float, std: float, shape: tuple[int, ...] = (1, 1, 1, 1)) -> Gaussian:
    return Gaussian(torch.full(shape, mean).double(), torch.full(shape, 2 * math.log(std)).double())


def test_gaussian_kl_is_the_integral() -> None:
    p, q = normal(0.3, 0.5), normal(-0.2, 0.8)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(0.3, 0.5), torch.distributions.Normal(-0.2, 0.8)
    )
    assert gaussian_kl(p, q).item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_256_bins_share_all_of_the_mass() -> None:
    levels = (torch.arange(256).double() / 127.5 - 1)[:, None, None, None]
    for mean, std in [(0.0, 0.3), (-0.99, 0.05), (1.2, 2.0)]:
        mass = torch.exp(-discretized_nll(levels, normal(mean, std)))
        assert mass.sum().item() == pytest.approx(1, abs=1e-9)


def test_a_bin_far_off_is_finite() -> None:
    nll = discretized_nll(torch.ones(1, 1, 1, 1), normal(-1.0, 1e-3))
    assert nll.item() == pytest.approx(-math.log(1e-12))


def test_the_bound_takes_likelihood_at_the_end_and_divergence_before() -> None:
    x0 = torch.zeros(2, 1, 2, 2).double()
    posterior, model = normal(0.3, 0.5, (2, 1, 2, 2)), normal(-0.2, 0.8, (2, 1, 2, 2))
    first, later = vb_bits(x0, torch.tensor([0, 5]), posterior, model).tolist()
    assert first == pytest.approx(discretized_nll(x0, model)[0, 0, 0, 0].item() / math.log(2))
    assert later == pytest.approx(gaussian_kl(posterior, model)[0, 0, 0, 0].item() / math.log(2))


def test_reverse_kl_averages_elements_and_leaves_the_reference_alone() -> None:
    torch.manual_seed(0)
    values = [torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    on, off = Gaussian(*values[:2]), Gaussian(*values[2:])
    kl = reverse_kl(on, off)
    distance = (on.mean - off.mean) ** 2 / (2 * off.log_variance.exp())
    ratio = on.log_variance - off.log_variance
    torch.testing.assert_close(kl, (distance + (ratio.exp() - ratio - 1) / 2).mean(dim=(1, 2, 3)))
    assert reverse_kl(on, on).abs().max() == 0
    kl.sum().backward()
    assert all(value.grad is not None and value.grad.all() for value in values[:2])
    assert all(value.grad is None for value in values[2:])


def test_min_snr_weighs_the_error_of_x0_by_the_lesser_of_snr_and_gamma() -> None:
    """arXiv 2303.09556: the loss is min(SNR, γ) times the squared error of x_0, here reckoned from that of eps."""
    alpha_bar = torch.tensor([0.999, 0.9, 0.5, 0.01], dtype=torch.float64)
    x0, noise, predicted = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
    predicted_x0 = (x_t - (1 - alpha_bar).sqrt() * predicted) / alpha_bar.sqrt()
    expected = (alpha_bar / (1 - alpha_bar)).clamp(max=5) * (predicted_x0 - x0) ** 2
    torch.testing.assert_close(min_snr_weight(alpha_bar, 5.0) * (predicted - noise) ** 2, expected)
