"""Whole runs in one process: what they leave behind, how they start, resume and refuse."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from train_kit import (
    ARCHITECTURE,
    PHASES,
    make_config,
    metrics,
    opened,
    read_lines,
    shake,
    state_of,
    trace,
    train_phase,
    write_config,
    write_shard,
)

from glide_ds.config import load_config
from glide_ds.data import shapes
from glide_ds.data.clip_notes import Encoder, StoreNote
from glide_ds.data.clip_store import text_hash, write_store
from glide_ds.data.tars.shards import open_shards
from glide_ds.diffusion.losses import QUARTILES
from glide_ds.errors import ConfigError, DataError, GlideError, WeightsError
from glide_ds.inference.draw import Row
from glide_ds.model import GlideConfig, create_model
from glide_ds.model.clip import FrozenClip, weights_hash
from glide_ds.model.dual_attention import DualAttention
from glide_ds.model.reduced import Reducible
from glide_ds.model.tensor_files import write_state
from glide_ds.model.unet import ResBlock
from glide_ds.training import run as run_module
from glide_ds.training import samples, setup
from glide_ds.training.checkpoint.commit import committed
from glide_ds.training.logging import JsonLines, RunLog
from glide_ds.training.loop import train
from glide_ds.training.objective import Objective
from glide_ds.training.run import check_pipeline, is_finished, main, told_end
from glide_ds.training.zero.stored import model_state

pytestmark = pytest.mark.usefixtures("group")

METRICS = {
    "step",
    "phase",
    "loss",
    "grad_norm",
    "lr",
    "images_per_s",
    "data_wait_s",
    "samples_seen",
    "gate_mean",
}


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, group: torch.device) -> Callable[..., None]:
    """launch/train.py's main(), inside the process group of the tests."""
    monkeypatch.setattr(run_module, "start_process_group", lambda timeout_s: group)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda *group: None)

    def run(*paths: Path, sets: tuple[str, ...] = (), dry_run: bool = False) -> None:
        main([str(path) for path in paths], None, sets, dry_run)

    return run


# --- what a run leaves ---


def test_a_run_leaves_what_the_design_says(trained: Path):
    run = trained / "run"
    assert sorted(p.name for p in run.iterdir()) == [
        "data-full.json",
        "metrics.jsonl",
        "phase3",
        "run.json",
        "samples",
        "starts.jsonl",
        "tensorboard",
        "trace",
    ]
    assert sorted(p.name for p in (run / "phase3").glob("step-*")) == ["step-00000004", "step-00000005"]
    assert (run / "phase3" / "LAST").readlink().name == "step-00000005"
    assert [p.name for p in (run / "samples").iterdir()] == ["full-00000005.png"]
    lines = metrics(trained)
    assert [line["step"] for line in lines] == [1, 2, 4, 5]  # the first, every second, the last
    assert lines[0].keys() >= METRICS
    assert [line["samples_seen"] for line in lines] == [4, 8, 16, 20]
    assert {line["phase"] for line in lines} == {"full"}
    traced = trace(trained)
    assert [line["step"] for line in traced] == [1, 2, 3, 4, 5]
    assert all(len(line["sample_ids"]) == len(line["timesteps"]) == 4 for line in traced)
    assert len({i for line in traced for i in line["sample_ids"]}) == 20


def test_metrics_hold_gates_rates_and_norms_by_role(trained: Path):
    line = metrics(trained)[-1]
    roles = {"adapter", "gates", "unet", "text"}
    assert line["lr_by_role"].keys() == line["grad_norm_by_role"].keys() == roles
    assert line["lr_by_role"]["gates"] == pytest.approx(3 * line["lr_by_role"]["unet"])
    assert line["lr"] == max(line["lr_by_role"].values())
    assert line["grad_norm"] == pytest.approx(sum(n**2 for n in line["grad_norm_by_role"].values()) ** 0.5)
    assert line["gate_offset"] == 10.0
    assert len(line["gates"]) == 6
    assert line["gate_mean"] == pytest.approx(sum(line["gates"].values()) / 6)
    assert line["gate_mean"] == pytest.approx(0.5, abs=0.01)
    assert all(value > 0 for value in line["grad_norm_by_role"].values())
    assert line["images_per_s"] > 0
    assert line["images_per_s_per_rank"] == line["images_per_s"]
    assert 0 <= line["data_wait_share"] < 1
    assert line["communication_share"] == 0
    assert 0 < line["mfu"] < 1.5  # of a rate measured on a machine that others use too
    assert line["data_wait_s"] >= 0
    assert 0.1 < line["memory_gib"] < 20


