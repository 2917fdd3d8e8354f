"""The configuration: precedence, checks with their messages, batch arithmetic, and no option that does nothing."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from train_kit import document, make_config, write_config

from glide_ds.config import (
    DEEPSPEED_KEYS,
    PRESETS,
    REFUSED_KEYS,
    BatchArithmetic,
    Config,
    cache_dir,
    load_config,
    with_changes,
)
from glide_ds.errors import ConfigError
from glide_ds.types import GlideConfig

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "ds_configs").rglob("*.json"))


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
    assert config.train.phase == {"base": "base", "phase1": "adapter_only", "phase2": "adapter_gates"}.get(
        path.stem, "full"
    )
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
        ("optimizer.params.learning_rate=3", ("optimizer.params.learning_rate", "known: lr, betas")),
        ("scheduler.params.warmup_steps=3", ("scheduler.params.warmup_steps", "'warmup_num_steps'")),
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
        ("clip.source", "both"),
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


@pytest.mark.parametrize("key", REFUSED_KEYS)
def test_deepspeeds_keys_that_would_harm_are_refused_with_the_reason(tmp_path: Path, key: str):
    whole = document(tmp_path) | {key: {"enabled": True}}
    assert REFUSED_KEYS[key] in refused(write(tmp_path / "c.json", whole))
    assert REFUSED_KEYS[key] in refused(write_config(tmp_path), f"{key}.enabled=true")


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
    message = refused(path, "scheduler.params.total_num_steps=20")
    assert "total_num_steps = 20" in message
    assert "train.steps = 30" in message
    assert "train.scope" in refused(path, "train.scope=unet")
    assert "drop_caption=0.6" in refused(path, "data.drop_caption=0.6", "data.drop_both=0.6")
    assert "inpaint" in refused(path, "model.preset=base-inpaint", "model.architecture.kind=base-inpaint")
    assert "clip.source" in refused(path, "model.architecture.kind=base-inpaint", "clip.source=image")


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


# --- no option that does nothing ---

# Where each field's effect is asserted. The architecture's are the model's and the shapes of a run's weights.
EFFECTS = {
    "run.dir": "test_run.py::test_a_run_leaves_what_the_design_says",
    "run.timeout_s": "test_run.py::test_the_timeout_reaches_the_process_group",
    "run.hang_s": "test_watchdog.py::test_the_hang_limit_is_half_of_the_timeout_unless_given",
    "run.max_hours": "test_stopping.py::test_the_time_limit_stops_a_run",
    "model.preset": "test_config.py::test_a_preset_gives_the_architecture_and_single_fields_depart_from_it",
    "model.weights": "test_run.py::test_weights_of_a_file_are_what_training_starts_from",
    "model.schedule": "test_objective.py::test_the_schedule_reaches_the_noise",
    "model.architecture": "test_config.py::test_a_preset_gives_the_architecture_and_single_fields_depart_from_it",
    "data.shards": "test_run.py::test_real_shards_are_trained_on_and_bad_samples_counted",
    "data.workers": "data/test_loader.py",
    "data.shuffle": "test_run.py::test_an_option_changes_what_a_batch_holds",
    "data.crop": "test_run.py::test_an_option_changes_what_a_batch_holds",
    "data.trim": "test_run.py::test_an_option_changes_what_a_batch_holds",
    "data.flip": "test_run.py::test_an_option_changes_what_a_batch_holds",
    "data.drop_caption": "test_run.py::test_an_option_changes_what_a_batch_holds",
    "data.drop_both": "test_run.py::test_an_option_changes_what_a_batch_holds",
    "data.min_side": "test_run.py::test_options_say_which_samples_can_be_used",
    "data.max_pixels": "test_run.py::test_options_say_which_samples_can_be_used",
    "data.max_bad_fraction": "test_run.py::test_options_say_which_samples_can_be_used",
    "data.tail": "test_run.py::test_options_say_which_samples_can_be_used",
    "data.damaged_shards": "test_run.py::test_options_place_the_index_and_salvage_a_damaged_tar",
    "data.index_dir": "test_run.py::test_options_place_the_index_and_salvage_a_damaged_tar",
    "data.cache_dir": "test_run.py::test_options_reach_the_cache_of_remote_shards",
    "data.cache_gb": "test_run.py::test_options_reach_the_cache_of_remote_shards",
    "data.shapes_samples": "test_run.py::test_the_opening_block_says_what_will_happen",
    "data.clip_store": "test_run.py::test_embeddings_of_a_store_condition_the_training",
    "data.mix": "test_run.py::test_a_mix_is_real_data_and_named_by_share",
    "data.filter": "test_run.py::test_options_say_which_samples_can_be_used",
    "data.trace": "test_run.py::test_a_run_leaves_what_the_design_says",
    "clip.model": "test_run.py::test_the_adapter_has_the_width_of_the_encoder",
    "clip.weights": "test_run.py::test_clip_weights_of_another_width_are_refused",
    "clip.source": "test_objective.py::test_the_source_says_which_embedding_conditions",
    "clip.drop": "test_objective.py::test_draws_drop_as_often_as_asked",
    "train.phase": "test_phases.py::test_a_phase_trains_its_roles_and_freezes_the_rest",
    "train.steps": "test_run.py::test_a_run_leaves_what_the_design_says",
    "train.seed": "test_objective.py::test_seed_and_phase_decide_the_numbers",
    "train.scope": "test_phases.py::test_a_phase_trains_its_roles_and_freezes_the_rest",
    "train.loss": "test_objective.py::test_the_total_is_what_its_terms_say",
    "train.weighting": "test_objective.py::test_the_total_is_what_its_terms_say",
    "train.vb_weight": "test_objective.py::test_the_total_is_what_its_terms_say",
    "train.lr_scale": "test_phases.py::test_groups_carry_their_rate_and_decay",
    "train.adapter_clipping": "test_engine.py::test_each_side_is_clipped_to_its_own_norm",
    "train.gate_offset": "test_phases.py::test_the_gate_offset_ramps_from_its_start_to_its_target",
    "train.gate_warmup": "test_phases.py::test_the_gate_offset_ramps_from_its_start_to_its_target",
    "train.kl_weight": "test_objective.py::test_the_total_is_what_its_terms_say",
    "train.kl_every": "test_objective.py::test_the_total_is_what_its_terms_say",
    "train.recompute": "test_run.py::test_precision_and_recomputing_are_set",
    "train.channels_last": "test_objective.py::test_channels_last_changes_the_layout_and_nothing_else",
    "train.tf32": "test_run.py::test_precision_and_recomputing_are_set",
    "train.activation_gb": "test_memory.py::test_a_budget_is_kept_with_as_little_work_as_it_takes",
    "train.compile": "test_compiling.py::test_a_compiled_run_is_the_eager_one",
    "train.cuda_graph": "test_capturing.py::test_a_recorded_run_on_cuda_is_the_launched_one",
    "checkpoint.every": "test_run.py::test_a_run_leaves_what_the_design_says",
    "checkpoint.keep": "test_checkpoint.py::test_pruning_keeps_the_newest",
    "stability.spike_factor": "test_stability.py::test_the_limit_is_the_median_and_so_many_deviations",
    "stability.window": "test_stability.py::test_nothing_is_judged_before_half_of_the_window_is_filled",
    "stability.skip_limit": "test_stability.py::test_a_limit_of_zero_skips_for_ever",
    "stability.max_rollbacks": "test_stability.py::test_rollbacks_without_end_stop_the_run_with_a_report",
    "stability.lr_cut": "test_stability.py::test_rollbacks_without_end_stop_the_run_with_a_report",
    "validation.every": "test_validation.py::test_figures_are_logged_and_change_no_training",
    "validation.samples": "test_validation.py::test_more_samples_than_the_set_holds_are_refused",
    "validation.shards": "test_validation.py::test_the_held_out_set_is_the_shapes_own_or_named_or_none",
    "validation.max_degradation": (
        "test_validation.py::test_the_baseline_is_the_first_phases_and_a_drift_from_it_stops_the_run"
    ),
    "checkpoint.keep_every": "test_checkpoint.py::test_milestones_are_kept_for_good",
    "checkpoint.best": "test_checkpoint.py::test_the_best_by_validation_loss_is_kept",
    "checkpoint.async_save": "test_checkpoint.py::test_a_failure_while_saving_leaves_the_previous_checkpoint",
    "ema.decay": "test_ema.py::test_the_average_is_what_the_formula_says",
    "ema.warmup": "test_ema.py::test_the_average_is_what_the_formula_says",
    "log.every": "test_run.py::test_a_run_leaves_what_the_design_says",
    "log.tensorboard": "test_run.py::test_tensorboard_has_the_scalars_and_the_samples",
    "log.samples_every": "test_run.py::test_a_run_leaves_what_the_design_says",
    "log.sample_prompts": "test_run.py::test_tensorboard_has_the_scalars_and_the_samples",
    "log.samples": "test_run.py::test_captions_for_the_grid_come_from_the_data",
    "log.sample_steps": "test_run.py::test_grids_are_drawn_as_the_options_say",
    "log.guidance": "test_run.py::test_grids_are_drawn_as_the_options_say",
}


def leaves() -> dict[str, dataclasses.Field[Any]]:
    sections = [f for f in dataclasses.fields(Config) if f.name != "deepspeed"]
    return {
        f"{section.name}.{f.name}": f
        for section in sections
        for f in dataclasses.fields(section.default_factory)  # type: ignore[arg-type]
    }


def test_every_field_has_a_test_of_its_effect():
    assert leaves().keys() == EFFECTS.keys()
    tests = Path(__file__).parent
    for name, where in EFFECTS.items():
        file, _, test = where.partition("::")
        (path,) = [p for p in (tests / file, tests / "training" / file) if p.is_file()]
        text = path.read_text()
        # Without a test's name, the option's own has to occur in a file of the layer that reads it.
        found = f"def {test}(" in text if test else re.search(name.partition(".")[2], text, re.IGNORECASE)
        assert found, f"{name}: {where}"


def test_every_field_is_read_somewhere_in_the_package():
    package = "\n".join(
        path.read_text() for path in (ROOT / "glide_ds").rglob("*.py") if path.name != "config.py"
    )
    for name in leaves():
        field = name.partition(".")[2]
        assert re.search(rf"\.{field}\b", package) or name in ("model.preset", "model.schedule"), name


def test_every_field_can_be_set_and_comes_back_from_run_json(tmp_path: Path):
    for name, field in leaves().items():
        if field.default is dataclasses.MISSING:
            continue  # a section of its own
        value = {
            "train.phase": "base",
            "train.scope": "all",
            "train.loss": "hybrid",
            "train.weighting": "v",
            "model.preset": "base",
            "model.schedule": "linear",
            "data.crop": "pad",
            "data.tail": "pad",
            "data.damaged_shards": "salvage",
            "clip.source": "image",
            "log.sample_prompts": ["a"],
            "data.index_dir": "x",
            "data.cache_dir": "x",
            "data.clip_store": "x",
            "validation.shards": "x",
            "run.timeout_s": 60,
            "train.recompute": "attention",
        }.get(name, not field.default if isinstance(field.default, bool) else None)
        if value is None:
            value = f"x{field.default}" if isinstance(field.default, str) else (field.default or 1) / 2
            value = value if isinstance(field.default, str | float) else int(value) or 2
        sets = [f"{name}={json.dumps(value)}"]
        if name == "train.cuda_graph":
            sets.append("train.recompute=none")
        if name == "train.activation_gb":
            sets.append("train.recompute=budget")
        (config,) = load_config(write_config(tmp_path), None, sets)
        section, key = name.split(".")
        got = getattr(getattr(config, section), key)
        assert got == (tuple(value) if isinstance(value, list) else value), name
        assert load_config(write(tmp_path / "again.json", config.to_json())) == (config,), name


def test_deepspeeds_keys_pass_through(tmp_path: Path):
    whole = document(tmp_path) | {"wall_clock_breakdown": True, "prescale_gradients": True}
    (config,) = load_config(write(tmp_path / "c.json", whole))
    assert config.deepspeed["wall_clock_breakdown"] is True
    assert set(config.deepspeed) <= set(DEEPSPEED_KEYS)


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GLIDE_DS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/glide_ds")
    monkeypatch.setenv("GLIDE_DS_CACHE", "/own")
    assert cache_dir() == Path("/own")
