"""train.cuda_graph: the run's numbers are those without it, and a machine or setting that can't says so."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from train_kit import PARITY, make_config, metrics, opened, shake, state_of, without_launcher, write_config

from glide_ds.errors import ConfigError
from glide_ds.training.loop import train
from glide_ds.training.speed import cuda_graph as capturing
from glide_ds.training.speed.meta import zeros

ROOT = Path(__file__).parents[2]


def keeping_places(passes: Callable[..., Tensor], samples: Sequence[Tensor], **_: Any) -> Callable[..., Tensor]:
    """What torch.cuda.make_graphed_callables does with memory, on a CPU: inputs are copied to where the first
    ones lay, outputs and gradients always returned at the same place, written over by the next call."""
    places: dict[str, list[Tensor | None]] = {}

    def kept(name: str, values: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
        held = places.setdefault(name, [value if value is None else value.clone() for value in values])
        for place, value in zip(held, values, strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        return tuple(place if place is None else place.detach() for place in held)

    class Replayed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Tensor:
            for sample, given in zip(samples, inputs, strict=True):
                assert (sample.shape, sample.dtype, sample.stride()) == (
                    given.shape,
                    given.dtype,
                    given.stride(),
                )
                if sample.requires_grad:
                    assert sample.data_ptr() == given.data_ptr()  # a weight
                else:
                    sample.copy_(given)
            with torch.enable_grad():
                ctx.output = passes(*samples)
            (output,) = kept("output", [ctx.output.detach()])
            assert output is not None
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
            wanted = [tensor for tensor in samples if tensor.requires_grad]
            found = iter(
                kept("gradients", torch.autograd.grad(ctx.output, wanted, gradients, allow_unused=True))
            )
            return tuple(next(found) if tensor.requires_grad else None for tensor in samples)

    call: Callable[..., Tensor] = Replayed.apply
    return call


@pytest.mark.parametrize(
    ("accumulation", "bf16"),
    [
        (2, False),
        pytest.param(1, True, marks=pytest.mark.slow),
        pytest.param(1, False, marks=pytest.mark.slow),
        pytest.param(2, True, marks=pytest.mark.slow),
    ],
)
def test_gradients_that_keep_their_place_train_the_same(
    tmp_path: Path, accumulation: int, bf16: bool, monkeypatch: pytest.MonkeyPatch, group
):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", keeping_places)
    states = []
    for recorded in (False, True):
        config = make_config(
            tmp_path / str(recorded),
            **{**PARITY, "train": {**PARITY["train"], "steps": 3, "channels_last": True}},
            train_micro_batch_size_per_gpu=4 // accumulation,
            bf16={"enabled": bf16},
        )
        with opened(config, shake) as run:
            assert run.arithmetic.accumulation == accumulation
            if recorded:
                inputs = zeros(run.model.config, config, run.arithmetic.micro_batch, run.device)
                capturing.record(run.model, inputs, accumulation)
            train(run)
            capturing.forget(run.model)
            states.append(state_of(run.model))
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    first, second = (
        [line["loss"] for line in metrics(tmp_path / str(flag), steady=True)] for flag in (False, True)
    )
    assert first == second


def test_a_machine_without_a_gpu_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str], group):
    told = pytest.raises(ConfigError, match=r"train.cuda_graph=true.*no GPU.*train.cuda_graph=false")
    with told, opened(make_config(tmp_path, bf16={"enabled": True}, train={"cuda_graph": True})):
        pass
    assert "in bf16 with fp32 masters, launched as a CUDA graph" in " ".join(capsys.readouterr().out.split())


def test_recomputing_cannot_be_recorded(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cuda_graph=true with train.recompute='blocks'.*=none"):
        make_config(tmp_path, train={"cuda_graph": True, "recompute": "blocks"})
    with pytest.raises(ConfigError, match=r"cuda_graph=true with train.align_weight=0.1.*no target.*=0"):
        make_config(tmp_path, train={"cuda_graph": True, "recompute": "none", "align_weight": 0.1})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_recorded_run_on_cuda_is_the_launched_one(tmp_path: Path, accumulation: int):
    losses = []
    for recorded in (False, True):
        folder = tmp_path / str(recorded)
        sections = {**PARITY, "train": {**PARITY["train"], "cuda_graph": recorded}}
        path = write_config(folder, **sections, train_micro_batch_size_per_gpu=4 // accumulation)
        command = [sys.executable, str(ROOT / "launch" / "train.py"), "--ds_config", str(path)]
        environment = {k: v for k, v in without_launcher().items() if k != "DS_ACCELERATOR"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("recorded the training step" in done.stdout) == recorded
        losses.append([line["loss"] for line in metrics(folder)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4), json.dumps(losses)
