"""Updates that are no good: skipped on all ranks, rolled back, or the end of the run, and what is written of it."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from train_kit import (
    batch_ids,
    make_config,
    metrics,
    poisoned,
    read_lines,
    shake,
    state_of,
    trace,
    train_phase,
)

from glide_ds.config import Config
from glide_ds.errors import UnstableError
from glide_ds.training import run as run_module
from glide_ds.training.checkpoint import commit as checkpoint
from glide_ds.training.checkpoint.commit import Owner, committed
from glide_ds.training.faults.watchdog import Watch
from glide_ds.training.logging import JsonLines, RunLog, finite
from glide_ds.training.stability import Guard, LossWindow
from glide_ds.training.zero.ema import Ema, read_average
from glide_ds.training.zero.snapshot import Snapshot
from glide_ds.training.zero.stored import model_state

pytestmark = pytest.mark.usefixtures("group")
CPU = torch.device("cpu")
GUARDED: dict[str, Any] = {
    "train": {"steps": 12},
    "data": {"shapes_samples": 400},
    "checkpoint": {"every": 3, "keep": 0},
    "stability": {"window": 8, "spike_factor": 50.0},
}


def guarded(folder: Path, **sections: Any) -> Config:
    laid = {name: {**GUARDED.get(name, {}), **values} for name, values in sections.items()}
    return make_config(folder, **(GUARDED | laid))


def run_phase(config: Config) -> torch.nn.Module:
    return run_module.run_phase(config, CPU, None, Watch())[0]


def skipped(folder: Path) -> list[dict[str, Any]]:
    return read_lines(folder / "run" / "skipped.jsonl")


# --- what is a spike ---


def window(losses: list[float], size: int = 8, factor: float = 5.0) -> LossWindow:
    return LossWindow(size, factor, losses, CPU)


def test_the_limit_is_the_median_and_so_many_deviations():
    limit = float(window([1.0, 1.1, 0.9, 1.2, 0.8]).limit())
    assert limit == pytest.approx(1.0 + 5 * 1.4826 * 0.1)
    # An outlier that was let in moves neither median nor spread by much.
    assert float(window([1.0, 1.1, 0.9, 1.2, 0.8, 1e6]).limit()) < 3


def test_nothing_is_judged_before_half_of_the_window_is_filled():
    assert float(window([1.0, 1.1, 0.9]).limit()) == math.inf
    assert float(window([1.0, 1.1, 0.9, 1.0]).limit()) < math.inf


def test_losses_that_hardly_differ_make_no_spike_of_nothing():
    assert float(window([1.0] * 8).limit()) == pytest.approx(1.1)


def test_the_window_keeps_the_last_accepted_losses_and_comes_back_from_a_manifest():
    kept = window([])
    for number in range(11):
        kept.add(torch.tensor(float(number), dtype=torch.float64), torch.tensor(number != 9))
    assert kept.read() == (2, 3, 4, 5, 6, 7, 8, 10)
    again = window(list(json.loads(json.dumps(kept.read()))))
    assert again.read() == kept.read()
    assert torch.equal(again.limit(), kept.limit())


# --- what is written ---


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path: Path):
    values = {"phase": "full", "step": 1, "loss": math.nan, "by": {"a": [math.inf, 1.0]}}
    output = JsonLines(tmp_path / "m.jsonl", "full", 0)
    output.write(values)
    output.close()
    assert json.loads((tmp_path / "m.jsonl").read_text()) == finite(values)
    assert finite(values) == {"phase": "full", "step": 1, "loss": None, "by": {"a": [None, 1.0]}}


def test_what_went_before_a_rollback_is_kept_as_history(tmp_path: Path):
    path = tmp_path / "skipped.jsonl"
    lines = [{"phase": "full", "step": step, "rollbacks": n} for n, step in ((0, 9), (1, 4), (1, 7))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    JsonLines(path, "full", 5, rollbacks=1).close()
    assert read_lines(path) == lines[:2]


@pytest.mark.parametrize(
    ("before", "target", "left"), [(7, 6, [3, 6]), (6, 3, [3]), (3, 3, [3]), (20, 9, [3, 6, 9])]
)
def test_rewinding_goes_before_the_trouble_or_as_far_as_it_can(
    tmp_path: Path, before: int, target: int, left: list[int]
):
    for step in (3, 6, 9):
        folder = tmp_path / f"step-{step:08d}"
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps({"run": "mine", "step": step, "files": {}}))
    assert checkpoint.rewind(tmp_path, before, Owner("mine")) == target
    assert (tmp_path / "LAST").readlink().name == f"step-{target:08d}"
    assert [c.step for c in reversed(committed(tmp_path))] == left
    assert sorted(int(p.name[5:]) for p in tmp_path.glob("step-*")) == left


def test_rewinding_a_phase_without_checkpoints_goes_to_its_beginning(tmp_path: Path):
    assert checkpoint.rewind(tmp_path, 7, Owner("mine")) == 0


# --- injected ---


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory, group: torch.device) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    run_phase(guarded(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("factor", "cause"), [(math.nan, "the loss is not finite"), (1e3, "loss spike")], ids=["nan", "spike"]
)
def test_a_bad_batch_is_skipped_counted_and_named(
    tmp_path: Path, clean: Path, capsys: pytest.CaptureFixture[str], factor: float, cause: str
):
    config = guarded(tmp_path, log={"every": 5, "tensorboard": True})
    with poisoned(config, {6: factor}):
        model = run_phase(config)
    (line,) = skipped(tmp_path)
    assert (line["step"], line["cause"], line["phase"]) == (7, cause, "full")
    assert line["sample_ids"] == batch_ids(config, 6) == trace(tmp_path)[6]["sample_ids"]
    assert len(line["losses"]) == 4
    lines = {line["step"]: line for line in metrics(tmp_path)}
    assert list(lines) == [1, 5, 7, 10, 12]  # the skipped update is recorded though it was not its turn
    assert [line["skipped"] for line in lines.values()] == [0, 0, 1, 1, 1]
    assert (lines[7]["loss"] is None) == math.isnan(factor)
    before = {line["step"]: line for line in metrics(clean)}
    for step, line in lines.items():
        assert line["lr"] == before[step]["lr"]  # the rate belongs to the step, skipped or not
        assert line["loss"] is None or math.isfinite(line["loss"])
    assert lines[5]["loss"] == before[5]["loss"]
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
    out = capsys.readouterr().out
    assert f"step 7: skipped, {cause}" in out
    assert committed(tmp_path / "run" / "phase3")[0].manifest["stability"]["skipped"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", [{}, {"bf16": {"enabled": True}}], ids=["fp32", "bf16"])
def test_a_skipped_update_changes_nothing_and_the_next_one_is_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: dict[str, Any]
):
    config, states, settle = guarded(tmp_path, train={"steps": 3}, **precision), [], Guard.settle

    def watched(self: Guard, *arguments: Any) -> bool:
        states.append(state_of(self.engine.module))
        return settle(self, *arguments)

    monkeypatch.setattr(Guard, "settle", watched)
    with poisoned(config, {1: math.nan}):
        train_phase(config, shake)
    first, second, third = states
    assert all(torch.equal(second[name], tensor) for name, tensor in first.items())
    assert all(bool(tensor.isfinite().all()) for tensor in third.values())
    assert not torch.equal(third["out.2.weight"], second["out.2.weight"])
    assert [line["loss"] is None for line in metrics(tmp_path)] == [False, True, False]


class Crash(Exception):  # noqa: N818 - stands for a kill
    pass


@pytest.mark.slow
def test_repeated_spikes_roll_back_past_their_data_at_a_lower_rate_and_a_kill_changes_nothing(
    tmp_path: Path, clean: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    bad = {6: 1e3, 7: math.nan, 8: 1e3}
    whole, parts = guarded(tmp_path / "a"), guarded(tmp_path / "b")
    with poisoned(whole, bad):
        straight = state_of(run_phase(whole))
    out = capsys.readouterr().out
    assert "step 9: 3 of the last 8 updates were skipped; back to step 6, past global batches 7 to 9" in out
    lines, before = metrics(tmp_path / "a"), metrics(clean)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["loss"] for line in lines[:6]] == [line["loss"] for line in before[:6]]
    assert [line["rollbacks"] for line in lines] == [0] * 6 + [1] * 6
    for line, other in zip(lines[6:], before[6:], strict=True):
        assert line["lr"] == pytest.approx(other["lr"] / 2)
    ids = [line["sample_ids"] for line in trace(tmp_path / "a")]
    assert ids == [batch_ids(whole, n) for n in (0, 1, 2, 3, 4, 5, 9, 10, 11, 12, 13, 14)]
    timesteps = [line["timesteps"] for line in trace(tmp_path / "a")]
    assert timesteps == [line["timesteps"] for line in trace(clean)]  # they belong to the step
    assert [line["cause"] for line in skipped(tmp_path / "a")] == [
        "loss spike",
        "the loss is not finite",
        "loss spike",
        "rollback",
    ]

    log_step, crashes = RunLog.step, [(0, 8), (1, 8), (1, 10)]  # (rollbacks, step): each once

    def logged(self: RunLog, done: int, values: Any, recorded: bool) -> None:
        log_step(self, done, values, recorded)
        if crashes and (values["rollbacks"], done) == crashes[0]:
            del crashes[0]
            raise Crash

    monkeypatch.setattr(RunLog, "step", logged)
    with poisoned(parts, bad):
        while crashes:
            with pytest.raises(Crash):
                run_phase(parts)
        resumed = state_of(run_phase(parts))
    assert metrics(tmp_path / "b", steady=True) == metrics(tmp_path / "a", steady=True)
    assert trace(tmp_path / "b") == trace(tmp_path / "a")
    assert skipped(tmp_path / "b") == skipped(tmp_path / "a")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in straight.items())


@pytest.mark.slow
def test_a_rollback_waits_for_the_save_under_way_and_takes_the_average_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    averages: dict[str, list[torch.Tensor]] = {}
    update, write = Ema.update, Snapshot.write

    def updated(self: Ema) -> None:
        update(self)
        averages[name] = [part.clone() for part in self.parts]

    def slow(self: Snapshot, target: Path) -> dict[str, dict[str, Any]]:
        time.sleep(1.0)  # training is done with the bad batches by then
        return write(self, target)

    monkeypatch.setattr(Ema, "update", updated)
    for name in ("synchronous", "background"):
        if name == "background":
            monkeypatch.setattr(Snapshot, "write", slow)
        checkpoint_config = {"async_save": name == "background"}
        config = guarded(tmp_path / name, ema={"decay": 0.9, "warmup": 3}, checkpoint=checkpoint_config)
        with poisoned(config, dict.fromkeys((6, 7, 8), math.nan)):
            run_phase(config)
    one, other = tmp_path / "synchronous", tmp_path / "background"
    assert [(line["step"], line.get("to")) for line in skipped(other)] == [
        (7, None),
        (8, None),
        (9, None),
        (9, 6),
    ]
    assert metrics(other, steady=True) == metrics(one, steady=True)
    ends = [committed(folder / "run" / "phase3") for folder in (one, other)]
    assert [[made.step for made in end] for end in ends] == [[12, 9, 6, 3]] * 2
    saved = [read_average(end[0]) for end in ends]
    assert [updates for _, updates in saved] == [12, 12]
    for parts in zip(saved[0][0][0], saved[1][0][0], averages["background"], strict=True):
        assert torch.equal(parts[0], parts[1])
        assert torch.equal(parts[0], parts[2])


@pytest.mark.slow
def test_rollbacks_without_end_stop_the_run_with_a_report(tmp_path: Path):
    # No checkpoint yet: the first rollback goes to the phase's beginning, past the batches that were bad.
    options = {"skip_limit": 2, "max_rollbacks": 1, "lr_cut": 0.25}
    config = guarded(tmp_path, stability=options, checkpoint={"every": 100})
    with (
        poisoned(config, {1: math.nan, 2: math.nan, 4: math.nan, 6: math.nan}),
        pytest.raises(UnstableError, match="max_rollbacks = 1") as caught,
    ):
        run_phase(config)
    assert caught.value.on_all_ranks
    assert [(line["step"], line["rollbacks"], line["cause"]) for line in skipped(tmp_path)] == [
        (2, 0, "the loss is not finite"),
        (3, 0, "the loss is not finite"),
        (3, 0, "rollback"),
        (2, 1, "the loss is not finite"),
        (4, 1, "the loss is not finite"),
    ]
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert {line["lr_cut"] for line in lines} == {0.25}
    report = json.loads((tmp_path / "run" / "stopped-report.json").read_text())
    assert (report["step"], report["phase"], report["rollbacks"]) == (4, "full", 1)
    assert report["last_skipped"][-1]["sample_ids"] == batch_ids(config, 6)
    assert report["reason"] in str(caught.value)


@pytest.mark.slow
def test_a_limit_of_zero_skips_for_ever(tmp_path: Path):
    config = guarded(tmp_path, stability={"skip_limit": 0})
    with poisoned(config, dict.fromkeys(range(3, 9), math.nan)):
        run_phase(config)
    assert metrics(tmp_path)[-1]["skipped"] == 6
    assert metrics(tmp_path)[-1]["rollbacks"] == 0


@pytest.mark.slow
def test_watching_changes_nothing_where_nothing_happens(tmp_path: Path, clean: Path):
    config = guarded(tmp_path, stability={"spike_factor": 0.0})
    train_phase(config)
    assert metrics(tmp_path, steady=True) == metrics(clean, steady=True)
    one, other = (committed(folder / "run" / "phase3")[0] for folder in (tmp_path, clean))
    state = model_state(one)
    assert all(torch.equal(state[name], tensor) for name, tensor in model_state(other).items())
    assert one.manifest["stability"]["losses"] == []
    assert len(other.manifest["stability"]["losses"]) == 8
