"""One run as frozen dataclasses.

Precedence: defaults < the JSON file's "glide_ds" block < the YAML overlay (what the phases share)
< --set key=value. What DeepSpeed names itself (batch sizes, ZeRO, precision, clipping, optimizer,
scheduler) stays in its own part of the JSON, and only there. Everything is checked here, before any
GPU is taken; what depends on the world size is checked by `batch_arithmetic`.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from glide_ds.errors import ConfigError
from glide_ds.types import Checkpointing, GlideConfig

BLOCK = "glide_ds"

PRESETS: dict[str, Callable[[], GlideConfig]] = {
    "base": lambda: GlideConfig.published("base"),
    "upsample": lambda: GlideConfig.published("upsample"),
    "base-inpaint": lambda: GlideConfig.published("base-inpaint"),
    "upsample-inpaint": lambda: GlideConfig.published("upsample-inpaint"),
    "tiny": lambda: GlideConfig(
        image_size=32,
        text_ctx=24,
        xf_width=64,
        xf_layers=3,
        xf_heads=2,
        model_channels=64,  # 2 per norm group: with 1 the output could not see an image's mean colour
        num_res_blocks=1,
        channel_mult=(1, 1, 1),
        attention_ds=(4,),
        num_head_channels=32,
        dropout=0.0,
    ),
}


@dataclass(frozen=True)
class RunConfig:
    """Where the run lives. The same directory again continues it."""

    dir: str = "runs/default"
    timeout_s: float = 600.0  # a rank that waits longer for the others ends the run with an error
    hang_s: float = 0.0  # no rank moves for so long: the run ends, naming the late one; 0: half of timeout_s
    max_hours: float = 0.0  # since the start of the process, then the run stops well; 0: no limit

    def __post_init__(self) -> None:
        _in_range("run.timeout_s", self.timeout_s, 1)
        _in_range("run.hang_s", self.hang_s, 0)
        _in_range("run.max_hours", self.max_hours, 0)
        if self.hang_s >= self.timeout_s:
            raise ConfigError(
                f"run.hang_s = {self.hang_s} is not less than run.timeout_s = {self.timeout_s}: waiting ranks "
                "would give up before the late one is named; lower run.hang_s or raise run.timeout_s"
            )


@dataclass(frozen=True)
class ModelConfig:
    """Which GLIDE, and where its weights come from."""

    preset: str = "base"  # base | upsample | base-inpaint | upsample-inpaint | tiny
    weights: str = "auto"  # a file | openai | random | builtin:tiny; the parent phase's checkpoint goes first
    schedule: str = "auto"  # squaredcos_cap_v2 | linear; auto: as published for the kind
    architecture: GlideConfig = field(default_factory=GlideConfig)  # departures from the preset

    def __post_init__(self) -> None:
        _one_of("model.preset", self.preset, PRESETS)
        _one_of("model.schedule", self.schedule, ("auto", "squaredcos_cap_v2", "linear"))
        if self.architecture.clip_dim is not None:
            raise ConfigError(
                f"model.architecture.clip_dim = {self.architecture.clip_dim} is not yours to set: it follows "
                "from clip.model and from the phase; remove it"
            )

    @property
    def noise_schedule(self) -> str:
        if self.schedule != "auto":
            return self.schedule
        return "linear" if self.architecture.upsamples else "squaredcos_cap_v2"


@dataclass(frozen=True)
class FilterConfig:
    """What a sample's JSON record must say for it to be used; a record that does not say it is dropped."""

    min_size: int = 0  # pixels of the original's shorter side
    max_aspect: float = 0.0  # longer by shorter side; 0 takes any
    min_similarity: float | None = None  # CLIP similarity of picture and caption
    max_punsafe: float | None = None
    nsfw: tuple[str, ...] = ()  # allowed values, such as UNLIKELY; none: any
    language: tuple[str, ...] = ()  # allowed values, such as en; none: any

    def __post_init__(self) -> None:
        _in_range("data.filter.min_size", self.min_size, 0)
        if self.max_aspect and self.max_aspect < 1:
            raise ConfigError(f"data.filter.max_aspect={self.max_aspect} drops every picture; give 1 or more")

    @property
    def active(self) -> bool:
        return self != FilterConfig()


