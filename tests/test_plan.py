"""`glide-ds plan`: counts against published figures, arithmetic, calibration by a result file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_kit import make_config, write_config

from glide_ds import cli
from glide_ds.commands import plan
from glide_ds.config import load_config
from glide_ds.errors import ConfigError
from glide_ds.model.glide import RECOMPUTED
from glide_ds.model.unet import AttentionBlock
from glide_ds.training.setup import glide_config
from glide_ds.training.speed.flops import count_work, step_work
from glide_ds.training.speed.meta import meta_model

# Models on the meta device import half of torch, and count the published model's operations: seconds of CPU.
slow = pytest.mark.slow


@slow
def test_operations_are_the_published_models(root: Path):
    (config,) = load_config(root / "ds_configs" / "base.json")
    work = count_work(meta_model(glide_config(config), config))
    assert work.step == pytest.approx(715e9, rel=0.01)
    assert work.forward == pytest.approx(2 * 119.15e9, rel=0.01)
    attention = sum(count for block, count in work.blocks.items() if isinstance(block, AttentionBlock))
    assert 0 < attention < 0.2 * work.forward
    assert sum(work.blocks.values()) == pytest.approx(work.forward, rel=0.05)


@slow
def test_a_frozen_trunk_costs_less(tmp_path: Path):
    def step(phase: str) -> int:
        config = make_config(tmp_path, phase)
        return step_work(glide_config(config), config)

    assert step("adapter_only") < 0.8 * step("full")


@slow
def test_the_largest_micro_batch_fits_and_one_more_does_not(tmp_path: Path):
    config = make_config(tmp_path, "full", train_batch_size=64)
    made = plan.make_plan(config, 1, 2, "4090")
    assert list(made.memory) == list(RECOMPUTED)
    largest = made.largest["blocks"]
    assert largest > made.largest["none"] > 1

    def needed(micro: int) -> float:
        sized = make_config(tmp_path, "full", train_batch_size=2 * micro)
        return sum(plan.make_plan(sized, 1, 2, "4090").memory["blocks"].values())

    assert needed(largest) <= made.limit < needed(largest + 1)
    without = replace(made, largest=dict.fromkeys(RECOMPUTED, 0))
    assert any(line.startswith("!!") and config.train.recompute in line for line in plan.describe(without, 1))
    assert not any(line.startswith("!!") for line in plan.describe(made, 1))


def test_communication_is_two_psi_and_more_with_accumulation(tmp_path: Path):
    # A layer of its own: no meta model needed to count what is sent.
    model = torch.nn.Linear(10, 10, bias=False)
    config = make_config(tmp_path, "full", train_batch_size=8)
    one = plan.communication(model, config, config.batch_arithmetic(4))
    assert one == {"gradients": 4 * 100 * 3 / 4, "weights": 4 * 100 * 3 / 4}
    split = make_config(tmp_path, "full", train_batch_size=8, train_micro_batch_size_per_gpu=1)
    assert plan.communication(model, split, split.batch_arithmetic(4))["gradients"] == 2 * one["gradients"]
    assert sum(plan.communication(model, config, config.batch_arithmetic(1)).values()) == 0
    model.requires_grad_(False)
    assert sum(plan.communication(model, config, config.batch_arithmetic(4)).values()) == 0


def test_a_result_of_the_same_device_replaces_the_assumption(tmp_path: Path):
    config = make_config(tmp_path, "full")
    path = tmp_path / "step-h100.json"
    row = {"engine": True, "phase": "full", "precision": "tf32", "tflops": 150.0}
    others = [
        {"engine": False, "tflops": 400.0},
        {"phase": "adapter_only", "tflops": 300.0},
        {"precision": "bf16"},
        {"reduced": True, "tflops": 190.0},
    ]
    rows = [row, *({**row, **other} for other in others), {**row, "tflops": 140.0}]
    device = {"device": "NVIDIA H100 80GB HBM3"}
    path.write_text(json.dumps({"environment": device, "suite": "options", "rows": rows}))
    rate, source = plan.rate_of(config, "h100", [path])
    assert rate == pytest.approx(150e12)
    assert "150 TFLOP/s" in source
    assert str(path) in source
    kernels = make_config(tmp_path, "full", train={"precision": "tf32-fp16-kernels"})
    assert plan.rate_of(kernels, "h100", [path])[0] == pytest.approx(190e12)
    full = make_config(tmp_path, "full", train={"precision": "fp32"})
    assert plan.rate_of(full, "h100", [path])[0] == pytest.approx(plan.UTILISATION * 67e12)
    other, words = plan.rate_of(config, "a100-80", [path])
    assert other == pytest.approx(plan.UTILISATION * 156e12)
    assert "assumed" in words
    half = make_config(tmp_path, "full", bf16={"enabled": True})
    assert plan.rate_of(half, "h100", [])[0] == pytest.approx(plan.UTILISATION * 989e12)
    assert "of the bf16 matrix rate measured here" in plan.rate_of(half, "cpu", [])[1]
    assert "of the fp32 matrix rate measured here" in plan.rate_of(config, "cpu", [])[1]


def test_a_cpu_s_rate_is_this_machine_s_unless_a_result_is_named(tmp_path: Path):
    """Whatever results other machines have left in the checkout."""
    made = plan.make_plan(make_config(tmp_path), 1, 1, "cpu")
    assert "measured here" in made.rate_source


def test_a_file_that_is_no_result_is_named(tmp_path: Path):
    path = tmp_path / "step-x.json"
    path.write_text("[]")
    with pytest.raises(ConfigError, match=r"step-x\.json is no result of benchmarks/step\.py"):
        plan.rate_of(make_config(tmp_path), "h100", [path])


@slow
def test_the_command_plans_each_phase_and_sums_the_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    paths = [str(write_config(tmp_path, phase)) for phase in ("adapter_only", "full")]
    assert cli.main(["plan", "--ds_config", *paths, "--nodes", "2", "--gpus", "2", "--gpu", "a100-40"]) == 0
    out = capsys.readouterr().out
    assert "phase adapter_only on 2 x 2 a100-40" in out
    assert "phase full on 2 x 2 a100-40" in out
    assert "GPU-hours on 4 x a100-40" in out
    for word in ("memory", "network", "loader", "checkpoints", "images/s", "→ none"):
        assert word in out
    assert max(len(line) for line in out.splitlines() if not line.startswith("Next")) <= 80
    assert cli.main(["plan", "--ds_config", *paths, "--gpus", "3"]) == 2
    assert "use 3 or 6" in capsys.readouterr().err


def test_a_batch_larger_than_the_data_is_the_run_s_mistake_and_the_plan_s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = str(write_config(tmp_path, "full", data={"shapes_samples": 3}))
    assert cli.main(["plan", "--ds_config", path, "--gpu", "h100"]) == 2
    told = capsys.readouterr()
    assert "fewer than one global batch of 4" in told.err
    assert "can't be opened" not in told.out
    elsewhere = f"data.shards={tmp_path}/elsewhere-{{000..003}}.tar"
    assert cli.main(["plan", "--ds_config", path, "--gpu", "h100", "--set", elsewhere]) == 0
    told = capsys.readouterr()
    assert "matches no file" in " ".join(told.out.split())


def test_the_device_is_this_machine_s_unless_one_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["plan", "--ds_config", str(write_config(tmp_path))]) == 0
    here = plan.gpu_here()
    out = capsys.readouterr().out
    assert f"on 1 x {max(1, torch.cuda.device_count())} {here}" in out
    assert "0.000" not in out.partition("disk ")[2]  # seconds, not 0.0003 minutes
    assert "Next, where it will run: glide-ds preflight --ds_config" in out


@pytest.mark.parametrize(
    ("name", "gib", "key"),
    [
        ("NVIDIA H100 80GB HBM3", 79.6, "h100"),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"),
        ("NVIDIA A100 80GB PCIe", 79.2, "a100-80"),
        ("NVIDIA GeForce RTX 4090", 23.6, "4090"),
        ("NVIDIA RTX A6000", 47.5, "a6000"),
        ("NVIDIA L40S", 44.4, "l40s"),
        ("Tesla T4", 14.6, None),
    ],
)
def test_a_device_is_known_by_what_it_calls_itself(name: str, gib: float, key: str | None):
    assert plan.gpu_named(name, gib * 2**30) == key
