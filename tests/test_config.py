"""The configuration: precedence, checks with their messages, batch arithmetic, and no option that does nothing."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from train_kit import document, make_config, write_config

from glide_ds import cli
from glide_ds.config import (
    DEEPSPEED_KEYS,
    PRESETS,
    BatchArithmetic,
    Config,
    cache_dir,
    load_config,
    with_changes,
)
from glide_ds.config.keys import Key, all_keys
from glide_ds.config.schema import SECTIONS
from glide_ds.errors import ConfigError
from glide_ds.training.checkpoint.start import find_start
from glide_ds.types import GlideConfig

ROOT = Path(__file__).parents[1]
SHIPPED = [p for p in sorted((ROOT / "ds_configs").rglob("*.json")) if p.name != "schema.json"]


def write(path: Path, values: Any) -> Path:
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return path


def refused(path: Path, *sets: str, overlay: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overlay, sets)
    return str(caught.value)


# --- precedence ---


def test_defaults_then_the_block_then_the_overlay_then_set(tmp_path: Path):
    path = write_config(tmp_path, train={"seed": 1, "steps": 11, "kl_every": 31})
    overlay = tmp_path / "run.yaml"
    overlay.write_text("train: {seed: 2, kl_every: 32}\ntrain_batch_size: 6\n")
    (config,) = load_config(path, overlay, ["train.seed=3", "optimizer.params.lr=1e-4"])
    assert config.train.gate_offset == 10.0  # default
    assert config.train.steps == 11  # block
    assert (config.train.kl_every, config.deepspeed["train_batch_size"]) == (32, 6)  # overlay
    assert (config.train.seed, config.deepspeed["optimizer"]["params"]["lr"]) == (3, 1e-4)  # --set
    assert config.deepspeed["optimizer"]["params"]["betas"] == [
        0.9,
        0.98,
    ]  # a section is laid over, not replaced
    assert load_config(path)[0].train.seed == 1


def test_a_preset_gives_the_architecture_and_single_fields_depart_from_it(tmp_path: Path):
    whole = document(tmp_path)
    whole["glide_ds"]["model"] = {"preset": "tiny", "architecture": {"xf_layers": 1}}
    (config,) = load_config(write(tmp_path / "a.json", whole))
    assert config.model.architecture == dataclasses.replace(PRESETS["tiny"](), xf_layers=1)
    (config,) = load_config(tmp_path / "a.json", None, ["model.preset=upsample"])
    assert config.model.architecture == GlideConfig.published("upsample", xf_layers=1)


@pytest.mark.parametrize(
    ("item", "value"),
    [
        ("data.shards={000000..000007}.tar", "{000000..000007}.tar"),
        ("data.shards=/a/{00..07}.tar", "/a/{00..07}.tar"),
        ("data.shards=[a.tar, b.tar]", ("a.tar", "b.tar")),
        ("data.shards=s3://bucket/{0..9}.tar", "s3://bucket/{0..9}.tar"),
        ("data.trace=true", True),
        ("data.flip=5e-1", 0.5),
        ("data.index_dir=null", None),
        ("data.index_dir=/tmp/x=y", "/tmp/x=y"),
    ],
)
def test_set_reads_values_as_people_write_them(tmp_path: Path, item: str, value: Any):
    (config,) = load_config(write_config(tmp_path), None, [item])
    name = item.partition("=")[0].partition(".")[2]
    assert getattr(config.data, name) == value


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_shipped_config_loads_and_divides_over_one_two_and_eight_ranks(path: Path):
    (config,) = load_config(path)
    clip = {"phase1": "adapter_only", "phase2": "adapter_gates", "phase3": "full"}
    assert config.train.phase == clip.get(path.stem, "base")
    upsamples, inpaints = config.model.architecture.upsamples, config.model.architecture.inpaints
    assert (upsamples, inpaints) == (path.stem.startswith("upsample"), path.stem.endswith("inpaint"))
    for ranks in (1, 2, 8):
        total, micro, accumulation, world = config.batch_arithmetic(ranks)
        assert micro * accumulation * world == total == config.deepspeed["train_batch_size"]


def test_run_json_alone_gives_the_same_configuration_again(tmp_path: Path):
    path = write_config(tmp_path, data={"shards": ["a.tar", "b.tar"]}, log={"sample_prompts": ["a circle"]})
    (config,) = load_config(path, None, ["train.lr_scale.gates=7", "model.architecture.channel_mult=[1, 3]"])
    again = write(tmp_path / "run.json", {"versions": {}, "phases": {"full": config.to_json()}, "lineage": {}})
    assert load_config(again) == (config,)
    assert load_config(write(tmp_path / "one.json", config.to_json())) == (config,)


def test_run_json_holds_the_phases_in_order(tmp_path: Path):
    phases = {name: document(tmp_path, name) for name in ("adapter_only", "adapter_gates", "full")}
    loaded = load_config(write(tmp_path / "run.json", {"phases": phases}))
    assert [config.train.phase for config in loaded] == list(phases)


# --- mistakes ---


def test_a_json_mistake_is_named_by_line_and_column(tmp_path: Path):
    path = write(tmp_path / "c.json", '{\n "train_batch_size": 4,\n "optimizer": {"type" "AdamW"}\n}')
    message = refused(path)
    assert f"{path} is not valid JSON" in message
    assert "line 3, column 23" in message
    assert '"type" "AdamW"' in message


@pytest.mark.parametrize("text", ["", "[1]", "3"])
def test_a_file_that_is_no_object_is_refused(tmp_path: Path, text: str):
    assert "c.json" in refused(write(tmp_path / "c.json", text))


def test_a_file_that_is_missing_is_told_with_what_lies_beside_it(tmp_path: Path):
    write_config(tmp_path, "base")
    assert "holds base.json" in refused(tmp_path / "bse.json")


def test_a_yaml_mistake_is_told(tmp_path: Path):
    overlay = tmp_path / "run.yaml"
    overlay.write_text("train:\n  seed: [1\n")
    assert "line 3" in refused(write_config(tmp_path), overlay=overlay)
    overlay.write_text("just text")
    assert "holds str" in refused(write_config(tmp_path), overlay=overlay)


@pytest.mark.parametrize(
    ("item", "parts"),
    [
        ("trian.steps=3", ("--set trian.steps=3", "'trian'", "nearest known: 'train'")),
        ("train.stepz=3", ("--set train.stepz=3", "'train.stepz'", "nearest known: 'steps'")),
        ("train.lr_scale.gate=3", ("'train.lr_scale.gate'", "nearest known: 'gates'")),
        ("model.architecture.channels=3", ("'model.architecture.channels'", "'model_channels'")),
        ("train_batch_sise=3", ("'train_batch_sise'", "nearest known: 'train_batch_size'")),
        ("optimizer.params.learning_rate=3", ("optimizer.params.learning_rate", "write optimizer.params.lr=")),
        (
            "scheduler.params.warmup_steps=3",
            ("scheduler.params.warmup_steps", "write scheduler.params.warmup_num"),
        ),
        ("train.steps=many", ("train.steps = 'many'", "int")),
        ("train.steps=3.5", ("train.steps = 3.5", "int")),
        ("train.steps=true", ("train.steps = True", "int")),
        ("train=3", ("train = 3", "section")),
        ("train.steps", ("--set train.steps", "key=value")),
        ("data.trace=1", ("data.trace = 1", "bool")),
        ("data.shards=[1]", ("data.shards = [1]",)),
        ("optimizer.type=Adam", ("optimizer.type = 'Adam'", "AdamW, AdamW8bit")),
        ("scheduler.type=OneCycle", ("scheduler.type = 'OneCycle'", "WarmupCosineLR, WarmupLR")),
        ("optimizer.params.lr=0", ("optimizer.params.lr = 0", "positive")),
        ("zero_optimization.stage=3", ("zero_optimization.stage = 3", "set it to 2")),
        ("prescale_gradients=true", ("prescale_gradients = True", "reduce_scatter to false")),
        ("gradient_predivide_factor=2.0", ("gradient_predivide_factor = 2.0", "reduce_scatter to false")),
        ("gradient_clipping=-1", ("gradient_clipping = -1",)),
        ("train_batch_size=0", ("train_batch_size = 0",)),
        ("train_micro_batch_size_per_gpu=1.5", ("train_micro_batch_size_per_gpu = 1.5",)),
        ("model.architecture.clip_dim=512", ("clip_dim = 512", "clip.model")),
        ("model.architecture.kind=tiny", ("'tiny'", "base, upsample")),
    ],
)
def test_a_wrong_value_is_told_with_key_value_and_remedy(tmp_path: Path, item: str, parts: tuple[str, ...]):
    message = refused(write_config(tmp_path), item)
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.preset", "tinny"),
        ("model.schedule", "cosine"),
        ("data.crop", "left"),
        ("data.damaged_shards", "ignore"),
        ("clip.source", "sound"),
        ("train.phase", "phase3"),
        ("train.scope", "clip"),
        ("train.loss", "l1"),
    ],
)
def test_a_choice_names_its_options(tmp_path: Path, name: str, value: str):
    message = refused(write_config(tmp_path), f"{name}={value}")
    assert f"{name} = {value!r}; choose one of " in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("run.timeout_s", 0),
        ("run.hang_s", -1),
        ("run.max_hours", -1),
        ("data.workers", -1),
        ("data.flip", 1.5),
        ("data.drop_caption", -0.1),
        ("data.drop_both", 2),
        ("data.max_bad_fraction", 1.1),
        ("data.min_side", 0),
        ("data.max_pixels", 0),
        ("data.shapes_samples", 0),
        ("clip.drop", 1.1),
        ("train.steps", 0),
        ("train.seed", -1),
        ("train.weighting", "snr"),
        ("train.recompute", True),
        ("train.vb_weight", -1),
        ("train.adapter_clipping", -1),
        ("train.gate_warmup", -1),
        ("train.kl_weight", -1),
        ("train.kl_every", 0),
        ("train.align_weight", -1),
        ("checkpoint.every", 0),
        ("checkpoint.keep", -1),
        ("stability.spike_factor", -1),
        ("stability.window", 3),
        ("stability.skip_limit", -1),
        ("stability.max_rollbacks", -1),
        ("stability.lr_cut", 0),
        ("validation.every", -1),
        ("validation.samples", 0),
        ("validation.max_degradation", -0.1),
        ("log.every", 0),
        ("log.samples", 0),
        ("log.sample_steps", 0),
        ("log.samples_every", -1),
    ],
)
def test_a_number_outside_its_range_is_refused(tmp_path: Path, name: str, value: float):
    assert f"{name} = " in refused(write_config(tmp_path), f"{name}={value}")


def test_an_unknown_key_of_the_file_is_told_with_the_file(tmp_path: Path):
    path = write(tmp_path / "c.json", document(tmp_path) | {"zero_optimisation": {}})
    message = refused(path)
    assert str(path) in message
    assert "nearest known: 'zero_optimization'" in message
    whole = document(tmp_path)
    whole["glide_ds"]["modle"] = {}
    assert "nearest known: 'model'" in refused(write(path, whole))


@pytest.mark.parametrize("key", ["optimizer", "scheduler", "train_batch_size"])
def test_what_training_needs_can_not_be_left_out(tmp_path: Path, key: str):
    whole = document(tmp_path)
    del whole[key]
    assert key in refused(write(tmp_path / "c.json", whole))


def test_conflicts_are_told_with_both_values(tmp_path: Path):
    path = write_config(tmp_path, train={"steps": 30})
    assert "train.scope" in refused(path, "train.scope=unet")
    assert "drop_caption=0.6" in refused(path, "data.drop_caption=0.6", "data.drop_both=0.6")
    assert "train base-inpaint" in refused(path, "data.mask.boxes=1")
    assert "train an upsampler" in refused(path, "data.degrade.share=1")
    assert "data.degrade.share = 0" in refused(path, "model.architecture.kind=upsample", "data.degrade.blur=3")
    nothing = [f"data.mask.{kind}=0" for kind in ("boxes", "strokes", "halves", "everything", "nothing")]
    assert "no mask could be drawn" in refused(path, "model.architecture.kind=base-inpaint", *nothing)
    assert "clip.source" in refused(path, "model.architecture.kind=base-inpaint", "clip.source=image")


def test_every_mistake_of_a_configuration_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    whole = document(tmp_path, data={"drop_caption": 0.6, "drop_both": 0.7})
    whole["glide_ds"]["train"]["stepz"] = 3
    whole["glide_ds"]["log"]["every"] = 0
    whole["zero_optimization"]["overlap_comm"] = "often"
    path = write(tmp_path / "c.json", whole)
    five = (
        ("unknown key 'train.stepz'", "nearest known: 'steps'", "correct or remove it"),
        ("train.seed = 'seven'", "give a value of type int"),
        ("log.every = 0", "give a number at least 1"),
        ("data.drop_caption=0.6", "data.drop_both=0.7", "lower one of them"),
        ("zero_optimization.overlap_comm = 'often'", "valid boolean"),
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path, None, ["train.seed=seven"])
    assert len(caught.value.faults) == len(five)
    for parts in five:
        assert any(all(part in str(fault) for part in parts) for fault in caught.value.faults), parts
    said = next(fault for fault in caught.value.faults if "seven" in str(fault))
    assert str(said).startswith("--set train.seed=seven: ")  # where it is from
    assert cli.main(["train", "--ds_config", str(path), "--set", "train.seed=seven", "--dry_run"]) == 2
    shown = capsys.readouterr().err
    assert all(part in shown for parts in five for part in parts)


@pytest.mark.parametrize(
    "command", [("train", "--dry_run"), ("preflight",), ("plan",)], ids=lambda words: words[0]
)
def test_the_mistakes_of_every_phases_file_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
):
    paths = []
    for name, every in (("one", 0), ("two", -1)):
        whole = document(tmp_path, log={"every": every})
        paths.append(str(write(tmp_path / f"{name}.json", whole)))
    assert cli.main([command[0], "--ds_config", *paths, *command[1:]]) == 2
    shown = capsys.readouterr().err
    assert "one.json: log.every = 0" in shown
    assert "two.json: log.every = -1" in shown


# --- names that keys had before ---

# A phase of a run.json as it was written before keys were renamed.
OLD_PHASE: dict[str, Any] = {
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 32,
    "gradient_clipping": 2.0,
    "zero_optimization": {"stage": 2, "contiguous_gradients": True, "overlap_comm": False},
    "zero_allow_untested_optimizer": True,
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 0.005, "betas": [0.9, 0.98], "eps": 1e-08, "weight_decay": 0.01},
    },
    "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 10, "cos_min_ratio": 0.1}},
    "glide_ds": {
        "model": {"preset": "tiny", "weights": "builtin:tiny", "schedule": "auto"},
        "data": {"shards": "builtin:shapes", "drop_caption": 0.5, "mix": {}, "tail": "drop", "trace": True},
        "clip": {"model": "builtin:tiny", "weights": "openai", "source": "text", "drop": 0.1},
        "train": {
            "phase": "adapter_only",
            "steps": 6,
            "weighting": "v",
            "checkpointing": "none",
            "activation_gb": 0.0,
            "tf32": True,
            "channels_last": True,
        },
        "checkpoint": {"every": 3, "keep": 2, "keep_every": 0, "best": True, "background": True},
    },
}


def old_run(folder: Path, **changed: Any) -> Path:
    """A run.json of then in folder/run; `changed` keys of the block as section__key."""
    phase = copy.deepcopy(OLD_PHASE)
    phase["glide_ds"]["run"] = {"dir": str(folder / "run")}
    for name, value in changed.items():
        section, _, key = name.partition("__")
        phase["glide_ds"][section][key] = value
    (folder / "run").mkdir(parents=True, exist_ok=True)
    return write(
        folder / "run" / "run.json", {"versions": {}, "phases": {"adapter_only": phase}, "lineage": {}}
    )


@pytest.mark.parametrize(
    ("changed", "told_now"),
    [
        ({}, ("none", "tf32-fp16-kernels", True, True)),
        (
            {"train__checkpointing": "blocks", "train__tf32": False},
            ("blocks", "fp32", True, True),
        ),
        ({"checkpoint__background": False, "data__tail": "pad"}, ("none", "tf32-fp16-kernels", False, False)),
    ],
    ids=["as written", "precision and recomputing", "saving and the last batch"],
)
def test_a_run_json_of_before_is_read_under_todays_names(
    tmp_path: Path, changed: dict[str, Any], told_now: tuple[Any, ...]
):
    path = old_run(tmp_path, **changed)
    (config,) = load_config(path)
    train, checkpoint, data = config.train, config.checkpoint, config.data
    assert (train.recompute, train.precision, checkpoint.async_save, data.drop_last) == told_now
    assert (config.train.steps, config.data.drop_caption, config.checkpoint.every) == (6, 0.5, 3)
    assert "zero_allow_untested_optimizer" not in config.to_json()
    (laid_over,) = load_config(path, None, ["train.steps=9", "train.precision=tf32"])
    assert (laid_over.train.steps, laid_over.train.precision) == (9, "tf32")


def test_a_run_of_before_is_resumed_under_todays_names(tmp_path: Path):
    path = old_run(tmp_path)
    folder = tmp_path / "run" / "phase1" / "step-00000003"
    folder.mkdir(parents=True)
    write(folder / "manifest.json", {"step": 3, "files": {}})
    (config,) = load_config(path)
    assert find_start(config, verify=False).step == 3
    freely = with_changes(config, train={"steps": 9, "recompute": "blocks"}, checkpoint={"async_save": False})
    assert find_start(freely, verify=False).step == 3
    with pytest.raises(ConfigError, match=r"glide_ds\.data\.drop_last: True → False"):
        find_start(with_changes(config, data={"drop_last": False}), verify=False)


@pytest.mark.parametrize(
    ("old", "value", "advice"),
    [
        ("train.checkpointing", "attention", "write train.recompute=attention"),
        ("train.tf32", True, "write train.precision=tf32-fp16-kernels"),
        ("train.tf32", False, "write train.precision=fp32"),
        ("checkpoint.background", False, "write checkpoint.async_save=false"),
        ("data.tail", "pad", "write data.drop_last=false"),
        ("data.tail", "drop", "write data.drop_last=true"),
    ],
)
def test_an_old_name_is_refused_with_the_new_one(tmp_path: Path, old: str, value: Any, advice: str):
    section, _, key = old.partition(".")
    path = write_config(tmp_path, **{section: {key: value}})
    wanted = f"{old} = {value!r} has another name now; {advice}"
    assert f"{path}: {wanted}" in refused(path)
    item = f"{old}={json.dumps(value)}"
    assert f"--set {item}: {wanted}" in refused(write_config(tmp_path), item)
    # The advice is one that is taken.
    load_config(write_config(tmp_path), None, [advice.removeprefix("write ")])


# --- batches ---


@pytest.mark.parametrize(
    ("total", "most", "ranks", "wanted"),
    [
        (32, 32, 1, (32, 32, 1, 1)),
        (32, 32, 8, (32, 4, 1, 8)),
        (32, 4, 2, (32, 4, 4, 2)),
        (24, 5, 2, (24, 4, 3, 2)),
        (7, 3, 1, (7, 1, 7, 1)),
        (32, None, 2, (32, 16, 1, 2)),
    ],
)
def test_accumulation_follows_from_batch_and_ranks(
    tmp_path: Path, total: int, most: int | None, ranks: int, wanted: tuple[int, ...]
):
    config = make_config(tmp_path, train_batch_size=total)
    if most:
        sizes = {**config.deepspeed, "train_micro_batch_size_per_gpu": most}
        config = config.changed(deepspeed=sizes)
    assert config.batch_arithmetic(ranks) == BatchArithmetic(*wanted)


@pytest.mark.parametrize(
    ("total", "ranks", "sizes"), [(30, 4, "28 or 32"), (33, 8, "32 or 40"), (3, 8, "use 8,")]
)
def test_a_batch_that_does_not_divide_names_the_nearest_sizes(
    tmp_path: Path, total: int, ranks: int, sizes: str
):
    with pytest.raises(ConfigError, match=re.escape(sizes)) as caught:
        make_config(tmp_path, train_batch_size=total).batch_arithmetic(ranks)
    assert f"train_batch_size {total}" in str(caught.value)
    assert f"{ranks} ranks" in str(caught.value)


def test_changed_copies_are_checked_too(tmp_path: Path):
    config = make_config(tmp_path)
    assert with_changes(config, train={"steps": 9}).train.steps == 9
    with pytest.raises(ConfigError, match=r"train\.steps"):
        with_changes(config, train={"steps": 0})


# --- every key ---

# The shortest file.
LEAST: dict[str, Any] = {
    "train_batch_size": 4,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.001}},
    "scheduler": {"type": "WarmupCosineLR"},
}
# Another valid value of a key, where it does not follow from the default; and what it needs beside it.
OTHERS: dict[str, Any] = {
    "train.profile_steps": "2:3",
    "data.captions": {"txt": 2.0},
    "train_batch_size": 6,
    "optimizer.type": "AdamW8bit",
    "optimizer.params.lr": 0.5,
    "optimizer.params.betas": [0.5, 0.6],
    "scheduler.type": "WarmupLR",
    "scheduler.params.total_num_steps": 9000,
    "communication_data_type": "fp32",
    "zero_optimization.stage": 2,  # no other is taken
    "zero_optimization.contiguous_gradients": False,
    "zero_optimization.reduce_scatter": False,
    "zero_optimization.reduce_bucket_size": 7,
    "zero_optimization.use_multi_rank_bucket_allreduce": True,
    "zero_optimization.allgather_bucket_size": 8,
    "zero_optimization.overlap_comm": True,
    "zero_optimization.ignore_unused_parameters": False,
    "bf16.enabled": True,
    "flops_profiler.enabled": True,
    "flops_profiler.recompute_fwd_factor": 0.5,
    "flops_profiler.profile_step": 2,
    "flops_profiler.module_depth": 3,
    "flops_profiler.top_modules": 4,
    "flops_profiler.detailed": False,
    "flops_profiler.output_file": "x",
    "model.architecture.kind": "upsample",
    "data.mix.NAME.shards": "a.tar",
    "data.mix.NAME.weight": 3.0,
    "data.mix.NAME.filter.max_aspect": 2.0,
    "data.filter.max_aspect": 2.0,
    "train.phase": "adapter_gates",
    "train.recompute": "attention",
}
BESIDE = {
    "data.reader": ("data.shards=x.tar",),
    "data.captions": ("data.shards=x.tar",),
    "data.caption_file": ("data.shards=x.tar", 'data.captions={"file.caption": 1}'),
    "data.shuffle_buffer": ("data.reader=stream", "data.shards=x.tar"),
    "ema.snapshot_every": ("checkpoint.every=1",),
    "log.wandb.name": ("log.wandb.project=x",),
    "log.wandb.mode": ("log.wandb.project=x",),
    "train.scope": ("train.phase=base",),
    "train.min_snr_gamma": ("train.weighting=min-snr",),
    "validation.patience": ("validation.every=5",),
    "train.profile_ranks": ("train.profile_steps=1:2",),
    "train.activation_gb": ("train.recompute=budget",),
    "clip.image_share": ("clip.source=both",),
    "data.degrade.share": ("model.architecture.kind=upsample",),
    **{
        f"data.degrade.{name}": ("model.architecture.kind=upsample", "data.degrade.share=0.5")
        for name in ("blur", "noise", "jpeg")
    },
    **{
        f"data.mask.{kind}": ("model.architecture.kind=base-inpaint",)
        for kind in ("boxes", "strokes", "halves", "everything", "nothing")
    },
    "log.sample_images": ("clip.source=image",),
    "train.cuda_graph": ("train.recompute=none",),
    "prescale_gradients": ("zero_optimization.reduce_scatter=false",),
    "gradient_predivide_factor": ("zero_optimization.reduce_scatter=false",),
}


def another(key: Key) -> Any:
    """A valid value that is not the key's default."""
    if key.name in OTHERS:
        return OTHERS[key.name]
    default, kinds = json.loads(key.default), key.type.split(" or ")
    if key.type == "bool":
        return not default
    if key.type == "str" and key.values:
        return next(value for value in key.values.split(", ") if value != default)
    if kinds[0] in ("int", "float"):
        return (default or 1) + 1 if kinds[0] == "int" else (default or 1.0) / 2
    return {"str": "x", "list of str": ["x"], "list of int": [1, 3]}[kinds[0]]