def test_the_loss_is_the_mean_of_its_quartiles(trained: Path):
    timesteps = {line["step"]: line["timesteps"] for line in trace(trained)}
    for line in metrics(trained):
        quartiles = [t * QUARTILES // 1000 for t in timesteps[line["step"]]]
        means = [line["loss_by_quartile"][f"q{q + 1}"] for q in quartiles]
        assert line["loss"] == pytest.approx(sum(means) / len(means))
        assert len(line["loss_by_quartile"]) == len(set(quartiles))


def test_tensorboard_has_the_scalars_and_the_samples(trained: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "run" / "tensorboard" / "full"), {"histograms": 0})
    events.Reload()
    scalars = events.Tags()["scalars"]
    for name in ("loss/loss", "norms/grad_norm", "rates/lr", "speed/images_per_s", "speed/data_wait_s"):
        assert name in scalars
    for name in ("rates/lr_by_role/adapter", "norms/grad_norm_by_role/text", "gates/clip_adapter"):
        assert name in scalars
    for name in ("speed/memory_gib", "gates/gate_mean", "data/samples_seen", "faults/rollbacks"):
        assert name in scalars
    assert any(name.startswith("loss/loss_by_quartile/") for name in scalars)
    lines = {line["step"]: line["loss"] for line in metrics(trained)}
    assert {e.step: pytest.approx(e.value, rel=1e-5) for e in events.Scalars("loss/loss")} == lines
    assert set(events.Tags()["distributions"]) == {"gates/all", "norms/adapter"}
    assert [e.step for e in events.Histograms("gates/all")] == list(lines)
    (text,) = events.Tensors("configuration/text_summary")
    assert b'"train_batch_size": 4' in text.tensor_proto.string_val[0]
    (picture,) = events.Images("samples")
    drawn = Image.open(io.BytesIO(picture.encoded_image_string))
    on_disk = Image.open(trained / "run" / "samples" / "full-00000005.png")
    assert np.array_equal(np.asarray(drawn), np.asarray(on_disk))
    assert on_disk.width == 2 * 132  # the two log.sample_prompts side by side


def test_run_json_alone_runs_again(
    trained: Path, start: Callable[..., None], capsys: pytest.CaptureFixture[str]
):
    recorded = trained / "run" / "run.json"
    assert load_config(recorded) == load_config(trained / "full.json")
    whole = json.loads(recorded.read_text())
    assert whole["versions"].keys() >= {"python", "torch", "deepspeed", "glide_ds"}
    assert whole["lineage"] == {"full": {"start": "random", "sha256": None}}
    before = metrics(trained)
    start(recorded)  # the run is finished: nothing is trained again
    assert metrics(trained) == before
    assert "resumes at step 5" in " ".join(capsys.readouterr().out.split())  # the block is wrapped


def test_the_manifest_says_what_an_export_needs(trained: Path):
    manifest = committed(trained / "run" / "phase3")[0].manifest
    assert GlideConfig(**manifest["model"]) == GlideConfig(**{**ARCHITECTURE, "clip_dim": 64})
    assert manifest["clip"]["model"] == "builtin:tiny"
    assert (manifest["phase"], manifest["schedule"]) == ("full", "squaredcos_cap_v2")
    assert manifest["samples_seen"] == 20
    assert manifest["lineage"]["full"]["start"] == "random"
    assert manifest["data_fingerprint"] == "shapes-64"


# --- resume ---


class Crash(Exception):  # noqa: N818 - stands for a kill
    pass


