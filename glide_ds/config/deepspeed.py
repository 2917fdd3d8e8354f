"""What stays in DeepSpeed's own part of a configuration, and only there: the keys of its that this trainer passes on.

Its sections' values are held against DeepSpeed's own models. A key that DeepSpeed or the trainer would ignore is
refused, and so is one that would break what is built on ZeRO-2 (clipping by role, checkpoints for any world size).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, create_model

from glide_ds.config.refused import why_refused
from glide_ds.config.section import (
    AUTO,
    Conflict,
    Mistake,
    Section,
    fixed,
    free,
    no_auto,
    no_such_key,
    unlisted,
)
from glide_ds.errors import Fault

Pair = Annotated[list[float], BeforeValidator(unlisted)]


class OptimizerParams(Section):
    """What AdamW and AdamW8bit take."""

    lr: float = fixed(..., "learning rate at its peak, of every role by its train.lr_scale", gt=0)
    betas: Pair = fixed([0.9, 0.999], "decay of the two moments per update", min_length=2, max_length=2)
    eps: float = fixed(1e-8, "added to the denominator", ge=0)
    weight_decay: float = fixed(0.0, "of matrices and kernels, decoupled from the gradient", ge=0)


class OptimizerPart(Section):
    """What makes an update of a gradient."""

    type: Literal["AdamW", "AdamW8bit"] = fixed(..., "AdamW, or AdamW8bit with moments of 8 bits")
    params: OptimizerParams = fixed(..., "its parameters")


class SchedulerParams(Section):
    """What the schedules take. WarmupLR takes warmup_num_steps alone."""

    warmup_num_steps: int = fixed(0, "updates until the learning rate is at its peak", ge=0)
    warmup_min_ratio: float = fixed(0.0, "of the peak, where the warm-up starts", ge=0, le=1)
    total_num_steps: int | None = free(
        None,
        "the update at which the cosine ends; null: train.steps. A phase made longer or shorter keeps its curve by it",
        ge=1,
    )
    cos_min_ratio: float = fixed(1e-4, "of the peak, where the cosine ends", ge=0, le=1)


class SchedulerPart(Section):
    """How the learning rate goes."""

    type: Literal["WarmupCosineLR", "WarmupLR"] = fixed(..., "after the warm-up: half a cosine, or constant")
    params: SchedulerParams = fixed(SchedulerParams(), "its parameters")

    def conflicts(self) -> Iterator[Conflict]:
        given = self.params.model_fields_set - {"warmup_num_steps"}
        if self.type == "WarmupLR" and given:
            names = ", ".join(f"scheduler.params.{name}" for name in sorted(given))
            fault = Fault(
                f"{names}: WarmupLR takes warmup_num_steps only",
                "it would do nothing",
                "remove it or use WarmupCosineLR",
            )
            yield Conflict(("type", *(f"params.{name}" for name in given)), fault)


class DeepSpeedPart(Section):
    """DeepSpeed's part: the top level of the file."""

    train_batch_size: int = fixed(
        ..., "pictures per update, of all ranks together; accumulation follows from it", ge=1
    )
    train_micro_batch_size_per_gpu: int | None = free(
        None, "the most pictures of a rank in one pass; null: its whole share of train_batch_size", ge=1
    )
    optimizer: OptimizerPart = fixed(..., "what makes an update of a gradient")
    scheduler: SchedulerPart = fixed(..., "how the learning rate goes")
    gradient_clipping: float = fixed(0.0, "gradient norm threshold of the pretrained model; 0: none", ge=0)
    zero_optimization: Mapping[str, Any] = free(
        ..., "ZeRO-2: how gradients and moments are shared by the ranks"
    )
    bf16: Mapping[str, Any] = fixed({}, "training in bf16 with fp32 masters")
    communication_data_type: Literal["fp32", "fp16", "bf16"] | None = fixed(
        None, "what gradients are sent in; null: as they are"
    )
    prescale_gradients: bool = fixed(False, "divide gradients by the ranks before they are summed, not after")
    gradient_predivide_factor: float = fixed(
        1.0, "what is divided by before the sum, the rest after it, unless prescale_gradients", gt=0
    )
    wall_clock_breakdown: bool = free(False, "DeepSpeed's own timers: slow, for they wait for the GPU")
    memory_breakdown: bool = free(False, "DeepSpeed's own lines about memory")
    flops_profiler: Mapping[str, Any] = free({}, "DeepSpeed's own profile of one step")

    def conflicts(self) -> Iterator[Conflict]:
        if not self.zero_optimization.get("reduce_scatter", True):
            return
        for key, default in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
            if (value := getattr(self, key)) != default:
                fault = Fault(
                    f"{key} = {value!r} with zero_optimization.reduce_scatter = True",
                    "DeepSpeed scales gradients so only where it reduces all of them to all ranks",
                    f"remove {key}, or set zero_optimization.reduce_scatter to false",
                )
                yield Conflict((key, "zero_optimization"), fault)