class MixPart(NamedTuple):
    """One data set of a mix."""

    shards: str | tuple[str, ...]
    weight: float
    filter: FilterConfig


@dataclass(frozen=True)
class DataConfig:
    """Which samples, and how a picture and its caption become a training pair."""

    shards: str | tuple[str, ...] = "builtin:shapes"  # brace patterns, lists, URLs, or builtin:shapes
    workers: int = 2  # loader processes per rank; 0 loads in the training process
    shuffle: bool = True
    crop: str = "center"  # how a picture becomes square: center | pad
    trim: bool = True  # cut uniform borders away before the resize
    flip: float = 0.0  # probability of a left-right mirror; captions may speak of sides
    drop_caption: float = 0.1  # probability that the caption is emptied and CLIP kept
    drop_both: float = 0.1  # probability that both are dropped: the unconditional pass of guidance
    min_side: int = 2  # pictures with a shorter side are skipped
    max_pixels: int = 64_000_000  # larger pictures are skipped undecoded: decompression bombs
    max_bad_fraction: float = 0.5  # a larger share of unusable samples stops the run
    mix: Mapping[str, Any] = field(default_factory=dict)  # instead of shards: name -> {shards, weight, filter}
    filter: FilterConfig = field(default_factory=FilterConfig)
    tail: str = "drop"  # what an epoch's last, partial batch becomes: drop | pad (with the epoch's first)
    damaged_shards: str = "stop"  # stop | salvage: train on the members of a damaged tar that are whole
    index_dir: str | None = None  # where shard indexes lie; none: beside the shards, or in the user's cache
    clip_store: str | None = None  # folder of `glide-ds prepare clip`; none: encoded while training
    cache_dir: str | None = None  # where a node keeps blocks of remote shards; none: the user's cache
    cache_gb: float = 50.0  # its bound in GiB; an epoch's window wants 65,536 samples, some 3 GiB
    shapes_samples: int = 50_000  # size of the built-in set's epoch
    trace: bool = False  # write RUN/trace/rank*.jsonl

    def __post_init__(self) -> None:
        _one_of("data.crop", self.crop, ("center", "pad"))
        _one_of("data.tail", self.tail, ("drop", "pad"))
        _one_of("data.damaged_shards", self.damaged_shards, ("stop", "salvage"))
        for name in ("flip", "drop_caption", "drop_both", "max_bad_fraction"):
            _in_range(f"data.{name}", getattr(self, name), 0, 1)
        for name, least in (
            ("workers", 0),
            ("min_side", 1),
            ("max_pixels", 1),
            ("shapes_samples", 1),
            ("cache_gb", 0),
        ):
            _in_range(f"data.{name}", getattr(self, name), least)
        if self.drop_caption + self.drop_both > 1:
            raise ConfigError(
                f"data.drop_caption={self.drop_caption} and data.drop_both={self.drop_both} add up to more than "
                "1, but a sample is dropped in one way only; lower one of them"
            )
        if self.mix:
            _ = self.mix_parts  # its keys and values are checked where they are read

    @property
    def mix_parts(self) -> tuple[MixPart, ...]:
        """The data sets to mix; one, of `shards`, where there is no mix. `filter` holds where a part has none."""
        if not self.mix:
            return (MixPart(self.shards, 1.0, self.filter),)
        return tuple(_mix_part(f"data.mix.{name}", part, self.filter) for name, part in self.mix.items())


def _mix_part(name: str, part: Any, default: FilterConfig) -> MixPart:
    if not isinstance(part, Mapping) or "shards" not in part:
        raise ConfigError(f'{name} = {part!r}; give {{"shards": …, "weight": …, "filter": {{…}}}}')
    for key in part:
        if key not in MixPart._fields:
            raise ConfigError(f"unknown key {name}.{key}{_nearest(key, MixPart._fields)}; correct or remove it")
    weight = _coerce(f"{name}.weight", part.get("weight", 1.0), float)
    if not 0 < weight < float("inf"):
        raise ConfigError(f"{name}.weight = {weight}; give a positive number, or leave the set out")
    shards = _coerce(f"{name}.shards", part["shards"], str | tuple[str, ...])
    if isinstance(shards, str) and shards.startswith("builtin:"):
        raise ConfigError(
            f"{name}.shards = {shards!r}: only tar shards can be mixed; write them with prepare shapes"
        )
    rules = part.get("filter")
    return MixPart(shards, weight, default if rules is None else _build(FilterConfig, rules, f"{name}.filter."))


