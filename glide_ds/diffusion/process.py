"""The diffusion process q(x_t | x_0), its reverse p(x_{t-1} | x_t) and the training losses.

B samples, S image side. A timestep t is an index into this process; `timestep_map[t]` is the timestep of the
original process, which is what the model is given. Equations: DDPM (arXiv 2006.11239) and Improved DDPM
(arXiv 2102.09672).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from glide_ds.diffusion.losses import Gaussian, mean_per_sample, vb_bits
from glide_ds.diffusion.schedule import FloatArray, betas_of, kept_timesteps, respaced_betas, spaced


def create_diffusion(
    schedule: str, steps: int = 1000, respacing: str | int | None = None, spacing: str = "uniform"
) -> Diffusion:
    """The process of `schedule` ("squaredcos_cap_v2" or "linear") over `steps` timesteps, of which `respacing`
    keeps some (see schedule.kept_timesteps), or as many as it says by another `spacing` of schedule.SPACINGS.
    Raises ConfigError for a name it does not know, and for what does not go together."""
    betas = betas_of(schedule, steps)
    kept = kept_timesteps(steps, respacing) if spacing == "uniform" else spaced(spacing, betas, respacing)
    return Diffusion(betas if respacing is None else respaced_betas(betas, kept), kept)


class Prediction(NamedTuple):
    """What a model output says about the step from x_t to x_{t-1}; every tensor is [B, 3, S, S]."""

    mean: Tensor
    log_variance: Tensor
    x0: Tensor

    @property
    def gaussian(self) -> Gaussian:
        return Gaussian(self.mean, self.log_variance)


class Diffusion:
    """A discrete diffusion process with learned-range variances. Its tables are float64 and never change."""

    def __init__(self, betas: FloatArray, timestep_map: list[int]) -> None:
        self.betas = betas
        self.timestep_map = timestep_map
        self.num_timesteps = len(betas)
        self.alphas_cumprod = np.cumprod(1 - betas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        # lambda = log(alpha / sigma); a picture without noise has an infinite one.
        self.half_log_snr = 0.5 * (np.log(self.alphas_cumprod) - np.log1p(-self.alphas_cumprod))
        self.half_log_snr_prev = np.append(np.inf, self.half_log_snr[:-1])
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / self.alphas_cumprod - 1)
        remaining = 1 - self.alphas_cumprod
        self.posterior_variance = betas * (1 - self.alphas_cumprod_prev) / remaining
        # The first posterior variance is 0, which has no logarithm: the second stands in, or a lone step's beta.
        second = self.posterior_variance[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(second, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / remaining
        self.posterior_mean_coef2 = (1 - self.alphas_cumprod_prev) * np.sqrt(1 - betas) / remaining
        self.log_betas = np.log(betas)
        self._on_device: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def table(self, name: str, t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Entries t (int64 [B]) of the table of that name as [B, 1, 1, 1] on t's device, fp32 at least.

        Tables are copied to a device once: gathering never waits for it.
        """
        key = (name, t.device, torch.promote_types(dtype, torch.float32))
        if key not in self._on_device:
            values = torch.as_tensor(np.asarray(getattr(self, name)))
            self._on_device[key] = values.to(device=t.device, dtype=key[2])
        return self._on_device[key][t][:, None, None, None]

    def model_timesteps(self, t: Tensor) -> Tensor:
        """The original timesteps (int64 [B]) of indices t, for the model."""
        key = ("timestep_map", t.device, torch.int64)
        if key not in self._on_device:
            self._on_device[key] = torch.tensor(self.timestep_map, device=t.device)
        return self._on_device[key][t]

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise (DDPM, equation 4)."""
        signal = self.table("sqrt_alphas_cumprod", t, x0.dtype)
        return signal * x0 + self.table("sqrt_one_minus_alphas_cumprod", t, x0.dtype) * noise

    def predict_x0(self, eps: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x_0 that noise eps implies: q_sample solved for x_0."""
        scale = self.table("sqrt_recip_alphas_cumprod", t, x_t.dtype)
        return scale * x_t - self.table("sqrt_recipm1_alphas_cumprod", t, x_t.dtype) * eps

    def predict_eps(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that x_0 implies: q_sample solved for the noise."""
        scale = self.table("sqrt_recip_alphas_cumprod", t, x_t.dtype)
        return (scale * x_t - x0) / self.table("sqrt_recipm1_alphas_cumprod", t, x_t.dtype)

    def posterior(self, x0: Tensor, x_t: Tensor, t: Tensor) -> Gaussian:
        """q(x_{t-1} | x_t, x_0) (DDPM, equations 6 and 7); at t = 0 with the variance of t = 1."""
        mean = self.table("posterior_mean_coef1", t, x_t.dtype) * x0
        mean = mean + self.table("posterior_mean_coef2", t, x_t.dtype) * x_t
        log_variance = self.table("posterior_log_variance_clipped", t, x_t.dtype)
        return Gaussian(mean, log_variance.expand_as(mean))

    def p_mean_variance(self, model_output: Tensor, x_t: Tensor, t: Tensor, clip_x0: bool = True) -> Prediction:
        """p(x_{t-1} | x_t) from a model output [B, 6, S, S], in fp32 at least.

        The variance channels v interpolate the log variance between the clipped posterior's (v = -1) and beta
        (v = 1) (Improved DDPM, equation 15). `clip_x0` keeps the predicted x_0 in [-1, 1].
        """
        eps, v = model_output.to(torch.promote_types(x_t.dtype, torch.float32)).chunk(2, dim=1)
        x0 = self.predict_x0(eps, x_t, t)
        if clip_x0:
            x0 = x0.clamp(-1, 1)
        low = self.table("posterior_log_variance_clipped", t, x_t.dtype)
        high = self.table("log_betas", t, x_t.dtype)
        log_variance = low + (v + 1) / 2 * (high - low)
        return Prediction(self.posterior(x0, x_t, t).mean, log_variance, x0)

    def losses(
        self, model_output: Tensor, x0: Tensor, x_t: Tensor, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """The loss terms of every sample, each [B]; their sum is the hybrid loss.

        "mse": the mean of (eps - noise)^2 (DDPM, equation 14). "vb": the variational bound's term in bits per
        element (losses.vb_bits), through which only the variance channels learn: eps is detached in it
        (Improved DDPM, section 3.1).
        """
        wide = torch.promote_types(x_t.dtype, torch.float32)
        eps, v = model_output.to(wide).chunk(2, dim=1)
        frozen_mean = torch.cat([eps.detach(), v], dim=1)
        p = self.p_mean_variance(frozen_mean, x_t, t, clip_x0=False)
        return {
            "mse": mean_per_sample((eps - noise) ** 2),
            "vb": vb_bits(x0, t, self.posterior(x0, x_t, t), p.gaussian),
        }
