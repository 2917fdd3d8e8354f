"""No key that does nothing: each is changed, and something that a person would care about changes with it.

A row of the table is a key, another value of it, and what is looked at (key_probes.py: the package's own code). A key
without a row fails.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import key_probes as see
import pytest
from train_kit import ARCHITECTURE, DOCUMENT

from glide_ds.config import Config, load_config
from glide_ds.config.keys import all_keys
from glide_ds.errors import ConfigError
from glide_ds.training import preview, setup

Values = Mapping[str, Any]
Observe = Callable[[Config], Any]

SMALL = {f"model.architecture.{name}": value for name, value in ARCHITECTURE.items()}
BASE_PHASE = {"train.phase": "base"}
NOTHING_ELSE: Values = {}
TAR = {"data.shards": "plain.tar"}
SIDE = {**TAR, "data.captions": {"file.caption": 1.0}, "data.caption_file": "side-a.jsonl"}
TWO_SETS = {"data.mix.a.shards": "plain.tar", "data.mix.b.shards": "other.tar"}
COSINE = {"train.steps": 10, "scheduler.params.warmup_num_steps": 3}
REMOTE = {"data.shards": [f"{see.REMOTE}/plain.tar", f"{see.REMOTE}/other.tar"]}
GRID = {"log.samples_every": 1, "log.sample_steps": 2, "log.samples": 2}
VALIDATED = {"validation.every": 1, "validation.samples": 4, "train.steps": 100, "log.sample_steps": 1}
STORM = {
    "train.steps": 7,
    "stability.window": 4,
    "stability.spike_factor": 50.0,
    "checkpoint.every": 1,
    "data.shapes_samples": 400,
}
UPSAMPLED = {"model.architecture.kind": "upsample"}
LEAST_BLOCKS = {"model.architecture.channel_mult": [1], "model.architecture.attention_ds": [1]}
SAYING = {**BASE_PHASE, "train.steps": 4}
FILTERS = {
    "min_size": 40,
    "max_aspect": 2.0,
    "min_similarity": 0.3,
    "max_punsafe": 0.5,
    "nsfw": ["UNLIKELY"],
    "language": ["en"],
}


class Row(NamedTuple):
    """A key, its other value, what is looked at, and what both sides have beside it."""

    key: str
    value: Any
    observe: Observe
    given: Values


def rows(
    observe: Observe, values: Values, given: Values = NOTHING_ELSE, *, slow: bool = False
) -> Iterator[Any]:
    """A row per key of `values`."""
    marks = [pytest.mark.slow] if slow else []
    for key, value in values.items():
        name = f"{key}-{observe.__name__}"
        yield pytest.param(Row(key, value, observe, {**SMALL, **given}), id=name, marks=marks)


TABLE = [
    # --- data ---
    *rows(
        see.batches,
        {
            "train_batch_size": 6,
            "train_micro_batch_size_per_gpu": 2,
            "train.seed": 1,
            "data.shards": "other.tar",
            "data.shuffle": False,
            "data.crop": "pad",
            "data.trim": False,
            "data.flip": 1.0,
            "data.drop_caption": 0.9,
            "data.drop_both": 0.9,
            "data.min_side": 30,
            "data.max_pixels": 100,
            "data.drop_last": False,
            "data.clip_store": "embeddings",
            "data.captions": {"json.NSFW": 1.0},
            **{f"data.filter.{rule}": value for rule, value in FILTERS.items()},
        },
        TAR,
    ),
    *rows(
        see.batches,
        {
            "data.mix.NAME.shards": "bad.tar",
            "data.mix.NAME.weight": 9.0,
            **{f"data.mix.NAME.filter.{rule}": value for rule, value in FILTERS.items()},
        },
        TWO_SETS,
    ),
    *rows(see.batches, {"data.caption_file": "side-b.jsonl"}, SIDE),
    *rows(see.batches, {"data.degrade.share": 1.0}, UPSAMPLED),
    *rows(
        see.batches,
        {"data.degrade.blur": 3.0, "data.degrade.noise": 50.0, "data.degrade.jpeg": 1},
        {**UPSAMPLED, "data.degrade.share": 1.0},
    ),
    *rows(
        see.batches,
        {f"data.mask.{kind}": 9.0 for kind in ("boxes", "strokes", "halves", "everything", "nothing")},
        {"model.architecture.kind": "base-inpaint"},
    ),
    *rows(see.batches, {"data.shapes_samples": 32}),
    *rows(see.batches, {"clip.image_share": 0.9}, {**TAR, "clip.source": "both"}),
    *rows(see.batches, {"data.reader": "stream"}, TAR),
    *rows(see.batches, {"data.shuffle_buffer": 3}, {**TAR, "data.reader": "stream"}),
    *rows(see.batches, {"data.damaged_shards": "salvage"}, {"data.shards": "cut.tar"}),
    *rows(see.many_batches, {"data.max_bad_fraction": 0.01}, {"data.shards": "bad.tar", "train_batch_size": 8}),
    *rows(see.loader_processes, {"data.workers": 1}),
    *rows(see.index_files, {"data.index_dir": "there/index"}, {"data.shards": "there/copy.tar"}),
    *rows(see.cached_blocks, {"data.cache_dir": "there/mine", "data.cache_gb": 0.0}, REMOTE),
    # --- the model ---
    *rows(
        see.computed,
        {
            "model.architecture.kind": "upsample",
            "model.architecture.image_size": 32,
            "model.architecture.text_ctx": 16,
            "model.architecture.xf_width": 64,
            "model.architecture.xf_layers": 2,
            "model.architecture.xf_heads": 4,
            "model.architecture.model_channels": 64,
            "model.architecture.num_res_blocks": 2,
            "model.architecture.channel_mult": [1, 3],
            "model.architecture.attention_ds": [1],
            "model.architecture.num_head_channels": 32,
            "model.architecture.dropout": 0.5,
            "model.architecture.clip_tokens": 3,
        },
    ),
    *rows(see.shapes, {"clip.model": "ViT-B/32"}),
    *rows(see.starting_weights, {"model.weights": "start.pt"}, BASE_PHASE),
    *rows(see.noise, {"model.schedule": "linear"}, BASE_PHASE),
    *rows(
        see.embeddings,
        {"clip.weights": "clip-b.safetensors"},
        {"clip.model": "clip.json", "clip.weights": "clip-a.safetensors"},
    ),
    # --- what is trained ---
    *rows(
        see.groups,
        {
            "optimizer.params.lr": 0.5,
            "optimizer.params.weight_decay": 0.5,
            "train.phase": "adapter_only",
            **{f"train.lr_scale.{role}": 3.0 for role in ("adapter", "gates", "unet", "text")},
        },
    ),
    *rows(see.groups, {"train.scope": "text"}, BASE_PHASE),
    *rows(
        see.rates,
        {
            "scheduler.type": "WarmupLR",
            "scheduler.params.warmup_num_steps": 5,
            "scheduler.params.warmup_min_ratio": 0.5,
            "scheduler.params.total_num_steps": 20,
            "scheduler.params.cos_min_ratio": 0.5,
            "train.steps": 11,
        },
        COSINE,
    ),
    *rows(see.gate_offsets, {"train.gate_offset": 5.0, "train.gate_warmup": 4}),
    *rows(
        see.losses,
        {
            "train.seed": 1,
            "clip.source": "image",
            "clip.drop": 1.0,
            "train.loss": "hybrid",
            "train.weighting": "v",
            "train.timesteps": "stratified",
            "train.offset_noise": 0.1,
            "train.input_perturbation": 0.1,
            "train.kl_weight": 1.0,
            "train.channels_last": True,
        },
    ),
    *rows(see.losses, {"train.vb_weight": 1.0}, {"train.loss": "hybrid"}),
    *rows(see.losses, {"train.weighting": "min-snr"}, {"train.min_snr_gamma": 5.0}),
    *rows(see.losses, {"train.min_snr_gamma": 1.0}, {"train.weighting": "min-snr"}),
    *rows(see.losses, {"train.kl_every": 2}, {"train.kl_weight": 1.0}),
    *rows(see.losses, {"train.align_weight": 1.0}, {"data.drop_caption": 0.9}),
    *rows(
        see.trained,
        {
            "optimizer.type": "AdamW8bit",
            "optimizer.params.betas": [0.5, 0.6],
            "optimizer.params.eps": 0.1,
            "gradient_clipping": 0.001,
            "train.adapter_clipping": 0.001,
            "bf16.enabled": True,
        },
        {"train.steps": 2},
        slow=True,
    ),
    *rows(see.average, {"ema.decay": 0.5}, BASE_PHASE),
    *rows(see.average, {"ema.snapshot_every": 100}, BASE_PHASE),
    *rows(see.average, {"ema.warmup": 0.0}, {**BASE_PHASE, "ema.decay": 0.5}),
    # --- how it is computed ---
    *rows(see.ways, {"train.recompute": "blocks", "train.precision": "fp32"}),
    *rows(see.ways, {"train.precision": "tf32-fp16-kernels"}),
    *rows(
        see.ways,
        {"train.activation_gb": 0.0001},
        {"train.recompute": "budget", "train.activation_gb": 1.0},
        slow=True,
    ),
    *rows(see.compiled, {"train.compile": True}, {**BASE_PHASE, **LEAST_BLOCKS}, slow=True),
    *rows(see.recording, {"train.cuda_graph": True}),
    *rows(
        see.handed_over,
        {
            "zero_optimization.contiguous_gradients": False,
            "zero_optimization.reduce_scatter": False,
            "zero_optimization.reduce_bucket_size": 7,
            "zero_optimization.use_multi_rank_bucket_allreduce": True,
            "zero_optimization.allgather_bucket_size": 8,
            "zero_optimization.overlap_comm": True,
            "zero_optimization.ignore_unused_parameters": False,
            "bf16.enabled": True,
            "communication_data_type": "bf16",
        },
    ),
    *rows(
        see.handed_over,
        {"prescale_gradients": True, "gradient_predivide_factor": 2.0},
        {"zero_optimization.reduce_scatter": False},
    ),
    # --- what DeepSpeed says of itself ---
    *rows(see.said, {"wall_clock_breakdown": True, "memory_breakdown": True}, SAYING, slow=True),
    *rows(see.profile, {"flops_profiler.enabled": True}, SAYING, slow=True),
    *rows(
        see.profile,
        {
            "flops_profiler.recompute_fwd_factor": 0.5,
            "flops_profiler.profile_step": 2,
            "flops_profiler.module_depth": 1,
            "flops_profiler.top_modules": 2,
            "flops_profiler.detailed": False,
            "flops_profiler.output_file": "profile.txt",
        },
        {**SAYING, "flops_profiler.enabled": True},
        slow=True,
    ),
    # --- a run, what it leaves and when it ends ---
    *rows(
        see.run_files,
        {
            "run.dir": "elsewhere",
            "train.steps": 4,
            "data.trace": False,
            "checkpoint.every": 3,
            "checkpoint.keep": 1,
            "checkpoint.keep_every": 1,
            "log.every": 3,
            "log.samples_every": 1,
            "log.tensorboard": True,
            "train.profile_steps": "2:3",
        },
        {**BASE_PHASE, "train.steps": 3, "checkpoint.every": 1, "log.sample_steps": 2},
        slow=True,
    ),
    *rows(
        see.run_files,
        {"checkpoint.best": False},
        {**BASE_PHASE, **VALIDATED, "train.steps": 2, "checkpoint.every": 1},
        slow=True,
    ),
    *rows(
        see.run_files,
        {"train.profile_ranks": [1]},
        {**BASE_PHASE, "train.steps": 2, "train.profile_steps": "1:2"},
        slow=True,
    ),
    *rows(
        see.tracked,
        {"log.wandb.project": "other", "log.wandb.name": "mine", "log.wandb.mode": "offline"},
        {"log.wandb.project": "glide"},
    ),
    *rows(see.saving, {"checkpoint.async_save": False}, BASE_PHASE),
    *rows(
        see.grid,
        {
            "log.sample_prompts": ["a red circle"],
            "log.samples": 3,
            "log.sample_steps": 3,
            "log.guidance": 1.0,
        },
        {**BASE_PHASE, **GRID},
    ),
    *rows(see.grid, {"log.sample_images": ["photo.png"]}, {**GRID, "clip.source": "image"}),
    *rows(
        see.validated,
        {
            "validation.drawn": 2,
            "validation.patience": 1,
            "validation.every": 2,
            "validation.samples": 5,
            "validation.shards": "plain.tar",
            "validation.max_degradation": 0.0,
        },
        {**BASE_PHASE, **VALIDATED},
    ),
    *rows(see.waiting, {"run.timeout_s": 300.0}, BASE_PHASE),
    *rows(see.patience, {"run.timeout_s": 300.0}, BASE_PHASE),
    *rows(see.hanging, {"run.timeout_s": 300.0, "run.hang_s": 7.0}),
    *rows(see.stopping, {"run.max_hours": 1e-6}),
    *rows(
        see.stormy,
        {"stability.spike_factor": 0.0, "stability.window": 100, "stability.skip_limit": 1},
        {**BASE_PHASE, **STORM},
        slow=True,
    ),
    *rows(
        see.stormy,
        {"stability.max_rollbacks": 0, "stability.lr_cut": 0.1},
        {**BASE_PHASE, **STORM, "stability.skip_limit": 1},
        slow=True,
    ),
]
APART = {"model.preset", "zero_optimization.stage"}  # tests of their own


@pytest.fixture(scope="module")
def folder(group: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where all rows run, with what they name."""
    made = tmp_path_factory.mktemp("every-key")
    see.make_material(made)
    with pytest.MonkeyPatch.context() as patch:
        # Two figures that no row looks at, each half a second of counting.
        patch.setattr(setup, "peak_rate", lambda *_: 1.0)
        patch.setattr(preview, "describe_memory", lambda *_: "")
        patch.setenv("GLIDE_DS_CACHE", "there/users")
        yield made


