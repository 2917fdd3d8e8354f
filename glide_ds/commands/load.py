"""A model from whatever a person names: an export, a run or one of its folders, `openai`, `builtin:tiny`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from glide_ds.config import PRESETS, ClipConfig
from glide_ds.config.phases import PHASES
from glide_ds.data.pictures.decode import Cropping
from glide_ds.errors import CheckpointError, ConfigError, WeightsError
from glide_ds.files import user_path
from glide_ds.model import create_model
from glide_ds.model.clip import FrozenClip
from glide_ds.model.glide import Glide
from glide_ds.model.tensor_files import StateFile, sidecar
from glide_ds.model.weights import BUILTIN, load_state, load_weights, stored_config
from glide_ds.training.checkpoint.commit import (
    MANIFEST,
    Committed,
    at,
    committed,
    lookalikes,
    no_manifest,
    unreadable,
    verify,
)
from glide_ds.training.zero.elastic import masters, trained_weights, weights
from glide_ds.training.zero.ema import has_average, read_average
from glide_ds.training.zero.power import LONGEST, put_together
from glide_ds.types import GlideConfig


class Loaded(NamedTuple):
    """A model ready to draw."""

    model: Glide
    schedule: str
    clip: ClipConfig | None
    pictures: Cropping = Cropping()  # how those it was trained on were made square
    origin: Path | None = None  # the file or the checkpoint's folder

    def encoder(self, device: torch.device, source: str) -> FrozenClip | None:
        """The CLIP encoder whose embeddings the model reads, with the towers for `source`; None for plain GLIDE."""
        return FrozenClip(self.clip.model, self.clip.weights, device, source=source) if self.clip else None


def load_model(
    source: str,
    device: torch.device,
    *,
    kind: str = "base",
    ema: bool | float = False,
    clip_model: str | None = None,
) -> Loaded:
    """A model in eval mode from an export, a run or checkpoint folder, `openai` or `builtin:tiny`.

    `kind` says which of the published models `openai` means. `ema` takes the average of a run's weights, or the one of
    that length; an export either is one or isn't. `clip_model` is where the CLIP encoder's weights are now: a file, or
    open_clip's tag.
    Raises WeightsError or CheckpointError for what can't be had or trusted.
    """
    path = user_path(source)
    if path.is_dir():
        checkpoint = find_checkpoint(path)
        path = checkpoint.path
        about = checkpoint.manifest
        model = create_model(GlideConfig(**about["model"]))
        state = weights(checkpoint) | (dict(trained(checkpoint, ema=ema)) if ema else {})
        load_state(model, StateFile(checkpoint.path, state), source=source)
    else:
        if ema:
            raise ConfigError(
                f"{'--ema' if ema is True else '--ema_length'}: {source} is no run directory",
                remedy="an export holds the average if it was made with it",
            )
        about = (sidecar(path) or {}) if path.is_file() else {}
        model = create_model(_architecture(source, path, kind))
        load_weights(model, path if path.is_file() else source)
    schedule = about.get("schedule", "linear" if model.config.upsamples else "squaredcos_cap_v2")
    if device.type == "cpu":  # NHWC convolutions are up to 2.5 times as fast there
        model = model.to(memory_format=torch.channels_last)
    clip = _clip_of(about, path, clip_model) if model.config.clip_dim else None
    if clip_model and clip is None:
        raise ConfigError(f"--clip_model {clip_model}: {source} has no CLIP adapter", remedy="leave it out")
    cropping = Cropping(**about.get("pictures", {}))
    return Loaded(model.to(device).eval(), schedule, clip, cropping, path if path.exists() else None)


def _architecture(source: str, path: Path, kind: str) -> GlideConfig:
    if source == BUILTIN:
        return PRESETS["tiny"]()
    if source == "openai":
        return GlideConfig.published(kind)
    if not path.is_file():
        raise WeightsError(
            f"{source!r} is neither a file, a folder, openai nor {BUILTIN}", remedy="correct the path"
        )
    return stored_config(path)


def _clip_of(about: dict[str, Any], source: Path, weights: str | None) -> ClipConfig | None:
    """The CLIP encoder that a sidecar or manifest names, its weights from `weights` where that is given.

    A sidecar names what lies in its own folder from there, so that both can be moved.
    """
    if not about.get("clip"):
        return None
    named = ClipConfig(**about["clip"])
    given = {"weights": weights} if weights else {}
    if source.is_file():
        places = {name: source.parent / getattr(named, name) for name in ("model", "weights")}
        given = {name: str(place) for name, place in places.items() if place.is_file()} | given
    return named.changed("clip", **given)


def find_checkpoint(place: Path, phase: str | None = None) -> Committed:
    """The newest checkpoint whose files verify below a run directory or phase folder, or the one in this folder.

    It is where training would go on; newer ones that are damaged are told on stderr. Raises CheckpointError where
    there is none, or none whole in the last phase that has any.
    """
    if (place / MANIFEST).is_file():
        made = at(place.resolve())  # whatever the folder's name: a copy's, a link's
        found, broken = ([made], []) if made else ([], [place.resolve()])
    else:
        names = [phase] if phase else list(reversed(PHASES))
        folders = [place] if lookalikes(place) else [place / PHASES[name].folder for name in names]
        both = ((committed(folder), unreadable(folder)) for folder in folders)
        found, broken = next(filter(any, both), ([], []))
    if not found and not broken:
        wanted_phase = f" of phase {phase}" if phase else ""
        raise CheckpointError(
            f"{place} holds no committed checkpoint{wanted_phase}",
            remedy="give a run directory in which training has saved at least once",
        )
    damaged = [f"{path} is damaged ({no_manifest(path)})" for path in broken]
    for candidate in found:
        if not (problems := verify(candidate)):
            for text in damaged:
                print(f"{text}: {candidate.path.name} is taken, as training would", file=sys.stderr, flush=True)
            if candidate.manifest["files"].keys() == set(candidate.manifest.get("stay", ())):
                raise CheckpointError(
                    f"{candidate.path} holds averages alone, which a pruned checkpoint left behind",
                    remedy=f"name {candidate.path.parent.parent}, or a checkpoint in it, with --ema_length",
                )
            return candidate
        damaged.append(f"{candidate.path} is damaged ({problems[0]})")
    raise CheckpointError(
        f"{damaged[0]}{' and no older one is whole' * (len(damaged) > 1)}",
        "its weights can't be trusted",
        "copy it there again with all its files, or name the folder of another",
    )


def trained(checkpoint: Committed, *, ema: bool | float) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 tensor) of every trained parameter, from the optimizer's masters or, with `ema`, their average.

    A number is the length of an average that is put together. Raises CheckpointError where there is no such average.
    """
    if ema and ema is not True:
        return put_together(checkpoint, ema)
    if ema and not has_average(checkpoint):
        raise CheckpointError(
            f"{checkpoint.path} holds no average of the weights: it was trained with ema.decay=0",
            remedy="do without --ema",
        )
    return trained_weights(checkpoint, read_average(checkpoint)[0] if ema else masters(checkpoint))


def ema_length(text: str) -> float:
    """What --ema_length is given: the length of an average as a share of the training up to there."""
    length = float(text)
    if not 0 < length <= LONGEST:
        raise argparse.ArgumentTypeError(
            f"{text}: give a share of the training, from 0.01 to {LONGEST}; 0.05 is usual"
        )
    return length
