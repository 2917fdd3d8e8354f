"""Which blocks are computed again in the backward pass, and what autograd keeps of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from glide_ds.config import BatchArithmetic, Config
from glide_ds.model.glide import RECOMPUTED, Glide
from glide_ds.model.layers import Block
from glide_ds.training.speed.compiling import compiler_spared
from glide_ds.training.speed.meta import meta_model, one_image

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
    """The blocks that are computed again at that setting of train.recompute."""
    if dial == "budget":
        return found.within(config.train.activation_gb * 2**30 / arithmetic.micro_batch)
    return found.dialled(dial)


def set_recomputation(model: Glide, config: Config, arithmetic: BatchArithmetic) -> None:
    """Have the model compute again what train.recompute says."""
    if config.train.recompute != "budget":
        model.recompute(config.train.recompute)
        return
    twin = meta_model(model.config, config)
    found = count_activations(twin, cpu=next(model.parameters()).is_cpu)
    again = recomputed(found, config, arithmetic, "budget")
    for block, planned in zip(model.blocks().values(), twin.blocks().values(), strict=True):
        block.recompute = planned in again


@lru_cache(maxsize=8)
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
    watching = saved_tensors_hooks(keep, lambda tensor: tensor)
    with compiler_spared(), torch.device("meta"), watching, _FusedAttention(cpu):
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