@pytest.fixture(autouse=True)
def _here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def configured(values: Values) -> Config:
    """The small run of the other tests with these keys set as a person does."""
    whole = json.loads(json.dumps(DOCUMENT))
    whole["scheduler"] = {"type": "WarmupCosineLR"}
    del whole["glide_ds"]["model"]["architecture"]
    whole["glide_ds"]["run"] = {"dir": "run"}
    Path("config.json").write_text(json.dumps(whole))
    return load_config("config.json", None, [f"{key}={json.dumps(value)}" for key, value in values.items()])[0]


def seen(observe: Observe, values: Values) -> Any:
    for name in ("run", "elsewhere"):
        shutil.rmtree(name, ignore_errors=True)
    return observe(configured(values))


unchanged: dict[str, Any] = {}


def seen_unchanged(observe: Observe, given: Values) -> Any:
    """The same for all rows that look at it so, and twice: what differs by itself would show nothing."""
    name = f"{observe.__name__} {json.dumps(given)}"
    if name not in unchanged:
        unchanged[name] = seen(observe, given)
        if seen(observe, given) != unchanged[name]:
            pytest.fail(f"{observe.__name__} tells two runs of one configuration apart")
    return unchanged[name]


@pytest.mark.parametrize("row", TABLE)
def test_a_key_changes_what_is_seen(row: Row):
    before = seen_unchanged(row.observe, row.given)
    changed = {**row.given, row.key.replace("NAME", "a"): row.value}
    assert seen(row.observe, changed) != before