@dataclass(frozen=True)
class ClipConfig:
    """The frozen encoder whose embeddings condition the adapter."""

    model: str = "ViT-L/14"  # as users write it, or builtin:tiny
    weights: str = "openai"  # open_clip's tag or a local file; builtin:tiny brings its own
    source: str = "text"  # text | image: which embedding trains the adapter
    drop: float = 0.1  # probability that CLIP alone is dropped (jointly with the caption: data.drop_both)

    def __post_init__(self) -> None:
        _one_of("clip.source", self.source, ("text", "image"))
        _in_range("clip.drop", self.drop, 0, 1)


@dataclass(frozen=True)
class LrScale:
    """Each role's learning rate as a multiple of the optimizer's `lr`."""

    adapter: float = 1.0
    gates: float = 1.0
    unet: float = 1.0
    text: float = 1.0


@dataclass(frozen=True)
class TrainConfig:
    """What one phase optimises, for how long."""

    phase: str = "full"  # base | adapter_only | adapter_gates | full
    steps: int = 1000  # the phase's total, counted over all resumes
    seed: int = 0
    scope: str = "all"  # what phase base trains: all | unet | text
    loss: str = "mse"  # mse | hybrid: hybrid adds the variational bound for the variance channels
    weighting: str = "eps"  # eps | v: v weighs noisy timesteps more, where conditioning decides
    vb_weight: float = 0.001  # of the variational bound (bits per dimension) in the hybrid loss
    lr_scale: LrScale = field(default_factory=LrScale)
    adapter_clipping: float = 0.5  # gradient norm threshold of adapter and gates; the rest: gradient_clipping
    gate_offset: float = 10.0  # the scheduled part of every gate's logit, reached at the end of gate_warmup
    gate_warmup: int = 0  # steps; 0 sets the offset at once
    kl_weight: float = 0.0  # of the Gaussian KL to the CLIP-off pass
    kl_every: int = 100  # steps between two KL terms
    # What is computed again in the backward pass to save memory: none | attention | blocks (all of them) | budget.
    checkpointing: Checkpointing = "blocks"
    activation_gb: float = 0.0  # GiB that checkpointing=budget may keep per rank between forward and backward
    compile: bool = False  # the blocks, by torch.compile: minutes at the first start, then kept
    cuda_graph: bool = False  # record the passes once and launch them as one; with checkpointing=none
    tf32: bool = True  # products of fp32 in TF32's precision, some of them by fp16 kernels (model/reduced.py)
    channels_last: bool = False  # NHWC activations: 1.25 times as fast on a CPU

    def __post_init__(self) -> None:
        _one_of("train.phase", self.phase, ("base", "adapter_only", "adapter_gates", "full"))
        _one_of("train.scope", self.scope, ("all", "unet", "text"))
        _one_of("train.loss", self.loss, ("mse", "hybrid"))
        _one_of("train.weighting", self.weighting, ("eps", "v"))
        for name in ("steps", "kl_every"):
            _in_range(f"train.{name}", getattr(self, name), 1)
        for name in ("seed", "vb_weight", "adapter_clipping", "gate_warmup", "kl_weight", "activation_gb"):
            _in_range(f"train.{name}", getattr(self, name), 0)
        if (self.checkpointing == "budget") != (self.activation_gb > 0):
            raise ConfigError(
                f"train.checkpointing = {self.checkpointing!r} with train.activation_gb = {self.activation_gb:g}: "
                "the budget and its size go together, and one alone would do nothing; give both or neither"
            )
        if self.cuda_graph and self.checkpointing != "none":
            raise ConfigError(
                f"train.cuda_graph=true with train.checkpointing={self.checkpointing!r}: what is computed again must "
                "draw the same dropout again, which a recording can't; set train.checkpointing=none, with a smaller "
                "micro-batch if that takes too much memory, or train.cuda_graph=false"
            )
        if self.phase != "base" and self.scope != "all":
            raise ConfigError(
                f"train.scope = {self.scope!r} belongs to phase base; phase {self.phase!r} fixes what trains. "
                "Remove train.scope or set train.phase=base"
            )


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run's state is written, and how much of it is kept."""

    every: int = 500  # steps
    keep: int = 2  # the newest committed checkpoints per phase; 0 keeps all
    keep_every: int = 0  # steps; a checkpoint at a multiple of it is kept for good
    best: bool = True  # keep the one of the lowest validation loss too, as BEST
    background: bool = True  # write while training goes on, from a copy of the state in host memory

    def __post_init__(self) -> None:
        _in_range("checkpoint.every", self.every, 1)
        _in_range("checkpoint.keep", self.keep, 0)
        _in_range("checkpoint.keep_every", self.keep_every, 0)