def crash_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Die right after update `step` was logged."""
    log_step = RunLog.step

    def logged(self: RunLog, done: int, *rest: Any) -> None:
        log_step(self, done, *rest)
        if done == step:
            raise Crash

    monkeypatch.setattr(RunLog, "step", logged)


RESUMED = {
    # The crash is in the middle of the gate's ramp, with KL terms before and after it; step 5, the first one
    # of the resumed run, is not a step that is logged.
    "train": {"steps": 9, "gate_warmup": 7, "kl_weight": 0.1, "kl_every": 3},
    "checkpoint": {"every": 4},
    "log": {"every": 2},
    "train_batch_size": 2,
}


@pytest.mark.parametrize(
    "given",
    [
        {},
        pytest.param({"optimizer": {"type": "AdamW8bit"}}, marks=pytest.mark.slow),
        pytest.param({"optimizer": {"type": "AdamW8bit"}, "bf16": {"enabled": True}}, marks=pytest.mark.slow),
    ],
    ids=["fp32", "8-bit", "8-bit and bf16"],
)
def test_resume_continues_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]):
    whole, parts = (make_config(tmp_path / name, **RESUMED, **given) for name in ("a", "b"))
    straight = state_of(train_phase(whole, shake))
    with monkeypatch.context() as patch:
        crash_after(patch, 6)
        with pytest.raises(Crash):
            train_phase(parts, shake)
    assert [line["step"] for line in trace(tmp_path / "b")] == [1, 2, 3, 4, 5, 6]
    with opened(parts) as run:
        assert run.start.step == 4
        assert [line["step"] for line in trace(tmp_path / "b")] == [1, 2, 3, 4]  # cut back to what is saved
        train(run)
    resumed = state_of(run.model)
    assert metrics(tmp_path / "b", steady=True) == metrics(tmp_path / "a", steady=True)
    assert trace(tmp_path / "b") == trace(tmp_path / "a")
    assert {line["step"] for line in metrics(tmp_path / "a") if "kl" in line} == {1, 4}
    offsets = [line["gate_offset"] for line in metrics(tmp_path / "a")]
    assert offsets == sorted(offsets)
    assert offsets[1] < 10.0 == offsets[-1]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())


@pytest.mark.slow
def test_resume_takes_the_checkpoint_before_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    config = make_config(tmp_path, train={"steps": 3}, checkpoint={"every": 1}, train_batch_size=2)
    train_phase(config)
    before = metrics(tmp_path, steady=True)
    model = tmp_path / "run" / "phase3" / "step-00000003" / "model.safetensors"
    os.truncate(model, 1000)
    capsys.readouterr()
    with opened(config) as run:
        assert run.start.step == 2
        train(run)
    out = " ".join(capsys.readouterr().out.split())
    assert "step-00000003: model.safetensors has 1000 bytes instead of" in out.replace("!! ", "")
    assert metrics(tmp_path, steady=True) == before
    assert [c.step for c in committed(tmp_path / "run" / "phase3")] == [3, 2]


def test_lines_of_other_phases_and_torn_lines_are_kept_and_cut(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    lines = [{"phase": "base", "step": 9}, {"phase": "full", "step": 1}, {"phase": "full", "step": 2}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"phase": "full", "st')
    output = JsonLines(path, "full", 1)
    output.write({"phase": "full", "step": 2, "again": True})
    output.close()
    assert read_lines(path) == [*lines[:2], {"phase": "full", "step": 2, "again": True}]


# --- one phase after another ---


@pytest.mark.slow
def test_three_phases_in_one_command_hand_over_weights_and_offset(tmp_path: Path, start: Callable[..., None]):
    paths = [
        write_config(tmp_path, phase, train={"steps": 2, "gate_warmup": warmup}, train_batch_size=2)
        for phase, warmup in (("adapter_only", 1), ("adapter_gates", 0), ("full", 0))
    ]
    start(*paths)
    lines = metrics(tmp_path)
    assert [(line["phase"], line["step"]) for line in lines] == [
        (phase, step) for phase in PHASES[1:] for step in (1, 2)
    ]
    assert [line["gate_offset"] for line in lines] == [5.0, 10.0, 10.0, 10.0, 10.0, 10.0]
    whole = json.loads((tmp_path / "run" / "run.json").read_text())
    for child, parent in (("adapter_gates", "phase1"), ("full", "phase2")):
        (made,) = committed(tmp_path / "run" / parent)
        assert whole["lineage"][child] == {"start": f"{parent}/step-00000002", "sha256": made.fingerprint}
    assert len(load_config(tmp_path / "run" / "run.json")) == 3
    phase1, phase2 = (model_state(committed(tmp_path / "run" / f"phase{n}")[0]) for n in (1, 2))
    changed = {name for name in phase1 if not torch.equal(phase1[name], phase2[name])}
    assert changed
    assert all("clip" in name for name in changed)  # phase 2 trained the adapter, the rest is phase 1's
    # A phase of its own finds its parent: the same numbers as in the pipeline.
    os.rename(tmp_path / "run" / "phase3", tmp_path / "phase3")
    start(paths[2])
    again, first = committed(tmp_path / "run" / "phase3")[0], committed(tmp_path / "phase3")[0]
    state, other = model_state(again), model_state(first)
    assert all(torch.equal(state[name], other[name]) for name in other)


def test_a_pipeline_in_the_wrong_order_or_over_two_folders_is_refused(tmp_path: Path):
    configs = {phase: make_config(tmp_path, phase) for phase in PHASES}
    check_pipeline(list(configs.values()))
    for order in (("full", "adapter_only"), ("full", "full"), ("adapter_gates", "adapter_only")):
        with pytest.raises(ConfigError, match=f"{order[1]!r} comes after {order[0]}"):
            check_pipeline([configs[phase] for phase in order])
    elsewhere = make_config(tmp_path / "x", "full")
    with pytest.raises(ConfigError, match=r"run\.dir"):
        check_pipeline([configs["adapter_only"], elsewhere])


# --- how it starts ---


def test_weights_of_a_file_are_what_training_starts_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.manual_seed(3)
    plain = create_model(GlideConfig(**ARCHITECTURE))
    write_state(tmp_path / "base.pt", plain.state_dict())
    config = make_config(tmp_path, "adapter_only", model={"weights": "~/base.pt"})
    with opened(config) as run:
        state = state_of(run.model)
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.state_dict().items())
    out = capsys.readouterr().out
    assert f"Weights from {tmp_path / 'base.pt'}" in out
    assert "kept initial values" in out  # the CLIP parts
    assert "RANDOM START" not in out


def test_the_adapter_has_the_width_of_the_encoder(tmp_path: Path):
    assert setup.glide_config(make_config(tmp_path, "full")).clip_dim == 64
    assert setup.glide_config(make_config(tmp_path, "base")).clip_dim is None
    for name, dim in (("ViT-B/32", 512), ("ViT-L/14", 768)):
        assert setup.glide_config(make_config(tmp_path, clip={"model": name})).clip_dim == dim


def test_precision_and_recomputing_are_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for precision, dial in (("tf32", "attention"), ("fp32", "blocks"), ("tf32-fp16-kernels", "none")):
        monkeypatch.setattr(setup, "can_reduce", lambda device: True)  # as on a GPU
        config = make_config(tmp_path / precision, train={"precision": precision, "recompute": dial})
        with opened(config) as run:
            recomputed = {type(block) for block in run.model.blocks().values() if block.recompute}
            assert (ResBlock in recomputed, DualAttention in recomputed) == (dial == "blocks", dial != "none")
            assert torch.backends.cuda.matmul.allow_tf32 is (precision != "fp32")
            assert torch.backends.cudnn.allow_tf32 is (precision != "fp32")
            reduced = {module.reduced for module in run.model.modules() if isinstance(module, Reducible)}
            assert reduced == {precision == "tf32-fp16-kernels"}


def test_the_timeout_reaches_the_process_group(monkeypatch: pytest.MonkeyPatch):
    import deepspeed

    from glide_ds.training.zero.group import start_process_group

    given: dict[str, Any] = {}
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **options: given.update(options))
    start_process_group(77.0)
    assert given["timeout"].total_seconds() == 77.0
    assert given["dist_backend"] == "gloo"


def test_the_opening_block_says_what_will_happen(
    tmp_path: Path,
    start: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def refuse(_: float) -> None:
        raise AssertionError("a dry run takes no process group")

    monkeypatch.setattr(run_module, "start_process_group", refuse)
    paths = [write_config(tmp_path, phase) for phase in PHASES[1:]]
    start(*paths, dry_run=True)
    out = capsys.readouterr().out
    text = " ".join(out.split())
    assert not (tmp_path / "run").exists()
    for part in (
        "phase adapter_only",
        "phase full",
        "trains adapter 73,408 parameters",
        "frozen gates 6, unet 845,254, text 1,625,984 parameters",
        "builtin:tiny text embeddings, 64-d",
        "builtin:shapes: 64 samples, 16 batches per epoch",
        "batch 4 = micro-batch 4 x accumulation 1 x 1 rank",
        "4 to go of 4",
        "device CPU (PyTorch sees no GPU here), in fp32",
        "memory about",
        "starts from random weights",
        "starts from adapter_gates's weights",
        "RANDOM START",
    ):
        assert part in text, part
    assert out.count("──\n") == 6
    assert out.count("RANDOM START") == 1  # the others have a parent by then


def test_captions_for_the_grid_come_from_the_data(tmp_path: Path):
    captions, images, *others = samples.find_examples(make_config(tmp_path, log={"samples": 3}), None)
    assert len(captions) == 3
    assert all(" " in caption for caption in captions)
    assert images is not None
    assert len(images) == 3  # what is really there, to stand below what is drawn
    assert others == [None] * 3
    prompts = make_config(tmp_path, log={"sample_prompts": ["a", "b"], "samples": 3})
    assert samples.find_examples(prompts, None) == samples.Examples(["a", "b"])


def test_grids_of_clip_show_the_pictures_of_the_data_above_what_is_drawn_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked: list[tuple[list[str], torch.Tensor]] = []

    def drawn(model: Any, captions: list[str], *, clip_embedding: torch.Tensor, **_: Any) -> torch.Tensor:
        asked.append((captions, clip_embedding))
        return torch.full((len(captions), 16, 16, 3), 7, dtype=torch.uint8)

    monkeypatch.setattr(samples, "draw", drawn)
    clip = FrozenClip("builtin:tiny")
    for source in ("image", "both"):
        asked.clear()
        settings = {"clip": {"source": source}, "log": {"samples_every": 1, "samples": 2}}
        rows: list[Row] = []
        with opened(make_config(tmp_path / source, **settings)) as run:
            monkeypatch.setattr(run.log, "pictures", lambda _, drawn, rows=rows: rows.extend(drawn))
            run.sampler.draw(1)
            captions, pictures = run.sampler.examples.captions, run.sampler.examples.pictures
        texts = [[*captions]] if source == "both" else []
        assert [told for told, _ in asked] == [*texts, ["", ""]]
        torch.testing.assert_close(asked[-1][1], clip.encode_image(pictures))
        if texts:
            torch.testing.assert_close(asked[0][1], clip.encode_text(captions))
        assert len(rows) == len(asked) + 1
        shown = rows[-2].images.float()
        wanted = pictures.float().unflatten(1, (16, 2)).unflatten(3, (16, 2)).mean((2, 4))
        torch.testing.assert_close(shown, wanted, atol=0.51, rtol=0)


@pytest.mark.parametrize("kind", ["upsample", "base-inpaint", "upsample-inpaint"])
def test_grids_show_what_the_model_is_given_its_result_and_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    log = {"samples_every": 1, "samples": 3, "sample_steps": 2, "sample_prompts": ["a", "b", "c"]}
    config = make_config(tmp_path, "base", model={"architecture": {**ARCHITECTURE, "kind": kind}}, log=log)
    rows: list[Row] = []
    with opened(config, shake) as run:
        monkeypatch.setattr(run.log, "pictures", lambda _, drawn: rows.extend(drawn))
        run.sampler.draw(1)
    result = rows[-2]
    assert result.labels == ["a", "b", "c"]
    assert [row.labels[0] for row in rows if row is not result] == [
        *["input"] * kind.startswith("upsample"),
        *["masked"] * kind.endswith("inpaint"),
        "original",
    ]
    assert {row.images.shape for row in rows} == {(3, 16, 16, 3)}
    if kind.endswith("inpaint"):
        masked, original = rows[-3].images, rows[-1].images
        known = (masked != 128).any(3)
        assert 0 < known.float().mean() < 1
        assert torch.equal(result.images[known], original[known])
        assert not torch.equal(result.images, original)


UPSAMPLE = {"preset": "upsample", "architecture": {}}


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"log": {"sample_images": ["a.png"]}}, "clip.source=both"),
        ({"log": {"sample_images": ["a.png"]}, "clip": {"source": "both"}, "model": UPSAMPLE}, "upsampler"),
    ],
)
def test_sample_images_that_would_do_nothing_are_refused(tmp_path: Path, settings: Any, part: str):
    with pytest.raises(ConfigError, match=part):
        make_config(tmp_path, **settings)


def test_grids_are_drawn_as_the_options_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}

    def drawn(model: Any, captions: list[str], **options: Any) -> torch.Tensor:
        asked.update(options)
        return torch.zeros(len(captions), 16, 16, 3, dtype=torch.uint8)

    monkeypatch.setattr(samples, "draw", drawn)
    options = {"samples_every": 2, "samples": 2, "sample_steps": 7, "guidance": 1.5}
    config = make_config(tmp_path, train={"steps": 3}, log=options, train_batch_size=2)
    train_phase(config)
    assert (asked["steps"], asked["guidance"]) == (7, 1.5)
    assert asked["clip_embedding"].shape == (2, 64)
    drawings = sorted(p.name for p in (tmp_path / "run" / "samples").iterdir())
    assert drawings == ["full-00000002.png", "full-00000003.png"]  # every second, and the last


# --- bad input ---


def fails(kind: type[GlideError], start: Callable[..., None], *paths: Path, sets: tuple[str, ...] = ()) -> str:
    with pytest.raises(kind) as caught:
        start(*paths, sets=sets)
    return str(caught.value)


def test_missing_and_empty_shards_are_named(tmp_path: Path, start: Callable[..., None]):
    path = write_config(tmp_path)
    (tmp_path / "train-000.tar").write_bytes(b"")
    message = fails(DataError, start, path, sets=(f"data.shards={tmp_path}/trian-{{000..003}}.tar",))
    assert f"{tmp_path}/trian-{{000..003}}.tar" in message
    assert "train-000.tar" in message  # what lies nearest
    assert "empty" in fails(DataError, start, path, sets=("data.shards=''",))
    assert "empty" in fails(DataError, start, path, sets=("data.shards=[]",))
    assert "train-000.tar" in fails(DataError, start, path, sets=(f"data.shards={tmp_path}/train-000.tar",))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_fewer_samples_than_a_batch_are_refused(tmp_path: Path, start: Callable[..., None]):
    message = fails(DataError, start, write_config(tmp_path), sets=("data.shapes_samples=3",))
    assert "3 samples" in message
    assert "batch of 4" in message


def test_mistakes_in_the_configuration_come_before_the_process_group(
    tmp_path: Path, start: Callable[..., None], monkeypatch: pytest.MonkeyPatch
):
    def refuse(_: float) -> None:
        raise AssertionError("the process group was started")

    monkeypatch.setattr(run_module, "start_process_group", refuse)
    path = write_config(tmp_path)
    assert "nearest known: 'steps'" in fails(ConfigError, start, path, sets=("train.stepz=1",))
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "use 3 or 6" in fails(ConfigError, start, path)
    (tmp_path / "bad.json").write_text('{"train_batch_size": 4,}')
    assert "line 1, column 24" in fails(ConfigError, start, tmp_path / "bad.json")


def test_clip_weights_of_another_width_are_refused(tmp_path: Path, start: Callable[..., None]):
    from glide_ds.model.clip import BUILTIN_WEIGHTS

    sets = ("clip.model=ViT-B/32", f"clip.weights={BUILTIN_WEIGHTS}")
    message = fails(WeightsError, start, write_config(tmp_path), sets=sets)
    assert "512" in message
    assert "64" in message


def test_an_adapter_for_another_encoder_is_refused(tmp_path: Path, start: Callable[..., None]):
    other = create_model(GlideConfig(**{**ARCHITECTURE, "clip_dim": 512}))
    write_state(tmp_path / "other.pt", other.state_dict())
    message = fails(WeightsError, start, write_config(tmp_path), sets=(f"model.weights={tmp_path}/other.pt",))
    assert "width 512" in message
    assert "width 64" in message
    assert "clip.model" in message


def test_an_upsamplers_file_is_refused_by_the_base_model(tmp_path: Path, start: Callable[..., None]):
    sizes = {**ARCHITECTURE, "kind": "upsample", "num_head_channels": 32}
    write_state(tmp_path / "upsample.pt", create_model(GlideConfig(**sizes)).state_dict())
    path = write_config(tmp_path, "base", model={"weights": str(tmp_path / "upsample.pt")})
    message = fails(WeightsError, start, path)
    assert "kind upsample (6 input channels), the model is base (3)" in message
    assert "base.pt" in message


def test_a_truncated_weight_file_is_refused(tmp_path: Path, start: Callable[..., None]):
    for name in ("base.pt", "base.safetensors"):
        write_state(tmp_path / name, create_model(GlideConfig(**ARCHITECTURE)).state_dict())
        os.truncate(tmp_path / name, (tmp_path / name).stat().st_size // 2)
        message = fails(
            WeightsError, start, write_config(tmp_path, "base"), sets=(f"model.weights={tmp_path / name}",)
        )
        assert name in message
        assert "truncated" in message


def test_a_weight_file_that_is_not_there_is_told(tmp_path: Path, start: Callable[..., None]):
    message = fails(WeightsError, start, write_config(tmp_path, "base"), sets=("model.weights=/no/base.pt",))
    assert "'/no/base.pt'" in message


@pytest.fixture
def photos(tmp_path: Path) -> str:
    return write_shard(tmp_path / "photos.tar", [good_sample(n) for n in range(8)])


@pytest.mark.parametrize("phase", ["adapter_gates", "full"])
def test_a_phase_without_its_parent_is_refused_on_real_data(
    tmp_path: Path, start: Callable[..., None], photos: str, phase: str
):
    path = write_config(tmp_path, phase, data={"shards": photos}, model={"weights": "openai"})
    message = fails(WeightsError, start, path)
    assert "train adapter_only first" in message
    assert str(tmp_path / "run") in message
    write_state(tmp_path / "base.pt", create_model(GlideConfig(**ARCHITECTURE)).state_dict())
    message = fails(WeightsError, start, path, sets=(f"model.weights={tmp_path}/base.pt",))
    assert "holds none" in message


def test_real_data_without_weights_is_refused(tmp_path: Path, start: Callable[..., None], photos: str):
    path = write_config(tmp_path, "base", data={"shards": photos}, model={"weights": "auto"})
    message = fails(WeightsError, start, path)
    for remedy in ("model.weights=/path/base.pt", "model.weights=openai", "model.weights=random"):
        assert remedy in message


def test_a_mix_is_real_data_and_named_by_share(
    tmp_path: Path, start: Callable[..., None], photos: str, capsys: pytest.CaptureFixture[str]
):
    mix = {"a": {"shards": photos, "weight": 3}, "b": {"shards": [photos], "weight": 1}}
    path = write_config(
        tmp_path, "base", data={"shards": "builtin:shapes", "mix": mix}, model={"weights": "auto"}
    )
    assert "is real data" in fails(WeightsError, start, path)
    with opened(make_config(tmp_path, "base", data={"mix": mix})) as run:
        assert len(next(run.source.batches(0))) == 4
    assert f"75% {photos}, 25% {photos}: 16 samples" in " ".join(capsys.readouterr().out.split())


def test_the_run_directory_of_another_configuration_is_refused(tmp_path: Path, start: Callable[..., None]):
    path = write_config(tmp_path, "adapter_only", train={"steps": 1}, train_batch_size=2)
    start(path)
    message = fails(ConfigError, start, path, sets=("optimizer.params.lr=0.5", "train.seed=4"))
    assert "optimizer.params.lr: 0.001 → 0.5" in message
    assert "train.seed: 0 → 4" in message
    assert str(tmp_path / "run") in message
    child = write_config(tmp_path, "adapter_gates", train_batch_size=2)
    assert "clip_tokens: 2 → 3" in fails(ConfigError, start, child, sets=("model.architecture.clip_tokens=3",))
    assert "clip.model" in fails(ConfigError, start, child, sets=("clip.model=ViT-B/32",))
    # What only says where, how often or how the work is spread may differ.
    start(path, sets=("log.every=7", "checkpoint.keep=1", "data.workers=0", "train.steps=2"))
    assert metrics(tmp_path)[-1]["step"] == 2


@pytest.mark.parametrize("parent", ["file", "proc"])
def test_a_run_directory_that_can_not_be_written_is_refused(
    tmp_path: Path, start: Callable[..., None], parent: str
):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "run" if parent == "file" else Path("/proc/glide_ds/run")
    message = fails(ConfigError, start, write_config(tmp_path), sets=(f"run.dir={folder}",))
    assert str(folder) in message
    assert "can't be written" in message


def test_a_run_json_that_is_damaged_is_refused(tmp_path: Path, start: Callable[..., None]):
    path = write_config(tmp_path, train={"steps": 1}, train_batch_size=2)
    start(path)
    os.truncate(tmp_path / "run" / "run.json", 40)
    assert "run.json can't be read" in fails(ConfigError, start, path)


# --- bad samples ---


def png(pixels: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(out, "PNG")
    return out.getvalue()


def good_sample(number: int) -> dict[str, bytes]:
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3))
    return {"png": png(pixels), "txt": f"noise number {number}".encode()}


def bomb() -> bytes:
    """The head of a PNG that claims 100 megapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 10_000, 10_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