# What of DeepSpeed's own sections is passed on, and what it means.
THEIRS: dict[str, dict[str, str]] = {
    "zero_optimization": {
        "stage": "2: gradients and moments are shared; nothing else is built for",
        "contiguous_gradients": "copy gradients to one buffer as they come",
        "reduce_scatter": "reduce each gradient to its owner only",
        "reduce_bucket_size": "numbers reduced at a time",
        "use_multi_rank_bucket_allreduce": "one all-reduce for the owners' buckets: sends twice the bytes",
        "allgather_bucket_size": "numbers gathered at a time",
        "overlap_comm": "reduce while the backward pass goes on: a second bucket of memory",
        "ignore_unused_parameters": "a parameter without a gradient is no error",
    },
    "bf16": {"enabled": "train in bf16; masters and moments stay in fp32"},
    "flops_profiler": {
        "enabled": "profile one step",
        "recompute_fwd_factor": "what recomputing adds, as a share of the forward pass",
        "profile_step": "which",
        "module_depth": "how deep modules are listed; -1: all",
        "top_modules": "how many modules are listed",
        "detailed": "print the profile of every module",
        "output_file": "write it there; null: print it",
    },
}


def check_theirs(name: str, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[Mistake]]:
    """One of DeepSpeed's own sections, its values as DeepSpeed reads them, and what is wrong with it."""
    passed, mistakes = THEIRS[name], []
    model = their_model(name)
    for key, value in values.items():
        if key not in passed:
            full = f"{name}.{key}"
            fault = no_such_key(full, f"{full} = {value!r}", tuple(passed), why_refused(full))
            mistakes.append(Mistake((name, key), fault))
        elif value == AUTO:
            mistakes.append(Mistake((name, key), no_auto(f"{name}.{key}")))
    wrong = {mistake.place[1] for mistake in mistakes}
    try:
        read = model(strict=True, **{key: value for key, value in values.items() if key not in wrong})
    except ValidationError as error:
        for found in error.errors(include_url=False):
            place = (name, *(str(part) for part in found["loc"][:1]))
            message = f"{found['msg'][0].lower()}{found['msg'][1:]}"
            fault = Fault(f"{'.'.join(place)} = {found['input']!r}", remedy=f"DeepSpeed says: {message}")
            mistakes.append(Mistake(place, fault))
        return dict(values), mistakes
    stage = values.get("stage", 0)
    if name == "zero_optimization" and stage != 2:
        fault = Fault(
            f"zero_optimization.stage = {stage!r}; clipping by role and checkpoints are built on stage 2",
            remedy="set it to 2",
        )
        mistakes.append(Mistake((name, "stage"), fault))
    return {key: getattr(read, key) if key in passed else value for key, value in values.items()}, mistakes


@cache
def their_model(name: str) -> type[BaseModel]:
    """DeepSpeed's model of one of its sections. Imports DeepSpeed: 0.2 s beside torch's 1.5 s."""
    with _quietly():
        if name == "zero_optimization":
            from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

            return DeepSpeedZeroConfig
        if name == "bf16":
            from deepspeed.runtime.precision_config import DeepSpeedBF16Config

            return DeepSpeedBF16Config
        from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    # No pydantic model, but an object that holds the defaults.
    defaults = vars(DeepSpeedFlopsProfilerConfig({}))
    made: Any = {key: (str | None if value is None else type(value), value) for key, value in defaults.items()}
    return create_model(name, __config__=ConfigDict(extra="forbid"), strict=(bool, True), **made)


@contextmanager
def _quietly() -> Iterator[None]:
    """Spare a command's output DeepSpeed's warning that there is no GPU."""
    import torch

    name = "DS_ACCELERATOR"
    hushed = name not in os.environ and not torch.cuda.is_available()
    if hushed:
        os.environ[name] = "cpu"
    try:
        yield
    finally:
        if hushed:
            del os.environ[name]
