"""Samplers on a denoiser that is exact: data N(0, 0.5^2), whose best epsilon and paths are known in closed form."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glide_ds.diffusion import SAMPLERS, Diffusion, create_diffusion
from glide_ds.diffusion.guidance import Guidance, check_guidance, rescaled
from glide_ds.diffusion.samplers import make_step
from glide_ds.diffusion.sampling import run_steps
from glide_ds.diffusion.schedule import SPACINGS, betas_of, spaced
from glide_ds.errors import ConfigError

STD = 0.5
SCHEDULES = ("linear", "squaredcos_cap_v2")
DETERMINISTIC = ("ddim", "euler", "dpm++2m", "plms")


def exact(diffusion: Diffusion) -> Any:
    def output(x: Tensor, t: Tensor) -> Tensor:
        signal = diffusion.table("sqrt_alphas_cumprod", t, torch.float64)
        sigma = diffusion.table("sqrt_one_minus_alphas_cumprod", t, torch.float64)
        eps = (sigma * x / (signal**2 * STD**2 + sigma**2)).to(x.dtype)
        return torch.cat([eps, torch.zeros_like(eps)], 1)

    return output


def start(dtype: torch.dtype = torch.float64, count: int = 20) -> Tensor:
    return torch.randn(count, 3, 16, 16, dtype=dtype, generator=torch.Generator().manual_seed(0))


def solve(diffusion: Diffusion, sampler: str, x: Tensor, *, whole: bool = True, **options: Any) -> Tensor:
    """x taken to the data, or to the lowest level of noise."""
    generator = torch.Generator().manual_seed(1)
    return run_steps(
        diffusion,
        exact(diffusion),
        x,
        partial(make_step(sampler, diffusion), clip_x0=False, **options),
        lambda _: torch.randn(x.shape, dtype=x.dtype, generator=generator),
        None if whole else lambda steps: steps[:-1],
    )


def error(schedule: str, steps: int, sampler: str, **options: Any) -> float:
    """How far a path ends from where it should, before the last step, relative to where it should."""
    diffusion = create_diffusion(schedule, respacing=steps)
    alpha_bar = diffusion.alphas_cumprod
    spread = np.sqrt(alpha_bar * STD**2 + 1 - alpha_bar)
    x = start(count=1)
    ratio = solve(diffusion, sampler, x, whole=False, **options) / (x * spread[0] / spread[-1])
    return float((ratio - 1).abs().max())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_error_falls_with_the_order_claimed(schedule: str) -> None:
    def order(sampler: str, **options: Any) -> float:
        return float(
            np.log2(error(schedule, 80, sampler, **options) / error(schedule, 160, sampler, **options))
        )

    assert 0.9 < order("ddim") < 1.1
    assert 1.8 < order("dpm++2m", furthest=torch.inf) < 2.2  # as published
    for steps in (20, 40, 80):  # with the bound it is nearer by more than that
        assert error(schedule, steps, "dpm++2m") < error(schedule, steps, "dpm++2m", furthest=torch.inf) / 4
        assert error(schedule, steps, "plms") < error(schedule, steps, "ddim") / 20


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("sampler", "steps", "within"),
    [
        ("dpm++2m", 20, 0.02),
        ("dpm++2m-sde", 20, 0.025),
        ("plms", 20, 0.02),
        ("ddim", 160, 0.05),
        ("euler-a", 160, 0.06),
    ],
)
def test_the_spread_of_the_data_comes_out(schedule: str, sampler: str, steps: int, within: float) -> None:
    drawn = solve(create_diffusion(schedule, respacing=steps), sampler, start()).std() / start().std()
    assert float(drawn) == pytest.approx(STD, rel=within)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", DETERMINISTIC)
def test_float32_survives_the_noisiest_level(schedule: str, sampler: str) -> None:
    """Cosine ends with an alpha of 5e-5: what float32 can't hold of x_T is all that may be lost."""
    diffusion = create_diffusion(schedule, respacing=20)
    fine, coarse = (solve(diffusion, sampler, start(dtype, 1)) for dtype in (torch.float64, torch.float32))
    assert coarse.dtype == torch.float32
    same = solve(diffusion, sampler, start(torch.float32, 1).double())
    assert coarse.std() == pytest.approx(float(same.std()), rel=2e-3)
    assert fine.isfinite().all()


def test_euler_is_ddim_and_ancestral_euler_its_noisy_end() -> None:
    diffusion = create_diffusion("squaredcos_cap_v2", respacing=10)
    assert torch.equal(solve(diffusion, "euler", start()), solve(diffusion, "ddim", start()))
    assert torch.equal(solve(diffusion, "euler-a", start()), solve(diffusion, "ddim", start(), eta=1.0))


