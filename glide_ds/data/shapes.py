"""The built-in data set: coloured shapes on a light ground, drawn on the fly, with exact captions.

Every picture is a pure function of (seed, index), the same on every machine and at every side length, so the
set needs no files and tests and the quickstart can check what a model learned (see `glide_ds.data.judge`).
Lengths and positions of a scene are fractions of the picture's side; x grows to the right, y downwards.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from glide_ds.data.tars.writing import writing_shard
from glide_ds.errors import DataError

# Indices below are for training, from here on held out: no training run ever draws them.
HELD_OUT = 2**40

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 35),
    "orange": (250, 140, 20),
    "yellow": (245, 220, 40),
    "green": (35, 160, 65),
    "blue": (35, 85, 220),
    "purple": (145, 45, 180),
    "black": (22, 22, 22),
}
KINDS = ("circle", "square", "triangle", "cross", "ring")
SIZES: dict[str, tuple[float, float]] = {"small": (0.28, 0.33), "large": (0.43, 0.45)}
# Where the first object lies as seen from the second: (x, y) direction.
RELATIONS: dict[str, tuple[int, int]] = {
    "above": (0, -1),
    "below": (0, 1),
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
}

MARGIN = 0.02  # free border around every object
GAP = 0.05  # free space between two objects along their relation's axis; two large ones just fit
MAX_SLANT = 0.6  # largest offset across the axis, relative to the distance along it
SHADE = 12  # largest brightness offset of an object's colour, in 1/255
RING_HOLE = 0.52  # inner by outer radius
CROSS_ARM = 0.36  # arm width by diameter

_COLOUR_NAMES, _SIZE_NAMES, _RELATION_NAMES = tuple(COLOURS), tuple(SIZES), tuple(RELATIONS)
_OBJECT = rf"a ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(KINDS)})"
_CAPTION = re.compile(rf"{_OBJECT}(?: ({'|'.join(RELATIONS)}) {_OBJECT})?")


@dataclass(frozen=True)
class Label:
    """What a caption says of one object."""

    size: str
    colour: str
    kind: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.kind}"


@dataclass(frozen=True)
class Description:
    """What a caption says: one object, or two and where the first lies as seen from the second."""

    objects: tuple[Label, ...]
    relation: str | None = None

    def __str__(self) -> str:
        return f" {self.relation} ".join(map(str, self.objects))


@dataclass(frozen=True)
class Shape:
    """One object: its label, and its place as fractions of the picture's side."""

    label: Label
    x: float
    y: float
    diameter: float  # side of its bounding box
    shade: int = 0  # added to every channel of its colour

    @property
    def rgb(self) -> tuple[int, int, int]:
        r, g, b = (min(255, max(0, c + self.shade)) for c in COLOURS[self.label.colour])
        return r, g, b


@dataclass(frozen=True)
class Scene:
    """One picture before it has pixels."""

    shapes: tuple[Shape, ...]
    relation: str | None
    background: tuple[int, int, int]


class _Stream:
    """Random numbers as a pure function of (seed, index): SplitMix64 (Steele et al. 2014).

    A numpy Generator costs 20 µs to seed, as much as half a picture, and promises no stable stream.
    """

    _MASK = 2**64 - 1
    _GAMMA = 0x9E3779B97F4A7C15

    def __init__(self, seed: int, index: int) -> None:
        self._state = self._mix(self._mix(seed & self._MASK) ^ (index & self._MASK))

    def _mix(self, z: int) -> int:
        z = (z + self._GAMMA) & self._MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & self._MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & self._MASK
        return z ^ (z >> 31)

    def below(self, n: int) -> int:
        """An integer in 0…n-1; the modulo's bias is n / 2**64."""
        self._state = (self._state + self._GAMMA) & self._MASK
        return self._mix(self._state) % n

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.below(2**53) / 2**53


