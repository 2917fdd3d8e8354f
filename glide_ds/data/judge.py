"""Reads the built-in shapes off a picture: what is there, in which colour, where. Knows no caption.

Meant for generated pictures, so edges may be soft and noisy. A pixel of an object of colour c with coverage a
over background b is b + a (c - b): its direction from the background tells the colour even at a faint edge, and
its length the coverage. A shape is recognised from that coverage: area and centroid, which blur leaves alone,
fix the place and size of a template of each kind, and the best overlap wins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from glide_ds.data.shapes import (
    COLOURS,
    CROSS_ARM,
    KINDS,
    RELATIONS,
    RING_HOLE,
    SIZES,
    Description,
    Label,
    coverage,
    parse_caption,
)
from glide_ds.errors import DataError

# Limits, in 1/255 of RGB distance or fractions; noise of std 12 per channel stays far inside each.
FOREGROUND = 60.0  # a pixel farther than this from the background belongs to an object
OFF_PALETTE = 100.0  # an object whose core is farther than this from every colour has none
SPECK = 0.012  # components below this share of the picture are no objects; the smallest cross has 0.046
MIN_OVERLAP = 0.6  # an object that overlaps no template better has no known shape

_NAMES = tuple(COLOURS)
_PALETTE = np.array(list(COLOURS.values()), np.float32)
_SIZE_LIMIT = (SIZES["small"][1] + SIZES["large"][0]) / 2
# Area in units of the squared diameter, and how far the centroid lies below the box's centre, in diameters.
_MOMENTS = {
    "circle": (np.pi / 4, 0.0),
    "square": (1.0, 0.0),
    "triangle": (0.5, 1 / 6),
    "cross": (2 * CROSS_ARM - CROSS_ARM**2, 0.0),
    "ring": (np.pi / 4 * (1 - RING_HOLE**2), 0.0),
}


@dataclass(frozen=True)
class Found:
    """One object seen in a picture; lengths and positions as fractions of the side."""

    colour: str | None  # None: far from every colour of the palette
    kind: str | None  # None: like no known shape
    size: str
    x: float
    y: float
    diameter: float
    overlap: float  # with the best template: intersection over union, 0…1


@dataclass(frozen=True)
class Grade:
    """Whether a picture shows its caption. Each is about every object, and an object too many is an error."""

    colour: bool  # exactly the named colours are there
    shape: bool  # and each is of the shape named with it
    size: bool  # and each is of the size named with it
    position: bool  # colours are right and the relation between the objects holds


def judge(image: NDArray[np.uint8]) -> list[Found]:
    """The objects in a picture, uint8 [S, S, 3] RGB, largest first; tested at S of 32 and 64."""
    if image.ndim != 3 or image.shape[0] != image.shape[1] or image.shape[2] != 3 or image.dtype != np.uint8:
        raise DataError(
            f"picture is {image.dtype} {list(image.shape)}, the judge reads square ones",
            remedy="give uint8 [S, S, 3]",
        )
    background = _background(image)
    offset = image - background
    foreground = np.sqrt((offset * offset).sum(2)) > FOREGROUND
    labels = np.where(foreground, _nearest_colour(offset, background), -1)
    found = [
        _measure(offset, background, component, foreground)
        for colour in np.unique(labels[foreground])
        for component in _components(labels == colour)
        if component.mean() > SPECK
    ]
    return sorted(found, key=lambda f: -f.diameter)


def grade(image: NDArray[np.uint8], caption: str | Description) -> Grade:
    """Compare what `judge` sees with a caption of the built-in shapes (`DataError` on any other)."""
    told = parse_caption(caption) if isinstance(caption, str) else caption
    seen = judge(image)
    if len(seen) != len(told.objects):
        return Grade(False, False, False, False)
    # Two objects of one colour can be matched in two ways: the kinder one counts.
    return max((_compare(order, told) for order in permutations(seen)), key=lambda g: sum(astuple(g)))


def _compare(seen: tuple[Found, ...], told: Description) -> Grade:
    """Grade objects in the order in which the caption names them."""
    pairs: list[tuple[Found, Label]] = list(zip(seen, told.objects, strict=True))
    colour = all(f.colour == label.colour for f, label in pairs)
    return Grade(
        colour=colour,
        shape=colour and all(f.kind == label.kind for f, label in pairs),
        size=colour and all(f.size == label.size for f, label in pairs),
        position=colour and (told.relation is None or _relation(*seen) == told.relation),
    )


def _relation(first: Found, second: Found) -> str:
    """The one of the four relations that comes nearest to where `first` lies as seen from `second`."""
    dx, dy = first.x - second.x, first.y - second.y
    return max(RELATIONS, key=lambda name: dx * RELATIONS[name][0] + dy * RELATIONS[name][1])


def _background(image: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The plain ground's colour [3]: objects keep off the border, and the median ignores those that do not."""
    border = (image[:2].reshape(-1, 3), image[-2:].reshape(-1, 3), image[:, 0], image[:, -1])
    return np.median(np.concatenate(border), axis=0).astype(np.float32)


