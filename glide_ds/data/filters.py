"""Filters on what a sample's JSON record says of it, as LAION and img2dataset write it. All off by default.

A filter drops a sample whose record lacks the value it asks for: unknown is not safe. Dropped samples are
counted by rule, apart from the unusable ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from glide_ds.config import FilterConfig
from glide_ds.data.captions import parse_json
from glide_ds.data.tally import Unusable

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
        width, height = _number(record, WIDTHS, "size"), _number(record, HEIGHTS, "size")
        _drop_if(min(width, height) < filters.min_size, "min_size", f"{width:g} x {height:g}")
        aspect = max(width, height) / max(1.0, min(width, height))
        _drop_if(bool(filters.max_aspect) and aspect > filters.max_aspect, "max_aspect", f"{aspect:.2f}")
    if filters.min_similarity is not None:
        value = _number(record, SIMILARITY, "min_similarity")
        _drop_if(value < filters.min_similarity, "min_similarity", f"{value:g}")
    if filters.max_punsafe is not None:
        value = _number(record, UNSAFE, "max_punsafe")
        _drop_if(value > filters.max_punsafe, "max_punsafe", f"{value:g}")
    for rule, names, allowed in (("nsfw", NSFW, filters.nsfw), ("language", LANGUAGE, filters.language)):
        if allowed:
            text = str(_value(record, names, rule)).lower()
            _drop_if(text not in {item.lower() for item in allowed}, rule, text)


def _value(record: Mapping[str, Any], names: tuple[str, ...], rule: str) -> Any:
    for name in names:
        if record.get(name) is not None:
            return record[name]
    raise Filtered(f"{rule}: not recorded", f"none of {', '.join(names)}")


def _number(record: Mapping[str, Any], names: tuple[str, ...], rule: str) -> float:
    value = _value(record, names, rule)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise Filtered(f"{rule}: not recorded", f"{value!r} is no number") from None


def _drop_if(dropped: bool, rule: str, detail: str) -> None:
    if dropped:
        raise Filtered(rule, detail)
