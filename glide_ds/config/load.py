"""From files and --set to a configuration, or to one error that names every mistake.

Precedence: defaults < the JSON file's "glide_ds" block < the YAML overlay (what the phases share) < --set key=value.
What DeepSpeed names itself (batch sizes, ZeRO, bf16, clipping, optimizer, scheduler) stays in its own part of the
JSON, and only there. Everything is checked here, before any GPU is taken; what depends on the world size is checked
by `Config.batch_arithmetic`.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from glide_ds.config.deepspeed import THEIRS, DeepSpeedPart, check_theirs
from glide_ds.config.refused import why_refused
from glide_ds.config.renamed import RENAMED, upgraded
from glide_ds.config.schema import BLOCK, PRESETS, SECTIONS, Config, DataConfig, DegradeConfig, MaskConfig
from glide_ds.config.section import Mistake, Place, checked, follow, no_such_key
from glide_ds.errors import ConfigError, Fault
from glide_ds.files import user_path
from glide_ds.types import GlideConfig

SCHEMA = "$schema"  # names schema.json for editors
DEEPSPEED_KEYS = tuple(DeepSpeedPart.model_fields)


def cache_dir() -> Path:
    """GLIDE_DS_CACHE, else the user's cache directory by the XDG convention; without a home, a temporary one."""
    if own := os.environ.get("GLIDE_DS_CACHE"):
        return user_path(own)
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return user_path(xdg) / "glide_ds"
    try:
        return Path.home() / ".cache" / "glide_ds"
    except RuntimeError:  # an account without an entry, as containers have it
        return Path(tempfile.gettempdir()) / f"glide_ds-{os.getuid()}"


def load_configs(
    paths: Sequence[str | Path], overlay: str | Path | None = None, sets: Sequence[str] = ()
) -> list[Config]:
    """The phases of several --ds_config files, in order. Raises ConfigError with the mistakes of all of them."""
    configs: list[Config] = []
    faults: list[Fault] = []
    for path in paths:
        try:
            configs += load_config(path, overlay, sets)
        except ConfigError as error:
            faults += error.faults
    if faults:
        raise ConfigError.all_of(list(dict.fromkeys(faults)))
    return configs


def load_config(
    path: str | Path, overlay: str | Path | None = None, sets: Sequence[str] = ()
) -> tuple[Config, ...]:
    """Read one --ds_config file with the YAML overlay and the --set values on top.

    A file of ours holds one phase; a run.json holds every phase of its run, in order, under the names that keys had
    when it was written (renamed.py). Raises ConfigError with every mistake: key, value, nearest known key and remedy.
    """
    whole = _read_json(user_path(path))
    documents = [upgraded(one) for one in whole["phases"].values()] if "phases" in whole else [whole]
    faults: list[Fault] = []
    layers: list[tuple[str, Any]] = []
    if overlay:
        layers.append((f"--config {overlay}", _read_yaml(user_path(overlay))))
    for item in sets:
        try:
            layers.append((f"--set {item}", _parse_set(item)))
        except ConfigError as error:
            faults += error.faults
    configs = []
    for document in documents:
        config, found = resolve(str(path), document, layers)
        configs.append(config)
        faults += found
    if faults:
        raise ConfigError.all_of(list(dict.fromkeys(faults)))
    return tuple(config for config in configs if config)


def resolve(
    path: str, document: Mapping[str, Any], layers: Sequence[tuple[str, Any]] = ()
) -> tuple[Config | None, list[Fault]]:
    """One document with `layers` (where from, keys) on top; all that is wrong with it where it gives no Config."""
    laid = _Laid()
    laid.lay(document.get(BLOCK, {}), f"{path}", (), SECTIONS)
    theirs = {key: value for key, value in document.items() if key not in (BLOCK, SCHEMA)}
    laid.lay(theirs, path, (), (*DEEPSPEED_KEYS, BLOCK))
    for where, layer in layers:
        laid.lay(layer, where, (), (*SECTIONS, *DEEPSPEED_KEYS))
    deepspeed, mistakes = _deepspeed({key: laid.values[key] for key in DEEPSPEED_KEYS if key in laid.values})
    model = dict(laid.values["model"]) if isinstance(laid.values.get("model"), Mapping) else {}
    preset = model.get("preset", Config().model.preset)
    if isinstance(departures := model.get("architecture", {}), Mapping):
        plain = asdict(PRESETS[preset]()) if preset in PRESETS else {}
        plain.pop("clip_dim", None)
        laid.values["model"] = model | {"architecture": plain | dict(departures)}
    made: dict[str, Any] = {}
    for name in SECTIONS:
        values = laid.values.get(name, {})
        if not isinstance(values, Mapping):
            keys = ", ".join(Config.model_fields[name].annotation.model_fields)  # type: ignore[union-attr]
            fault = Fault(f"{name} = {values!r} should be a section with the keys {keys}")
            mistakes.append(Mistake((name,), fault))
            continue
        section, found = checked(Config.model_fields[name].annotation, values, (name,))  # type: ignore[arg-type]
        mistakes += found
        if section is not None:
            made[name] = section
    faults = [*laid.faults, *(laid.told(mistake, path) for mistake in mistakes)]
    faults += _conflicts(made, deepspeed)
    return (None if faults else Config(deepspeed=deepspeed, **made)), faults