BAD = {
    "corrupt image": {"png": good_sample(0)["png"][:200], "txt": b"half a picture"},
    "unknown image format": {"png": b"no picture at all", "txt": b"text"},
    "empty caption": {"png": good_sample(1)["png"], "txt": b"  \n"},
    "caption not text": {"png": good_sample(2)["png"], "txt": b"\xff\x01\x02\x81"},
    "image too small": {"png": png(np.zeros((1, 1, 3))), "txt": b"one pixel"},
    "image too large": {"png": bomb(), "txt": b"a bomb"},
}


def test_real_shards_are_trained_on_and_bad_samples_counted(
    tmp_path: Path, start: Callable[..., None], capsys: pytest.CaptureFixture[str]
):
    members = [*(good_sample(n) for n in range(10)), *BAD.values()]
    shards = write_shard(tmp_path / "mixed.tar", members)
    more = {"train": {"steps": 4}, "model": {"weights": "random"}, "checkpoint": {"every": 3}}
    path = write_config(tmp_path, "adapter_only", data={"shards": shards}, **more)
    start(path)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4]
    ids = {i for line in trace(tmp_path) for i in line["sample_ids"]}
    assert ids <= set(range(10))  # none of the bad
    earlier, told = (line for line in capsys.readouterr().out.splitlines() if line.startswith("data: "))
    assert earlier.startswith("data: 12 samples delivered")  # at every checkpoint: step 3
    report = json.loads((tmp_path / "run" / "data-adapter_only.json").read_text())
    assert report["delivered"] == 16
    for cause in BAD:  # an epoch of 16 samples was read
        assert f"{cause} " in told, told
        assert report["skipped"][cause] >= 1


