"""torch.compile, a block at a time: regions small enough to compile in seconds, and equal ones compiled once.

Everything between two blocks is a matter of bytes, not of time. What was compiled lies in inductor's cache
(TORCHINDUCTOR_CACHE_DIR, or a folder of the user's below /tmp), where the ranks of a node and later runs find it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from glide_ds.config import Config
from glide_ds.errors import ConfigError
from glide_ds.model.glide import Glide
from glide_ds.training.logging import duration
from glide_ds.training.speed.memory import zeros

FORMS = 1024  # of one block's code, by size, phase, precision; torch's own limit of 8 guards against mistakes
TELL_S = 5.0


def set_compilation(model: Glide, config: Config, micro_batch: int, device: torch.device) -> None:
    """Compile the blocks, now and not in the first step, or take the compiled ones away: train.compile says which.

    Raises ConfigError where this machine can't compile.
    """
    blocks = model.blocks().values()
    for block in blocks:
        block.compiled = None
    if not config.train.compile:
        return
    import torch._dynamo

    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = FORMS
    progress = Progress(len(blocks), shown=dist.get_rank() == 0)
    compiled = [torch.compile(block.forward, dynamic=False, fullgraph=True) for block in blocks]
    for block, call in zip(blocks, compiled, strict=True):
        block.compiled = progress.over(call)
    try:
        _one_step(model, config, micro_batch, device)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise ConfigError(
            f"train.compile=true, and this machine can't compile ({str(error).strip().splitlines()[0]}); "
            "it takes Triton on a GPU and a C++ compiler on a CPU",
            "",
            "install that, or set train.compile=false",
        ) from error
    for block, call in zip(blocks, compiled, strict=True):
        block.compiled = call
    progress.end()


class Progress:
    """How many of the blocks are compiled, in a line now and then."""

    def __init__(self, blocks: int, shown: bool) -> None:
        self.blocks, self.shown, self.done = blocks, shown, 0
        self.started = self.told = time.monotonic()
        self._say(
            f"compiling {blocks} blocks (train.compile); those of the last run are found again in seconds"
        )

    def over(self, compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`compiled`, counted at its first call."""
        called = False

        def call(*inputs: Any) -> Tensor:
            nonlocal called
            output = compiled(*inputs)
            if not called:
                called = True
                self._count()
            return output

        return call

    def end(self) -> None:
        self._say(f"compiled {self.blocks} blocks in {duration(time.monotonic() - self.started)}")

    def _count(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self.told > TELL_S:
            self.told = now
            left = (now - self.started) / self.done * (self.blocks - self.done)
            self._say(f"compiling block {self.done}/{self.blocks}, {duration(left)} left at most")

    def _say(self, text: str) -> None:
        if self.shown:
            print(text, flush=True)


def _one_step(model: Glide, config: Config, micro_batch: int, device: torch.device) -> None:
    """Forward and backward once on zeros: for shapes and layouts; nothing is accumulated."""
    inputs = zeros(model.config, config, micro_batch, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    output = model.train()(**inputs)
    torch.autograd.grad(output.sum(), trained, allow_unused=True)
