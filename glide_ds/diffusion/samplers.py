"""Samplers: from x_t one step towards the picture. Each is one function and its line in SAMPLERS.

A sampler is given the process, the model output [B, 6, S, S], x_t [B, 3, S, S], t (int64 [B]) and noise like x_t, and
returns x_{t-1}. What else it takes by keyword is its options; one that names `history` gets a list of its own for each
drawing, in which it keeps earlier predictions. Levels are half log-SNRs, lambda = log(alpha / sigma), in float64: the
cosine schedule ends with an alpha of 5e-5, whose reciprocal float32 would not survive.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glide_ds.diffusion.process import Diffusion
from glide_ds.errors import ConfigError, GlideError

Step = Callable[..., Tensor]  # (diffusion, model output, x_t, t, noise) -> x_{t-1}; options by keyword
# Adams-Bashforth, the latest first: by how many predictions there are (PNDM, arXiv 2202.09778, equation 12).
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def ddpm_step(
    diffusion: Diffusion, output: Tensor, x_t: Tensor, t: Tensor, noise: Tensor, clip_x0: bool = True
) -> Tensor:
    """Draw x_{t-1} from p(x_{t-1} | x_t) with the predicted x_0 clipped (DDPM, algorithm 2)."""
    p = diffusion.p_mean_variance(output, x_t, t, clip_x0=clip_x0)
    return p.mean + _not_last(t) * torch.exp(0.5 * p.log_variance) * noise


def ddim_step(
    diffusion: Diffusion,
    output: Tensor,
    x_t: Tensor,
    t: Tensor,
    noise: Tensor,
    eta: float = 0.0,
    clip_x0: bool = True,
) -> Tensor:
    """x_{t-1} by DDIM (arXiv 2010.02502, equations 12 and 16): deterministic at eta 0."""
    x0 = diffusion.p_mean_variance(output, x_t, t, clip_x0=clip_x0).x0
    eps = diffusion.predict_eps(x0, x_t, t)
    alpha_bar = diffusion.table("alphas_cumprod", t, x_t.dtype)
    previous = diffusion.table("alphas_cumprod_prev", t, x_t.dtype)
    sigma = eta * torch.sqrt((1 - previous) / (1 - alpha_bar)) * torch.sqrt(1 - alpha_bar / previous)
    mean = torch.sqrt(previous) * x0 + torch.sqrt(1 - previous - sigma**2) * eps
    return mean + _not_last(t) * sigma * noise


def euler_step(
    diffusion: Diffusion, output: Tensor, x_t: Tensor, t: Tensor, noise: Tensor, clip_x0: bool = True
) -> Tensor:
    """Euler's method on dx/dsigma = eps, x and sigma scaled by 1 / alpha (EDM, arXiv 2206.00364, algorithm 1).

    That is DDIM at eta 0, term by term.
    """
    return ddim_step(diffusion, output, x_t, t, noise, 0.0, clip_x0)


def euler_a_step(
    diffusion: Diffusion, output: Tensor, x_t: Tensor, t: Tensor, noise: Tensor, clip_x0: bool = True
) -> Tensor:
    """Euler's method down to sigma'^2 / sigma, then noise up to sigma': the ancestral step. It is DDIM at eta 1."""
    return ddim_step(diffusion, output, x_t, t, noise, 1.0, clip_x0)


def dpmpp_2m_step(
    diffusion: Diffusion,
    output: Tensor,
    x_t: Tensor,
    t: Tensor,
    noise: Tensor,
    history: list[Tensor],
    clip_x0: bool = True,
    furthest: float = 1.0,
) -> Tensor:
    """DPM-Solver++(2M), deterministic and of second order (arXiv 2211.01095, algorithm 2).

    It extrapolates no further than `furthest` times the length of the last step. The paper's has no such bound, and
    overshoots where steps grow in log-SNR, as they do at the end of evenly spaced timesteps: drawn by 20 of them,
    data of a standard deviation of 0.5 come out with 0.550 (cosine) and 0.621 (linear), with the bound 0.500 and 0.493.
    """
    now, after = _levels(diffusion, t)
    h = after.half_log_snr - now.half_log_snr
    x0, slope = _with_slope(diffusion, output, x_t, t, history, clip_x0, furthest)
    x = after.sigma / now.sigma * x_t - after.alpha * torch.expm1(-h) * (x0 + slope / 2)
    return x.to(x_t.dtype)


def dpmpp_2m_sde_step(
    diffusion: Diffusion,
    output: Tensor,
    x_t: Tensor,
    t: Tensor,
    noise: Tensor,
    history: list[Tensor],
    clip_x0: bool = True,
    furthest: float = 1.0,
) -> Tensor:
    """SDE-DPM-Solver++(2M): the same with as much noise as the reverse SDE adds (arXiv 2211.01095, appendix)."""
    now, after = _levels(diffusion, t)
    h = after.half_log_snr - now.half_log_snr
    x0, slope = _with_slope(diffusion, output, x_t, t, history, clip_x0, furthest)
    x = after.sigma / now.sigma * torch.exp(-h) * x_t - after.alpha * torch.expm1(-2 * h) * (x0 + slope / 2)
    return (x + after.sigma * torch.sqrt(-torch.expm1(-2 * h)) * noise).to(x_t.dtype)