def test_embeddings_of_a_store_condition_the_training(tmp_path: Path, photos: str):
    losses = []
    for value in (0.0, 1.0):
        store, shards = tmp_path / f"clip{value}", open_shards(photos)
        rows = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float16) + np.float16(10 * value)
        hashes = [text_hash(shards.read(n)["txt"].decode()) for n in range(8)]
        encoder, weights = Encoder("builtin:tiny", "openai", "text"), weights_hash("builtin:tiny", "openai")
        note = StoreNote(encoder, weights, shards.fingerprints[0], "", 8, 64, missing=0)
        write_store(store, shards.urls[0], rows, np.array(hashes, np.uint64), note)
        data = {"shards": photos, "clip_store": str(store)}
        with opened(make_config(tmp_path / str(value), data=data), shake) as run:
            run.model.clip_gate_offset.fill_(10.0)
            batch = next(run.source.batches(0))
            assert batch.clip is not None
            assert np.array_equal(batch.clip.numpy(), rows[batch.sample_ids.numpy()])
            losses.append(Objective(run.config, run.diffusion, run.engine, run.clip)(batch, 0).mse)
    assert not torch.allclose(*losses)


def test_nothing_but_bad_samples_is_an_error(tmp_path: Path, start: Callable[..., None]):
    shards = write_shard(tmp_path / "bad.tar", [BAD["corrupt image"]] * 8)
    path = write_config(tmp_path, "adapter_only", data={"shards": shards}, model={"weights": "random"})
    message = fails(DataError, start, path)
    assert "no usable sample" in message
    assert "corrupt image 256" in message
    assert not list((tmp_path / "run").glob("phase1/step-*"))


