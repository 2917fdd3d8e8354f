"""Uniform borders of a picture, to the pixel of its full size, also where it was decoded at a part of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from glide_ds.data.pictures.resample import Box, Pixels

TRIM_TOLERANCE = 12  # of 255: what still counts as one colour along a picture's edge
RINGING, RINGING_MEAN = 48, 3.0  # of 255: how far JPEG strays beside a strong edge, at most and on average
MIN_TRIMMED = 0.1  # of a side: what would leave less is no border but a flat picture
MIXED_LINES = 2  # at most, of a picture in its full size
PROBES = 8  # pixels of an edge looked at before all of them
FIRST_LINES = 32  # looked at before twice as many: most borders of a reduced picture are shorter


def content_box(pixels: Pixels, scale: int = 1, extent: Box | None = None) -> Box:
    """(top, bottom, left, right) of what lies inside uniform borders; `extent`, the whole, where there are none.

    An edge is a border where its outermost line has one colour, within TRIM_TOLERANCE per channel. The
    border goes on over lines that leave that colour by no more than JPEG's ringing beside a strong edge.
    Of a picture reduced by `scale`, edges come in steps of 1 / scale pixel.
    """
    height, width = pixels.shape[:2]
    whole = extent or (0, height, 0, width)
    top = _border(pixels, scale)
    bottom = height - _border(pixels[::-1], scale)
    if bottom - top < MIN_TRIMMED * height:
        return whole
    across = pixels[int(top) : int(bottom) + (bottom % 1 > 0)].transpose(1, 0, 2)
    left = _border(across, scale)
    right = width - _border(across[::-1], scale)
    if right - left < MIN_TRIMMED * width:
        return whole
    return (
        top or whole[0],
        whole[1] if bottom == height else bottom,
        left or whole[2],
        whole[3] if right == width else right,
    )


def _border(lines: Pixels, scale: int) -> float:
    """How much of [lines, length, 3] is border from its first line on; 0 where that has more than one colour."""
    step = lines.shape[1] // PROBES + 1
    probes = lines[0, ::step].tolist()  # plain integers: nearly every photo ends here
    red, green, blue = colour = probes[len(probes) // 2]
    for r, g, b in probes:
        if abs(r - red) > TRIM_TOLERANCE or abs(g - green) > TRIM_TOLERANCE or abs(b - blue) > TRIM_TOLERANCE:
            return 0
    mixed = MIXED_LINES if scale == 1 else 1
    seen = FIRST_LINES
    while True:
        away = _Away(lines[:seen], colour)
        most = away.by_line(np.maximum)
        if most[0] > TRIM_TOLERANCE:
            return 0
        reach = _first(most > RINGING)  # no border is longer than this
        if reach + mixed < seen or seen >= len(lines):
            break
        seen *= 2
    mean = away.by_line(np.add, np.uint32)[: reach + mixed + 1] / (3 * lines.shape[1])
    count = min(reach, _first(mean > RINGING_MEAN))
    # The last lines of a border are mixed with content: by reduced decoding, or by the interpolation of colour.
    # How much of the content's distance from the border's colour they have tells where in them the edge lies.
    if count + mixed >= len(mean):
        return count
    content = max(float(mean[count + mixed]), RINGING_MEAN)
    share = sum(1 - min(line / content, 1.0) for line in mean[count : count + mixed].tolist())
    return count + round(share * scale) / scale


def _first(flags: NDArray[np.bool_]) -> int:
    place = int(flags.argmax())
    return place if flags[place] else len(flags)


class _Away:
    """How far each value of lines [lines, length, 3] lies from a colour's."""

    def __init__(self, lines: Pixels, colour: list[int]) -> None:
        # Columns are read row by row: to lay them out one after the other would take as long as all the rest.
        self.columns = abs(lines.strides[0]) < abs(lines.strides[1])
        self.backwards = self.columns and lines.strides[0] < 0
        if self.columns:
            lines = (lines[::-1] if self.backwards else lines).transpose(1, 0, 2)
        flat = lines.reshape(len(lines), -1)
        # A whole row of the colour: with three values the subtraction's inner loop would be three long.
        row = np.frombuffer(bytes(colour) * lines.shape[1], np.uint8)
        self.values: NDArray[Any] = np.maximum(flat, row)
        self.values -= np.minimum(flat, row)

    def by_line(self, ufunc: np.ufunc, dtype: Any = np.uint8) -> NDArray[Any]:
        """Each line's values put together, [lines]."""
        if not self.columns:
            return ufunc.reduce(self.values, axis=1, dtype=dtype)
        by_channel = ufunc.reduce(self.values, axis=0, dtype=dtype)
        lines: NDArray[Any] = ufunc.reduce(by_channel.reshape(-1, 3), axis=1, dtype=dtype)
        return lines[::-1] if self.backwards else lines
