"""Losses as pure functions. B samples, C channels, S image side; every result is [B]."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

QUARTILES = 4  # of the timesteps, in which losses are told apart
MAX_INVERSE_SNR = 20.0


class Gaussian(NamedTuple):
    """A diagonal Gaussian over images, both [B, C, S, S]."""

    mean: Tensor
    log_variance: Tensor


def mean_per_sample(values: Tensor) -> Tensor:
    """[B, ...] -> [B]."""
    return values.flatten(1).mean(dim=1)


def v_weight(alpha_bar: Tensor) -> Tensor:
    """The weight [B] that makes an eps-MSE the MSE of v-prediction: 1 + 1/SNR.

    Salimans & Ho 2022, arXiv 2202.00512, section 4; 1/SNR is capped so that single samples don't dominate.
    """
    return 1 + ((1 - alpha_bar) / alpha_bar).clamp(max=MAX_INVERSE_SNR)


def min_snr_weight(alpha_bar: Tensor, gamma: float) -> Tensor:
    """The weight [B] of an eps-MSE under the min-SNR-γ strategy: min(SNR, γ) / SNR.

    Hang et al. 2023, arXiv 2303.09556, section 3.4: min(SNR, γ) is the weight of the squared error of x_0, which is
    1/SNR times that of eps.
    """
    return (gamma * (1 - alpha_bar) / alpha_bar).clamp(max=1.0)


def gaussian_kl(p: Gaussian, q: Gaussian) -> Tensor:
    """KL(p || q) of every element, in nats."""
    log_ratio = p.log_variance - q.log_variance
    distance = (p.mean - q.mean) ** 2 * torch.exp(-q.log_variance)
    return 0.5 * (torch.exp(log_ratio) - log_ratio - 1 + distance)


def discretized_nll(image: Tensor, p: Gaussian) -> Tensor:
    """-log of p's mass in the 8-bit bin of every element of `image` in [-1, 1], in nats (DDPM, equation 13).

    The two outermost bins reach to infinity. The normal CDF is the tanh approximation, as in the published
    losses.
    """
    centered = image - p.mean
    precision = torch.exp(-0.5 * p.log_variance)
    below_upper = _normal_cdf(precision * (centered + 1 / 255))
    below_lower = _normal_cdf(precision * (centered - 1 / 255))
    mass = torch.where(
        image < -0.999,
        below_upper,
        torch.where(image > 0.999, 1 - below_lower, below_upper - below_lower),
    )
    return -torch.log(mass.clamp(min=1e-12))


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def vb_bits(x0: Tensor, t: Tensor, posterior: Gaussian, model: Gaussian) -> Tensor:
    """One term of the variational bound, in bits per element (Improved DDPM, equations 4 to 7).

    KL(q(x_{t-1} | x_t, x_0) || p) for t > 0, the negative log likelihood of x_0 at t = 0.
    """
    kl = mean_per_sample(gaussian_kl(posterior, model))
    nll = mean_per_sample(discretized_nll(x0, model))
    return torch.where(t == 0, nll, kl) / math.log(2)


def reverse_kl(on: Gaussian, off: Gaussian) -> Tensor:
    """KL(on || off) between two reverse steps p(x_{t-1} | x_t), averaged over elements, in nats.

    The squared distance of the means over twice off's variance, plus the term for the variances. `off` is the
    reference (CLIP left out) and receives no gradient.
    """
    return mean_per_sample(gaussian_kl(on, Gaussian(off.mean.detach(), off.log_variance.detach())))
