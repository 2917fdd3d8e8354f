"""The average of the weights: its formula, what it costs nothing of, and where it is used."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from train_kit import document, make_config, metrics, opened, shake, state_of

from glide_ds.commands.export import export
from glide_ds.commands.load import find_checkpoint
from glide_ds.config import Config, EmaConfig
from glide_ds.errors import CheckpointError
from glide_ds.model.tensor_files import read_state
from glide_ds.training import samples
from glide_ds.training.checkpoint.commit import AVERAGES, Owner, commit, committed, prepare, verify
from glide_ds.training.loop import train
from glide_ds.training.setup import PhaseRun, glide_config
from glide_ds.training.speed.memory import memory_estimate
from glide_ds.training.speed.meta import meta_model
from glide_ds.training.zero import power
from glide_ds.training.zero.ema import decay_at, has_average, read_average

pytestmark = pytest.mark.usefixtures("group")

OPTIONS: dict[str, Any] = {
    "train": {"phase": "adapter_only", "steps": 6},
    "checkpoint": {"every": 3},
    "ema": {"decay": 0.8, "warmup": 4.0},
    "train_batch_size": 2,
}


def weights(run: PhaseRun) -> torch.Tensor:
    return torch.cat(
        [master.detach().clone() for master in run.engine.optimizer.single_partition_of_fp32_groups]
    )


def ema_config(folder: Path, **changes: Any) -> Config:
    return make_config(folder, "adapter_only", **{**OPTIONS, **changes})


def test_the_average_is_what_the_formula_says(tmp_path: Path):
    with opened(ema_config(tmp_path), shake) as run:
        assert run.ema is not None
        expected = weights(run)
        assert torch.equal(torch.cat(run.ema.parts), expected)  # it starts at the phase's first weights
        for update in range(1, 4):
            for master in run.engine.optimizer.single_partition_of_fp32_groups:
                master.data.add_(update)
            decay = min(0.8, (1 + update) / (4.0 + update))
            expected = decay * expected + (1 - decay) * weights(run)
            run.ema.update()
            torch.testing.assert_close(torch.cat(run.ema.parts), expected)
        run.engine.optimizer.overflow = True  # what DeepSpeed says of a step that it skipped
        run.ema.update()
        assert run.ema.updates == 3
        torch.testing.assert_close(torch.cat(run.ema.parts), expected)
    assert [decay_at(EmaConfig(decay=0.5, warmup=0.0), update) for update in (1, 2)] == [0.5, 0.5]


def test_resume_applies_and_restores_the_average_bit_for_bit(tmp_path: Path):
    straight, whole = ema_config(tmp_path / "a"), ema_config(tmp_path / "b")
    scheduler = {"params": {**whole.deepspeed["scheduler"]["params"], "total_num_steps": 6}}
    parts = ema_config(tmp_path / "b", train={"steps": 3}, scheduler=scheduler)
    whole = ema_config(tmp_path / "b", scheduler=scheduler)
    with opened(straight, shake) as run:
        train(run)
        assert run.ema is not None
        averaged, updates = [part.clone() for part in run.ema.parts], run.ema.updates
        trained = state_of(run.model)
        with run.ema.applied():
            inside = state_of(run.model)
        after = state_of(run.model)
    changed = {name for name in trained if not torch.equal(trained[name], inside[name])}
    assert changed == {
        name for name, _ in run.model.named_parameters() if "clip" in name and "gate" not in name
    }
    assert all(torch.equal(trained[name], after[name]) for name in trained)
    with opened(parts, shake) as run:
        train(run)
    with opened(whole) as run:
        assert run.start.step == 3
        train(run)
        assert run.ema is not None
        assert (run.ema.updates, updates) == (6, 6)
        assert all(torch.equal(own, other) for own, other in zip(run.ema.parts, averaged, strict=True))
    assert metrics(tmp_path / "a", steady=True) == metrics(tmp_path / "b", steady=True)
    newest = committed(tmp_path / "b" / "run" / "phase1")[0]
    assert all(torch.equal(*pair) for pair in zip(read_average(newest)[0][0], averaged, strict=True))


def test_samples_are_drawn_by_the_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn: list[dict[str, torch.Tensor]] = []

    def draw(model: torch.nn.Module, captions: list[str], **_: Any) -> torch.Tensor:
        drawn.append(state_of(model))
        return torch.zeros(len(captions), 16, 16, 3, dtype=torch.uint8)

    monkeypatch.setattr(samples, "draw", draw)
    with opened(ema_config(tmp_path, log={"samples_every": 6, "sample_prompts": ["a"]}), shake) as run:
        train(run)
        assert run.ema is not None
        with run.ema.applied():
            averaged = state_of(run.model)
    (used,) = drawn
    assert all(torch.equal(used[name], tensor) for name, tensor in averaged.items())


def test_it_may_be_switched_on_and_off_between_two_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with opened(ema_config(tmp_path, ema={"decay": 0.0}, train={"steps": 3})) as run:
        train(run)
        assert run.ema is None
    assert not has_average(committed(tmp_path / "run" / "phase1")[0])
    with opened(ema_config(tmp_path)) as run:
        assert run.ema is not None
        assert run.ema.updates == 0
        assert torch.equal(torch.cat(run.ema.parts), weights(run))
    assert "holds no average: it starts at these weights" in capsys.readouterr().out


def test_the_memory_estimate_counts_it(tmp_path: Path):
    on, off = ema_config(tmp_path), ema_config(tmp_path, ema={"decay": 0.0})
    model = meta_model(glide_config(on), on)
    sizes = [memory_estimate(model, config, config.batch_arithmetic(2), "none") for config in (on, off)]
    trained = sum(p.numel() for name, p in model.named_parameters() if "clip" in name and "gate" not in name)
    assert [size.get("average") for size in sizes] == [4 * trained / 2, None]
    assert document(tmp_path)["glide_ds"].get("ema") is None  # off by default


# --- averages put together afterwards ---


def direct(lines: list[torch.Tensor], length: float) -> torch.Tensor:
    """The average kept over the weights after each update."""
    average = lines[0]
    for update, line in enumerate(lines, start=1):
        average = torch.lerp(line, average, power.decay_at(length, update))
    return average


@pytest.mark.parametrize("length", [0.05, 0.1])
def test_a_profile_has_its_length(length: float):
    steps = 2000
    shares = direct(list(torch.eye(steps, dtype=torch.float64)), length)
    times = (torch.arange(steps) + 0.5) / steps
    mean = (shares * times).sum()
    assert float(shares.sum()) == pytest.approx(1)
    assert float(((shares * (times - mean) ** 2).sum()).sqrt()) == pytest.approx(length, rel=1e-3)


@pytest.mark.parametrize("length", [0.03, 0.05, 0.07, 0.1, 0.15, 0.2])
def test_any_length_is_put_together_from_two(length: float):
    lines = list(1 + torch.randn(400, 50, dtype=torch.float64).mul(1e-3).cumsum(0))
    updates = list(range(10, 401, 10))
    factors, missed = power.solve(updates, length)
    kept = [{kept: direct(lines[:update], kept) for kept in power.KEPT} for update in updates]
    sums = sum(
        factor * parts[name] for row, parts in zip(factors, kept, strict=True) for name, factor in row.items()
    )
    wanted = direct(lines, length)
    assert sum(sum(row.values()) for row in factors) == pytest.approx(1)
    assert missed < 0.01
    assert float((sums - wanted).norm() / wanted.norm()) < 1e-4


def test_too_few_averages_are_told_by_what_they_miss():
    assert power.solve([100], 0.05)[1] < 1e-6
    assert power.solve([100], 0.2)[1] > power.MISSED
    assert power.solve(list(range(5, 101, 5)), 0.01)[1] > power.MISSED


SNAPSHOTS: dict[str, Any] = {
    "ema": {"snapshot_every": 2, "decay": 0.9},
    "checkpoint": {"every": 1, "keep": 2},
    "train": {"steps": 12},
}


def test_pruned_checkpoints_leave_their_averages_and_any_length_is_exported(tmp_path: Path):
    lines: list[torch.Tensor] = []

    class Witness(power.PowerAverages):
        def update(self) -> None:
            lines.append(weights(run))

        def files(self) -> dict[str, Any]:
            return {}

        def facts(self, step: int) -> dict[str, Any]:
            return {}

    for steps in (7, 12):
        config = ema_config(tmp_path, **SNAPSHOTS | {"train": {"steps": steps}})
        with opened(config, shake if steps == 7 else None) as run:
            run.averages = (*run.averages, Witness(run.engine, 1, 0))
            train(run)
    folder = tmp_path / "run" / "phase1"
    newest, *others = committed(folder)
    assert [made.step for made in (newest, *others)] == [12, 11]
    left = committed(folder / "averages")
    assert [made.step for made in left] == [10, 8, 6, 4, 2]
    assert all(
        not verify(made) and made.manifest["files"].keys() == {"power-rank-0.safetensors"} for made in left
    )
    export(newest, tmp_path / "x.pt", ema=0.07)
    state = read_state(tmp_path / "x.pt")
    names = [name for group in newest.manifest["engine"]["groups"] for name in group]
    got, wanted = torch.cat([state[name].flatten() for name in names]), direct(lines, 0.07)
    assert float((got - wanted).norm() / wanted.norm()) < 1e-4
    assert float((got - wanted).norm() / (lines[-1] - wanted).norm()) < 0.05
    with pytest.raises(
        CheckpointError, match=r"length 0\.01 can't be put together from those of 7 checkpoints"
    ):
        export(newest, tmp_path / "x.pt", ema=0.01)
    assert [made.step for made in power.snapshots(others[0])] == [2, 4, 6, 8, 10, 11]
    with pytest.raises(CheckpointError, match=r"averages alone.*--ema_length"):
        find_checkpoint(left[0].path)
    damaged = left[2].path / "power-rank-0.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"step-00000006 is damaged.*move it away"):
        export(newest, tmp_path / "x.pt", ema=0.07)
    for path in (newest.path, others[0].path, folder / "LAST"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    with opened(ema_config(tmp_path, **SNAPSHOTS)):  # from the beginning, and so do its averages
        assert not committed(folder / "averages")


def test_averages_of_another_beginning_or_run_are_not_mixed_in(tmp_path: Path):
    own = Owner("own")
    begun = {2: 0, 4: 0, 6: 5, 8: 5, 10: 5}  # the option was off between 4 and 6
    for step, began in begun.items():
        for folder in (tmp_path, tmp_path / AVERAGES):
            prepare(folder, step, own)
            averages = {"began": began, "updates": step - began}
            last = commit(folder, {"run": "own", "step": step, "files": {}, AVERAGES: averages}, own)
    prepare(tmp_path, 7, Owner("other"))
    commit(tmp_path, last.manifest | {"run": "other", "step": 7}, Owner("other"))
    assert [made.step for made in power.snapshots(committed(tmp_path)[0])] == [6, 8, 10]
    assert [made.step for made in power.snapshots(committed(tmp_path)[1])] == [6, 8]
