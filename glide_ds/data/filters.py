"""Filters on what a sample's JSON record says of it, as LAION and img2dataset write it. All off by default.

A filter drops a sample whose record lacks the value it asks for: unknown is not safe. So does a value that is no
finite number where the rule asks for one, or no plain word: it compares with nothing. Dropped samples are counted by
rule, apart from the unusable ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from glide_ds.config import FilterConfig
from glide_ds.data.tally import Unusable
from glide_ds.data.texts.captions import parse_json

WIDTHS = ("original_width", "width", "WIDTH")
HEIGHTS = ("original_height", "height", "HEIGHT")
SIMILARITY = ("similarity", "SIMILARITY", "clip_similarity")
UNSAFE = ("punsafe", "PUNSAFE")
NSFW = ("NSFW", "nsfw")
LANGUAGE = ("LANGUAGE", "language", "lang")


class Filtered(Unusable):
    """A sample that a rule leaves out; the cause is the rule."""


def check(members: Mapping[str, bytes], filters: FilterConfig) -> None:
    """Raises Filtered where a rule drops the sample, Unusable where its record can't be read."""
    if not filters.active:
        return
    record: Mapping[str, Any] = parse_json(members["json"])[0] if "json" in members else {}
    if filters.min_size or filters.max_aspect:
        # 0 and -1 are what a tool writes that does not know.
        width, height = _number(record, WIDTHS, "size", least=1), _number(record, HEIGHTS, "size", least=1)
        _drop_if(min(width, height) < filters.min_size, "min_size", f"{width:g} x {height:g}")
        aspect = max(width, height) / max(1.0, min(width, height))
        _drop_if(bool(filters.max_aspect) and aspect > filters.max_aspect, "max_aspect", f"{aspect:.2f}")
    if filters.min_similarity is not None:
        value = _number(record, SIMILARITY, "min_similarity")
        _drop_if(value < filters.min_similarity, "min_similarity", f"{value:g}")
    if filters.max_punsafe is not None:
        value = _number(record, UNSAFE, "max_punsafe", least=0)
        _drop_if(value > filters.max_punsafe, "max_punsafe", f"{value:g}")
    for rule, names, allowed in (("nsfw", NSFW, filters.nsfw), ("language", LANGUAGE, filters.language)):
        if allowed:
            text = _word(record, names, rule).lower()
            _drop_if(text not in {item.lower() for item in allowed}, rule, text)


def _value(record: Mapping[str, Any], names: tuple[str, ...], rule: str) -> Any:
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise Filtered(f"{rule}: not recorded", f"none of {', '.join(names)}")


def _number(record: Mapping[str, Any], names: tuple[str, ...], rule: str, least: float = -math.inf) -> float:
    value = _value(record, names, rule)
    number = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):  # no number at all, or an integer of more than 308 digits
            number = float(value)
    if not math.isfinite(number):
        raise Filtered(f"{rule}: not recorded", f"{_shown(value)} is no finite number")
    if number < least:
        raise Filtered(f"{rule}: not recorded", f"{number:g} is below {least:g}")
    return number


def _word(record: Mapping[str, Any], names: tuple[str, ...], rule: str) -> str:
    value = _value(record, names, rule)
    if not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        raise Filtered(f"{rule}: not recorded", f"{_shown(value)} is no word")
    return str(value)[:100]


def _shown(value: Any) -> str:
    """What a message says of a value: not all of a list nested a thousand deep, or of a number as long."""
    return (
        repr(value)[:40] if isinstance(value, str | float | bool) else f"a value of type {type(value).__name__}"
    )


def _drop_if(dropped: bool, rule: str, detail: str) -> None:
    if dropped:
        raise Filtered(rule, detail)
