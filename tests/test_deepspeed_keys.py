"""DeepSpeed's keys: each is passed on and leaves a run resumable, or is refused with the reason, before anything is."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ranks import Run, Warm
from train_kit import document, metrics, rewound

from glide_ds.config import load_config
from glide_ds.config.deepspeed import THEIRS, DeepSpeedPart, their_model
from glide_ds.config.keys import all_keys
from glide_ds.config.refused import REFUSED, why_refused
from glide_ds.errors import ConfigError


def refused(folder: Path, **keys: Any) -> str:
    """What is said of our document with these keys laid over DeepSpeed's part, where it is refused."""
    whole = document(folder)
    for key, value in keys.items():
        inner = isinstance(value, Mapping) and isinstance(whole.get(key), Mapping)
        whole[key] = {**whole[key], **value} if inner else value
    path = folder / "config.json"
    path.write_text(json.dumps(whole))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert all(fault.fact and (fault.remedy or ";" in fault.fact) for fault in caught.value.faults)
    return str(caught.value)


def nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return dict(value)


@pytest.mark.parametrize("name", [name.replace("*", "x") for name in REFUSED])
def test_a_refused_key_is_told_with_the_reason(tmp_path: Path, name: str):
    said = refused(tmp_path, **nested(name, True))
    assert f"{name!r} can't be set" in said or f"{name} = True can't be set" in said
    assert str(why_refused(name)) in said


@pytest.mark.parametrize("section", THEIRS)
def test_every_key_of_deepspeeds_models_is_passed_on_or_refused_with_a_reason(section: str):
    fields = their_model(section).model_fields
    names = {*fields, *(field.alias for field in fields.values() if field.alias)}
    assert [
        name for name in names if name not in THEIRS[section] and not why_refused(f"{section}.{name}")
    ] == []
    assert set(THEIRS[section]) <= names


def test_every_key_that_deepspeed_reads_of_the_top_level_is_passed_on_or_refused_with_a_reason():
    """Its constants and the literals of its config.py name them."""
    from deepspeed.runtime import config, constants

    source = inspect.getsource(config)
    read = {getattr(constants, name) for name in re.findall(r"get_scalar_param\(param_dict, ([A-Z_]+)", source)}
    read |= set(re.findall(r"param_dict\.get\(['\"](\w+)", source)) | set(
        re.findall(r"^    ['\"](\w+)['\"]:", source, re.M)
    )
    assert len(read) > 30
    ours = {*DeepSpeedPart.model_fields, "use_data_before_expert_parallelism"}
    in_zero = {"mics_shard_size", "mics_hierarchical_params_gather", "zeropp_loco_param"}
    assert [name for name in read - in_zero if name not in ours and not why_refused(name)] == []


@pytest.mark.parametrize("name", [key.name for key in all_keys() if key.deepspeed])
def test_auto_is_no_value(tmp_path: Path, name: str):
    place, _, key = name.rpartition(".")
    said = refused(tmp_path, **nested(name, "auto"))
    if name.endswith(".type"):
        assert "choose one of" in said or "auto" in said
    assert f"{name} = 'auto'" in said
    assert place in said
    assert key in said


