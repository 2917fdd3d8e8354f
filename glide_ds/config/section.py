"""What every section of a configuration is: a frozen pydantic model whose mistakes are told in a person's words.

A key's type, range, default, meaning and whether it may change on resume stand in its field, and nowhere else.
"""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

from annotated_types import Ge, Gt, Le
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo

from glide_ds.errors import ConfigError, Fault
from glide_ds.files import user_path

Resume = Literal["free", "fixed"]
AUTO = "auto"
Place = tuple[str, ...]  # the keys that lead to a value, as in ("train", "steps")


def key(default: Any, meaning: str, *, resume: Resume, **limits: Any) -> Any:
    """A key: what it is unless given, what it means, and whether two starts of a phase may differ in it.

    `limits` are pydantic's: ge, gt, le. A default of `...` makes the key required.
    """
    return Field(default, description=meaning, json_schema_extra={"resume": resume}, **limits)


fixed, free = partial(key, resume="fixed"), partial(key, resume="free")


class Conflict(NamedTuple):
    """Values that do not go together, and the keys of the section that hold them."""

    keys: tuple[str, ...]
    fault: Fault


class ConflictsError(ValueError):
    """How a section tells pydantic of them."""

    def __init__(self, found: Sequence[Conflict]) -> None:
        super().__init__("; ".join(str(conflict.fault) for conflict in found))
        self.found = found


class WrongError(ValueError):
    """A validator's words about one key's value: consequence and remedy; name and value are added to them."""

    def __init__(self, consequence: str, remedy: str) -> None:
        super().__init__(consequence, remedy)
        self.consequence, self.remedy = consequence, remedy


class Section(BaseModel):
    """A group of keys. Its constructor raises pydantic's ValidationError, `of` and `changed` raise ConfigError."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
    )

    refused: ClassVar[Mapping[str, str]] = {}  # keys that a person may think of, and why there are none

    @classmethod
    def of(cls, values: Mapping[str, Any], place: str = "") -> Self:
        """The section that plain values describe. Raises ConfigError with every mistake; `place`: "data.filter"."""
        made, mistakes = checked(cls, values, tuple(place.split(".")) if place else ())
        if made is None:
            raise ConfigError.all_of([mistake.fault for mistake in mistakes])
        return made

    def changed(self, place: str = "", /, **changes: Any) -> Self:
        """A copy with other values, checked like a fresh one."""
        return self.of(dict(self) | changes, place)

    def conflicts(self) -> Iterator[Conflict]:
        """Values that are right one by one and do not go together."""
        yield from ()

    @model_validator(mode="after")
    def _without_conflict(self) -> Self:
        if found := list(self.conflicts()):
            raise ConflictsError(found)
        return self


S = TypeVar("S", bound=Section)


class Mistake(NamedTuple):
    """One fault of a configuration, and the key that it is told of."""

    place: Place
    fault: Fault


def checked(cls: type[S], values: Mapping[str, Any], place: Place = ()) -> tuple[S | None, list[Mistake]]:
    """The section of plain values, which lie under the keys `place`, or everything that is wrong with them."""
    try:
        return cls.model_validate(values), []
    except ValidationError as error:
        mistakes = list(_mistakes(cls, values, error, place, set()))
    # pydantic looks for conflicts only once every value is right: those between the right ones are found without
    # the others.
    wrong = {mistake.place for mistake in mistakes}
    try:
        rest = _without(values, {found[len(place) :] for found in wrong})
        cls.model_validate(rest)
    except ValidationError as error:
        mistakes += [m for m in _mistakes(cls, rest, error, place, wrong) if m.place not in wrong]
    return None, mistakes


def _mistakes(
    cls: type[Section], values: Mapping[str, Any], error: ValidationError, place: Place, wrong: set[Place]
) -> Iterator[Mistake]:
    """pydantic's errors in our words, one for each key. No conflict with a value that is `wrong` anyway."""
    told = set()
    for found in error.errors(include_url=False):
        reason = found.get("ctx", {}).get("error")
        spot = follow(cls, found["loc"])
        here = (*place, *spot.place)
        if isinstance(reason, ConflictsError):
            for conflict in reason.found:
                keys = [(*here, *name.split(".")) for name in conflict.keys]
                if not wrong & set(keys):
                    yield Mistake(keys[0], conflict.fault)
        elif here not in told:
            told.add(here)
            yield Mistake(here, _fault(".".join(here), found["type"], reason, spot, _at(values, spot.place)))