def test_shards_that_moved_are_the_same_data(tmp_path: Path, group: torch.device):
    shapes.write_shards(tmp_path / "here", 16, 8, 16)
    sections: dict[str, Any] = {"checkpoint": {"every": 2}, "validation": {"every": 0}}
    train_phase(make_config(tmp_path, data={"shards": str(tmp_path / "here")}, train={"steps": 2}, **sections))
    (tmp_path / "here").rename(tmp_path / "there")
    config = make_config(tmp_path, data={"shards": str(tmp_path / "there")}, train={"steps": 4}, **sections)
    with opened(config) as run:
        assert run.start.step == 2
    shapes.write_shards(tmp_path / "other", 16, 8, 16, seed=9, start=500)
    other = make_config(tmp_path, data={"shards": str(tmp_path / "other")}, train={"steps": 4}, **sections)
    with pytest.raises(DataError, match="other samples than when"), opened(other):
        pass


def test_the_log_is_closed_whatever_ends_the_phase(tmp_path: Path, group: torch.device):
    def fails() -> None:
        with opened(make_config(tmp_path, data={"trace": True})) as run:
            logs.append(run.log)
            raise ZeroDivisionError

    logs: list[RunLog] = []
    with pytest.raises(ZeroDivisionError):
        fails()
    for output in (logs[0].metrics, logs[0].trace):
        assert output is not None
        assert output.file.closed