def recorded(path: str, document: Mapping[str, Any]) -> Config:
    """A phase of the run.json at `path`. Raises ConfigError where it does not describe one."""
    config, faults = resolve(path, upgraded(document))
    if config is None:
        raise ConfigError.all_of(faults)
    return config


@dataclass
class _Laid:
    """Layers laid over each other, and where each value is from."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Place, str] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def lay(self, layer: Any, where: str, place: Place = (), known: Sequence[str] = ()) -> None:
        """Lay `layer`, which lies under the keys `place`, on top; types are checked later."""
        if not isinstance(layer, Mapping):
            fact = f"{where}: expected a mapping of keys to values, found {layer!r}"
            self.faults.append(Fault(fact, remedy="give key: value pairs"))
            return
        into = self.values
        for name in place:
            into = into[name]
        for key, value in layer.items():
            here = (*place, str(key))
            if known and key not in known:
                fault = no_such_key(str(key), repr(key), known, why_refused(str(key)))
                self.faults.append(fault._replace(fact=f"{where}: {fault.fact}"))
            elif renamed := RENAMED.get(".".join(here)):
                fault = Fault(
                    f"{where}: {'.'.join(here)} = {value!r} has another name now", remedy=renamed.advice(value)
                )
                self.faults.append(fault)
            elif isinstance(value, Mapping):
                inner = into.setdefault(key, {})
                if isinstance(inner, dict):
                    into[key] = dict(inner)
                    self.lay(value, where, here)
                else:
                    told = f"{where}: {'.'.join(here)} holds the single value {inner!r}"
                    self.faults.append(Fault(told, remedy="it is no section; give one value"))
            else:
                into[key] = value
                self.origins[here] = where

    def told(self, mistake: Mistake, path: str) -> Fault:
        """The mistake's fault, with the file or option that it came from."""
        origin = next((self.origins[p] for p in _upwards(mistake.place) if p in self.origins), path)
        return mistake.fault._replace(fact=f"{origin}: {mistake.fault.fact}")


def _upwards(place: Place) -> list[Place]:
    return [place[:length] for length in range(len(place), 0, -1)]


def _deepspeed(values: dict[str, Any]) -> tuple[dict[str, Any], list[Mistake]]:
    """DeepSpeed's part as it reads it, and what is wrong with it."""
    part, mistakes = checked(DeepSpeedPart, values)
    read = part.model_dump(exclude_unset=True, exclude_none=True) if part else dict(values)
    for name in THEIRS:
        if isinstance(values.get(name), Mapping):
            read[name], found = check_theirs(name, values[name])
            mistakes += found
    if part:
        read["scheduler"].setdefault("params", {})
    return read, mistakes


def _conflicts(made: Mapping[str, Any], deepspeed: Mapping[str, Any]) -> list[Fault]:
    """What of two sections does not go together, where both are right."""
    faults = []
    model, clip = made.get("model"), made.get("clip")
    validation, data = made.get("validation"), made.get("data")
    on_shapes = validation and validation.shards is None and (not data or data.draws_shapes)
    if validation and validation.drawn and not on_shapes and not (model and model.architecture.upsamples):
        faults.append(
            Fault(
                f"validation.drawn = {validation.drawn} on other data than the built-in shapes",
                "only shapes have a judge",
                "remove it, or train on builtin:shapes",
            )
        )
    images = made["log"].sample_images if made.get("log") else ()
    if images and clip and not clip.pictured:
        faults.append(
            Fault(
                f"log.sample_images = {list(images)} with clip.source = 'text'",
                "an adapter that never saw a picture's embedding would be shown them",
                "set clip.source=both or image, or remove log.sample_images",
            )
        )
    if images and model and model.architecture.upsamples:
        fault = (
            f"log.sample_images = {list(images)} with an upsampler, which enlarges pictures of the run's data"
        )
        faults.append(Fault(fault, remedy="remove log.sample_images"))
    if model and clip and clip.pictured and model.architecture.inpaints:
        fault = f"clip.source = {clip.source!r} shows an inpaint model what it should fill in"
        faults.append(Fault(fault, remedy="use clip.source=text"))
    if model and data:
        faults += _unused_by(model.architecture, data)
    ema, checkpoint = made.get("ema"), made.get("checkpoint")
    if ema and checkpoint and ema.snapshot_every % checkpoint.every:
        faults.append(
            Fault(
                f"ema.snapshot_every = {ema.snapshot_every} is no multiple of checkpoint.every = {checkpoint.every}",
                "no checkpoint would be written then",
                "give a multiple",
            )
        )
    return faults


