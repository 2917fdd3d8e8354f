"""From a sample's text members to its caption.

Understood: KEY.txt; KEY.json with a caption field (img2dataset, LAION, plain); several captions per image
(COCO's list of annotations, or {text, weight} records), of which one is drawn per epoch. Captions are cleaned as
little as possible: white space at the ends goes and runs of it become one space, which is all tokens would notice.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from glide_ds.data.tally import Cause, Unusable
from glide_ds.data.texts.encodings import decode_text

TEXT_EXTENSIONS = ("txt", "text", "caption")
CAPTION_FIELDS = ("caption", "captions", "text", "TEXT", "prompt", "alt_text", "alt", "title", "description")
TEXT_FIELDS = ("caption", "text", "raw", "TEXT", "value")
MAX_CHARACTERS = 20_000


def parse_json(data: bytes) -> tuple[dict[str, Any], bool]:
    """(the record, whether it was UTF-8). Raises Unusable where it is no JSON object."""
    text, utf8 = decode_text(data)
    try:
        record = loads(text)
    except (ValueError, RecursionError) as error:
        raise Unusable(Cause.BAD_JSON, str(error)[:80]) from None
    if isinstance(record, list):  # COCO's annotations of an image
        record = {"captions": record}
    if not isinstance(record, dict):
        raise Unusable(Cause.BAD_JSON, f"a {type(record).__name__}, not an object")
    return record, utf8


def loads(text: str | bytes) -> Any:
    """JSON, with integers of any length. Raises ValueError, RecursionError."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (
        ValueError
    ):  # an integer of more digits than Python converts; in a float it is infinite, as in JavaScript
        return json.loads(text, parse_int=float)


def read_caption(members: Mapping[str, bytes], draw: float) -> tuple[str, tuple[str, ...]]:
    """A sample's caption, and notes on what was tolerated. `draw` in [0, 1) picks among several.

    Raises Unusable where there is no caption.
    """
    choices, notes = read_captions(members)
    return choose(choices, draw), notes


def read_captions(members: Mapping[str, bytes]) -> tuple[list[tuple[str, float]], tuple[str, ...]]:
    """A sample's captions, one or more, with weights, and notes on what was tolerated.

    A text member goes before the JSON record, which is read where the text is missing, empty or no text.
    Raises Unusable where there is no caption.
    """
    notes: list[str] = []
    found, bad = False, None
    for extension in TEXT_EXTENSIONS:
        if extension in members:
            found = True
            try:
                text, utf8 = decode_text(members[extension])
            except Unusable as error:
                bad = bad or error  # another member may yet have a caption
                continue
            if clean := tidy(text):
                return [(clean, 1.0)], () if utf8 else ("caption not UTF-8",)
    if "json" in members:
        try:
            record, utf8 = parse_json(members["json"])
        except Unusable as error:
            raise bad or error from None
        if not utf8:
            notes.append("caption not UTF-8")
        choices = [(tidy(text), weight) for text, weight in caption_choices(record)]
        found = found or bool(choices)
        if choices := [(text, weight) for text, weight in choices if text]:
            return choices, (*notes, "text not readable, the record's caption taken") if bad else tuple(notes)
    if bad:
        raise bad
    if found:
        raise Unusable(Cause.EMPTY_CAPTION)
    raise Unusable(Cause.NO_CAPTION, f"members: {', '.join(sorted(members))}")


def tidy(text: str) -> str:
    # Lone surrogates, which JSON's \ud800 can make, have no UTF-8 and would stop the tokenizer.
    return " ".join(text[:MAX_CHARACTERS].encode("utf-8", "ignore").decode().split())


def caption_choices(record: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Every caption a JSON record offers, with its weight, from the first field that has any."""
    for name in CAPTION_FIELDS:
        if name in record and (choices := choices_of(record[name])):
            return choices
    return []


def choices_of(value: Any) -> list[tuple[str, float]]:
    """The captions in lists of lists, however deep they are nested, in their order."""
    found: list[tuple[str, float]] = []
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting.extend(reversed(item))
        elif isinstance(item, str):
            found.append((item, 1.0))
        elif isinstance(item, dict):
            text = next((item[name] for name in TEXT_FIELDS if isinstance(item.get(name), str)), None)
            if text is not None:
                found.append((text, _weight(item.get("weight", 1.0))))
    return found


def _weight(value: Any) -> float:
    """A caption's weight; 1 where it is no finite number of 0 or more, as where none is given."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max:
        return float(value)
    return 1.0


def choose(choices: list[tuple[str, float]], draw: float) -> str:
    """One of the weighted captions by a number in [0, 1), or "" where there is none."""
    total = sum(weight for _, weight in choices)
    if total > sys.float_info.max:
        choices = [(text, weight / len(choices)) for text, weight in choices]
        total = sum(weight for _, weight in choices)
    remaining = draw * total
    for text, weight in choices:
        if remaining < weight:
            return text
        remaining -= weight
    return choices[-1][0] if choices else ""
