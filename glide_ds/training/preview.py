"""The block that says, before training, what will happen."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from glide_ds.config import BatchArithmetic, Config
from glide_ds.model import create_model
from glide_ds.model.text import ResidualAttentionBlock
from glide_ds.model.unet import AttentionBlock, ResBlock
from glide_ds.training.lineage import Start, banner, folder_of
from glide_ds.training.phases import count_by_role, trained_roles
from glide_ds.types import GlideConfig

WIDTH = 100
OPTIMIZER_BYTES = {"AdamW": 8.0, "AdamW8bit": 2.1}  # of moments per trained parameter


def block(
    config: Config, arithmetic: BatchArithmetic, start: Start, glide: GlideConfig, data: Mapping[str, Any]
) -> str:
    """Phase, parameters by role, data, batch arithmetic, memory, resume point: a page of plain text.

    `glide` is the architecture to be built, `data` the source's facts.
    """
    with torch.device("meta"):
        model = create_model(glide)
    counts = count_by_role(model.named_parameters())
    roles = trained_roles(config)
    train, steps_left = config.train, config.train.steps - start.step
    epochs = train.steps / data["batches_per_epoch"]
    rows = [
        ("run", f"{config.run.dir}, phase folder {folder_of(config, train.phase).name}: {start.describe()}"),
        (
            "model",
            f"{config.model.preset} {glide.kind}, {glide.image_size} px, {sum(counts.values()):,} parameters",
        ),
        ("trains", _counted(counts, [r for r in counts if r in roles])),
        ("frozen", _counted(counts, [r for r in counts if r not in roles])),
        (
            "clip",
            f"{config.clip.model} {config.clip.source} embeddings, {glide.clip_dim}-d"
            if glide.clip_dim
            else "off",
        ),
        (
            "data",
            f"{_sets(config)}: {data['samples']:,} samples, {data['batches_per_epoch']:,} batches per epoch",
        ),
        ("batch", describe_batch(config, arithmetic)),
        ("steps", f"{steps_left:,} to go of {train.steps:,} ({epochs:.2f} epochs), {describe_rates(config)}"),
        ("memory", describe_memory(model, config, arithmetic)),
    ]
    lines = [f"── glide_ds: phase {train.phase} ".ljust(WIDTH, "─")]
    for name, text in rows:
        lines += textwrap.wrap(
            text, WIDTH, initial_indent=f"{name:<8}", subsequent_indent=" " * 8, break_long_words=False
        )
    warning = banner(config, start)
    for text in (*start.damaged, *((warning,) if warning else ())):
        lines += textwrap.wrap(text, WIDTH, initial_indent="!!      ", subsequent_indent="!!      ")
    return "\n".join([*lines, "─" * WIDTH])


def describe_batch(config: Config, arithmetic: BatchArithmetic) -> str:
    total, micro, accumulation, world = arithmetic
    asked = config.deepspeed.get("train_micro_batch_size_per_gpu", micro)
    why = f" (asked for up to {asked}; {total // world} per rank)" if asked != micro else ""
    return f"{total} = micro-batch {micro}{why} x accumulation {accumulation} x {world} rank{'s' * (world > 1)}"


def describe_rates(config: Config) -> str:
    """The learning rate of every trained role at its peak."""
    peak = config.deepspeed["optimizer"]["params"]["lr"]
    rates = ", ".join(
        f"{role} {peak * getattr(config.train.lr_scale, role):.3g}" for role in trained_roles(config)
    )
    return f"{config.deepspeed['optimizer']['type']}, learning rate {rates}, {config.deepspeed['scheduler']['type']}"


def describe_memory(model: nn.Module, config: Config, arithmetic: BatchArithmetic) -> str:
    """An estimate per rank, by part."""
    parts = memory_estimate(model, config, arithmetic)
    shown = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items())
    return f"about {_gib(sum(parts.values()))} per rank: {shown}"


def memory_estimate(model: nn.Module, config: Config, arithmetic: BatchArithmetic) -> dict[str, float]:
    """Bytes per rank by part, for a model on the meta device. The frozen CLIP encoder is left out."""
    roles, world = trained_roles(config), arithmetic.world_size
    counts = count_by_role(model.named_parameters())
    trained = sum(count for role, count in counts.items() if role in roles)
    zero = config.deepspeed.get("zero_optimization", {})
    bucket = min(trained, int(zero.get("reduce_bucket_size", 5e8)))
    width = 2 if config.deepspeed.get("bf16", {}).get("enabled") else 4
    return {
        "weights": width * sum(counts.values()),
        "gradients": width * trained,
        "optimizer": (4 + OPTIMIZER_BYTES[config.deepspeed["optimizer"]["type"]]) * trained / world,
        "buckets": 2.0 * width * bucket,
        "activations": width / 4 * activation_bytes(model, arithmetic.micro_batch, config.train.checkpointing),
    }


def activation_bytes(model: Any, micro_batch: int, checkpointing: bool) -> int:
    """fp32 bytes that autograd keeps for one micro-batch, counted on the meta device: nothing is computed.

    With checkpointing every block keeps its input only, and the largest block is recomputed at a time.
    """
    seen: set[int] = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    alive: list[torch.Tensor] = []
    outside = 0
    inside: list[int] = []
    inputs = 0
    depth = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal outside
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            alive.append(tensor)
            if depth:
                inside[-1] += storage.nbytes()
            else:
                outside += storage.nbytes()
        return tensor

    def enter(_module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal depth, inputs
        depth += 1
        inside.append(0)
        inputs += args[0].untyped_storage().nbytes()

    def leave(*_: object) -> None:
        nonlocal depth
        depth -= 1

    blocks = [m for m in model.modules() if isinstance(m, ResBlock | AttentionBlock | ResidualAttentionBlock)]
    hooks = [m.register_forward_pre_hook(enter) for m in blocks] + [
        m.register_forward_hook(leave) for m in blocks
    ]
    config = model.config
    side, context = config.image_size, config.text_ctx
    with torch.device("meta"), saved_tensors_hooks(keep, lambda tensor: tensor):
        extra = {"low_res": torch.empty(1, 3, side // 4, side // 4)} if config.upsamples else {}
        if config.clip_dim:
            extra["clip_embedding"] = torch.empty(1, config.clip_dim)
        model(
            torch.empty(1, 3, side, side),
            torch.zeros(1, dtype=torch.int64),
            tokens=torch.zeros(1, context, dtype=torch.int64),
            mask=torch.ones(1, context, dtype=torch.bool),
            **extra,
        )
    for hook in hooks:
        hook.remove()
    per_image = outside + (inputs + max(inside) if checkpointing else sum(inside))
    return per_image * micro_batch


def _sets(config: Config) -> str:
    """The data sets by their patterns, and by weight where they are mixed."""
    parts = config.data.mix_parts
    weight = sum(part.weight for part in parts)
    shares = [f"{part.weight / weight:.0%} " if config.data.mix else "" for part in parts]
    return ", ".join(share + _listed(part.shards) for share, part in zip(shares, parts, strict=True))


def _listed(shards: str | tuple[str, ...]) -> str:
    if isinstance(shards, str):
        return shards
    return shards[0] + (f" and {len(shards) - 1} more" if shards[1:] else "")


def _counted(counts: Mapping[str, int], roles: list[str]) -> str:
    if not roles:
        return "nothing"
    return ", ".join(f"{role} {counts[role]:,}" for role in roles) + " parameters"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"