# --- environment ---


def test_ranks_are_read_from_any_launcher(monkeypatch: pytest.MonkeyPatch):
    from glide_ds.environment import read_environment

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert read_environment() == (0, 1)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "SLURM_PROCID": "3",
        "SLURM_NTASKS": "8",
        "SLURM_LOCALID": "1",
        "MASTER_ADDR": "node0",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert read_environment() == (3, 8)
    assert os.environ["LOCAL_RANK"] == "1"
    monkeypatch.delenv("MASTER_PORT")
    with pytest.raises(ConfigError, match="MASTER_PORT"):
        read_environment()
    monkeypatch.undo()


# --- options of the data, each with something that it changes ---


def bordered(number: int) -> dict[str, bytes]:
    pixels = np.pad(
        np.random.default_rng(number).integers(0, 200, (20, 24, 3)),
        ((4, 4), (4, 4), (0, 0)),
        constant_values=255,
    )
    return {"png": png(pixels), "txt": f"noise number {number}".encode()}


def what_is_read(folder: Path, shards: str, batches: int = 2, **options: Any) -> Any:
    """Everything of the first batches that data options decide, or the error that they end in."""
    config = make_config(folder, "base", data={"shards": shards, **options})
    try:
        source = setup.open_source(config, config.batch_arithmetic(1), 0)
        stream = source.batches(0)
        read = [next(stream) for _ in range(batches)]
    except DataError as error:
        return str(error)
    return source.batches_per_epoch, [
        [b.sample_ids.tolist(), b.images.tolist(), b.tokens.tolist(), b.drop_clip.tolist()] for b in read
    ]