def test_a_drawing_keeps_a_history_of_its_own() -> None:
    diffusion = create_diffusion("squaredcos_cap_v2", respacing=10)
    for sampler in SAMPLERS:
        assert torch.equal(solve(diffusion, sampler, start()), solve(diffusion, sampler, start()))


@pytest.mark.slow  # importing diffusers takes seconds
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spacing", list(SPACINGS))
def test_it_agrees_with_diffusers(schedule: str, spacing: str) -> None:
    """Its DPM-Solver++(2M) knows no bound, and works on tables in float32: alpha_T of the cosine schedule differs."""
    diffusers = pytest.importorskip("diffusers", reason="the extra reference is not installed")
    diffusion = create_diffusion(schedule, respacing=20, spacing=spacing)
    betas = betas_of(schedule, 1000)
    scheduler = diffusers.DPMSolverMultistepScheduler(trained_betas=betas, lower_order_final=False)
    scheduler.set_timesteps(timesteps=diffusion.timestep_map[::-1])
    sigmas = torch.tensor(np.append(np.exp(-diffusion.half_log_snr[::-1]), 0.0))
    scheduler.sigmas = sigmas  # in float64, or its own rounding is all that is compared
    x, model = start(count=1), exact(diffusion)
    for place, timestep in enumerate(scheduler.timesteps):
        t = torch.full((1,), diffusion.num_timesteps - 1 - place)
        x = scheduler.step(model(x, t)[:, :3], timestep, x).prev_sample
    ours = solve(diffusion, "dpm++2m", start(count=1), furthest=torch.inf)
    torch.testing.assert_close(ours, x.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("spacing", ["karras", "trailing"])
@pytest.mark.parametrize("count", [1, 2, 7, 20, 100, 999, 1000])
def test_a_spacing_gives_as_many_timesteps_as_asked(schedule: str, spacing: str, count: int) -> None:
    kept = spaced(spacing, betas_of(schedule, 1000), count)
    assert len(kept) == count
    assert kept == sorted(set(kept))
    assert kept[-1] == 999
    assert kept[0] >= 0


def test_karras_is_dense_at_low_noise() -> None:
    for schedule in SCHEDULES:
        levels = np.exp(-create_diffusion(schedule, respacing=10, spacing="karras").half_log_snr)
        root = levels[:-1] ** (1 / 7)
        assert np.diff(root).std() < 0.25 * np.diff(root).mean()  # even but for rounding


@pytest.mark.parametrize(
    ("spacing", "count", "part"),
    [
        ("even", 10, "spacing 'even' does not exist; choose one of uniform, karras, trailing"),
        ("karras", "fast27", "was given fast27 steps"),
        ("trailing", 1001, "from 1 to 1000"),
        ("karras", 0, "was given 0 steps"),
    ],
)
def test_a_spacing_that_cannot_be_is_named(spacing: str, count: int | str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        create_diffusion("linear", respacing=count, spacing=spacing)


def test_plms_refuses_steps_that_are_not_even() -> None:
    with pytest.raises(ConfigError, match="'plms' was given steps of"):
        make_step("plms", create_diffusion("linear", respacing=20, spacing="karras"))
    for spacing in SPACINGS:
        make_step("dpm++2m", create_diffusion("linear", respacing=20, spacing=spacing))


def test_rescaled_guidance_has_the_spread_of_the_unguided() -> None:
    guided, alone = 4 * torch.randn(2, 6, 8, 8), torch.randn(2, 6, 8, 8)
    whole = rescaled(guided, alone, 1.0)
    torch.testing.assert_close(whole[:, :3].std((1, 2, 3)), alone[:, :3].std((1, 2, 3)))
    torch.testing.assert_close(rescaled(guided, alone, 0.5)[:, :3], (whole + guided)[:, :3] / 2)
    assert torch.equal(whole[:, 3:], guided[:, 3:])
    assert torch.equal(rescaled(guided, alone, 0.0), guided)


@pytest.mark.parametrize(
    ("guidance", "part"),
    [
        (Guidance(float("nan")), "guidance is nan"),
        (Guidance(3.0, 1.5), "guidance_rescale is 1.5"),
        (Guidance(3.0, 0.0, (2.0, 1.0)), "guidance_interval is 2 to 1"),
        (Guidance(3.0, 0.0, (-1.0, 1.0)), "guidance_interval is -1"),
        (Guidance(1.0, 0.5), "guidance_rescale without guidance"),
        (Guidance(1.0, 0.0, (0.3, 5.0)), "guidance_interval without guidance"),
    ],
)
def test_guidance_that_cannot_be_is_named(guidance: Guidance, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        check_guidance(guidance, None)