def test_every_key_has_a_row():
    covered = {param.values[0].key for param in TABLE} | APART
    assert covered == {key.name for key in all_keys()}


def test_the_preset_is_the_architecture_unless_it_is_departed_from():
    tiny, upsample = (configured({"model.preset": preset}) for preset in ("tiny", "upsample"))
    assert see.shapes(tiny) != see.shapes(upsample)


def test_the_stage_that_is_handed_to_deepspeed_is_the_one_that_is_taken():
    assert "2" in see.handed_over(configured(SMALL))["zero_config"]["stage"]
    for stage in (0, 1, 3):
        with pytest.raises(ConfigError, match=f"zero_optimization.stage = {stage}"):
            configured({**SMALL, "zero_optimization.stage": stage})


# --- values at the edge ---


@pytest.mark.parametrize(
    ("key", "observe"),
    [("train_micro_batch_size_per_gpu", see.batches), ("scheduler.params.total_num_steps", see.rates)],
)
def test_null_says_what_leaving_the_key_out_says(key: str, observe: Observe):
    assert seen(observe, {**SMALL, key: None}) == seen(observe, SMALL)


def test_a_grid_of_one_timestep_is_drawn():
    assert seen(see.grid, {**SMALL, **BASE_PHASE, **GRID, "log.sample_steps": 1})