@pytest.mark.parametrize(
    ("option", "part"),
    [
        ({"shuffle": False}, 0),
        ({"crop": "pad"}, 1),
        ({"trim": False}, 1),
        ({"flip": 1.0}, 1),
        ({"drop_caption": 0.9}, 2),
        ({"drop_both": 0.9}, 3),
    ],
    ids=str,
)
def test_an_option_changes_what_a_batch_holds(tmp_path: Path, option: dict[str, Any], part: int):
    shards = write_shard(tmp_path / "p.tar", [bordered(n) for n in range(10)])
    epoch, default = what_is_read(tmp_path, shards)
    epoch_now, changed = what_is_read(tmp_path, shards, **option)
    assert epoch_now == epoch
    assert [batch[part] for batch in changed] != [batch[part] for batch in default]


def test_options_say_which_samples_can_be_used(tmp_path: Path):
    shards = write_shard(tmp_path / "p.tar", [*(bordered(n) for n in range(10)), BAD["corrupt image"]])
    assert what_is_read(tmp_path, shards)[0] == 2
    assert what_is_read(tmp_path, shards, drop_last=False)[0] == 3
    assert "image too small" in what_is_read(tmp_path, shards, min_side=40)
    assert "image too large" in what_is_read(tmp_path, shards, max_pixels=100)
    assert "record" in what_is_read(tmp_path, shards, filter={"min_size": 4}) or "filter" in what_is_read(
        tmp_path, shards, filter={"min_size": 4}
    )
    assert what_is_read(tmp_path, shards, batches=60)
    assert "data.max_bad_fraction=0.01" in what_is_read(tmp_path, shards, batches=60, max_bad_fraction=0.01)


def test_options_place_the_index_and_salvage_a_damaged_tar(tmp_path: Path):
    shards = write_shard(tmp_path / "p.tar", [bordered(n) for n in range(10)])
    what_is_read(tmp_path, shards, index_dir=str(tmp_path / "index"))
    assert list((tmp_path / "index").rglob("*"))
    os.truncate(shards, os.path.getsize(shards) // 2)
    for leftover in tmp_path.glob("*.tar.*"):
        leftover.unlink()
    index = {"index_dir": str(tmp_path / "other")}
    assert "damaged" in what_is_read(tmp_path, shards, **index)
    assert what_is_read(tmp_path, shards, damaged_shards="salvage", **index)[0] == 1


def test_options_reach_the_cache_of_remote_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, photos: str):
    from glide_ds.data import samples

    given: list[Any] = []
    storage = samples.Storage
    monkeypatch.setattr(samples, "Storage", lambda cache: (given.append(cache), storage(cache))[1])
    what_is_read(tmp_path, photos, cache_dir=str(tmp_path / "blocks"), cache_gb=2.0)
    assert given == [samples.CacheOptions(str(tmp_path / "blocks"), 2 * 2**30)]


def test_a_finished_run_says_so_and_what_comes_next(trained: Path):
    short, longer = (make_config(trained, train={"steps": steps}) for steps in (5, 6))
    assert (is_finished(short), is_finished(longer)) == (True, False)
    assert re.search(r"finished before this start: all 5 steps .*glide-ds sample", told_end([short], True))
    assert re.search(r"finished: step 5 .*Next: glide-ds sample .*glide-ds export", told_end([short], False))
