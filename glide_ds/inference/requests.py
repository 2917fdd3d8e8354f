"""What is to be drawn, one request a line: a text file of prompts, or a jsonl with more to say.

Everything in a file is checked before anything is drawn, and all that is wrong is told at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from glide_ds.data.pictures.decode import Cropping
from glide_ds.data.tally import Unusable
from glide_ds.data.texts.encodings import decode_text
from glide_ds.errors import DataError, Fault, GlideError
from glide_ds.files import user_path
from glide_ds.inference.canvas import Files, read_canvas
from glide_ds.inference.prompts import check_weights, read_picture, weighted

TOLD = 20  # mistakes of a file, in words
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


@dataclass(frozen=True)
class Request:
    """One prompt, and what it has of its own."""

    line: int  # in its file, from 1
    prompt: str = ""
    images: tuple[str, ...] = ()  # pictures for CLIP to see, FILE or FILE:WEIGHT
    texts: tuple[str, ...] = ()  # and texts for it to read in place of the prompt, TEXT or TEXT:WEIGHT
    seed: int | None = None  # of its first picture
    guidance: float | None = None
    inpaint: Files | None = None  # a picture to fill in, and its mask


class Row(BaseModel):
    """A line of a jsonl."""

    model_config = ConfigDict(extra="forbid", strict=True)
    prompt: str = ""
    image: str | list[str] = []
    clip_prompt: str | list[str] = []
    mask: str | None = None  # beside one image: that is filled in, and CLIP does not see it
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    guidance: Annotated[float, Field(allow_inf_nan=False, strict=False)] | None = None


def read_requests(path: Path) -> tuple[list[Request], int]:
    """(requests, how many empty lines were left out) of a file; what ends in .jsonl holds an object a line.

    A jsonl's pictures are named from its own folder. Raises DataError with the number of every bad line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} can't be read ({error.strerror})", remedy="correct --prompts") from error
    try:
        lines = decode_text(data)[0].splitlines()
    except Unusable as error:
        raise DataError(f"{path} is no text ({error.detail})", remedy="write it as UTF-8") from error
    requests: list[Request] = []
    faults: list[Fault] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            requests.append(_parsed(number, line, path))
        except GlideError as error:
            faults += [Fault(f"{path}, line {number}: {fault.fact}", *fault[1:]) for fault in error.faults]
    if len(faults) > TOLD:
        faults[TOLD:] = [Fault(f"and {len(faults) - TOLD} more mistakes in {path}")]
    if faults:
        raise DataError.all_of(faults)
    if not requests:
        raise DataError(f"{path} holds no prompt", "there is nothing to draw", "write one on each line")
    return requests, sum(not line.strip() for line in lines)


def _parsed(number: int, line: str, path: Path) -> Request:
    if path.suffix.lower() not in JSON_SUFFIXES:
        return Request(number, line.strip())
    try:
        row = Row.model_validate(json.loads(line))
    except json.JSONDecodeError as error:
        raise DataError(f"no JSON ({error.msg} at column {error.colno})", remedy="write an object") from None
    except ValidationError as error:
        raise DataError.all_of(list(_faults(error))) from None
    images = tuple(str(path.parent / user_path(name)) for name in _several(row.image))
    texts = tuple(_several(row.clip_prompt))
    inpaint = None
    if row.mask is not None:
        if len(images) != 1:
            raise DataError(
                f"mask beside {len(images)} images", remedy="give the image that is to be filled in"
            )
        inpaint, images = (images[0], str(path.parent / user_path(row.mask))), ()
        read_canvas([inpaint], 16)
    if not row.prompt.strip() and not images and not texts and not inpaint:
        raise DataError("no prompt, image or clip_prompt", "there is nothing to draw", "give one of them")
    check_weights([*weighted(images, files=True), *weighted(texts)])
    for image, _ in weighted(images, files=True):
        read_picture(image, 16, Cropping())
    return Request(number, row.prompt.strip(), images, texts, row.seed, row.guidance, inpaint)


def _several(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def _faults(error: ValidationError) -> Iterator[Fault]:
    known = ", ".join(Row.model_fields)
    for fault in error.errors():
        key, value = ".".join(str(word) for word in fault["loc"]), _short(fault["input"])
        if fault["type"] == "extra_forbidden":
            yield Fault(f"the key {key!r} does not exist", remedy=f"choose of {known}")
        else:
            yield Fault(f"{key or 'the line'} is {value}", remedy=fault["msg"])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
