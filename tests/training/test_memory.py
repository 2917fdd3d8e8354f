"""The memory estimate, by counts on the meta device. That it agrees with real steps: benchmarks/memory.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from train_kit import make_config, opened

from glide_ds.config import Config, load_config
from glide_ds.errors import ConfigError
from glide_ds.model import create_model
from glide_ds.model.glide import RECOMPUTED, Glide
from glide_ds.training import preview, setup
from glide_ds.training.phases import parameter_groups
from glide_ds.training.setup import glide_config
from glide_ds.training.speed import memory, recompute
from glide_ds.training.speed.fitting import USABLE, fitted, rank_memory
from glide_ds.training.speed.memory import gib
from glide_ds.training.speed.meta import meta_model, one_image, weight_bytes

pytestmark = pytest.mark.slow  # a model on the meta device imports half of torch: seconds of CPU


def kept_for_real(config) -> int:
    """Bytes that autograd keeps in a forward pass on the CPU, parameters apart, each storage once."""
    model = create_model(glide_config(config))
    parameter_groups(model, config)
    if weight_bytes(config) == 2:
        model.bfloat16()
    seen = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            kept[storage.data_ptr()] = storage
        return tensor

    inputs = {
        name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in one_image(model.config).items()
    }
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**inputs)
    return sum(storage.nbytes() for storage in kept.values())


def activation_bytes(model: Glide, micro_batch: int, dial: str) -> int:
    """What autograd keeps of one micro-batch, with the largest block that is computed again alive beside it."""
    found = recompute.count_activations(model)
    return found.most(found.dialled(dial)) * micro_batch


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("phase", ["adapter_only", "full"])
def test_activations_are_those_of_a_real_forward_pass(tmp_path: Path, phase: str, bf16: bool):
    config = make_config(tmp_path, phase, bf16={"enabled": bf16})
    found = recompute.count_activations(meta_model(glide_config(config), config), cpu=True)
    assert found.kept(frozenset()) == pytest.approx(kept_for_real(config), rel=0.02)


def test_each_turn_of_the_dial_keeps_less_and_a_frozen_trunk_least(tmp_path: Path):
    kept = {}
    for phase in ("adapter_only", "full"):
        config = make_config(tmp_path, phase)
        model = meta_model(glide_config(config), config)
        kept[phase] = [activation_bytes(model, 3, dial) for dial in RECOMPUTED]
        assert kept[phase] == sorted(kept[phase], reverse=True)
        assert kept[phase][0] > 1.5 * kept[phase][-1]
        assert activation_bytes(model, 6, "none") == 2 * kept[phase][0]
    assert all(frozen < free for frozen, free in zip(kept["adapter_only"], kept["full"], strict=True))


def test_a_budget_is_kept_with_as_little_work_as_it_takes(tmp_path: Path):
    micro = 4
    (whole, all_again) = (
        activation_bytes(meta_model(glide_config(config), config), micro, dial)
        for config in [make_config(tmp_path)]
        for dial in ("none", "blocks")
    )
    recomputed = []
    for budget in (whole, (whole + all_again) // 2, all_again, all_again // 2):
        config = make_config(
            tmp_path,
            train_batch_size=micro,
            train_micro_batch_size_per_gpu=micro,
            train={"recompute": "budget", "activation_gb": budget / 2**30},
        )
        model = create_model(glide_config(config))
        parameter_groups(model, config)
        recompute.set_recomputation(model, config, config.batch_arithmetic(1))
        twin = meta_model(glide_config(config), config)
        found = recompute.count_activations(twin)
        again = {twin.blocks()[name] for name, block in model.blocks().items() if block.recompute}
        recomputed.append(len(again))
        if budget >= all_again:
            assert found.most(frozenset(again)) * micro <= budget
    assert recomputed == sorted(recomputed)
    assert recomputed[0] == 0 < recomputed[1] < recomputed[-1]


def test_parts_follow_precision_optimizer_ranks_and_accumulation(tmp_path: Path):
    def parts(ranks: int = 1, dial: str = "none", **sections):
        config = make_config(tmp_path, "full", **sections)
        model = meta_model(glide_config(config), config)
        return memory.memory_estimate(model, config, config.batch_arithmetic(ranks), dial)

    plain = parts()
    count = sum(p.numel() for p in create_model(glide_config(make_config(tmp_path))).parameters())
    assert plain["master"] == 0
    assert parts(ranks=2)["master"] == 4 * count / 2
    assert plain["moments"] == 8 * count
    assert plain["weights"] == pytest.approx(4 * count, rel=1e-5)
    assert parts(ranks=2)["moments"] == plain["moments"] / 2
    assert parts(optimizer={"type": "AdamW8bit", "params": {"lr": 1e-3}})["moments"] == pytest.approx(
        2.1 * count
    )
    half = parts(bf16={"enabled": True})
    assert half["weights"] == pytest.approx(plain["weights"] / 2, rel=1e-5)
    assert half["master"] == 4 * count
    assert parts(train_micro_batch_size_per_gpu=1)["gradients"] > plain["gradients"]
    for ranks in (1, 2):  # a graph gives nothing back
        launched, recorded = (
            parts(ranks=ranks, dial="none", train={"recompute": "none", "cuda_graph": graph})
            for graph in (False, True)
        )
        assert recorded["activations"] >= launched["activations"]
        assert recorded["gradients"] >= 4 * count * (1 + (ranks > 1) / ranks)


def test_the_header_says_what_would_train_faster(tmp_path: Path):
    large = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 64}  # activations are most of it

    def told(capacity: float, **train) -> str:
        config = make_config(tmp_path, "full", train=train, **large)
        model = meta_model(glide_config(config), config)
        return preview.describe_faster(model, config, config.batch_arithmetic(1), capacity)

    config = make_config(tmp_path, "full", **large)
    model = meta_model(glide_config(config), config)
    needs = [
        sum(rank_memory(model, config, config.batch_arithmetic(1), dial, cpu=False).values())
        for dial in ("none", "attention")
    ]
    ample, tight = (need / USABLE * 1.001 for need in needs)
    none = f"train.recompute=none fits, about {memory.gib(needs[0])} of {memory.gib(ample)}"
    assert none in told(ample, recompute="blocks")
    assert "train.recompute=attention fits" in told(tight, recompute="blocks")
    assert "recompute" not in told(tight * 0.99, recompute="blocks")
    assert "recompute" not in told(tight, recompute="attention")
    assert "recompute=none" in told(ample, recompute="budget", activation_gb=0.001)
    assert "train.compile=true" in told(ample, recompute="none")
    assert "train.precision=tf32-fp16-kernels" in told(ample, recompute="none")
    assert not told(ample, recompute="none", compile=True, precision="tf32-fp16-kernels")


LARGE = {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 64}  # activations are most of it


def needs_of(config: Config) -> dict[str, float]:
    model = meta_model(glide_config(config), config)
    return {
        dial: sum(rank_memory(model, config, config.batch_arithmetic(1), dial, cpu=True).values())
        for dial in ("none", "attention", "blocks")
    }


@pytest.mark.parametrize("dial", ["none", "attention", "blocks"])
def test_auto_takes_the_least_recomputing_that_fits(tmp_path: Path, dial: str):
    config = make_config(tmp_path, "full", train={"recompute": "auto"}, **LARGE)
    arithmetic, glide = config.batch_arithmetic(1), glide_config(config)
    needs = needs_of(config)
    settled, chosen = fitted(config, arithmetic, glide, needs[dial], cpu=True)
    assert chosen is not None
    assert settled.train.recompute == chosen.dial == dial
    assert chosen.fits
    assert (chosen.cost > 0) == (dial != "none")
    told = chosen.describe()
    assert f"{dial} (auto): takes about {gib(needs[dial])}" in told
    assert "train.recompute=none|attention|blocks fixes it" in told
    assert (f"none would take {gib(needs['none'])}" in told) == (dial != "none")
    assert config.train.recompute == "auto"  # which is what run.json remembers


def test_auto_says_so_where_nothing_fits(tmp_path: Path):
    config = make_config(tmp_path, "full", train={"recompute": "auto"}, **LARGE)
    settled, chosen = fitted(config, config.batch_arithmetic(1), glide_config(config), 1.0, cpu=True)
    assert settled.train.recompute == "blocks"
    assert chosen is not None
    assert "MORE THAN FITS" in chosen.describe()


def test_auto_counts_the_frozen_encoder(tmp_path: Path):
    with_clip, without = (
        make_config(tmp_path, phase, clip={"model": "ViT-L/14"}, **LARGE) for phase in ("full", "base")
    )
    model = meta_model(glide_config(with_clip), with_clip)
    parts = rank_memory(model, with_clip, with_clip.batch_arithmetic(1), "none", cpu=False)
    assert parts["CLIP"] > 4 * 100e6
    assert parts["workspace"] > 1e9
    model = meta_model(glide_config(without), without)
    assert "CLIP" not in rank_memory(model, without, without.batch_arithmetic(1), "none", cpu=False)


def test_a_graph_that_does_not_fit_is_refused(tmp_path: Path):
    train = {"recompute": "auto", "cuda_graph": True}
    config = make_config(tmp_path, "full", train=train, **LARGE)
    arithmetic, glide = config.batch_arithmetic(1), glide_config(config)
    settled, _ = fitted(config, arithmetic, glide, 1e12, cpu=True)
    assert settled.train.recompute == "none"
    with pytest.raises(ConfigError, match=r"train.cuda_graph=true.*lower train_micro_batch_size_per_gpu"):
        fitted(config, arithmetic, glide, needs_of(config)["none"] * 0.99, cpu=True)


def test_a_run_recomputes_what_auto_chose_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], group: object
):
    config = make_config(tmp_path, "full", train={"recompute": "auto"}, **LARGE)
    monkeypatch.setattr(setup, "limit_here", lambda _: needs_of(config)["attention"])
    with opened(config) as run:
        again = {type(block).__name__ for block in run.model.blocks().values() if block.recompute}
    assert again == {"DualAttention"}
    assert "attention (auto)" in " ".join(capsys.readouterr().out.split())
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())
    assert recorded["phases"]["full"]["glide_ds"]["train"]["recompute"] == "auto"


def test_a_small_batch_peaks_in_the_optimizers_step(tmp_path: Path):
    # Two copies of the gradients are then more than all that the backward pass holds.
    config = make_config(tmp_path, "full", train_batch_size=1)
    model = meta_model(glide_config(config), config)
    parts = memory.memory_estimate(model, config, config.batch_arithmetic(1), "blocks")
    trained = sum(p.numel() for p in model.parameters())
    assert parts["activations"] == 0
    assert parts["gradients"] > 4 * trained
    # In bf16 the largest group's gradients lie flat twice: as they come, and in fp32.
    half = make_config(tmp_path, "full", train_batch_size=1, bf16={"enabled": True})
    model = meta_model(glide_config(half), half)
    in_bf16 = memory.memory_estimate(model, half, half.batch_arithmetic(1), "blocks")
    assert in_bf16["gradients"] - 2 * trained == 1.5 * (parts["gradients"] - 4 * trained)


def test_a_bf16_rank_on_a_cpu_has_the_frozen_weights_in_fp32_too(tmp_path: Path):
    config = make_config(tmp_path, "adapter_only", bf16={"enabled": True})
    model = meta_model(glide_config(config), config)
    gpu, cpu = (
        memory.memory_estimate(model, config, config.batch_arithmetic(1), "none", cpu=cpu)
        for cpu in (False, True)
    )
    assert "frozen" not in gpu
    assert cpu["frozen"] == 4 * sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert cpu["activations"] > gpu["activations"]  # attention is fp32's


def test_a_checkpoint_on_disk_has_the_size_that_was_planned(trained: Path):
    (config,) = load_config(trained / "run" / "run.json")
    planned = memory.checkpoint_bytes(meta_model(glide_config(config), config), config)
    (folder,) = sorted((trained / "run" / "phase3").glob("step-*"))[-1:]
    assert planned == pytest.approx(sum(p.stat().st_size for p in folder.iterdir()), rel=0.1)


def test_a_save_in_the_background_takes_rank_0_its_own_part_of_a_checkpoint(trained: Path, tmp_path: Path):
    (config,) = load_config(trained / "run" / "run.json")
    model = meta_model(glide_config(config), config)
    whole = memory.checkpoint_bytes(model, config)
    trained_bytes = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (
        memory.snapshot_bytes(model, config, 1) == whole - trained_bytes
    )  # a lone rank's masters are its weights
    module = 4 * sum(p.numel() for p in (*model.parameters(), *model.buffers()))
    assert memory.snapshot_bytes(model, config, 4) == module + (whole - module) / 4
    assert memory.snapshot_bytes(model, make_config(tmp_path, checkpoint={"async_save": False}), 4) == 0


@pytest.mark.parametrize(
    ("checkpoint", "validation", "kept"),
    [
        ({"keep": 2}, {}, 3),  # with the one being written
        ({"keep": 2}, {"every": 10}, 4),  # and the best
        ({"keep": 2, "best": False}, {"every": 10}, 3),
        ({"keep": 2, "keep_every": 25}, {}, 5),  # 50 and 100
        ({"keep": 0}, {"every": 10}, 10),
    ],
)
def test_the_most_checkpoints_at_once(tmp_path: Path, checkpoint, validation, kept: int):
    config = make_config(
        tmp_path, train={"steps": 100}, checkpoint={"every": 10, **checkpoint}, validation=validation
    )
    assert memory.checkpoints_kept(config) == kept