@dataclass(frozen=True)
class EmaConfig:
    """An exponential moving average of the trained weights, 4 bytes per parameter shared by the ranks."""

    decay: float = 0.0  # 0 keeps no average; 0.9999 is usual
    warmup: float = 10.0  # update t decays by min(decay, (1 + t) / (warmup + t)); 0: by decay from the start

    def __post_init__(self) -> None:
        _in_range("ema.decay", self.decay, 0, 1)
        _in_range("ema.warmup", self.warmup, 0)


@dataclass(frozen=True)
class StabilityConfig:
    """What happens to an update whose loss or gradient is no good.

    One that is not finite is skipped in any case, and so is a loss spike, by all ranks alike. Several within
    `window` steps bring the run back to the checkpoint before them, past their data, at a lower rate.
    """

    spike_factor: float = 15.0  # a loss so many deviations above the recent median is a spike; 0: none is
    window: int = 100  # accepted updates that a loss is compared with; the first half of them is not judged
    skip_limit: int = 3  # skipped updates within `window` steps that bring a rollback; 0: they never do
    max_rollbacks: int = 3  # per phase; then the run stops with a report
    lr_cut: float = 0.5  # what every learning rate is multiplied by after a rollback

    def __post_init__(self) -> None:
        for name in ("spike_factor", "skip_limit", "max_rollbacks"):
            _in_range(f"stability.{name}", getattr(self, name), 0)
        _in_range("stability.window", self.window, 4)
        _in_range("stability.lr_cut", self.lr_cut, 0.01, 1)


@dataclass(frozen=True)
class ValidationConfig:
    """How good the model is on held-out samples, at the same noise and timesteps each time."""

    every: int = 0  # steps; 0: never
    samples: int = 256
    shards: str | tuple[str, ...] | None = None  # none: the shapes' held-out set, and nothing for other data
    # By what share the loss with CLIP off may exceed that before training, until the run stops; 0: any.
    max_degradation: float = 0.1

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("samples", 1), ("max_degradation", 0)):
            _in_range(f"validation.{name}", getattr(self, name), least)


@dataclass(frozen=True)
class LogConfig:
    """What a person sees while the run goes on."""

    every: int = 10  # steps between two lines of metrics.jsonl
    tensorboard: bool = True
    samples_every: int = 1000  # steps between two sample grids; 0 draws none
    sample_prompts: tuple[str, ...] = ()  # empty: captions of the run's own data
    samples: int = 8  # pictures per grid where the prompts come from the data
    sample_steps: int = 50
    guidance: float = 3.0

    def __post_init__(self) -> None:
        for name in ("every", "samples", "sample_steps"):
            _in_range(f"log.{name}", getattr(self, name), 1)
        _in_range("log.samples_every", self.samples_every, 0)


class BatchArithmetic(NamedTuple):
    """How the global batch is split: global_batch = micro_batch * accumulation * world_size."""

    global_batch: int
    micro_batch: int
    accumulation: int
    world_size: int


