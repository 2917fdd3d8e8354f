"""bf16: the module computes with rounded weights; nothing else is rounded, from the first start to the export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from train_kit import IN_BF16, make_config, metrics, opened, shake, state_of

from glide_ds.commands.export import assembled
from glide_ds.config import Config
from glide_ds.model import create_model
from glide_ds.training.checkpoint.commit import committed
from glide_ds.training.loop import train
from glide_ds.training.setup import PhaseRun, glide_config
from glide_ds.training.zero.elastic import weights

pytestmark = pytest.mark.usefixtures("group")


def check_close_to_start(found: dict[str, Tensor], config: Config, updates: int = 1) -> None:
    """After updates of IN_BF16: trained weights within their reach of the start, frozen ones the start's."""
    torch.manual_seed(0)
    model = create_model(glide_config(config))
    shake(model)
    rounded = 0.0
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        reach = 2e-7 * updates if "clip" in name and "gate" not in name else 0.0
        assert (found[name] - weight).abs().max() <= reach, name
        rounded = max(rounded, float((weight.bfloat16().float() - weight).abs().max()))
    assert rounded > 1e-3  # what a master made from the module could be off


def masters(run: PhaseRun) -> dict[str, Tensor]:
    trained = [(name, p) for name, p in run.model.named_parameters() if p.requires_grad]
    return {name: p._hp_mapping.hp_fragment.detach().clone().view(p.shape) for name, p in trained}


def exact(run: PhaseRun) -> dict[str, Tensor]:
    return {**masters(run), **run.engine.frozen}


def test_masters_start_at_the_fp32_weights_and_the_module_at_what_they_round_to(tmp_path: Path):
    given: dict[str, Tensor] = {}

    def prepare(model: nn.Module) -> None:
        shake(model)
        given.update(state_of(model))

    with opened(make_config(tmp_path, bf16={"enabled": True}), prepare) as run:
        found = masters(run)
        assert found.keys() == dict(run.model.named_parameters()).keys()
        for name, parameter in run.model.named_parameters():
            assert torch.equal(found[name], given[name]), name
            assert torch.equal(parameter, given[name].bfloat16()), name


def test_a_chain_of_phases_rounds_no_weight_from_start_to_export(tmp_path: Path):
    first = make_config(tmp_path, "adapter_only", **IN_BF16)
    with opened(first, shake) as run:
        train(run)
        left = exact(run)
    (checkpoint,) = committed(tmp_path / "run" / "phase1")
    check_close_to_start(weights(checkpoint), first)
    exported = assembled(checkpoint)
    for name, tensor in left.items():
        assert torch.equal(exported[name], tensor), name
        assert exported[name].dtype == torch.float32
    with opened(make_config(tmp_path, "adapter_only", **IN_BF16), lambda model: None) as run:  # resumed
        assert run.start.step == 1
        same(exact(run), left)
    with opened(make_config(tmp_path, "adapter_gates", **IN_BF16), lambda model: None) as run:
        assert run.engine.frozen.keys() != set()
        same(exact(run), left)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.slow
def test_losses_follow_those_of_fp32(tmp_path: Path):
    """With masters that start at the rounded weights they depart by 1.1 %, and 0.17 % at the end."""
    losses = []
    for enabled in (False, True):
        folder = tmp_path / str(enabled)
        config = make_config(
            folder,
            train={"steps": 50},
            bf16={"enabled": enabled},
            optimizer={"type": "AdamW", "params": {"lr": 2e-5}},
            checkpoint={"every": 50},
        )
        with opened(config, shake) as run:
            train(run)
        losses.append([line["loss"] for line in metrics(folder)])
    assert losses[1] == pytest.approx(losses[0], rel=3e-3)
    assert sum(losses[1][-10:]) == pytest.approx(sum(losses[0][-10:]), rel=5e-4)
