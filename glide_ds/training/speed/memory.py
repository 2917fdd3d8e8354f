"""Where a rank's memory goes, from counts alone: models on the meta device, nothing computed, no memory taken.

A training step has two high points: in the backward pass, where activations go while gradients come, and in
the optimizer's step, where ZeRO-2 lays the gradients of a parameter group flat once more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from glide_ds.config import BatchArithmetic, Config
from glide_ds.model import create_model
from glide_ds.model.glide import RECOMPUTED, Glide
from glide_ds.model.layers import Block
from glide_ds.training.phases import parameter_groups
from glide_ds.types import GlideConfig

OPTIMIZER_BYTES = {"AdamW": 8.0, "AdamW8bit": 2.1}  # of moments per trained parameter
Again = frozenset[nn.Module]  # the blocks that are computed again in the backward pass


@dataclass
class Kept:
    """What autograd keeps of one block for one image, in bytes; what an earlier block keeps already is not in it."""

    module: nn.Module
    inside: int = 0
    input: int = 0
    gradients: int = 0  # of its trained parameters, whatever the batch
    work: int = 0  # about how many multiply-adds it takes to compute again


@dataclass
class Activations:
    """What autograd keeps for one image, block by block in the order of the forward pass."""

    blocks: list[Kept] = field(default_factory=list)
    outside: int = 0  # between blocks

    def kept(self, again: Again) -> int:
        """Bytes at the start of the backward pass, where the blocks `again` keep their input only."""
        return self.outside + sum(b.input if b.module in again else b.inside for b in self.blocks)

    def most(self, again: Again) -> int:
        """The same, with the largest block of `again` alive beside it."""
        return self.kept(again) + max((b.inside for b in self.blocks if b.module in again), default=0)

    def dialled(self, dial: str) -> Again:
        """The blocks that a name of RECOMPUTED stands for."""
        return frozenset(b.module for b in self.blocks if isinstance(b.module, RECOMPUTED[dial]))

    def within(self, budget: float) -> Again:
        """The blocks to compute again so that one image keeps no more than `budget` bytes, for little work.

        Those that free the most bytes per multiply-add go first. Where the budget can't be met: all blocks.
        """
        again: set[nn.Module] = set()
        saving = [b for b in self.blocks if b.inside > b.input]
        for block in sorted(saving, key=lambda b: (b.input - b.inside) / b.work):
            if self.most(frozenset(again)) <= budget:
                break
            again.add(block.module)
        return frozenset(again)

    def backward_peak(self, again: Again, images: int, gradient_share: float) -> tuple[float, float]:
        """Bytes of activations and of gradients at the worst moment of the backward pass.

        `gradient_share` is the part of each gradient that stays: 1 / ranks under ZeRO-2.
        """
        left, arrived = float(self.kept(again) * images), 0.0
        worst = (left, arrived)
        for block in reversed(self.blocks):
            anew = block.module in again
            now = (left + (block.inside * images if anew else 0), arrived + block.gradients)
            worst = max(worst, now, key=sum)
            left -= (block.input if anew else block.inside) * images
            arrived += block.gradients * gradient_share
        return worst


def recomputed(found: Activations, config: Config, arithmetic: BatchArithmetic, dial: str) -> Again:
    """The blocks that are computed again at that setting of train.checkpointing."""
    if dial == "budget":
        return found.within(config.train.activation_gb * 2**30 / arithmetic.micro_batch)
    return found.dialled(dial)


def set_recomputation(model: Glide, config: Config, arithmetic: BatchArithmetic) -> None:
    """Have the model compute again what train.checkpointing says."""
    if config.train.checkpointing != "budget":
        model.recompute(config.train.checkpointing)
        return
    twin = meta_model(model.config, config)
    found = count_activations(twin, cpu=next(model.parameters()).is_cpu)
    again = recomputed(found, config, arithmetic, "budget")
    for block, planned in zip(model.blocks().values(), twin.blocks().values(), strict=True):
        block.recompute = planned in again


def meta_model(glide: GlideConfig, config: Config) -> Glide:
    """The phase's model without memory: its precision, its frozen parameters."""
    with torch.device("meta"):
        model = create_model(glide)
    parameter_groups(model, config)
    return model.bfloat16() if weight_bytes(config) == 2 else model


def weight_bytes(config: Config) -> int:
    """Of one parameter in the module."""
    return 2 if config.deepspeed.get("bf16", {}).get("enabled") else 4