@dataclass(frozen=True)
class Config:
    """One phase of one run: DeepSpeed's own part and ours."""

    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def uses_clip(self) -> bool:
        return self.train.phase != "base"

    def batch_arithmetic(self, world_size: int) -> BatchArithmetic:
        """Split `train_batch_size` over the ranks.

        The micro-batch is the largest divisor of a rank's share that does not exceed
        `train_micro_batch_size_per_gpu`. Raises ConfigError naming the nearest sizes that divide.
        """
        total = self.deepspeed["train_batch_size"]
        if total % world_size:
            below = total // world_size * world_size
            nearest = [size for size in (below, below + world_size) if size]
            raise ConfigError(
                f"train_batch_size {total} can't be split evenly over {world_size} ranks; "
                f"use {' or '.join(map(str, nearest))}, or another number of ranks"
            )
        share = total // world_size
        most = self.deepspeed.get("train_micro_batch_size_per_gpu", share)
        micro = max(size for size in range(1, min(most, share) + 1) if share % size == 0)
        return BatchArithmetic(total, micro, share // micro, world_size)

    def to_json(self) -> dict[str, Any]:
        """The file that gives this value again: DeepSpeed's part with our block inside."""
        block = {f.name: _plain(getattr(self, f.name)) for f in fields(self) if f.name != "deepspeed"}
        del block["model"]["architecture"]["clip_dim"]
        return {**json.loads(json.dumps(self.deepspeed)), BLOCK: block}


# What DeepSpeed reads at the top level of its JSON and this trainer lets through.
DEEPSPEED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "optimizer",
    "scheduler",
    "gradient_clipping",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "bf16",
    "steps_per_print",
    "wall_clock_breakdown",
    "communication_data_type",
    "comms_logger",
    "flops_profiler",
    "prescale_gradients",
    "gradient_predivide_factor",
    "memory_breakdown",
    "dump_state",
)
REFUSED_KEYS = {
    "fp16": "GLIDE overflows in fp16; remove it (fp32 with TF32 is the default) or use bf16",
    "amp": "apex is not supported; remove it or use bf16",
    "torch_autocast": "precision is fp32 (TF32) or bf16; remove it or use bf16",
    "gradient_accumulation_steps": "it follows from train_batch_size, train_micro_batch_size_per_gpu and the "
    "number of ranks; remove it",
    "activation_checkpointing": "that section belongs to DeepSpeed's reentrant checkpointing, which loses "
    "gradients here; remove it and use train.checkpointing in the glide_ds block",
    "tensorboard": "the trainer writes its own; remove it and use log.tensorboard in the glide_ds block",
}
OPTIMIZERS = ("AdamW", "AdamW8bit")
SCHEDULERS: dict[str, tuple[str, ...]] = {
    "WarmupCosineLR": ("total_num_steps", "warmup_num_steps", "warmup_min_ratio", "cos_min_ratio"),
    "WarmupLR": ("warmup_num_steps",),
}