def told(config: Config, name: str) -> Any:
    """The value of a key, as JSON has it; None where DeepSpeed's part does not hold it."""
    whole = config.to_json()
    section: Any = whole["glide_ds"] if name.split(".")[0] in SECTIONS else whole
    for part in name.split("."):
        section = section.get(part) if section else None
    return section


@pytest.mark.parametrize("key", all_keys(), ids=lambda key: key.name)
def test_every_key_can_be_set_and_comes_back(tmp_path: Path, key: Key):
    path, value = write(tmp_path / "c.json", LEAST), another(key)
    name = key.name.replace("NAME", "mine")
    mixed = ["data.mix.mine.shards=b.tar"] if "NAME" in key.name else []
    assert told(load_config(path, None, mixed)[0], name) != value or key.name == "zero_optimization.stage"
    sets = [*mixed, *BESIDE.get(key.name, ()), f"{name}={json.dumps(value)}"]
    (config,) = load_config(path, None, sets)
    assert told(config, name) == value
    assert load_config(write(tmp_path / "again.json", config.to_json())) == (config,)


def test_deepspeeds_keys_pass_through(tmp_path: Path):
    whole = document(tmp_path) | {"wall_clock_breakdown": True, "memory_breakdown": True}
    (config,) = load_config(write(tmp_path / "c.json", whole))
    assert config.deepspeed["wall_clock_breakdown"] is True
    assert set(config.deepspeed) <= set(DEEPSPEED_KEYS)


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GLIDE_DS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/glide_ds")
    monkeypatch.setenv("GLIDE_DS_CACHE", "/own")
    assert cache_dir() == Path("/own")
