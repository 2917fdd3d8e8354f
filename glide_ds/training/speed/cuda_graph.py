"""A CUDA graph of the training step's two passes: recorded once, then launched by one call each.

A host takes 5 to 50 µs to launch a kernel from Python, and a step of the base model has over 4,000: on an H200 that
takes 200 ms, in which bf16's kernels for 64 images would run nearly twice. What a graph reads and writes keeps its
place: inputs are copied to where the recorded kernels read them, the weights stay in DeepSpeed's flat buffers, and
the gradients are the same tensors every time.
"""

from __future__ import annotations

import inspect
import time
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from glide_ds.config import BatchArithmetic, Config
from glide_ds.errors import ConfigError
from glide_ds.model.glide import Glide
from glide_ds.progress import duration
from glide_ds.training.speed.meta import zeros


def capture(model: Glide, config: Config, arithmetic: BatchArithmetic, device: torch.device) -> None:
    """Record the training passes, and replay them from now on, where train.cuda_graph says so.

    After it neither a parameter's place nor what is trained may change, until `forget`. Drawing, validating and
    passes without gradient go the way they went before. Raises ConfigError where there is no GPU.
    """
    if not config.train.cuda_graph:
        return
    if device.type != "cuda":
        raise ConfigError(
            "train.cuda_graph=true, and PyTorch sees no GPU here",
            "there is nothing to record",
            "start on a machine with one, or set train.cuda_graph=false",
        )
    started = time.monotonic()
    record(model, zeros(model.config, config, arithmetic.micro_batch, device), arithmetic.accumulation)
    if dist.get_rank() == 0:
        took = duration(time.monotonic() - started)
        print(f"recorded the training step as a CUDA graph (train.cuda_graph) in {took}", flush=True)


def record(model: Glide, inputs: dict[str, Tensor], accumulation: int) -> None:
    """Record the passes of training on inputs like these, by name, and replay them from now on."""
    passes = _Passes(model.train(), tuple(inputs))
    samples = (*inputs.values(), *passes.stand_ins)
    with warnings.catch_warnings():
        # torch warms up and records on two streams, and keeps the nodes of the one for the other.
        warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream")
        replayed = torch.cuda.make_graphed_callables(passes.run, samples, allow_unused_input=True)
    model.__dict__["forward"] = _Captured(model, passes.names, replayed, accumulation)


def forget(model: Glide) -> None:
    """Give the recording's memory back, and the model its own forward pass."""
    captured = model.__dict__.pop("forward", None)
    if captured is not None:
        captured.close()


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class _Passes(nn.Module):
    """The model's own forward pass, its inputs and trained parameters by place.

    It is recorded with stand-ins for the parameters, in the same memory: DeepSpeed holds on to the parameters' own
    nodes of autograd, which belong to a stream that can't be recorded.
    """

    def __init__(self, model: Glide, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names
        self.trained = [f"model.{name}" for name in _trained(model)]
        self.stand_ins = [nn.Parameter(parameter.detach()) for parameter in _trained(model).values()]

    def forward(self, *inputs: Tensor) -> Tensor:
        named: dict[str, Any] = dict(zip(self.names, inputs, strict=True))
        return Glide.forward(self.model, **named)

    def run(self, *places: Tensor) -> Tensor:
        inputs, parameters = places[: len(self.names)], places[len(self.names) :]
        output: Tensor = functional_call(self, dict(zip(self.trained, parameters, strict=True)), inputs)
        return output


class _Captured:
    """Stands in for a model's `forward`."""

    def __init__(self, model: Glide, names: tuple[str, ...], replayed: Any, accumulation: int) -> None:
        self.model, self.names, self.replayed = model, names, replayed
        self.signature = inspect.signature(model.forward)
        self.trained = list(_trained(model).values())
        # Replaying writes over the gradients of the micro-batch before, which are still to be added to.
        self.hooks = [p.register_hook(Tensor.clone) for p in self.trained] if accumulation > 1 else []

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if not (self.model.training and torch.is_grad_enabled()):
            return Glide.forward(self.model, *args, **kwargs)
        given = self.signature.bind(*args, **kwargs).arguments
        output: Tensor = self.replayed(*(given.pop(name) for name in self.names), *self.trained)
        assert not given, f"recorded without {set(given)}"
        return output

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