def _fault(name: str, kind: str, reason: Exception | None, spot: Spot, value: Any) -> Fault:
    """What is wrong with one value."""
    if isinstance(reason, WrongError):
        return Fault(f"{name} = {value!r}", reason.consequence, reason.remedy)
    if value == AUTO:
        return no_auto(name)
    if spot.field is None:
        return no_such_key(name, f"{name} = {value!r}", spot.known, spot.refused.get(spot.place[-1]))
    wanted = describe_type(spot.field)
    if kind == "missing":
        return Fault(f"{name} is missing", remedy=f"give it: {spot.field.description}")
    if section_of(spot.field) is not None:
        return Fault(f"{name} = {value!r} is a single value", remedy=f"give a {wanted}")
    if options := choices(spot.field):
        return Fault(f"{name} = {value!r}", remedy=f"choose one of {', '.join(options)}")
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"):
        return Fault(f"{name} = {value}", remedy=f"give {describe_range(spot.field) or 'a finite number'}")
    return Fault(f"{name} = {value!r} has the wrong type", remedy=f"give a value of type {wanted}")


# Where other trainers have a key of another name or place: by its last word, how to write it here.
ELSEWHERE = {
    **dict.fromkeys(("lr", "learning_rate"), "optimizer.params.lr=…"),
    **{name: f"optimizer.params.{name}=…" for name in ("betas", "eps", "weight_decay")},
    **dict.fromkeys(("warmup", "warmup_steps"), "scheduler.params.warmup_num_steps=…"),
    **dict.fromkeys(("batch_size", "global_batch_size"), "train_batch_size=…, of all ranks together"),
    **dict.fromkeys(("epochs", "num_epochs"), "train.steps=…: epochs x pictures / train_batch_size"),
    **dict.fromkeys(("steps", "max_steps", "num_steps"), "train.steps=…"),
    **dict.fromkeys(("path", "data_dir", "dataset", "train_data"), "data.shards=…"),
    **dict.fromkeys(("output_dir", "out_dir", "logdir"), "run.dir=…"),
    **dict.fromkeys(("num_gpus", "gpus", "world_size"), "deepspeed --num_gpus N …: the launcher decides that"),
    **dict.fromkeys(("num_workers", "workers"), "data.workers=…"),
    "seed": "train.seed=…",
    "image_size": "model.architecture.image_size=…",
}


def no_such_key(name: str, told: str, known: Sequence[str], why: str | None) -> Fault:
    """A key that does not exist, or on purpose, for the reason `why`."""
    if why:
        return Fault(f"{told} can't be set: {why}")
    word = name.rpartition(".")[2]
    if meant := ELSEWHERE.get(word):
        return Fault(f"unknown key {name!r}", remedy=f"write {meant}")
    return Fault(f"unknown key {name!r}{nearest(word, known)}", remedy="correct or remove it")


def no_auto(name: str) -> Fault:
    """Where a value is "auto" that has to be given: only Hugging Face's Trainer fills those of DeepSpeed's keys in."""
    return Fault(
        f"{name} = {AUTO!r}: there is nothing here that it could follow from",
        remedy="give a value, or leave the key out for its default (`glide-ds config explain`)",
    )


def _without(values: Mapping[str, Any], wrong: set[Place]) -> dict[str, Any]:
    heads = {found[0] for found in wrong if len(found) == 1}
    return {
        name: _without(value, {found[1:] for found in wrong if found[:1] == (name,)})
        if isinstance(value, Mapping)
        else value
        for name, value in values.items()
        if name not in heads
    }


def _at(values: Any, place: Place) -> Any:
    for name in place:
        values = values.get(name) if isinstance(values, Mapping) else getattr(values, name, None)
    return values


