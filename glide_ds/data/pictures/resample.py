"""Antialiased Lanczos resize of a box whose edges may lie between pixels: crop and resize in one step.

A picture decoded at a half or a quarter of its size has its crop at fractions of a pixel; rounding that to whole
pixels would cost 10 dB at 64 px (`decode`). Each axis is a product with a matrix of Lanczos weights (Turkowski
1990), which is nearly empty away from its diagonal, so it is done in blocks of output lines over the input lines
they see.

H, W the picture's height and width, R, C the output's rows and columns.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Box = tuple[float, float, float, float]  # top, bottom, left, right, in pixels

LOBES = 3
BLOCK_LINES = 16  # output lines per product: with 8 and 32, at 64 px, it took 1.2 to 1.5 times as long
WEIGHTS_KEPT = 2048  # per process, some 8 KiB each at 64 px


class Block(NamedTuple):
    """`weights` [N, last - first] makes output lines `start` to `start + N` of the input's `first` to `last`."""

    start: int
    first: int
    last: int
    weights: NDArray[np.float32]


def resize(pixels: Pixels, box: Box, rows: int, columns: int) -> Pixels:
    """The box of a picture, uint8 [H, W, 3], as uint8 [R, C, 3].

    Only lines that lie wholly in the box are seen, so what is beside it never bleeds in.
    """
    top, bottom, left, right = box
    if box == (0, rows, 0, columns) and pixels.shape[:2] == (rows, columns):
        return np.ascontiguousarray(pixels)
    (first_row, last_row), (first, last) = _whole_lines(top, bottom), _whole_lines(left, right)
    height, width = last_row - first_row, last - first
    seen = pixels[first_row:last_row, first:last].reshape(height, 3 * width).astype(np.float32)
    # The first product turns the picture on its side, so both run along whole lines and colours stay together.
    turned = np.empty((3 * width, rows), np.float32)
    for block in _blocks(height, top - first_row, bottom - first_row, rows):
        out = turned[:, block.start : block.start + len(block.weights)]
        np.matmul(seen[block.first : block.last].T, block.weights.T, out=out)
    source, square = turned.reshape(width, 3 * rows), np.empty((columns, 3 * rows), np.float32)
    for block in _blocks(width, left - first, right - first, columns):
        out = square[block.start : block.start + len(block.weights)]
        np.matmul(block.weights, source[block.first : block.last], out=out)
    square += 0.5
    np.minimum(np.maximum(square, 0, out=square), 255.5, out=square)
    return np.ascontiguousarray(square.astype(np.uint8).reshape(columns, 3, rows).transpose(2, 0, 1))


def _whole_lines(begin: float, end: float) -> tuple[int, int]:
    first, last = math.ceil(begin), math.floor(end)
    return (first, last) if first < last else (math.floor(begin), math.ceil(end))


@lru_cache(WEIGHTS_KEPT)
def _blocks(lines: int, begin: float, end: float, size: int) -> tuple[Block, ...]:
    """The products that resize the span from `begin` to `end` of `lines` input lines to `size` lines."""
    step = (end - begin) / size
    stretch = max(step, 1.0)  # below 1 the kernel interpolates, above it also averages
    reach = LOBES * stretch
    centres = begin + (np.arange(size) + 0.5) * step
    nearest = np.floor(centres - reach).astype(np.int64)
    seen = nearest[:, None] + np.arange(math.ceil(2 * reach) + 1)
    places = (seen + 0.5 - centres[:, None]) / stretch
    kernel = np.sinc(places) * np.sinc(places / LOBES)
    kernel[(np.abs(places) >= LOBES) | (seen < 0) | (seen >= lines)] = 0
    kernel /= kernel.sum(axis=1, keepdims=True)
    blocks = []
    for start in range(0, size, BLOCK_LINES):
        part = seen[start : start + BLOCK_LINES]
        first, last = max(0, part.item(0, 0)), min(lines, part.item(-1, -1) + 1)
        # Room on both sides for the weights, all zero, of lines that there are not.
        weights = np.zeros((len(part), part.item(-1, -1) + 1 - part.item(0, 0)), np.float32)
        np.put_along_axis(weights, part - part[0, 0], kernel[start : start + BLOCK_LINES], axis=1)
        weights = np.ascontiguousarray(weights[:, first - part[0, 0] : last - part[0, 0]])
        blocks.append(Block(start, first, last, weights))
    return tuple(blocks)
