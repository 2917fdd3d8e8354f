"""Where a phase starts from, and what run.json remembers of it."""

from __future__ import annotations

import json
import platform
import uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from glide_ds import __version__
from glide_ds.config import Config
from glide_ds.config.keys import free_on_resume, leaves
from glide_ds.config.load import recorded
from glide_ds.config.phases import PHASES
from glide_ds.errors import CheckpointError, ConfigError, WeightsError
from glide_ds.files import user_path, write_file
from glide_ds.model.tensor_files import StateFile
from glide_ds.model.weights import load_state, load_weights
from glide_ds.training.checkpoint.commit import Committed, Owner, committed, lookalikes, newest_good
from glide_ds.training.faults.ranks import agreed
from glide_ds.training.speed.meta import weight_bytes
from glide_ds.training.zero.elastic import weights
from glide_ds.training.zero.stored import model_state

RUN_FILE = "run.json"
BUILTIN_DATA = "builtin:"
NAMED_WEIGHTS = ("openai", "random", "builtin:tiny")

T = TypeVar("T")


@dataclass(frozen=True)
class Start:
    """What a phase begins with: its own checkpoint, else its parent's, else `model.weights`."""

    resumed: Committed | None = None
    parent: Committed | None = None
    weights: str = "random"
    damaged: tuple[str, ...] = ()  # newer checkpoints that did not verify
    before: Config | None = None  # what the phase was last started with, where it is resumed and that is known

    @property
    def step(self) -> int:
        """Updates of the phase already done."""
        return self.resumed.step if self.resumed else 0

    def describe(self) -> str:
        if self.resumed:
            return f"resumes at step {self.resumed.step} from {self.resumed.path}"
        if self.parent:
            return f"starts from {self.parent.path} ({self.parent.manifest['phase']})"
        return f"starts from {self.weights} weights"


def folder_of(config: Config, phase: str) -> Path:
    """The phase's folder in the configuration's run directory."""
    return Path(config.run.dir) / PHASES[phase].folder


def find_start(config: Config, planned: Collection[str] = (), *, verify: bool) -> Start:
    """Find what the phase starts from. With `verify`, collective: all ranks check files and agree.

    `planned` phases will have run by then (a dry run of a pipeline). Raises WeightsError where a
    start is missing that real data needs, CheckpointError where there may be one and it can't be trusted.
    """
    phase = PHASES[config.train.phase]

    def found(action: Callable[[], T]) -> T:
        """An error that each rank raised by itself would be told as one rank's."""
        return agreed(action) if verify else action()

    resumed, damaged = _newest(folder_of(config, phase.name), verify)
    if resumed:
        before = found(lambda: _check_recorded(config, phase.name))
        return Start(resumed, damaged=tuple(damaged), before=before)
    for name in phase.parents:
        parent, broken = _newest(folder_of(config, name), verify)
        damaged += broken
        if parent:
            found(partial(_check_recorded, config, name))
            return Start(parent=parent, damaged=tuple(damaged))
        if name in planned:
            return Start(weights=f"{name}'s", damaged=tuple(damaged))
    return Start(weights=found(lambda: _given_weights(config)), damaged=tuple(damaged))


def _newest(folder: Path, verify: bool) -> tuple[Committed | None, list[str]]:
    """The newest checkpoint of a phase, and what is wrong with newer ones.

    Raises CheckpointError where there is none but something that looks like one.
    """
    if verify:
        found, damaged = newest_good(folder)
    else:
        found = next(iter(committed(folder)), None)
        damaged = [] if found else [f"{path}: no whole checkpoint" for path in lookalikes(folder)]
    if found or not damaged:
        return found, damaged
    error = CheckpointError(
        f"{folder} holds checkpoints, and none of them is whole ({'; '.join(damaged[:3])})",
        "the phase would start anew and lose them",
        f"copy them there again with all their files, under their names, or move them out of {folder} to start anew",
    )
    error.on_all_ranks = verify
    raise error


def _given_weights(config: Config) -> str:
    """`model.weights`, with "auto" resolved; an error where the phase could not do with it."""
    phase, weights = PHASES[config.train.phase], config.model.weights
    shards = [pattern for part in config.data.mix_parts for pattern in _listed(part.shards)]
    real_data = any(not pattern.startswith(BUILTIN_DATA) for pattern in shards)
    if weights == "auto" and real_data:
        raise WeightsError(
            f"data.shards = {shards} is real data and phase {phase.name!r} has no weights to start from",
            "GLIDE would be trained from random weights, which costs months",
            "give model.weights=/path/base.pt, model.weights=openai to download the published ones, or "
            "model.weights=random if that is meant",
        )
    if phase.needs_adapter and real_data and weights in ("auto", "openai", "builtin:tiny"):
        raise WeightsError(
            f"phase {phase.name!r} continues {' or '.join(phase.parents)}, and {config.run.dir} holds no "
            "committed checkpoint of it",
            f"there is no adapter to continue: {weights!r} brings no trained one",
            f"train {phase.parents[-1]} first (the same run.dir), or give model.weights=/path/of/an/export.pt",
        )
    if weights in (*NAMED_WEIGHTS, "auto"):
        return "random" if weights == "auto" else weights
    path = user_path(weights)
    if not path.is_file():
        raise WeightsError(
            f"model.weights = {weights!r} is neither a file nor one of {', '.join(NAMED_WEIGHTS)}",
            remedy="correct the path",
        )
    return str(path)