def scene(index: int, seed: int = 0) -> Scene:
    """The scene of that number: half hold one object, half two of different colours in a relation."""
    rng = _Stream(seed, index)
    ground = 231 + rng.below(19)
    background = (ground + rng.below(13) - 6, ground + rng.below(13) - 6, ground + rng.below(13) - 6)
    pair = rng.below(2) == 1
    first_colour = rng.below(len(COLOURS))
    first, d1, shade1 = _object(rng, first_colour)
    if not pair:
        x, y = (rng.between(MARGIN + d1 / 2, 1 - MARGIN - d1 / 2) for _ in range(2))
        return Scene((Shape(first, x, y, d1, shade1),), None, background)
    second_colour = (first_colour + 1 + rng.below(len(COLOURS) - 1)) % len(COLOURS)
    second, d2, shade2 = _object(rng, second_colour)
    relation = _RELATION_NAMES[rng.below(len(RELATIONS))]
    (x1, y1), (x2, y2) = _place(rng, d1, d2, relation)
    shapes = (Shape(first, x1, y1, d1, shade1), Shape(second, x2, y2, d2, shade2))
    return Scene(shapes, relation, background)


def _object(rng: _Stream, colour: int) -> tuple[Label, float, int]:
    size = _SIZE_NAMES[rng.below(len(SIZES))]
    label = Label(size, _COLOUR_NAMES[colour], KINDS[rng.below(len(KINDS))])
    return label, rng.between(*SIZES[size]), rng.below(2 * SHADE + 1) - SHADE


