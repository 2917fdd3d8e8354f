"""Where a rank's memory goes, from counts alone: models on the meta device, nothing computed, no memory taken.

A training step has two high points: in the backward pass, where activations go while gradients come, and in
the optimizer's step, where ZeRO-2 lays the gradients of a parameter group flat once more.
"""

from __future__ import annotations

import math
from typing import Any

from glide_ds.config import BatchArithmetic, Config
from glide_ds.model.glide import Glide
from glide_ds.training.phases import parameter_groups
from glide_ds.training.speed.meta import weight_bytes
from glide_ds.training.speed.recompute import count_activations, recomputed
from glide_ds.training.zero.optimizer import KINDS


def memory_estimate(
    model: Glide,
    config: Config,
    arithmetic: BatchArithmetic,
    dial: str,
    *,
    cpu: bool = False,
) -> dict[str, float]:
    """Bytes per rank by part at the step's high point, for a `meta_model`. The frozen CLIP encoder is left out.

    `cpu`: the rank computes on one, where what a GPU's rank keeps in the host's memory counts too.
    """
    world, width = arithmetic.world_size, weight_bytes(config)
    groups: dict[str, int] = {}
    for group in parameter_groups(model, config):
        name = f"{group['role']} {group['weight_decay'] > 0}"
        groups[name] = groups.get(name, 0) + sum(p.numel() for p in group["params"])
    trained = sum(groups.values())
    zero = config.deepspeed.get("zero_optimization", {})
    bucket = min(trained, int(zero.get("reduce_bucket_size", 5e8))) if world > 1 else 0  # see keep_gradients
    accumulated = 4.0 * trained / world if arithmetic.accumulation > 1 else 0.0
    gradients = width * trained / world
    static = {
        "weights": _module_bytes(model, config),
        "master": 4.0 * trained / world if world > 1 or width < 4 else 0.0,  # see share_weights
        "moments": KINDS[config.deepspeed["optimizer"]["type"]].state_bytes * trained / world,
    }
    if averages := averages_bytes(config):
        static["average"] = averages * trained / world
    if cpu and (frozen := frozen_masters(model, config)):
        static["frozen"] = frozen
    bucket_bytes = float(width * bucket * (2 if zero.get("overlap_comm") else 1))
    activations = count_activations(model, cpu=cpu)
    again = recomputed(activations, config, arithmetic, dial)
    # Laid flat in the precision they come in, then in fp32.
    flat = (6.0 if width < 4 and not accumulated else 4.0) * max(groups.values(), default=0) / world
    if config.train.cuda_graph:
        # It keeps the places of all activations and gradients, and what is reduced is a copy.
        recorded = float(width * trained) if world > 1 else 0.0
        return static | {
            "gradients": accumulated + gradients + recorded + flat,
            "activations": float(activations.kept(again) * arithmetic.micro_batch),
            "buckets": bucket_bytes,
        }
    kept, arrived = activations.backward_peak(again, arithmetic.micro_batch, 1 / world)
    if kept + arrived + bucket_bytes >= gradients + flat:
        moment = {"gradients": accumulated + arrived, "activations": kept, "buckets": bucket_bytes}
    else:
        moment = {"gradients": accumulated + gradients + flat, "activations": 0.0, "buckets": 0.0}
    return static | moment


def gib(size: float) -> str:
    """Bytes as a person reads them."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def checkpoint_bytes(model: Any, config: Config) -> float:
    """Bytes of one checkpoint on disk, all ranks' files together.

    The module, in bf16 its frozen weights in fp32 too, master weights, moments, the average.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    per_trained = 4 + KINDS[config.deepspeed["optimizer"]["type"]].state_bytes + averages_bytes(config)
    return _module_bytes(model, config) + frozen_masters(model, config) + per_trained * trained


def averages_bytes(config: Config) -> float:
    """Of one trained parameter's averages."""
    return 4.0 * bool(config.ema.decay) + 8.0 * bool(config.ema.snapshot_every)


def snapshots_left(model: Any, config: Config) -> tuple[int, float]:
    """How many checkpoints leave their averages behind for good, and the bytes of each."""
    every = config.ema.snapshot_every
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return (config.train.steps // every if every else 0), 8.0 * trained


def frozen_masters(model: Any, config: Config) -> float:
    """Bytes of the frozen weights in fp32, of which a bf16 module holds what they round to; rank 0's host has them."""
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return 4.0 * frozen if weight_bytes(config) == 2 else 0.0


def _module_bytes(model: Any, config: Config) -> float:
    return float(weight_bytes(config) * sum(p.numel() for p in (*model.parameters(), *model.buffers())))


def checkpoints_kept(config: Config) -> int:
    """The most checkpoints of the phase on disk at once: the newest, the one being written, milestones, the best."""
    every, keep, steps = config.checkpoint.every, config.checkpoint.keep, config.train.steps
    written = -(-steps // every)
    milestones = steps // math.lcm(every, config.checkpoint.keep_every) if config.checkpoint.keep_every else 0
    best = bool(config.checkpoint.best and config.validation.every)
    return min(written, keep + 1 + milestones + best) if keep else written


def snapshot_bytes(model: Any, config: Config, world_size: int) -> float:
    """Host memory in which rank 0 keeps what a background save writes; the other ranks keep no module.

    The frozen weights in fp32 are written from where they lie.
    """
    if not config.checkpoint.async_save:
        return 0.0
    module = _module_bytes(model, config)
    parts = (checkpoint_bytes(model, config) - frozen_masters(model, config) - module) / world_size
    if (
        world_size == 1 and weight_bytes(config) == 4
    ):  # whose masters are the module's weights: they are copied once
        parts -= 4.0 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    return module + parts