# --- as examples that people copy have them: Hugging Face's, DeepSpeed's tutorials, Megatron's ---
AUTO: dict[str, Any] = {"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"}
FP16 = {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16}
CPU = {"device": "cpu", "pin_memory": True}
STAGE_3 = {
    "stage": 3,
    "offload_optimizer": CPU,
    "offload_param": CPU,
    "overlap_comm": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "stage3_gather_16bit_weights_on_model_save": True,
}
PUBLISHED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {  # keys, and what of them is named
    "hf zero2": (
        {**AUTO, "fp16": FP16, "zero_optimization": {"offload_optimizer": CPU}},
        ("fp16", "offload_optimizer"),
    ),
    "hf zero3": (
        {**AUTO, "zero_optimization": STAGE_3},
        ("stage = 3", "offload_param", "stage3_max_live", "'auto'"),
    ),
    "hf bf16": ({"bf16": {"enabled": "auto"}}, ("bf16.enabled = 'auto'",)),
    "hf scheduler": (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto"}}},
        ("warmup_min_lr", "warmup_max_lr"),
    ),
    "hf optimizer": (
        {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto"}}},
        ("lr = 'auto'", "betas = 'auto'", "eps = 'auto'"),
    ),
    "hf decay": (
        {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto"}}},
        ("WarmupDecayLR",),
    ),
    "hf clipping": (
        {"gradient_clipping": "auto", "gradient_accumulation_steps": "auto"},
        ("gradient_accumulation",),
    ),
    "hf round robin": (
        {"zero_optimization": {"round_robin_gradients": True}},
        ("round_robin_gradients", "scrambled"),
    ),
    "zero1": ({"zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8}}, ("stage = 1",)),
    "zero0": ({"zero_optimization": {"stage": 0}}, ("stage = 0",)),
    "cifar": (
        {"optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.8, 0.999]}}},
        ("type = 'Adam'",),
    ),
    "cifar fp16": ({"fp16": {"enabled": True}, "steps_per_print": 2000}, ("fp16", "steps_per_print")),
    "bing bert": (
        {"optimizer": {"type": "Lamb", "params": {"lr": 11e-3, "max_coeff": 0.3}}},
        ("Lamb", "max_coeff"),
    ),
    "onebit": (
        {"optimizer": {"type": "OneBitAdam", "params": {"lr": 1e-4, "freeze_step": 9}}},
        ("OneBitAdam",),
    ),
    "offload": ({"zero_optimization": {"cpu_offload": True}}, ("cpu_offload",)),
    "nvme": ({"aio": {"block_size": 1}, "zero_optimization": {"offload_param": {"device": "nvme"}}}, ("aio",)),
    "zero++": ({"zero_optimization": {"zero_hpz_partition_size": 8, "zero_quantized_weights": True}}, ("hpz",)),
    "mics": ({"zero_optimization": {"mics_shard_size": 8}}, ("mics_shard_size",)),
    "zero bucket": ({"zero_optimization": {"reduce_bucket_size": 0}}, ("reduce_bucket_size = 0",)),
    "typo": ({"zero_optimization": {"overlap_com": True}}, ("nearest known: 'overlap_comm'",)),
    "bf16 typo": ({"bf16": {"enable": True}}, ("nearest known: 'enabled'",)),
    "bfloat16": ({"bfloat16": {"enabled": True}}, ("use bf16",)),
    "bf16 states": ({"bf16": {"enabled": True, "bf16_optimizer_states": True}}, ("bf16_optimizer_states",)),
    "grad dtype": ({"data_types": {"grad_accum_dtype": "fp32"}}, ("data_types",)),
    "monitors": ({"wandb": {"enabled": True}, "csv_monitor": {"enabled": True}}, ("wandb", "csv_monitor")),
    "universal": ({"checkpoint": {"load_universal": True}}, ("any number of ranks",)),
    "elastic": ({"elasticity": {"enabled": True, "max_train_batch_size": 2000}}, ("elasticity",)),
    "comments": ({"_comment": "tuned by hand"}, ("no comments",)),
    "recompute": ({"activation_checkpointing": {"partition_activations": True}}, ("train.recompute",)),
    "logging": ({"comms_logger": {"enabled": True}, "dump_state": True}, ("comms_logger", "dump_state")),
    "megatron": ({"data_efficiency": {"enabled": True}, "curriculum_learning": {}}, ("own order of data",)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_answered_before_anything_is_written(tmp_path: Path, name: str):
    keys, named = PUBLISHED[name]
    said = refused(tmp_path, **keys)
    assert [part for part in named if part not in said] == []
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


# --- what is passed on, on real ranks ---
ZERO = {
    "contiguous_gradients": False,
    "reduce_scatter": False,
    "reduce_bucket_size": 1000,
    "use_multi_rank_bucket_allreduce": True,
    "allgather_bucket_size": 1000,
    "overlap_comm": True,
    "ignore_unused_parameters": False,
}
SWITCHED: dict[str, dict[str, Any]] = {  # between two starts of a phase
    **{f"zero_optimization.{key}": {"zero_optimization": {key: value}} for key, value in ZERO.items()},
    "wall_clock_breakdown": {"wall_clock_breakdown": True},
    "memory_breakdown": {"memory_breakdown": True},
    "flops_profiler": {"flops_profiler": {"enabled": True, "profile_step": 2}},
}
KEPT: dict[str, dict[str, Any]] = {  # for the phase
    "communication_data_type": {"communication_data_type": "bf16"},
    "prescale_gradients": {"zero_optimization": {"reduce_scatter": False}, "prescale_gradients": True},
    "gradient_predivide_factor": {
        "zero_optimization": {"reduce_scatter": False},
        "gradient_predivide_factor": 2.0,
    },
}
OPTIONS: dict[str, Any] = {
    "checkpoint": {"every": 2, "keep": 0},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 2}},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "eps": 1e-4}},
}
PRECISIONS: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}


@pytest.fixture(scope="module")
def straight(warm_process: Warm, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of six updates on two ranks in each precision, without the keys."""
    folders = {}
    for precision, given in PRECISIONS.items():
        run = Run(warm_process, tmp_path_factory.mktemp(precision), **OPTIONS, **given)
        run.train(2, 6)
        assert run.wait() == [0, 0], run.said()[-3000:]
        folders[precision] = run.folder
    return folders


def on(warm: Warm, folder: Path, ranks: int, steps: int, keys: dict[str, Any], precision: str) -> None:
    run = Run(warm, folder, **OPTIONS, **PRECISIONS[precision])
    run.start(ranks, "glide_ds.cli:main", with_keys(run.words(steps), keys))
    assert run.wait() == [0] * ranks, run.said()[-3000:]


def with_keys(words: list[str], keys: Mapping[str, Any]) -> list[str]:
    """The command with DeepSpeed's keys set."""
    sets = [
        f"{name}.{key}={json.dumps(value)}" if key else f"{name}={json.dumps(value)}"
        for name, values in keys.items()
        for key, value in (values.items() if isinstance(values, Mapping) else [("", values)])
    ]
    return [*words, "--set", *sets]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SWITCHED)
def test_a_key_switched_on_between_starts_leaves_the_training_the_same_at_any_number_of_ranks(
    warm: Warm, straight: dict[str, Path], tmp_path: Path, name: str, precision: str
):
    again = rewound(straight[precision], tmp_path, 2)
    on(warm, again, 2, 4, SWITCHED[name], precision)
    on(warm, again, 1, 6, SWITCHED[name], precision)
    close = 1e-5 if precision == "fp32" else 1e-2
    assert losses(again) == pytest.approx(losses(straight[precision]), rel=close)
    assert losses(again)[:2] == losses(straight[precision])[:2]


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", KEPT)
def test_a_run_with_a_key_resumes_the_same_at_any_number_of_ranks(
    warm: Warm, tmp_path: Path, name: str, precision: str
):
    whole = tmp_path / "whole"
    on(warm, whole, 2, 4, KEPT[name], precision)
    again, other = (rewound(whole, tmp_path / part, 2) for part in ("again", "other"))
    on(warm, again, 2, 4, KEPT[name], precision)
    assert losses(again) == losses(whole)
    on(warm, other, 1, 4, KEPT[name], precision)
    assert losses(other) == pytest.approx(losses(whole), rel=1e-2)
    shutil.rmtree(whole)


def test_every_key_that_is_passed_on_is_resumed_with():
    told = {key.name for key in all_keys() if key.deepspeed}
    plain = {
        name for name in told if name.split(".")[0] in ("optimizer", "scheduler", "bf16", "flops_profiler")
    }
    plain |= {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_clipping",
        "zero_optimization.stage",
    }
    assert told - plain == (set(SWITCHED) | set(KEPT)) - {"flops_profiler"}