def _place(
    rng: _Stream, d1: float, d2: float, relation: str
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Centres of two boxes of sides d1 and d2 that stand in `relation`, apart and inside the picture."""
    dx, dy = RELATIONS[relation]
    free = 1 - 2 * MARGIN - GAP - d1 - d2
    before = rng.between(0, free)
    between = rng.between(0, free - before)
    along1 = MARGIN + before + d1 / 2
    distance = (d1 + d2) / 2 + GAP + between
    along2 = along1 + distance
    if dx + dy > 0:  # right of, below: the first object has the larger coordinate
        along1, along2 = 1 - along1, 1 - along2
    across1 = rng.between(MARGIN + d1 / 2, 1 - MARGIN - d1 / 2)
    slant = MAX_SLANT * distance
    low, high = max(MARGIN + d2 / 2, across1 - slant), min(1 - MARGIN - d2 / 2, across1 + slant)
    across2 = rng.between(low, high)
    if dx:
        return (along1, across1), (along2, across2)
    return (across1, along1), (across2, along2)


def describe(scene: Scene) -> Description:
    """What can be said of a scene."""
    return Description(tuple(shape.label for shape in scene.shapes), scene.relation)


def caption(scene: Scene) -> str:
    """The scene in words: "a large red circle above a small blue square"."""
    return str(describe(scene))


def parse_caption(text: str) -> Description:
    """The inverse of `caption`; `DataError` on a sentence that is not of this set."""
    match = _CAPTION.fullmatch(text.strip().lower())
    if match is None:
        raise DataError(
            f"caption {text!r} is not one of the built-in shapes",
            "it cannot be graded",
            'write it like "a large red circle above a small blue square"',
        )
    groups = match.groups()
    first, relation = Label(*groups[:3]), groups[3]
    return Description((first,)) if relation is None else Description((first, Label(*groups[4:])), relation)


def coverage(kind: str, dx: NDArray[np.float32], dy: NDArray[np.float32], radius: float) -> NDArray[np.float32]:
    """How much of each pixel a shape covers, 0…1: `dx` [w] and `dy` [h] from its centre, in pixels -> [h, w].

    Exact areas for square and cross, clipped signed distances for the others; `radius` is half the box's side.
    """
    column, row = dx[None, :], dy[:, None]
    if kind == "square":
        return _span(row, radius) * _span(column, radius)
    if kind == "cross":
        arm = radius * CROSS_ARM
        row_arm, column_arm = _span(row, arm), _span(column, arm)
        return _span(row, radius) * column_arm + row_arm * _span(column, radius) - row_arm * column_arm
    if kind == "triangle":  # apex on top, base and height both the diameter
        sides = (2 * np.abs(column) - row - radius) * np.float32(5**-0.5)
        return np.clip(0.5 - sides, 0, 1) * np.clip(0.5 + radius - row, 0, 1)
    distance = np.sqrt(row * row + column * column)
    if kind == "circle":
        return np.clip(0.5 + radius - distance, 0, 1)
    if kind == "ring":
        middle, half_width = radius * (1 + RING_HOLE) / 2, radius * (1 - RING_HOLE) / 2
        return np.clip(0.5 + half_width - np.abs(distance - middle), 0, 1)
    raise DataError(f"shape {kind!r} does not exist", remedy=f"choose one of {', '.join(KINDS)}")


def _span(offset: NDArray[np.float32], half: float) -> NDArray[np.float32]:
    """The part of the unit pixels at `offset` that lies within [-half, half]; half >= 0.5."""
    return np.clip(0.5 + half - np.abs(offset), 0, 1)


def render(scene: Scene, size: int = 32) -> NDArray[np.uint8]:
    """The scene's picture: uint8 [size, size, 3] RGB with antialiased edges."""
    image = np.empty((size, size, 3), np.uint8)
    image[:] = scene.background
    for shape in scene.shapes:
        radius = shape.diameter * size / 2
        left, columns = _window(shape.x * size, radius, size)
        top, rows = _window(shape.y * size, radius, size)
        cover = coverage(shape.label.kind, columns, rows, radius)[:, :, None]
        patch = image[top : top + len(rows), left : left + len(columns)]
        patch[:] = patch + cover * (np.array(shape.rgb, np.float32) - patch) + 0.5
    return image


def _window(centre: float, radius: float, size: int) -> tuple[int, NDArray[np.float32]]:
    """First pixel of a shape's window along one axis, and its pixels' centres relative to the shape's."""
    first = max(0, int(centre - radius) - 1)
    last = min(size, int(centre + radius) + 2)
    return first, np.arange(first + 0.5 - centre, last - centre, dtype=np.float32)


def draw(index: int, size: int = 32, seed: int = 0) -> tuple[NDArray[np.uint8], str]:
    """Sample `index` of the set: uint8 [size, size, 3] RGB and its caption."""
    picture = scene(index, seed)
    return render(picture, size), caption(picture)


def write_shards(
    out: str | os.PathLike[str],
    count: int,
    per_shard: int = 1000,
    size: int = 64,
    seed: int = 0,
    start: int = 0,
) -> list[Path]:
    """Write samples start…start+count-1 as WebDataset tars (png, txt, json) and return their paths.

    The same arguments give the same bytes. Each shard appears under its name only when complete.
    """
    if count < 1 or per_shard < 1:
        raise DataError(
            f"count={count} and per_shard={per_shard} give no shard", remedy="both must be at least 1"
        )
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, first in enumerate(range(start, start + count, per_shard)):
        path = folder / f"shapes-{number:06d}.tar"
        _write_shard(path, range(first, min(first + per_shard, start + count)), size, seed)
        paths.append(path)
    return paths


def _write_shard(path: Path, indices: range, size: int, seed: int) -> None:
    with writing_shard(path) as add:
        for index in indices:
            add(f"{index:09d}", dict(_members(scene(index, seed), size)))


def _members(picture: Scene, size: int) -> Iterator[tuple[str, bytes]]:
    png = io.BytesIO()
    Image.fromarray(render(picture, size)).save(png, "PNG")
    text = caption(picture)
    yield "png", png.getvalue()
    yield "txt", text.encode()
    yield "json", json.dumps({"caption": text, "scene": asdict(picture)}).encode()
