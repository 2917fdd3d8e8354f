"""Validation on held-out samples, and the stop where the pretrained ability is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from train_kit import make_config, metrics, opened, shake, train_phase, write_shard

from glide_ds.data import shapes
from glide_ds.data.packing.pack import pack
from glide_ds.errors import ConfigError, UnstableError
from glide_ds.inference.held_out import Figures, Gain
from glide_ds.training import loop
from glide_ds.training.checkpoint.commit import committed
from glide_ds.training.loop import train
from glide_ds.training.objective import Losses, Objective
from glide_ds.training.validation import Best, held_out_shards, open_held_out, with_found
from glide_ds.types import Batch

pytestmark = pytest.mark.usefixtures("group")
VALIDATED: dict[str, Any] = {
    "train": {"steps": 5},
    "validation": {"every": 2, "samples": 12},
    "log": {"every": 4},
    "checkpoint": {"every": 2, "keep": 0},
}


def test_the_held_out_set_is_the_shapes_own_or_named_or_none(tmp_path: Path):
    def chosen(**sections: Any) -> Any:
        return held_out_shards(make_config(tmp_path, **sections))

    assert chosen() is None  # validation.every = 0
    assert chosen(validation={"every": 2}) == "builtin:shapes-heldout"
    assert chosen(validation={"every": 2}, data={"shards": "a.tar"}) is None
    assert chosen(validation={"every": 2, "shards": "v.tar"}, data={"shards": "a.tar"}) == "v.tar"


def test_held_out_samples_come_in_their_order_and_unaugmented(tmp_path: Path):
    config = make_config(tmp_path, validation={"every": 1, "samples": 8}, data={"flip": 1.0, "drop_both": 0.9})
    source = open_held_out(config, "builtin:shapes-heldout")
    for number in (0, 5):
        image, caption = shapes.draw(shapes.HELD_OUT + number, 16)
        batch = source.one(number)
        assert torch.equal(batch.images[0], torch.from_numpy(image))
        assert batch.captions == (caption,)
        assert not batch.drop_clip.any()


def test_more_samples_than_the_set_holds_are_refused(tmp_path: Path):
    shard = write_shard(tmp_path / "v.tar", [_member(n) for n in range(3)])
    config = make_config(tmp_path, validation={"every": 1, "samples": 8, "shards": shard})
    with pytest.raises(ConfigError, match=r"8 held-out samples are wanted.* hold 3; set validation\.samples=3"):
        open_held_out(config, shard)


def _member(number: int) -> dict[str, bytes]:
    import io

    from PIL import Image

    file = io.BytesIO()
    image, caption = shapes.draw(number, 16)
    Image.fromarray(image).save(file, "PNG")
    return {"png": file.getvalue(), "txt": caption.encode()}


@pytest.mark.slow
def test_figures_are_logged_and_change_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = make_config(tmp_path / "a", **VALIDATED)
    train_phase(config, shake)
    out = capsys.readouterr().out
    assert "validation before training: loss " in out
    assert "validation at step 2: loss " in out
    lines = metrics(tmp_path / "a", steady=True)
    assert [line["step"] for line in lines] == [1, 2, 4, 5]  # the first, validated, validated, the last
    assert ["validation" in line for line in lines] == [False, True, True, True]
    for line in lines[1:]:
        found = line["validation"]
        assert found["loss_by_quartile"].keys() == {"q1", "q2", "q3", "q4"}
        assert found["loss"] == pytest.approx(sum(found["loss_by_quartile"].values()) / 4)
        assert found["loss"] != found["loss_clip_off"]
        assert found["gain_with_caption"] != found["gain_without_caption"]
        assert found["loss_clip_off_start"] == lines[1]["validation"]["loss_clip_off_start"]
    manifest = committed(tmp_path / "a" / "run" / "phase3")[0].manifest
    assert manifest["validation"]["latest"] == lines[-1]["validation"]
    assert manifest["validation_loss"] == lines[-1]["validation"]["loss"]  # the best checkpoint is chosen by it

    train_phase(make_config(tmp_path / "b", **VALIDATED | {"validation": {"every": 0}}), shake)
    for line in metrics(tmp_path / "b", steady=True):
        validated = next(other for other in lines if other["step"] == line["step"])
        assert line == {key: value for key, value in validated.items() if key != "validation"}


@pytest.mark.slow
def test_a_resumed_run_measures_what_the_uninterrupted_one_does(tmp_path: Path):
    whole, parts = make_config(tmp_path / "a", **VALIDATED), make_config(tmp_path / "b", **VALIDATED)
    train_phase(whole, shake)
    train_phase(make_config(tmp_path / "b", **VALIDATED | {"train": {"steps": 2}}), shake)
    with opened(parts) as run:
        assert run.validation.baseline is not None  # of the pretrained model, out of the manifest
        train(run)
    # The short run's learning rate ended sooner, so only what is measured before is the same.
    first, again = metrics(tmp_path / "a")[1], metrics(tmp_path / "b")[1]
    assert again["validation"]["loss_clip_off_start"] == first["validation"]["loss_clip_off_start"]
    assert metrics(tmp_path / "b")[-1]["validation"]["loss_clip_off_start"] == run.validation.baseline


def test_a_baseline_that_is_first_measured_on_a_resume_is_not_said_to_be_from_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train_phase(make_config(tmp_path, train={"steps": 2}), shake)
    capsys.readouterr()
    validated = {"train": {"steps": 4}, "validation": {"every": 4, "samples": 4}}
    with opened(make_config(tmp_path, **validated)) as run:
        run.validation.begin()
    out = capsys.readouterr().out
    assert "validation at step 2, first measured there, loss " in out
    assert "before training" not in out


@pytest.mark.parametrize(
    ("figures", "since"),
    [
        ([(1.0, 0.1), (0.9, 0.0), (0.8, 0.2)], [0, 0, 0]),
        ([(1.0, 0.1), (1.0, 0.1), (1.1, 0.0)], [0, 1, 2]),
        ([(1.0, 0.1), (1.1, 0.2), (1.1, 0.1), (0.9, 0.0)], [0, 0, 1, 0]),  # a gain alone counts
        ([(1.0, None), (0.9, None), (0.95, None)], [0, 0, 1]),
        ([(float("nan"), None), (float("nan"), None)], [1, 2]),
    ],
)
def test_what_betters_nothing_is_counted(figures: list[Any], since: list[int]):
    best, counted = Best(), []
    for loss, gain in figures:
        both = Gain(gain, 0.0) if gain is not None else None
        best = best.after(Figures(loss, loss, {}, gain_with_caption=None, gain_without_caption=both))
        counted.append(best.since)
        assert Best(**json.loads(json.dumps(best.facts(), allow_nan=False))) == best  # as a manifest keeps it
    assert counted == since


def test_a_phase_ends_where_nothing_has_improved_and_a_resume_does_not_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    frozen: dict[str, Any] = {
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-30, "weight_decay": 0.0}},
        "train": {"steps": 9},
        "validation": {"every": 2, "samples": 4, "patience": 2},
    }
    train_phase(make_config(tmp_path, "base", **frozen))
    told = "the phase ends at step 6: the last 2 validations bettered nothing (validation.patience = 2)"
    assert told in capsys.readouterr().out
    assert committed(tmp_path / "run" / "base")[0].step == 6
    train_phase(make_config(tmp_path, "base", **frozen))
    assert told in capsys.readouterr().out
    assert metrics(tmp_path)[-1]["step"] == 6
    patient = {**frozen, "validation": {"every": 2, "samples": 4, "patience": 3}}
    train_phase(make_config(tmp_path, "base", **patient))
    assert "the phase ends at step 8" in capsys.readouterr().out
    assert metrics(tmp_path)[-1]["validation"]["since_best"] == 3


@pytest.mark.slow
def test_the_baseline_is_the_first_phases_and_a_drift_from_it_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train_phase(make_config(tmp_path, "adapter_gates", **VALIDATED), shake)
    before = committed(tmp_path / "run" / "phase2")[0].manifest["validation"]["baseline"]

    class Backwards(Objective):
        """Unlearns."""

        def __call__(self, batch: Batch, step: int) -> Losses:
            losses = super().__call__(batch, step)
            return losses._replace(total=-losses.total)

    monkeypatch.setattr(loop, "Objective", Backwards)
    sections = VALIDATED | {"train": {"steps": 40}, "checkpoint": {"every": 100, "keep": 0}}
    config = make_config(tmp_path, **sections)
    with pytest.raises(UnstableError, match=r"validation\.max_degradation = 0\.1") as caught:
        train_phase(config)
    assert caught.value.exit_code == 3
    report = json.loads((tmp_path / "run" / "stopped-report.json").read_text())
    measured = [line for line in metrics(tmp_path) if line["phase"] == "full" and "validation" in line]
    assert {line["validation"]["loss_clip_off_start"] for line in measured} == {before}
    worse = [line["validation"]["loss_clip_off"] > 1.1 * before for line in measured]
    assert worse == [False] * (len(worse) - 1) + [True]
    assert committed(tmp_path / "run" / "phase3")[0].step == report["step"] == measured[-1]["step"] < 40
    allowed = sections | {"validation": {"every": 2, "samples": 12, "max_degradation": 0.0}}
    allowed["train"] = {"steps": report["step"] + 2}
    train_phase(make_config(tmp_path, **allowed))  # goes on where a person says so
    assert metrics(tmp_path)[-1]["step"] == report["step"] + 2
    assert not (tmp_path / "run" / "stopped-report.json").exists()


def test_real_shards_without_held_out_ones_are_not_validated_and_told_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shard = write_shard(tmp_path / "a.tar", [_member(n) for n in range(4)])
    config = make_config(tmp_path, validation={"every": 1}, data={"shards": shard})
    with opened(config) as run:
        run.validation.begin()
        assert run.validation.held_out is None
    assert "validation is off: data.shards is not built in" in capsys.readouterr().out


def test_held_out_shards_beside_the_data_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    photos, out = tmp_path / "photos", tmp_path / "shards"
    photos.mkdir()
    for n in range(12):
        Image.effect_noise((16, 16), n + 1).save(photos / f"{n}.png")
        (photos / f"{n}.txt").write_text(f"noise {n}")
    held = pack(photos, out, hold_out=0.4)["held_out"]["samples"]
    config = make_config(tmp_path, validation={"every": 1}, data={"shards": str(out / "*.tar")})
    with opened(config) as run:
        run.validation.begin()
        assert run.validation.held_out is not None
        assert run.validation.identity["samples"] == held > 0
        assert run.config.validation.shards is None  # the run's value stays what was asked for
    assert f"validation on {held} held-out samples of {out / 'held-out'}" in capsys.readouterr().out
    asked = make_config(tmp_path, validation={"every": 0}, data={"shards": str(out / "*.tar")})
    assert with_found(asked) is asked


def test_held_out_shapes_are_drawn_in_every_way_and_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    settings = {"every": 2, "samples": 4, "drawn": 3}
    sections = {"validation": settings, "log": {"sample_steps": 2, "samples_every": 0}, "train": {"steps": 2}}
    train_phase(make_config(tmp_path, **sections))
    (measured,) = [line["validation"] for line in metrics(tmp_path) if "validation" in line]
    for name in ("score", "score_caption_only", "score_clip_text", "score_clip_image", "score_off"):
        assert measured[name].keys() == {"count", "colour", "shape", "position"}
        assert measured[name]["count"] == 3
    out = capsys.readouterr().out
    assert "3 drawn, CLIP alone, by picture: colours" in out
    with pytest.raises(ConfigError, match="only shapes have a judge"):
        make_config(tmp_path, validation=settings, data={"shards": "a.tar"})
