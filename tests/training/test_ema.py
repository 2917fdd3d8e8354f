"""The average of the weights: its formula, what it costs nothing of, and where it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from train_kit import document, make_config, metrics, opened, shake, state_of

from glide_ds.config import Config, EmaConfig
from glide_ds.training import samples
from glide_ds.training.checkpoint.commit import committed
from glide_ds.training.loop import train
from glide_ds.training.setup import PhaseRun, glide_config
from glide_ds.training.speed.memory import memory_estimate
from glide_ds.training.speed.meta import meta_model
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
