"""The block that says, before training, what will happen."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from glide_ds.config import BatchArithmetic, Config
from glide_ds.masking import masked
from glide_ds.model.glide import RECOMPUTED, Glide
from glide_ds.progress import coloured, columns
from glide_ds.training.cautions import cautions
from glide_ds.training.checkpoint.start import Start, folder_of
from glide_ds.training.phases import count_by_role, trained_roles
from glide_ds.training.speed.fitting import USABLE, Fit, rank_memory
from glide_ds.training.speed.memory import frozen_masters, gib, memory_estimate, snapshot_bytes
from glide_ds.training.speed.meta import meta_model, weight_bytes
from glide_ds.training.zero.engine import cosine_end, lr_ratio
from glide_ds.types import GlideConfig


def block(
    config: Config,
    arithmetic: BatchArithmetic,
    start: Start,
    glide: GlideConfig,
    data: Mapping[str, Any],
    chosen: Fit | None = None,
) -> str:
    """Phase, parameters by role, data, batch arithmetic, memory, resume point: a page of plain text.

    `config` has train.recompute=auto resolved to what was `chosen`, `glide` is the architecture to be built, `data`
    the source's facts.
    """
    model = meta_model(glide, config)
    counts = count_by_role(model.named_parameters())
    roles = trained_roles(config)
    train = config.train
    epochs, held = _epochs(train.steps, data)
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
        ("data", f"{_sets(config)}: {held}"),
        ("device", describe_device(config)),
        ("batch", describe_batch(config, arithmetic)),
        ("steps", f"{describe_steps(config, start)} ({epochs}), {describe_rates(config)}"),
        ("memory", describe_memory(model, config, arithmetic)),
        *([("again", chosen.describe())] if chosen else []),
    ]
    if torch.cuda.is_available():
        on_gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        faster = describe_faster(model, config, arithmetic, on_gpu.total_memory)
        rows += [("faster", faster)] if faster else []
    width = columns()
    lines = [f"── glide_ds: phase {train.phase} ".ljust(width, "─")]
    for name, text in rows:
        lines += _wrapped(text, width, f"{name:<8}", " " * 8)
    damaged = [f"DAMAGED CHECKPOINT, not used: {text}; {start.describe()} instead" for text in start.damaged]
    for text in (
        *damaged,
        *describe_curve(config, start),
        *cautions(config, arithmetic, start, data, sum(counts.values())),
    ):
        lines += [coloured(line) for line in _wrapped(text, width, "!!      ", "!!      ")]
    return masked("\n".join([*lines, "─" * width]))


def _wrapped(text: str, width: int, first: str, others: str) -> list[str]:
    """Its lines; a path or key that is longer than one stays whole, so that it can be copied."""
    return textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _epochs(steps: int, data: Mapping[str, Any]) -> tuple[str, str]:
    """(how many epochs the steps are, what an epoch is), by the source's facts."""
    if data["samples"] is None:
        return "how many epochs shows as they are read", f"{data['shards']:,} streams, each read once an epoch"
    doubled = f" ({data['duplicate_keys']:,} under a key used before)" if data["duplicate_keys"] else ""
    return (
        f"{steps / data['batches_per_epoch']:.2f} epochs",
        f"{data['samples']:,} samples{doubled}, {data['batches_per_epoch']:,} batches per epoch",
    )


def describe_device(config: Config) -> str:
    """What a rank computes on, how exactly, and how it is told to."""
    on_gpu, train = torch.cuda.is_available(), config.train
    parts = [torch.cuda.get_device_name() if on_gpu else "CPU (PyTorch sees no GPU here)"]
    if weight_bytes(config) == 2:
        parts.append("in bf16 with fp32 masters")
    else:
        products = {
            "tf32": " with TF32 products",
            "tf32-fp16-kernels": " with TF32 products, some by fp16 kernels",
        }
        parts.append("in fp32" + (products.get(train.precision, "") if on_gpu else ""))
    parts += ["blocks compiled"] if train.compile else []
    parts += ["launched as a CUDA graph"] if train.cuda_graph else []
    return ", ".join(parts)


