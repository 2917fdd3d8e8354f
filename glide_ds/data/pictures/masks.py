"""Which pixels of a picture an inpainting model is shown.

GLIDE's were fine-tuned with random regions erased (arXiv 2112.10741, section 3.2). Lengths are fractions of the
picture's side, so that a mask looks alike at every side. B samples, S image side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from glide_ds.config import MaskConfig
from glide_ds.data.pictures.resample import Pixels

DICE = 24  # numbers that a mask is drawn by, at most
BOXES, BOX_SIDE = 3, (0.2, 0.8)
BENDS, STROKE_RADIUS = 5, (0.03, 0.12)
HALF_OFFSET = 0.3  # of the line that a half plane ends at, from the picture's centre

Dice = NDArray[np.float64]
Flags = NDArray[np.bool_]
Plane = NDArray[np.float64]  # [S, S], or one that broadcasts to it


def known_pixels(dice: Dice, side: int, shares: MaskConfig) -> Pixels:
    """Masks uint8 [B, S, S], 1 where the picture is known, by numbers [B, DICE] in [0, 1)."""
    limits = np.cumsum([getattr(shares, kind) for kind in KINDS])
    draws = list(KINDS.values())
    across = (np.arange(side) + 0.5) / side
    x, y = across[None, :], across[:, None]
    known = np.empty((len(dice), side, side), np.uint8)
    for row, (first, *rest) in zip(known, dice.tolist(), strict=True):
        kind = int(np.searchsorted(limits, first * limits[-1], side="right"))
        row[:] = ~draws[kind](iter(rest), x, y)
    return known


def _boxes(dice: Iterator[float], x: Plane, y: Plane) -> Flags:
    hidden = np.zeros((y.size, x.size), np.bool_)
    for _ in range(1 + int(next(dice) * BOXES)):
        width, height = (_between(next(dice), *BOX_SIDE) for _ in range(2))
        left, top = next(dice) * (1 - width), next(dice) * (1 - height)
        hidden |= (left <= x) & (x < left + width) & (top <= y) & (y < top + height)
    return hidden


def _strokes(dice: Iterator[float], x: Plane, y: Plane) -> Flags:
    """One stroke of a round brush, through random points."""
    hidden = np.zeros((y.size, x.size), np.bool_)
    radius = _between(next(dice), *STROKE_RADIUS)
    at = next(dice), next(dice)
    for _ in range(1 + int(next(dice) * BENDS)):
        to = next(dice), next(dice)
        dx, dy = to[0] - at[0], to[1] - at[1]
        along = ((x - at[0]) * dx + (y - at[1]) * dy) / (dx * dx + dy * dy or 1.0)
        nearest = np.clip(along, 0, 1)
        hidden |= (x - at[0] - nearest * dx) ** 2 + (y - at[1] - nearest * dy) ** 2 <= radius**2
        at = to
    return hidden


def _halves(dice: Iterator[float], x: Plane, y: Plane) -> Flags:
    angle, offset = 2 * math.pi * next(dice), _between(next(dice), -HALF_OFFSET, HALF_OFFSET)
    hidden: Flags = (x - 0.5) * math.cos(angle) + (y - 0.5) * math.sin(angle) > offset
    return hidden


def _everything(dice: Iterator[float], x: Plane, y: Plane) -> Flags:
    return np.ones((y.size, x.size), np.bool_)


def _nothing(dice: Iterator[float], x: Plane, y: Plane) -> Flags:
    return np.zeros((y.size, x.size), np.bool_)


# What is hidden, bool [S, S], by the share's name in data.mask.
KINDS: dict[str, Callable[[Iterator[float], Plane, Plane], Flags]] = {
    "boxes": _boxes,
    "strokes": _strokes,
    "halves": _halves,
    "everything": _everything,
    "nothing": _nothing,
}


def _between(die: float, low: float, high: float) -> float:
    return low + (high - low) * die