def memory_estimate(
    model: Glide,
    config: Config,
    arithmetic: BatchArithmetic,
    dial: str,
    activations: Activations | None = None,
    *,
    cpu: bool = False,
) -> dict[str, float]:
    """Bytes per rank by part at the step's high point, for a `meta_model`. The frozen CLIP encoder is left out.

    `activations` saves counting them again. `cpu`: the rank computes on one, where what a GPU's rank keeps in the
    host's memory counts too.
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
        "moments": OPTIMIZER_BYTES[config.deepspeed["optimizer"]["type"]] * trained / world,
    }
    if config.ema.decay:
        static["average"] = 4.0 * trained / world
    if cpu and (frozen := frozen_masters(model, config)):
        static["frozen"] = frozen
    bucket_bytes = float(width * bucket * (2 if zero.get("overlap_comm") else 1))
    activations = activations or count_activations(model, cpu=cpu)
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


def count_activations(model: Glide, *, cpu: bool = False) -> Activations:
    """What autograd keeps of one image, and which block keeps it, for a model on the meta device.

    `model` is in the precision and with the frozen parameters that it trains with; `cpu`: on a CPU.
    """
    found = Activations()
    seen: dict[int, torch.UntypedStorage] = {}  # alive, so that no id is used twice
    for tensor in (*model.parameters(), *model.buffers()):
        seen[id(tensor.untyped_storage())] = tensor.untyped_storage()
    current: list[Kept] = []

    def new_bytes(tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        if id(storage) in seen:
            return 0
        seen[id(storage)] = storage
        return storage.nbytes()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if current:
            current[-1].inside += new_bytes(tensor)
        else:
            found.outside += new_bytes(tensor)
        return tensor

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        block = Kept(module)
        tokens = (
            args[0].shape[2:].numel() if args[0].ndim == 4 else args[0].shape[1]
        )  # pixels, or the caption's
        block.work = sum(p.numel() for p in module.parameters()) * tokens
        if args[0].requires_grad or any(p.requires_grad for p in module.parameters()):
            block.input = args[0].untyped_storage().nbytes()
        block.gradients = sum(p.nbytes for p in module.parameters() if p.requires_grad)
        current.append(block)
        found.blocks.append(block)

    def leave(*_: object) -> None:
        current.pop()

    blocks = [m for m in model.modules() if isinstance(m, Block)]
    hooks = [m.register_forward_pre_hook(enter) for m in blocks]
    hooks += [m.register_forward_hook(leave) for m in blocks]
    with torch.device("meta"), saved_tensors_hooks(keep, lambda tensor: tensor), _FusedAttention(cpu):
        model(**one_image(model.config))
    for hook in hooks:
        hook.remove()
    return found


class _FusedAttention(TorchFunctionMode):
    """Attention as the fused kernels do it: the meta device would take the one that keeps the whole matrix.

    On a CPU it is always fp32's kernel (Attending.attend).
    """

    def __init__(self, cpu: bool) -> None:
        super().__init__()
        self.cpu = cpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            wide = [part.float() for part in args] if self.cpu else args
            output = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*wide)[0]
            return output.to(args[0].dtype)
        return func(*args, **(kwargs or {}))


def one_image(config: GlideConfig) -> dict[str, torch.Tensor]:
    """The inputs of a forward pass of one image, on the default device."""
    side, context = config.image_size, config.text_ctx
    inputs = {
        "x": torch.empty(1, 3, side, side),
        "timesteps": torch.zeros(1, dtype=torch.int64),
        "tokens": torch.zeros(1, context, dtype=torch.int64),
        "mask": torch.ones(1, context, dtype=torch.bool),
    }
    if config.upsamples:
        inputs["low_res"] = torch.empty(1, 3, side // 4, side // 4)
    if config.clip_dim:
        inputs["clip_embedding"] = torch.empty(1, config.clip_dim)
        inputs["clip_drop"] = torch.zeros(1, dtype=torch.bool)
    return inputs


def zeros(
    glide: GlideConfig, config: Config, micro_batch: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """The inputs of a training step of `micro_batch` images, all zero, in the layout that it has."""
    inputs = {
        name: torch.zeros(micro_batch, *tensor.shape[1:], dtype=tensor.dtype, device=device)
        for name, tensor in one_image(glide).items()
    }
    if config.train.channels_last:
        inputs["x"] = inputs["x"].contiguous(memory_format=torch.channels_last)
    return inputs


def gib(size: float) -> str:
    """Bytes as a person reads them."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"


def checkpoint_bytes(model: Any, config: Config) -> float:
    """Bytes of one checkpoint on disk, all ranks' files together.

    The module, in bf16 its frozen weights in fp32 too, master weights, moments, the average.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    per_trained = 4 + OPTIMIZER_BYTES[config.deepspeed["optimizer"]["type"]] + (4 if config.ema.decay else 0)
    return _module_bytes(model, config) + frozen_masters(model, config) + per_trained * trained


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
    if not config.checkpoint.background:
        return 0.0
    module = _module_bytes(model, config)
    return module + (checkpoint_bytes(model, config) - frozen_masters(model, config) - module) / world_size
