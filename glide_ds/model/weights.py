"""Weights into a model, whoever wrote them, with an account of what went where.

A source is a local `.pt` or `.safetensors` file, `openai` (downloaded once), `random` or `builtin:tiny`. Names
are OpenAI's; every name that contains `clip` is ours and may be missing from a file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from glide_ds.config import cache_dir
from glide_ds.errors import ConfigError, WeightsError
from glide_ds.files import PathLike, user_path
from glide_ds.model.download import fetch
from glide_ds.model.tensor_files import State, StateFile, check_precision, read_state, read_state_file, sidecar
from glide_ds.types import GlideConfig

BUILTIN = "builtin:tiny"
BUILTIN_WEIGHTS = Path(__file__).parents[1] / "tiny" / "glide.safetensors"

OPENAI_URL = "https://openaipublic.blob.core.windows.net/diffusion/dec-2021"
# File and size in bytes by kind. OpenAI published neither sizes nor hashes. The size of upsample.pt is known
# from the tests of a public Azure client that reads it; the others are held against what the server announces.
OPENAI_FILES: dict[str, tuple[str, int | None]] = {
    "base": ("base.pt", None),
    "upsample": ("upsample.pt", 1_593_693_639),
    "base-inpaint": ("base_inpaint.pt", None),
    "upsample-inpaint": ("upsample_inpaint.pt", None),
}

_INPUT_CHANNELS = {"base": 3, "upsample": 6, "base-inpaint": 7, "upsample-inpaint": 10}
_STEM = "input_blocks.0.0.weight"
WIDENED = "the weights of known pixels and their mask start at zero: the file is of kind {}"
# What no shape shows but a model's outputs depend on: the same tensors cut into other heads.
_INVISIBLE = ("xf_heads", "num_head_channels")
# A name that gives away whose file it is, what that is, and what to do.
_FAMILIES = {
    "visual.conv1.weight": ("a CLIP model", "give it as clip.weights"),
    "visual.proj": ("a CLIP model", "give it as clip.weights"),
    "label_emb.weight": (
        "a class-conditional guided-diffusion model",
        "give a GLIDE file, which reads captions",
    ),
    "conv_in.weight": ("a model in the names of diffusers", "give OpenAI's own file"),
    "diffusion_model.input_blocks.0.0.weight": ("a latent diffusion model", "give a GLIDE file"),
    "model.diffusion_model.input_blocks.0.0.weight": ("a latent diffusion model", "give a GLIDE file"),
}


@dataclass(frozen=True)
class LoadReport:
    """What a load did, by name."""

    source: str
    path: Path | None
    loaded: tuple[str, ...]
    kept: tuple[str, ...]  # of the model, not in the file: initial values
    ignored: tuple[str, ...]  # of the file, not in the model
    values: int = 0  # numbers loaded
    notes: tuple[str, ...] = ()

    def paragraph(self) -> str:
        """The account in one paragraph, for a log."""
        if self.path is None:
            return f"Weights: random; all {len(self.kept)} tensors keep their initial values, no file was read."
        sentences = [
            f"Weights from {self.path}: {_count(self.loaded)} ({self.values / 1e6:,.1f} M values) loaded",
            f"{_count(self.kept)} of the model {_some(self.kept)}kept initial values"
            if self.kept
            else "none kept",
            f"{_count(self.ignored)} of the file {_some(self.ignored)}ignored"
            if self.ignored
            else "none ignored",
        ]
        return "; ".join(sentences) + "." + "".join(f" Note: {note}." for note in self.notes)


def _count(names: tuple[str, ...]) -> str:
    return f"{len(names)} tensor{'s' * (len(names) != 1)}"


def _some(names: tuple[str, ...]) -> str:
    return f"({', '.join(names[:2])}{', …' if len(names) > 2 else ''}) "


def load_weights(
    model: nn.Module, source: PathLike, *, base_url: str | None = None, digest: str | None = None
) -> LoadReport:
    """Load `source` into `model` (of glide_ds.model.create_model) in place, cast to the model's dtype.

    Names of the model that contain `clip` may be missing from the file and keep their initial value; names of
    the file that contain `clip` may be missing from the model and are ignored. Anything else that does not
    match is a WeightsError that names the first names and shapes and the likely remedy, and the model is left
    as it was.

    `base_url` (else GLIDE_DS_OPENAI_URL, else OpenAI's) is where `openai` downloads from; `digest` is the
    SHA-256 to insist on there.
    """
    name = os.fspath(source)
    if name == "random":
        return LoadReport(name, None, (), tuple(model.state_dict()), ())
    file, notes = _open(name, _config(model).kind, base_url, digest)
    _check_heads(_config(model), file.path)
    return load_state(model, replace(file, notes=notes), source=name)


def load_state(model: nn.Module, file: StateFile, *, source: str) -> LoadReport:
    """`load_weights` for tensors at hand, such as those of a phase's checkpoint."""
    own = model.state_dict()
    file = _for_inpainting(_config(model), file)
    _check_fit(_config(model), own, file)
    loaded = tuple(key for key in own if key in file.tensors)
    with torch.no_grad():
        for key in loaded:
            own[key].copy_(file.tensors[key])
    return LoadReport(
        source=source,
        path=file.path,
        loaded=loaded,
        kept=tuple(key for key in own if key not in file.tensors),
        ignored=tuple(key for key in file.tensors if key not in own),
        values=sum(own[key].numel() for key in loaded),
        notes=file.notes + _cast_note(own, file.tensors, loaded),
    )


def download_openai(kind: str, *, base_url: str | None = None, digest: str | None = None) -> tuple[Path, str]:
    """The published file of that kind in the cache, fetched if need be, and how it was checked."""
    name, size = OPENAI_FILES[kind]
    url = (base_url or os.environ.get("GLIDE_DS_OPENAI_URL") or OPENAI_URL).rstrip("/")
    fetched = fetch(f"{url}/{name}", cache_dir() / name, size=size, digest=digest)
    return fetched.path, fetched.checks


def stored_config(path: PathLike) -> GlideConfig:
    """The architecture of a weight file: from the JSON beside it, else from its shapes."""
    return _sidecar_config(path) or infer_config(read_state(path))


def infer_config(state: Mapping[str, Tensor]) -> GlideConfig:
    """The architecture that a GLIDE state dict's names and shapes show.

    Image size, dropout and head counts leave no trace in shapes: they are the published ones (heads of 64).
    Raises WeightsError if the names are not GLIDE's.
    """
    try:
        return _infer(state)
    except (KeyError, ValueError, ZeroDivisionError, ConfigError) as error:
        family, remedy = _family(state)
        raise WeightsError(
            f"the names and shapes are not those of a GLIDE model ({error}): it looks like {family}",
            remedy=remedy,
        ) from error


def _infer(state: Mapping[str, Tensor]) -> GlideConfig:
    model_channels, inputs = state[_STEM].shape[:2]
    kind = {channels: kind for kind, channels in _INPUT_CHANNELS.items()}[inputs]
    # Every level of the way up but the last ends in an up-ResBlock, second or third in its block.
    up_norms = (".1.in_layers.0.weight", ".2.in_layers.0.weight")
    ups = sum(key.startswith("output_blocks.") and key.endswith(up_norms) for key in state)
    blocks = len({key.split(".")[1] for key in state if key.startswith("output_blocks.")})
    per_level = blocks // (ups + 1)
    firsts = [f"input_blocks.{1 + level * per_level}" for level in range(ups + 1)]
    text_ctx, xf_width = state["positional_embedding"].shape
    adapter = state.get("clip_adapter.proj.weight")
    return GlideConfig.published(
        kind,
        text_ctx=text_ctx,
        xf_width=xf_width,
        xf_layers=len({key.split(".")[2] for key in state if key.startswith("transformer.resblocks.")}),
        xf_heads=max(1, xf_width // 64),
        model_channels=model_channels,
        num_res_blocks=per_level - 1,
        channel_mult=tuple(
            state[f"{first}.0.out_layers.3.weight"].shape[0] // model_channels for first in firsts
        ),
        attention_ds=tuple(2**level for level, first in enumerate(firsts) if f"{first}.1.qkv.weight" in state),
        clip_dim=None if adapter is None else adapter.shape[1],
        **(
            {}
            if adapter is None
            else {"clip_tokens": state["clip_adapter.to_tokens.weight"].shape[0] // xf_width}
        ),
    )


# --- finding ------------------------------------------------------------------------------------------------


def _config(model: nn.Module) -> GlideConfig:
    config = getattr(model, "config", None)
    if not isinstance(config, GlideConfig):
        raise WeightsError(
            f"a {type(model).__name__} is no GLIDE model", remedy="make one with glide_ds.model.create_model"
        )
    return config


def _open(
    source: str, kind: str, base_url: str | None, digest: str | None
) -> tuple[StateFile, tuple[str, ...]]:
    if source == "openai":
        path, checks = download_openai(kind, base_url=base_url, digest=digest)
        file = read_state_file(path)
        return file, (*file.notes, checks)
    if source == BUILTIN and not BUILTIN_WEIGHTS.exists():
        raise WeightsError(
            f"the built-in GLIDE model is missing at {BUILTIN_WEIGHTS}",
            remedy="install the package again, or train it with launch/train_tiny_glide.py",
        )
    path = BUILTIN_WEIGHTS if source == BUILTIN else user_path(source)
    if not path.exists() and "/" not in source and not path.suffix:
        raise WeightsError(
            f"model.weights {source!r} is no file and no known source",
            remedy=f"give the path of a .pt or .safetensors file, openai, random or {BUILTIN}",
        )
    file = read_state_file(path)
    return file, file.notes


def _sidecar_config(path: PathLike) -> GlideConfig | None:
    about = sidecar(path)
    if about is None or "model" not in about:
        return None
    stored: dict[str, Any] = about["model"]
    known = {field.name for field in fields(GlideConfig)}
    if unknown := sorted(set(stored) - known):
        raise WeightsError(
            f"{path}.json describes a model by {', '.join(unknown)}, which this version does not know",
            remedy="update glide_ds, or remove the JSON to read the architecture off the shapes",
        )
    return GlideConfig(**stored)


def _for_inpainting(config: GlideConfig, file: StateFile) -> StateFile:
    """A plain model's file for its inpainting twin, whose four more input channels start at zero.

    The twin then computes what the plain model does, whatever it is shown.
    """
    stem, plain = file.tensors.get(_STEM), config.kind.removesuffix("-inpaint")
    if config.inpaint_channels is None or stem is None or stem.dim() != 4:
        return file
    if stem.shape[1] != _INPUT_CHANNELS[plain]:
        return file
    where = config.inpaint_channels
    zeros = stem.new_zeros(stem.shape[0], where.stop - where.start, *stem.shape[2:])
    wide = torch.cat([stem[:, : where.start], zeros, stem[:, where.start :]], dim=1)
    return replace(file, tensors={**file.tensors, _STEM: wide}, notes=(*file.notes, WIDENED.format(plain)))


# --- checking -----------------------------------------------------------------------------------------------


def _check_heads(config: GlideConfig, path: Path) -> None:
    stored = _sidecar_config(path)
    if stored is None:
        return
    if other := [name for name in _INVISIBLE if getattr(stored, name) != getattr(config, name)]:
        raise WeightsError(
            f"{path} was trained with {_differences(stored, config, other)}",
            "every shape would fit and the output be wrong",
            "set model.architecture to the file's values",
        )


def _check_fit(config: GlideConfig, own: State, file: StateFile) -> None:
    state = file.tensors
    missing = [key for key in own if key not in state and "clip" not in key]
    foreign = [key for key in state if key not in own and "clip" not in key]
    reshaped = [key for key in own if key in state and own[key].shape != state[key].shape]
    if missing or foreign or reshaped:
        shapes = [
            f"{key} {_shape(state[key])} in the file, {_shape(own[key])} in the model" for key in reshaped
        ]
        problems = "; ".join(
            f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for kind, names in (("missing", missing), ("unknown", foreign), ("of another shape", shapes))
            if names
        )
        cause, remedy = _diagnosis(config, state)
        raise WeightsError(
            f"{file.path} does not fit a {config.kind} model: {problems}. {cause}", remedy=remedy
        )
    check_precision(file.path, own, state)
    if broken := next((key for key in own if key in state and not _finite(state[key])), None):
        raise WeightsError(
            f"{file.path} holds numbers that are not finite (first in {broken})",
            "every picture would be noise",
            "take an earlier checkpoint, or fetch the file again",
        )


def _finite(tensor: Tensor) -> bool:
    """Whether every number is: the sum says so at a thirtieth of the cost, unless it overflows."""
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _diagnosis(config: GlideConfig, state: Mapping[str, Tensor]) -> tuple[str, str]:
    """What the file is instead, and what to do."""
    try:
        found = infer_config(state)
    except WeightsError:
        family, remedy = _family(state)
        return f"It looks like {family}", remedy
    if found.kind != config.kind:
        return (
            f"The file is of kind {found.kind} ({_INPUT_CHANNELS[found.kind]} input channels), the model is "
            f"{config.kind} ({_INPUT_CHANNELS[config.kind]})",
            f"give {OPENAI_FILES[config.kind][0]}, or set model.preset={found.kind}",
        )
    shown = [f.name for f in fields(GlideConfig) if f.name not in (*_INVISIBLE, "image_size", "dropout")]
    other = [name for name in shown if getattr(found, name) != getattr(config, name)]
    if found.clip_dim is None or config.clip_dim is None:
        other = [name for name in other if not name.startswith("clip")]
    if "clip_dim" in other:
        return (
            f"The file's adapter reads CLIP embeddings of width {found.clip_dim}, the model's of width "
            f"{config.clip_dim} (512: ViT-B/32 and ViT-B/16, 768: ViT-L/14)",
            "set clip.model to the one it was trained with, or give a file without CLIP parts to start a new adapter",
        )
    if other:
        return f"It was made with {_differences(found, config, other)}", "set them alike, or give other weights"
    return "Its architecture is the model's, but it is incomplete or carries foreign tensors", "export it again"


def _differences(found: GlideConfig, config: GlideConfig, names: list[str]) -> str:
    return ", ".join(f"{name} {getattr(found, name)} (the model: {getattr(config, name)})" for name in names)


def _family(state: Mapping[str, Tensor]) -> tuple[str, str]:
    """Whose file it is, and what to do."""
    known = next((told for name, told in _FAMILIES.items() if name in state), None)
    return known or (f"another model, whose names begin with {', '.join(list(state)[:3])}", "give a GLIDE file")


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "scalar"


def _cast_note(own: State, state: Mapping[str, Tensor], loaded: tuple[str, ...]) -> tuple[str, ...]:
    casts = sorted({f"{state[k].dtype} to {own[k].dtype}" for k in loaded if state[k].dtype != own[k].dtype})
    return (f"values were cast from {', '.join(casts).replace('torch.', '')}",) if casts else ()