def _unused_by(architecture: GlideConfig, data: DataConfig) -> Iterator[Fault]:
    """What only some kinds of models are given."""
    if data.degrade != DegradeConfig() and not architecture.upsamples:
        yield Fault(
            f"data.degrade is given, and a model of kind {architecture.kind!r} reads no low-resolution input",
            "it would do nothing",
            "remove it, or train an upsampler",
        )
    if data.mask != MaskConfig() and not architecture.inpaints:
        yield Fault(
            f"data.mask is given, and a model of kind {architecture.kind!r} is shown no masked picture",
            "it would do nothing",
            f"remove it, or train {architecture.kind}-inpaint",
        )


def _read_json(path: Path) -> dict[str, Any]:
    text = _read_text(path, "--ds_config")
    try:
        value = json.loads(text, object_pairs_hook=partial(_once, path))
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1].strip() if text.strip() else ""
        raise ConfigError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}: {line!r}",
            remedy="correct it",
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path} holds {type(value).__name__}, not an object with DeepSpeed's keys",
            remedy="give another file",
        )
    return value


def _once(path: Path, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object's keys and values. JSON would take the last of two values for a key in silence."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        doubled = next(name for name in names if names.count(name) > 1)
        given = " and ".join(repr(value) for name, value in pairs if name == doubled)
        raise ConfigError(
            f"{path} gives the key {doubled!r} more than once ({given})",
            "it is unknown which is meant",
            "keep one of them",
        )
    return values


def _read_yaml(path: Path) -> dict[str, Any]:
    text = _read_text(path, "--config")
    try:
        value = yaml.load(text, _YamlLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}", remedy="correct it") from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"{path} holds {type(value).__name__}, not keys and values", remedy="give another file"
        )
    return value


def _read_text(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        wide = path.read_bytes()[:2] in (b"\xff\xfe", b"\xfe\xff")
        raise ConfigError(
            f"{option} {path} is not UTF-8 text: {'it is UTF-16' if wide else f'byte {error.start} is no part of it'}",
            remedy="save it as UTF-8, for example with iconv -f "
            + ("UTF-16" if wide else "LATIN1")
            + " -t UTF-8",
        ) from error
    except OSError as error:
        near = sorted(p.name for p in path.parent.glob(f"*{path.suffix}")) if path.parent.is_dir() else []
        beside = f"; {path.parent} holds {', '.join(near)}" if near else ""
        raise ConfigError(
            f"{option} {path} can't be read ({error.strerror}){beside}", remedy="correct it"
        ) from error


def _parse_set(item: str) -> dict[str, Any]:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"--set {item} is no assignment", remedy="give key=value, such as --set train.steps=1000"
        )
    try:
        value = text if _is_plain(key, text) else yaml.load(text, _YamlLoader)
    except yaml.YAMLError:
        value = text
    for part in reversed(key.split(".")):
        value = {part: value}
    return typing.cast(dict[str, Any], value)


def _is_plain(key: str, text: str) -> bool:
    """Whether a value is the text as it stands, where YAML would make something else of it.

    A brace pattern such as {000..007}.tar is a shard name and no mapping, what follows a # is no comment, and what a
    key for text is given is no number and no date.
    """
    if re.match(r"\{\d+\.\.", text) or re.match(r"[^\"'\[{]*?(^|\s)#", text):
        return True
    place = key.split(".")
    spot = follow(Config if place[0] in SECTIONS else DeepSpeedPart, place)
    return spot.field is not None and spot.field.annotation is str and not re.match(r"\s*[\"']", text)


class _YamlLoader(yaml.SafeLoader):
    """SafeLoader that reads numbers as people mean them: 1e-4 is one (YAML 1.1 wants 1.0e-4), 0012 and 1:30 are none.

    Two values for one key are an error.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(name, deep=True) for name, _ in node.value]
        if doubled := [name for name in names if names.count(name) > 1 and name != "<<"]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {doubled[0]!r} is given more than once", node.start_mark
            )
        return super().construct_mapping(node, deep)


# 0012 would be 10, 1:30 would be 90, 2026-01-02 a date.
_YamlLoader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0].rpartition(":")[2] not in ("int", "float", "timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)
