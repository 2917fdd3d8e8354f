"""The keys of a whole --ds_config file, read off the schema: for explain, docs/config.md, diff and resuming."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo

from glide_ds.config.deepspeed import THEIRS, DeepSpeedPart, their_model
from glide_ds.config.schema import BLOCK, SECTIONS, Config, plain
from glide_ds.config.section import (
    Section,
    choices,
    describe_range,
    describe_type,
    follow,
    is_mapping,
    section_of,
    type_name,
)


class Key(NamedTuple):
    """One key as a person asks about it."""

    name: str  # as --set takes it; NAME stands for a name of one's choice
    type: str
    values: str  # which ones of the type; empty: all
    default: str  # as JSON; "required"
    meaning: str
    resume: str  # free, or fixed: two starts of a phase may not differ in it
    deepspeed: bool  # of DeepSpeed's part of the file


def all_keys() -> list[Key]:
    """Every key, in the order of the schema: DeepSpeed's part first, its own sections without their types."""
    found = list(_keys(DeepSpeedPart, "", deepspeed=True))
    for name in SECTIONS:
        found += _keys(_section(name), f"{name}.", deepspeed=False)
    return found


def sections() -> dict[str, str]:
    """What each section of the block is for."""
    return {name: (_section(name).__doc__ or "").strip() for name in SECTIONS}


def _section(name: str) -> type[Section]:
    section = section_of(Config.model_fields[name])
    assert section is not None, name
    return section


def _keys(cls: type[Section], prefix: str, *, deepspeed: bool) -> Iterator[Key]:
    for name, field in cls.model_fields.items():
        inner = section_of(field)
        if inner is not None:
            yield from _keys(
                inner, f"{prefix}{name}.{'NAME.' if is_mapping(field) else ''}", deepspeed=deepspeed
            )
        elif prefix + name in THEIRS and deepspeed:
            for key, meaning in THEIRS[name].items():
                theirs = next(f for n, f in their_model(name).model_fields.items() if key in (n, f.alias))
                kind = type_name(theirs.annotation)
                yield Key(f"{name}.{key}", kind, "", _default(theirs), meaning, _resume(field), True)
        else:
            yield Key(
                f"{prefix}{name}",
                describe_type(field),
                ", ".join(choices(field)) or describe_range(field).removeprefix("a number "),
                _default(field),
                field.description or "",
                _resume(field),
                deepspeed,
            )


def _default(field: FieldInfo) -> str:
    return (
        "required" if field.is_required() else json.dumps(plain(field.get_default(call_default_factory=True)))
    )


def _resume(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    return str(extra["resume"]) if isinstance(extra, Mapping) else "fixed"


def free_on_resume(name: str) -> bool:
    """Whether two starts of a phase may differ in that key of the file, such as glide_ds.train.steps."""
    place: list[str] = name.split(".")
    spot = follow(Config, place[1:]) if place[0] == BLOCK else follow(DeepSpeedPart, place)
    return spot.field is not None and _resume(spot.field) == "free"


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every single value of a document, by its keys joined with dots."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