# ---- what a field says of itself


class Spot(NamedTuple):
    """Where a chain of keys ends: at a field, or at a name that is none of `known`, on purpose if it is `refused`."""

    place: Place
    field: FieldInfo | None
    known: tuple[str, ...] = ()
    refused: Mapping[str, str] = {}


def follow(cls: type[Section], keys: Sequence[str | int]) -> Spot:
    """Go from key to key until a value that is no section; what comes after it (a list's item) is left out."""
    field: FieldInfo | None = None
    place: list[str] = []
    inside: type[Section] | None = cls
    rest = [str(name) for name in keys]
    while rest and inside is not None:
        place.append(rest.pop(0))
        field = inside.model_fields.get(place[-1])
        if field is None:
            return Spot(tuple(place), None, tuple(inside.model_fields), inside.refused)
        inside = section_of(field)
        if rest and inside is not None and is_mapping(field):
            place.append(rest.pop(0))
    return Spot(tuple(place), field)


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a key holds, or that each of its named values is."""
    stands_for = [m.json_schema_input_type for m in field.metadata if isinstance(m, PlainValidator)]
    for option in (*stands_for, field.annotation, *typing.get_args(field.annotation)):
        if isinstance(option, type) and issubclass(option, Section):
            return option
    return None


def is_mapping(field: FieldInfo) -> bool:
    """Whether a person chooses the names of what a key holds."""
    origin = typing.get_origin(field.annotation)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def choices(field: FieldInfo) -> tuple[str, ...]:
    """The values of a key that has a few."""
    return tuple(typing.get_args(field.annotation)) if typing.get_origin(field.annotation) is Literal else ()


def describe_type(field: FieldInfo) -> str:
    """A key's type as a person writes it: int, str or list of str, section with the keys …"""
    if section := section_of(field):
        told = f"section with the keys {', '.join(section.model_fields)}"
        return f"mapping of names, each to a {told}" if is_mapping(field) else told
    return type_name(field.annotation)


def type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return type_name(arguments[0])
    if origin is Literal:
        return "str"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(type_name, arguments))
    if origin is tuple:
        return f"list of {type_name(arguments[0])}"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"mapping of names, each to a {type_name(arguments[1])}"
    if isinstance(hint, type) and issubclass(hint, int) and issubclass(hint, Enum):
        return "int"
    return "null" if hint is types.NoneType else str(hint.__name__)


def describe_range(field: FieldInfo) -> str:
    """The numbers that a key takes; empty where it takes all."""
    low = next((m.ge for m in field.metadata if isinstance(m, Ge)), None)
    above = next((m.gt for m in field.metadata if isinstance(m, Gt)), None)
    high = next((m.le for m in field.metadata if isinstance(m, Le)), None)
    if above is not None:
        told = "a positive number" if above == 0 else f"a number above {above}"
        return f"{told}, at most {high}" if high is not None else told
    if high is not None:
        return f"a number between {low} and {high}" if low is not None else f"a number of at most {high}"
    return f"a number at least {low}" if low is not None else ""


def nearest(name: str, known: Sequence[str]) -> str:
    """The known name that was probably meant, in brackets; all of them where none is like it."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (nearest known: {close[0]!r})" if close else f" (known: {', '.join(known)})"


def listed(value: Any) -> Any:
    """A list, which JSON and YAML have, as the tuple that a frozen value has."""
    return tuple(value) if isinstance(value, list) else value


def unlisted(value: Any) -> Any:
    """A tuple as the list that JSON makes of it."""
    return list(value) if isinstance(value, tuple) else value


def _filled(path: str) -> str:
    try:
        return str(user_path(path)) if path.startswith("~") else path
    except ConfigError as error:
        raise WrongError("its home directory is unknown", error.faults[0].remedy) from error


Texts = Annotated[tuple[str, ...], BeforeValidator(listed)]
UserPath = Annotated[str, AfterValidator(_filled)]  # a path of this machine, with ~ filled in
Patterns = Annotated[str | tuple[str, ...], BeforeValidator(listed)]
