"""torch.compile, a block at a time: regions small enough to compile in seconds, and equal ones compiled once.

Everything between two blocks is a matter of bytes, not of time. What was compiled lies in inductor's cache
(TORCHINDUCTOR_CACHE_DIR, or a folder of the user's below /tmp), where the ranks of a node and later runs find it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from glide_ds.config import Config
from glide_ds.errors import ConfigError
from glide_ds.model.glide import Glide
from glide_ds.progress import Progress, duration
from glide_ds.training.speed.meta import zeros

FORMS = 1024  # of one block's code, by size, phase, precision; torch's own limit of 8 guards against mistakes


def set_compilation(model: Glide, config: Config, micro_batch: int, device: torch.device) -> None:
    """Compile the blocks, now and not in the first step, or take the compiled ones away: train.compile says which.

    Raises ConfigError where this machine can't compile.
    """
    blocks = model.blocks().values()
    for block in blocks:
        block.compiled = None
    if not config.train.compile:
        return
    progress = Progress("compiling", len(blocks), "blocks", shown=dist.get_rank() == 0)
    progress.line(
        f"compiling {len(blocks)} blocks (train.compile); those of the last run are found again in seconds"
    )
    compile_blocks(model)
    compiled = [block.compiled for block in blocks]
    for block, call in zip(blocks, compiled, strict=True):
        block.compiled = _counted(call, progress) if call else None
    with compiler_told("train.compile=true", "set train.compile=false"):
        _one_step(model, config, micro_batch, device)
    for block, call in zip(blocks, compiled, strict=True):
        block.compiled = call
    progress.close()
    progress.line(f"compiled {len(blocks)} blocks in {duration(time.monotonic() - progress.started)}")


def compile_blocks(model: Glide) -> None:
    """Have every block compiled when it is first called with inputs of a shape (see `compiler_told`)."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = FORMS
    for block in model.blocks().values():
        block.compiled = torch.compile(block.forward, dynamic=False, fullgraph=True)


@contextmanager
def compiler_told(asked: str = "--compile", remedy: str = "leave it out") -> Iterator[None]:
    """Raises ConfigError where a block within is the first to be compiled, and this machine can't."""
    import torch._dynamo

    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        raise ConfigError(
            f"{asked}, and this machine can't compile ({str(error).strip().splitlines()[0]}); "
            "it takes Triton on a GPU and a C++ compiler on a CPU",
            remedy=f"install that, or {remedy}",
        ) from error


@contextmanager
def compiler_spared() -> Iterator[None]:
    """Have torch not import its compiler, 1 s, to keep its Python kernels of the meta device out of graphs."""
    name = "torch._dynamo"
    stand_in = ModuleType(name)
    stand_in.__dict__["disable"] = lambda function, *_, **__: function
    sys.modules.setdefault(name, stand_in)
    try:
        yield
    finally:
        if sys.modules[name] is stand_in:
            del sys.modules[name]


def _counted(call: Callable[..., Tensor], progress: Progress) -> Callable[..., Tensor]:
    """`call`, counted at its first time, in which it is compiled."""
    first = True

    def counted(*inputs: Any) -> Tensor:
        nonlocal first
        output = call(*inputs)
        if first:
            first = False
            progress.advance()
        return output

    return counted


def _one_step(model: Glide, config: Config, micro_batch: int, device: torch.device) -> None:
    """Forward and backward once on zeros: for shapes and layouts; nothing is accumulated."""
    inputs = zeros(model.config, config, micro_batch, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    output = model.train()(**inputs)
    torch.autograd.grad(output.sum(), trained, allow_unused=True)