def load_start(model: nn.Module, config: Config, start: Start) -> list[str]:
    """Put the start's weights into the model. Returns what there is to say about it."""
    if start.resumed:
        if (
            weight_bytes(config) == 2
        ):  # the engine loads it, optimizer and all; the frozen weights it would have rounded
            model.load_state_dict(model_state(start.resumed), strict=False)
        return []
    if start.parent:
        file = StateFile(start.parent.path, weights(start.parent))
        report = load_state(model, file, source=str(start.parent.path))
    else:
        report = load_weights(model, start.weights)
        phase = PHASES[config.train.phase]
        has_adapter = any("clip" in name for name in report.loaded)
        if phase.needs_adapter and Path(start.weights).is_file() and not has_adapter:
            raise WeightsError(
                f"phase {phase.name!r} continues a trained adapter and model.weights = {start.weights!r} "
                "holds none",
                remedy=f"train {phase.parents[-1]} from it first, or give an export of that phase",
            )
    return [report.paragraph()]


# ---- run.json


def record(config: Config, start: Start) -> None:
    """Write the phase's resolved configuration, the versions and its parent into run.json. Rank 0 only."""
    path = Path(config.run.dir) / RUN_FILE
    whole = read_run(path.parent)
    if "run" not in whole:
        whole = {"run": uuid.uuid4().hex, "older": "phases" in whole, **whole}
    whole["versions"] = {
        "python": platform.python_version(),
        "glide_ds": __version__,  # of this source, installed or not
        **{name: version(name) for name in ("torch", "deepspeed", "open_clip_torch", "webdataset")},
    }
    phase = config.train.phase
    whole.setdefault("phases", {})[phase] = config.to_json()
    if not start.resumed:
        parent = start.parent
        whole.setdefault("lineage", {})[phase] = {
            "start": str(parent.path.relative_to(config.run.dir)) if parent else start.weights,
            "sha256": parent.fingerprint if parent else None,
        }
    write_file(path, json.dumps(whole, indent=1) + "\n")


def owner(config: Config) -> Owner:
    """Whose checkpoints the run directory's own are, once `record` has written its run.json. Collective."""
    own: list[Any] = [None]
    if dist.get_rank() == 0:  # another host may not see yet what has just been recorded
        whole = read_run(Path(config.run.dir))
        own = [Owner(whole["run"], whole["older"])]
    dist.broadcast_object_list(own)
    return own[0]


def lineage(config: Config) -> dict[str, Any]:
    """What every phase of the run started from."""
    return dict(read_run(Path(config.run.dir)).get("lineage", {}))


def read_run(folder: Path) -> dict[str, Any]:
    """The run directory's run.json; empty where there is none. Raises ConfigError where it can't be read."""
    path = folder / RUN_FILE
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} can't be read ({error})",
            "it is unknown what this run directory belongs to",
            "restore it, or choose another run.dir",
        ) from error


def _check_recorded(config: Config, phase: str) -> Config | None:
    """The configuration that `phase` was last started with; an error where its checkpoints are another run's."""
    before = read_run(Path(config.run.dir)).get("phases", {}).get(phase)
    if before is None:
        return None
    last = recorded(str(Path(config.run.dir) / RUN_FILE), before)
    then = dict(leaves(last.to_json()))
    now = dict(leaves(config.to_json()))
    if phase == config.train.phase:
        compared = [key for key in sorted(now.keys() | then.keys()) if not free_on_resume(key)]
    else:
        compared = [key for key in now if key.startswith("glide_ds.model.architecture.")]
        if PHASES[phase].clip:
            compared.append("glide_ds.clip.model")
    changed = [
        f"{key}: {then.get(key)!r} → {now.get(key)!r}" for key in compared if now.get(key) != then.get(key)
    ]
    if changed:
        raise ConfigError(
            f"run.dir = {config.run.dir!r} holds checkpoints of phase {phase!r} of another configuration "
            f"({'; '.join(changed[:5])}{('; …' if len(changed) > 5 else '')})",
            "going on would mix two runs",
            "choose another run.dir, or put the values back",
        )
    return last


def _listed(shards: str | tuple[str, ...]) -> tuple[str, ...]:
    return (shards,) if isinstance(shards, str) else shards