def cache_dir() -> Path:
    """GLIDE_DS_CACHE, else the user's cache directory by the XDG convention."""
    if own := os.environ.get("GLIDE_DS_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "glide_ds"


def load_config(
    path: str | Path, overlay: str | Path | None = None, sets: Sequence[str] = ()
) -> tuple[Config, ...]:
    """Read one --ds_config file with the YAML overlay and the --set values on top.

    A file of ours holds one phase; a run.json holds every phase of its run, in order.
    Raises ConfigError with key, value, nearest known key and remedy.
    """
    whole = _read_json(Path(path))
    documents = list(whole["phases"].values()) if "phases" in whole else [whole]
    layers = [(f"--config {overlay}", _read_yaml(Path(overlay)))] if overlay else []
    layers += [(f"--set {item}", _parse_set(item)) for item in sets]
    return tuple(_resolve(str(path), document, layers) for document in documents)


def _resolve(path: str, document: Mapping[str, Any], layers: list[tuple[str, dict[str, Any]]]) -> Config:
    deepspeed = {key: value for key, value in document.items() if key != BLOCK}
    block: dict[str, Any] = {}
    sections = [f.name for f in fields(Config) if f.name != "deepspeed"]
    _merge(block, document.get(BLOCK, {}), path, sections)
    for where, layer in layers:
        for key, value in layer.items():
            target = block if key in sections else deepspeed
            _merge(target, {key: value}, where, (*sections, *DEEPSPEED_KEYS))
    _check_deepspeed(deepspeed, path)
    preset = block.get("model", {}).get("preset", ModelConfig.preset)
    _one_of("model.preset", preset, PRESETS)
    architecture = dataclasses.asdict(PRESETS[preset]())
    block.setdefault("model", {})
    block["model"]["architecture"] = architecture | block["model"].get("architecture", {})
    config = _build(Config, block | {"deepspeed": deepspeed}, "")
    _check_conflicts(config)
    return config


def _merge(into: dict[str, Any], layer: Any, where: str, known: Sequence[str] = ()) -> None:
    """Lay `layer` over `into`; the types of the dataclasses are checked later, by `_build`."""
    if not isinstance(layer, Mapping):
        raise ConfigError(f"{where}: expected a mapping of keys to values, found {layer!r}")
    for key, value in layer.items():
        if known and key not in known:
            reason = REFUSED_KEYS.get(key)
            raise ConfigError(
                f"{where}: {key!r} can't be set here: {reason}"
                if reason
                else f"{where}: unknown key {key!r}{_nearest(key, known)}; correct or remove it"
            )
        if isinstance(value, Mapping):
            inner = into.setdefault(key, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"{where}: {key!r} holds the single value {inner!r}, not a section")
            into[key] = dict(inner)
            _merge(into[key], value, where)
        else:
            into[key] = value


def _check_deepspeed(deepspeed: dict[str, Any], path: str) -> None:
    for key in deepspeed:
        if key in REFUSED_KEYS:
            raise ConfigError(f"{path}: {key!r} can't be set: {REFUSED_KEYS[key]}")
        if key not in DEEPSPEED_KEYS:
            raise ConfigError(
                f"{path}: unknown key {key!r}{_nearest(key, (*DEEPSPEED_KEYS, BLOCK))}; correct or remove it"
            )
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        value = deepspeed.get(key)
        if (value is None and key == "train_batch_size") or (
            value is not None and (not _is_int(value) or value < 1)
        ):
            raise ConfigError(f"{path}: {key} = {value!r}; give a positive whole number")
    _check_section(
        deepspeed, path, "optimizer", dict.fromkeys(OPTIMIZERS, ("lr", "betas", "eps", "weight_decay"))
    )
    _check_section(deepspeed, path, "scheduler", SCHEDULERS)
    rate = deepspeed["optimizer"]["params"].get("lr")
    if not isinstance(rate, int | float) or not rate > 0:
        raise ConfigError(f"{path}: optimizer.params.lr = {rate!r}; give a positive number")
    stage = deepspeed.get("zero_optimization", {}).get("stage", 0)
    if stage != 2:
        raise ConfigError(
            f"{path}: zero_optimization.stage = {stage!r}; clipping by role and checkpoints are built on "
            "stage 2: set it to 2"
        )
    clipping = deepspeed.get("gradient_clipping", 0)
    if not isinstance(clipping, int | float) or clipping < 0:
        raise ConfigError(f"{path}: gradient_clipping = {clipping!r}; give a number, 0 for none")


def _check_section(deepspeed: dict[str, Any], path: str, name: str, known: Mapping[str, Sequence[str]]) -> None:
    """An optimizer or scheduler section: a known type with known parameters."""
    section = deepspeed.get(name)
    if not isinstance(section, Mapping) or section.get("type") not in known:
        raise ConfigError(
            f'{path}: {name} = {json.dumps(section)}; give {{"type": …, "params": {{…}}}} with type '
            f"{' or '.join(known)}"
        )
    accepted = known[section["type"]]
    for key in section.get("params", {}):
        if key not in accepted:
            raise ConfigError(
                f"{path}: unknown key {name}.params.{key}{_nearest(key, accepted)}; "
                f"{section['type']} takes {', '.join(accepted)}"
            )
    deepspeed[name] = {"type": section["type"], "params": dict(section.get("params", {}))}


def _check_conflicts(config: Config) -> None:
    train, architecture = config.train, config.model.architecture
    total = config.deepspeed["scheduler"]["params"].get("total_num_steps")
    if total is not None and total < train.steps:
        raise ConfigError(
            f"scheduler.params.total_num_steps = {total} is less than train.steps = {train.steps}: the last "
            f"{train.steps - total} steps would train at the lowest learning rate; remove it (it defaults to "
            "train.steps) or raise it"
        )
    if config.clip.source == "image" and architecture.inpaints:
        raise ConfigError("clip.source = 'image' shows an inpaint model what it should fill in; use 'text'")
    if architecture.inpaints:
        raise ConfigError(
            f"model.preset = {config.model.preset!r}: inpaint models can be loaded and sampled but not yet "
            "trained (no masks are drawn); use base or upsample"
        )


def _build(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    """A dataclass from plain values, with keys and types checked."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in fields(cls)]
    made = {}
    for key, value in values.items():
        name = f"{where}{key}"
        if key not in hints or key not in names:
            raise ConfigError(f"unknown key {name!r}{_nearest(key, names)}; correct or remove it")
        hint = hints[key]
        if is_dataclass(hint):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{name} = {value!r} should be a section with the keys {_keys(hint)}")
            made[key] = _build(hint, value, f"{name}.")
        else:
            made[key] = _coerce(name, value, hint)
    return cls(**made)


def _coerce(name: str, value: Any, hint: Any) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _coerce(name, value, option)
            except ConfigError:
                continue
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_coerce(name, item, arguments[0]) for item in value)
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        if isinstance(value, Mapping):
            return dict(value)
    elif origin is typing.Literal:
        if value in arguments:
            return value
        raise ConfigError(f"{name} = {value!r}; choose one of {', '.join(arguments)}")
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    wanted = getattr(hint, "__name__", None) or str(hint)
    raise ConfigError(f"{name} = {value!r} has the wrong type; give a value of type {wanted}")


def _read_json(path: Path) -> dict[str, Any]:
    text = _read_text(path, "--ds_config")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = text.splitlines()[error.lineno - 1].strip() if text.strip() else ""
        raise ConfigError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}: "
            f"{line!r}; correct it"
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds {type(value).__name__}, not an object with DeepSpeed's keys")
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    text = _read_text(path, "--config")
    try:
        value = yaml.load(text, _YamlLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}; correct it") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds {type(value).__name__}, not keys and values")
    return value


def _read_text(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        near = sorted(p.name for p in path.parent.glob(f"*{path.suffix}")) if path.parent.is_dir() else []
        beside = f"; {path.parent} holds {', '.join(near)}" if near else ""
        raise ConfigError(f"{option} {path} can't be read ({error.strerror}){beside}") from error


def _parse_set(item: str) -> dict[str, Any]:
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {item}: give key=value, such as --set train.steps=1000")
    try:
        # A brace pattern such as {000..007}.tar is a shard name, not YAML's inline mapping.
        value = text if re.match(r"\{\d+\.\.", text) else yaml.load(text, _YamlLoader)
    except yaml.YAMLError:
        value = text
    for part in reversed(key.split(".")):
        value = {part: value}
    return typing.cast(dict[str, Any], value)


class _YamlLoader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as the number people mean (YAML 1.1 wants 1.0e-4)."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(dataclasses.asdict(value)))


def _keys(cls: Any) -> str:
    return ", ".join(f.name for f in fields(cls))


def _nearest(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f" (nearest known: {close[0]!r})" if close else f" (known: {', '.join(known)})"


def _one_of(name: str, value: object, options: Any) -> None:
    if value not in options:
        raise ConfigError(f"{name} = {value!r}; choose one of {', '.join(options)}")


def _in_range(name: str, value: float, low: float, high: float | None = None) -> None:
    if value < low or (high is not None and value > high):
        limit = f"between {low} and {high}" if high is not None else f"at least {low}"
        raise ConfigError(f"{name} = {value}; give a number {limit}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def with_changes(config: Config, **sections: Mapping[str, Any]) -> Config:
    """A copy with fields of its sections replaced, checked like a fresh one."""
    return replace(
        config, **{name: replace(getattr(config, name), **changes) for name, changes in sections.items()}
    )
