"""Schedules and respacing, from the golden numbers."""

import json
from pathlib import Path

import numpy as np
import pytest

from glide_ds.diffusion import create_diffusion
from glide_ds.diffusion.schedule import betas_of, kept_timesteps
from glide_ds.errors import ConfigError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden_public.json").read_text())
TABLES = [
    "betas",
    "alphas_cumprod",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
]


@pytest.mark.parametrize("case", list(GOLDEN["schedules"]))
def test_tables_equal_the_published_ones(case: str) -> None:
    expected = GOLDEN["schedules"][case]
    schedule, steps = case.split("/")
    diffusion = create_diffusion(schedule, int(steps))
    for table in TABLES:
        np.testing.assert_allclose(getattr(diffusion, table)[expected["idx"]], expected[table], rtol=1e-11)
    assert diffusion.alphas_cumprod.sum() == pytest.approx(expected["alphas_cumprod_sum"], rel=1e-12)
    assert diffusion.timestep_map == list(range(int(steps)))


@pytest.mark.parametrize("case", list(GOLDEN["respacing"]))
def test_respacing_keeps_the_published_timesteps(case: str) -> None:
    steps, respacing = case.split(":")
    assert kept_timesteps(int(steps), respacing) == GOLDEN["respacing"][case]


@pytest.mark.parametrize("case", list(GOLDEN["respaced_diffusion"]))
def test_respaced_tables_equal_the_published_ones(case: str) -> None:
    expected = GOLDEN["respaced_diffusion"][case]
    schedule, respacing = case.split(":")
    diffusion = create_diffusion(schedule, respacing=respacing)
    assert diffusion.num_timesteps == expected["n"]
    for table in ("betas", "alphas_cumprod", "posterior_log_variance_clipped"):
        np.testing.assert_allclose(getattr(diffusion, table)[expected["idx"]], expected[table], rtol=1e-12)


def test_respacing_takes_a_number() -> None:
    assert kept_timesteps(1000, 100) == kept_timesteps(1000, "100")
    assert kept_timesteps(1000, 1) == [0]
    assert kept_timesteps(1000, "3,2,0,0") == [0, 124, 249, 250, 499]
    assert kept_timesteps(10, None) == list(range(10))


@pytest.mark.parametrize(
    ("respacing", "message"),
    [
        ("fast", "'fast' is not understood"),
        ("10,-3", "is not understood"),
        (0, "is not understood"),
        ("10,,3", "is not understood"),
        ("0,10", "is not understood"),
        ("2000", "cannot give 2000"),
        ("ddim51", "no integer stride"),
    ],
)
def test_a_respacing_that_cannot_be_is_named(respacing: str | int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_diffusion("linear", respacing=respacing)


def test_an_unknown_schedule_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'cosine' does not exist.*squaredcos_cap_v2"):
        betas_of("cosine", 10)