def _nearest_colour(offset: NDArray[np.float32], background: NDArray[np.float32]) -> NDArray[np.intp]:
    """The colour's number per pixel [S, S] whose mixtures with the background come nearest, in 3 x 3 pixels."""
    ray = _PALETTE - background
    length = np.sqrt((ray * ray).sum(1))
    along = offset @ (ray / length[:, None]).T
    mixture = np.clip(along, 0, 1.1 * length)
    residual = (offset * offset).sum(2)[:, :, None] - 2 * mixture * along + mixture * mixture
    padded = np.pad(residual, ((1, 1), (1, 1), (0, 0)))  # the border's residual is the same 0 for every colour
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return np.argmin(rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:], axis=2)


def _components(mask: NDArray[np.bool_]) -> Iterator[NDArray[np.bool_]]:
    """The 8-connected components of a mask [S, S].

    The mask becomes one integer of S rows with a free guard column each, so that growing by a pixel in all
    directions is six shifts: 50 times faster than visiting pixels one by one.
    """
    side = len(mask)
    width = side + 1
    guarded = np.zeros((side, width), np.bool_)
    guarded[:, :side] = mask
    bits = side * width
    rest = int.from_bytes(np.packbits(guarded, bitorder="little").tobytes(), "little")
    while rest:
        grown, seed = rest & -rest, 0
        while grown != seed:
            seed = grown
            line = seed | seed << 1 | seed >> 1
            grown = (line | line << width | line >> width) & rest
        rest &= ~seed
        packed = np.frombuffer(seed.to_bytes((bits + 7) // 8, "little"), np.uint8)
        flat = np.unpackbits(packed, count=bits, bitorder="little")
        yield flat.reshape(side, width)[:, :side].astype(np.bool_)


def _measure(
    offset: NDArray[np.float32],
    background: NDArray[np.float32],
    component: NDArray[np.bool_],
    foreground: NDArray[np.bool_],
) -> Found:
    """Colour, place and shape of one component [S, S] of a picture, given as its offset from the background."""
    side = len(offset)
    pixels = offset[component]
    strength = (pixels * pixels).sum(1)
    core = np.median(pixels[strength >= np.quantile(strength, 0.6)], axis=0)
    distance = np.sqrt(((_PALETTE - background - core) ** 2).sum(1))
    nearest = int(distance.argmin())

    cover = np.clip(offset @ core / (core @ core), 0, 1)
    cover[foreground & ~component] = 0
    rows, columns = _extent(component, 1), _extent(component, 0)
    kind, overlap, x, y, diameter = _best_template(cover[rows, columns])
    return Found(
        colour=_NAMES[nearest] if distance[nearest] < OFF_PALETTE else None,
        kind=kind if overlap > MIN_OVERLAP else None,
        size="small" if diameter / side < _SIZE_LIMIT else "large",
        x=(x + columns.start) / side,
        y=(y + rows.start) / side,
        diameter=diameter / side,
        overlap=overlap,
    )


def _extent(component: NDArray[np.bool_], axis: int) -> slice:
    """The range a component occupies, seen along `axis`, with room for the faint edge around it."""
    where = np.flatnonzero(component.any(axis))
    return slice(max(0, int(where[0]) - 2), int(where[-1]) + 3)


def _best_template(cover: NDArray[np.float32]) -> tuple[str, float, float, float, float]:
    """The kind that overlaps a coverage [h, w] best: kind, overlap, box centre x and y, box side in pixels."""
    area = float(cover.sum())
    columns = np.arange(cover.shape[1], dtype=np.float32) + 0.5
    rows = np.arange(cover.shape[0], dtype=np.float32) + 0.5
    x = float(cover.sum(0) @ columns) / area
    centroid = float(cover.sum(1) @ rows) / area
    fits = []
    for kind in KINDS:
        share, drop = _MOMENTS[kind]
        diameter = float(np.sqrt(area / share))
        y = centroid - drop * diameter
        template = coverage(kind, columns - x, rows - y, diameter / 2)
        overlap = float(np.minimum(cover, template).sum() / np.maximum(cover, template).sum())
        fits.append((kind, overlap, x, y, diameter))
    return max(fits, key=lambda fit: fit[1])
