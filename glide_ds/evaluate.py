"""How well pictures of the built-in shapes show their captions, counted by the judge."""

from __future__ import annotations

import argparse
import io
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from glide_ds.data.judge import Grade, grade
from glide_ds.types import DataError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


class Picture(NamedTuple):
    """A picture to grade, uint8 [S, S, 3] RGB, and the caption it should show."""

    name: str
    image: NDArray[np.uint8]
    caption: str


@dataclass(frozen=True)
class Score:
    """Of `count` pictures, the shares with every object's colour, shape, size, and the position right."""

    count: int
    colour: float
    shape: float
    size: float
    position: float

    def __str__(self) -> str:
        shares = (f"{name} {getattr(self, name):.1%}" for name in ("colour", "shape", "size", "position"))
        return f"{', '.join(shares)} right in {self.count} pictures"


def score(grades: Iterable[Grade]) -> Score:
    """Sum grades up; `DataError` if there are none."""
    marks = np.array([[g.colour, g.shape, g.size, g.position] for g in grades], np.float64)
    if not len(marks):
        raise DataError("there is no picture to grade; give at least one with its caption")
    return Score(len(marks), *map(float, marks.mean(0)))


def read_pictures(path: str | Path) -> Iterator[Picture]:
    """Pictures with their captions from a folder or a WebDataset tar: NAME.png and NAME.txt, sorted by name."""
    path = Path(path)
    if not path.exists():
        raise DataError(
            f"{path} does not exist, so there is nothing to grade; give a folder or a .tar of pictures"
        )
    files = (
        _tar_files(path) if path.is_file() else {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()}
    )
    for name in sorted(files):
        stem, dot, extension = name.rpartition(".")
        if dot + extension.lower() in PICTURES:
            if f"{stem}.txt" not in files:
                raise DataError(f"{path}: {name} has no caption beside it; write it to {stem}.txt")
            yield Picture(name, _decode(path, name, files[name]), files[f"{stem}.txt"].decode(errors="replace"))


def _tar_files(path: Path) -> dict[str, bytes]:
    try:
        with tarfile.open(path) as tar:
            return {m.name: f.read() for m in tar if (f := tar.extractfile(m)) is not None}
    except tarfile.TarError as error:
        raise DataError(
            f"{path} is not a readable tar ({error}); give a folder or a .tar of pictures"
        ) from error


def _decode(path: Path, name: str, content: bytes) -> NDArray[np.uint8]:
    try:
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(
            f"{path}: {name} cannot be read as a picture ({error}); remove or replace it"
        ) from error


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `glide-ds evaluate`."""
    parser.add_argument(
        "pictures", help="folder or tar with NAME.png and NAME.txt, such as `prepare shapes` writes"
    )
    parser.add_argument("--list", action="store_true", help="name every picture that does not show its caption")
    for name, what in (("colour", "every colour"), ("shape", "every shape")):
        parser.add_argument(
            f"--min_{name}",
            type=float,
            default=0.0,
            metavar="SHARE",
            help=f"fail if fewer have {what} right, 0...1",
        )


def run(args: argparse.Namespace) -> int:
    """Print the score; 1 if it is below what was asked for."""
    grades = []
    for picture in read_pictures(args.pictures):
        result = grade(picture.image, picture.caption)
        grades.append(result)
        wrong = [f.name for f in fields(result) if not getattr(result, f.name)]
        if args.list and wrong:
            print(f"{picture.name}: {', '.join(wrong)} wrong: {picture.caption}")
    total = score(grades)
    print(total)
    short = [
        f"{name} {getattr(total, name):.3f} is below {least:.3f}"
        for name, least in (("colour", args.min_colour), ("shape", args.min_shape))
        if getattr(total, name) < least
    ]
    if short:
        print("; ".join(short))
    return 1 if short else 0