def describe_batch(config: Config, arithmetic: BatchArithmetic) -> str:
    total, micro, accumulation, world = arithmetic
    asked = config.deepspeed.get("train_micro_batch_size_per_gpu", micro)
    why = f" (asked for up to {asked}; {total // world} per rank)" if asked != micro else ""
    return f"{total} = micro-batch {micro}{why} x accumulation {accumulation} x {world} rank{'s' * (world > 1)}"


def describe_steps(config: Config, start: Start) -> str:
    """How many steps are to go."""
    done, total = start.step, config.train.steps
    if done > total:
        return f"none to go: {done:,} are done, more than train.steps = {total:,}"
    return f"{total - done:,} to go of {total:,}"


def describe_curve(config: Config, start: Start) -> Iterator[str]:
    """What a person may not expect of the learning rate: a curve other than before, or an end before the last step."""
    if config.deepspeed["scheduler"]["type"] != "WarmupCosineLR":
        return
    end, step = cosine_end(config), start.step
    left = step + 2 <= config.train.steps  # updates whose rate is another
    if left and start.before is not None and (before := cosine_end(start.before)) != end:
        # The rate of the very next update is in the checkpoint already.
        then, now = lr_ratio(step + 1, start.before), lr_ratio(step + 1, config)
        times = f"{now / then:.2g} times as high" if then else "higher"
        yield (
            f"LEARNING RATE: its cosine ends at step {end:,} instead of {before:,}, so from step {step + 2:,} on it is "
            f"{now:.3g} of its peak instead of {then:.3g} ({times}). To keep the curve of before: --set "
            f"scheduler.params.total_num_steps={before}"
        )
    if end < config.train.steps:
        yield (
            f"LEARNING RATE: scheduler.params.total_num_steps = {end:,} is less than train.steps = "
            f"{config.train.steps:,}: the last {config.train.steps - max(step, end):,} steps train at its lowest"
        )


def describe_rates(config: Config) -> str:
    """The learning rate of every trained role at its peak."""
    peak = config.deepspeed["optimizer"]["params"]["lr"]
    rates = ", ".join(
        f"{role} {peak * getattr(config.train.lr_scale, role):.3g}" for role in trained_roles(config)
    )
    return f"{config.deepspeed['optimizer']['type']}, learning rate {rates}, {config.deepspeed['scheduler']['type']}"


def describe_memory(model: Glide, config: Config, arithmetic: BatchArithmetic) -> str:
    """An estimate per rank, by part."""
    cpu = not torch.cuda.is_available()
    parts = memory_estimate(model, config, arithmetic, config.train.recompute, cpu=cpu)
    shown = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
    on_host = {
        "frozen weights in fp32": 0.0 if cpu else frozen_masters(model, config),
        "copy for saving in the background": snapshot_bytes(model, config, arithmetic.world_size),
    }
    host = " and ".join(f"{name} {gib(size)}" for name, size in on_host.items() if size)
    return f"about {gib(sum(parts.values()))} per rank: {shown}" + (
        f"; rank 0's {host} of host memory" if host else ""
    )


def describe_faster(model: Glide, config: Config, arithmetic: BatchArithmetic, capacity: float) -> str:
    """What would train the same in less time on a GPU of that many bytes; empty where nothing is left to set."""
    train = config.train
    dials = list(RECOMPUTED)  # from the fastest; a budget is chosen with care, and only `none` is surely faster
    faster = dials[: dials.index(train.recompute) if train.recompute in dials else 1]
    needs = {dial: sum(rank_memory(model, config, arithmetic, dial, cpu=False).values()) for dial in faster}
    fitting = [dial for dial, need in needs.items() if need <= USABLE * capacity]
    advice = [
        f"train.recompute={dial} fits, about {gib(needs[dial])} of {gib(capacity)}" for dial in fitting[:1]
    ]
    if train.precision == "tf32" and weight_bytes(config) == 4:
        advice.append("train.precision=tf32-fp16-kernels, 8 to 16 % and as exact")
    if not train.compile:
        advice.append("train.compile=true, minutes at the first start")
    return "; ".join(advice)


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
