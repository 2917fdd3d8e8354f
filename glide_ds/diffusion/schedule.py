"""Noise schedules and which of their timesteps a shorter process keeps. Pure functions in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import accumulate, repeat

import numpy as np
from numpy.typing import NDArray

from glide_ds.errors import ConfigError

FloatArray = NDArray[np.float64]


def linear_betas(steps: int) -> FloatArray:
    """From 1e-4 to 0.02 over 1000 steps, scaled for other lengths (DDPM, section 4)."""
    scale = 1000 / steps
    return np.linspace(scale * 1e-4, scale * 0.02, steps, dtype=np.float64)


def squared_cosine_betas(steps: int) -> FloatArray:
    """The squared cosine schedule, beta at most 0.999 (Improved DDPM, equation 17)."""

    def alpha_bar(fraction: float) -> float:
        return math.cos((fraction + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array([min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), 0.999) for i in range(steps)])


SCHEDULES: dict[str, Callable[[int], FloatArray]] = {
    "linear": linear_betas,
    "squaredcos_cap_v2": squared_cosine_betas,
}


def betas_of(schedule: str, steps: int) -> FloatArray:
    """The betas of a named schedule, float64 [steps]."""
    if schedule not in SCHEDULES:
        raise ConfigError(
            f"noise schedule {schedule!r} does not exist", remedy=f"choose one of {', '.join(SCHEDULES)}"
        )
    return SCHEDULES[schedule](steps)


def kept_timesteps(steps: int, respacing: str | int | None) -> list[int]:
    """The timesteps that a respaced process keeps, ascending.

    None keeps all; "100" that many, evenly; "10,10,3,2,2" divides the process into as many sections and keeps
    that many in each, and "10,10,0,0,0" none of the noisiest, for an upsampler; "ddim50" takes the first integer
    stride that gives 50; "fast27" is GLIDE's own choice for its upsampler. Raises ConfigError for anything
    else, or if a section is shorter than its count.
    """
    if respacing is None:
        return list(range(steps))
    text = str(respacing)
    if text == "fast27":
        kept = kept_timesteps(steps, "10,10,3,2,2")
        return [*kept[:-1], steps - 3]
    if text.startswith("ddim") and text[4:].isdecimal():
        return _strided(steps, int(text[4:]))
    counts = text.split(",")
    if not all(count.strip().isdecimal() for count in counts) or not int(counts[0]):
        raise ConfigError(
            f"respacing {respacing!r} is not understood",
            remedy="write a number such as 100, counts per section such as 10,10,3,2,2, ddim50 or fast27",
        )
    return _sectioned(steps, [int(count) for count in counts])


def trailing_timesteps(betas: FloatArray, count: int) -> list[int]:
    """`count` timesteps at equal distances that end with the noisiest (arXiv 2305.08891, table 2)."""
    steps = len(betas)
    return sorted({steps - 1 - round(place * steps / count) for place in range(count)})


def karras_timesteps(betas: FloatArray, count: int) -> list[int]:
    """`count` timesteps near the noise levels of EDM (arXiv 2206.00364, equation 5, rho = 7), dense at low noise.

    The levels, sigma / alpha, go from the process' lowest to its highest or to KARRAS_MOST, above which a picture
    can't be told from none; the noisiest timestep begins in any case. Where two levels have the same nearest timestep
    one takes the next that is free.
    """
    levels = 0.5 * np.log(1 / np.cumprod(1 - betas) - 1)  # log(sigma / alpha): -half log-SNR
    low, high = np.exp(levels[0]) ** (1 / 7), min(np.exp(levels[-1]), KARRAS_MOST) ** (1 / 7)
    wanted = np.log(np.linspace(low, high, count) ** 7)
    kept = np.abs(levels - wanted[:, None]).argmin(1)
    kept[-1] = len(betas) - 1
    for place in range(1, count):  # each above the one before it
        kept[place] = max(kept[place], kept[place - 1] + 1)
    ceiling = np.arange(len(betas) - count, len(betas))  # and room for those that follow
    return [int(t) for t in np.minimum(kept, ceiling)]


KARRAS_MOST = 80.0
SPACINGS: dict[str, Callable[[FloatArray, int], list[int]] | None] = {
    "uniform": None,  # kept_timesteps, which takes more than a number
    "karras": karras_timesteps,
    "trailing": trailing_timesteps,
}


def spaced(spacing: str, betas: FloatArray, count: str | int | None) -> list[int]:
    """The timesteps of a process with these betas that a spacing of SPACINGS other than uniform keeps, ascending.

    Raises ConfigError for a spacing that does not exist, and for a count that is none or can't be had.
    """
    if (choose := SPACINGS.get(spacing)) is None:
        raise ConfigError(f"spacing {spacing!r} does not exist", remedy=f"choose one of {', '.join(SPACINGS)}")
    if not str(count).isdecimal() or not 1 <= int(str(count)) <= len(betas):
        raise ConfigError(
            f"spacing {spacing!r} was given {count} steps",
            remedy=f"give a number from 1 to {len(betas)}, or space them uniform",
        )
    return choose(betas, int(str(count)))


def _strided(steps: int, count: int) -> list[int]:
    for stride in range(1, steps):
        kept = range(0, steps, stride)
        if len(kept) == count:
            return list(kept)
    raise ConfigError(
        f"no integer stride through {steps} timesteps gives exactly {count}",
        remedy=f"write {count} without ddim to space them evenly",
    )


def _sectioned(steps: int, counts: list[int]) -> list[int]:
    kept: list[int] = []
    start = 0
    for place, count in enumerate(counts):
        size = steps // len(counts) + (place < steps % len(counts))
        if size < count:
            raise ConfigError(
                f"section {place + 1} of the respacing has {size} timesteps and cannot give {count}",
                remedy="ask for fewer",
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # Summed, not multiplied: the rounding of exact halves then equals the published samplers'.
        places = accumulate(repeat(stride, count - 1), initial=0.0) if count else ()
        kept += [start + round(place) for place in places]
        start += size
    return kept


def respaced_betas(betas: FloatArray, kept: list[int]) -> FloatArray:
    """Betas whose cumulative products equal the full process' at the kept timesteps."""
    alphas_cumprod = np.cumprod(1 - betas)[kept]
    previous = np.append(1.0, alphas_cumprod[:-1])
    return 1 - alphas_cumprod / previous