def plms_step(
    diffusion: Diffusion,
    output: Tensor,
    x_t: Tensor,
    t: Tensor,
    noise: Tensor,
    history: list[Tensor],
    clip_x0: bool = True,
) -> Tensor:
    """DDIM by an epsilon extrapolated from the last four (PNDM, arXiv 2202.09778), fewer at first.

    The last step takes the present one alone, so that it ends in what the model predicts.
    """
    now, after = _levels(diffusion, t)
    x0 = _x0(diffusion, output, x_t, t, clip_x0)
    history.append((x_t - now.alpha * x0) / now.sigma)
    del history[:-4]
    weights = ADAMS_BASHFORTH[len(history) - 1]
    eps = sum((w * e for w, e in zip(weights, reversed(history), strict=True)), torch.zeros_like(x0))
    eps = torch.where(_not_last(t), eps, history[-1])
    x0 = (x_t - now.sigma * eps) / now.alpha
    x0 = x0.clamp(-1, 1) if clip_x0 else x0
    return (after.alpha * x0 + after.sigma * eps).to(x_t.dtype)


SAMPLERS: dict[str, Step] = {
    "ddpm": ddpm_step,
    "ddim": ddim_step,
    "euler": euler_step,
    "euler-a": euler_a_step,
    "dpm++2m": dpmpp_2m_step,
    "dpm++2m-sde": dpmpp_2m_sde_step,
    "plms": plms_step,
}
EVENLY_SPACED = ("plms",)  # whose coefficients hold for steps of one length


def make_step(sampler: str, diffusion: Diffusion, eta: float = 0.0) -> Step:
    """The sampler of that name for one drawing. Raises GlideError for one that does not exist or can't take this."""
    if sampler not in SAMPLERS:
        raise GlideError(f"sampler {sampler!r} does not exist", remedy=f"choose one of {', '.join(SAMPLERS)}")
    step, options = SAMPLERS[sampler], inspect.signature(SAMPLERS[sampler]).parameters
    if eta and "eta" not in options:
        takers = [name for name, other in SAMPLERS.items() if "eta" in inspect.signature(other).parameters]
        raise GlideError(
            f"eta={eta} has no effect on sampler {sampler!r}",
            remedy=f"leave it out, or use {', '.join(takers)}",
        )
    lengths = torch.tensor(diffusion.timestep_map).diff().tolist()
    if sampler in EVENLY_SPACED and lengths and max(lengths) > min(lengths) + 1:
        raise ConfigError(
            f"sampler {sampler!r} was given steps of {min(lengths)} to {max(lengths)} timesteps",
            "its formula, which is for steps of one length, would not hold",
            "space them uniform or trailing, or take dpm++2m",
        )
    extra: dict[str, Any] = {"eta": eta} if eta else {}
    return partial(step, **extra, **({"history": []} if "history" in options else {}))


class Level(NamedTuple):
    """How much signal and noise there is, each float64 [B, 1, 1, 1]."""

    half_log_snr: Tensor
    alpha: Tensor
    sigma: Tensor


def _levels(diffusion: Diffusion, t: Tensor) -> tuple[Level, Level]:
    """The levels of x_t and of x_{t-1}; that of a picture is infinite."""
    tables = (diffusion.table(name, t, torch.float64) for name in ("half_log_snr", "half_log_snr_prev"))
    now, after = (Level(at, torch.sigmoid(2 * at).sqrt(), torch.sigmoid(-2 * at).sqrt()) for at in tables)
    return now, after


def _x0(diffusion: Diffusion, output: Tensor, x_t: Tensor, t: Tensor, clip: bool) -> Tensor:
    """The x_0 that the model predicts, float64."""
    x0 = diffusion.predict_x0(output[:, : x_t.shape[1]].double(), x_t.double(), t)
    return x0.clamp(-1, 1) if clip else x0


def _with_slope(
    diffusion: Diffusion,
    output: Tensor,
    x_t: Tensor,
    t: Tensor,
    history: list[Tensor],
    clip: bool,
    furthest: float,
) -> tuple[Tensor, Tensor]:
    """The predicted x_0, and by how much it will change in this step if it goes on as it did in the last one.

    By nothing in the first step, and in the last one, which is infinitely long.
    """
    x0 = _x0(diffusion, output, x_t, t, clip)
    before = history[-1] if history else None
    history[:] = [x0]
    if before is None:
        return x0, torch.zeros_like(x0)
    level, following = (diffusion.table(n, t, torch.float64) for n in ("half_log_snr", "half_log_snr_prev"))
    last = level - diffusion.table("half_log_snr", t + 1, torch.float64)
    ratio = torch.where(_not_last(t), ((following - level) / last).clamp(max=furthest), 0.0)
    return x0, ratio * (x0 - before)


def _not_last(t: Tensor) -> Tensor:
    return (t != 0)[:, None, None, None]
