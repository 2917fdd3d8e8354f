"""The arithmetic of repartitioning, and runs that two ranks begin and others continue."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from elastic_runs import CHAINS, STEPS
from train_kit import make_config, metrics, read_lines, shake

from glide_ds.export import export
from glide_ds.model import create_model
from glide_ds.training.checkpoint import Committed, committed
from glide_ds.training.elastic import own_part
from glide_ds.training.phases import PHASES
from glide_ds.training.run import glide_config

SCRIPT = Path(__file__).parents[1] / "elastic_runs.py"


@pytest.mark.parametrize("total", [1, 7, 12, 13])
@pytest.mark.parametrize("before", [1, 2, 3, 5])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_every_value_lands_on_its_new_rank_once(monkeypatch, total, before, after):
    line = torch.arange(1.0, total + 1)
    old = -(-total // before)
    parts = [line[i * old : (i + 1) * old] for i in range(before)]
    parts[-1] = torch.cat([parts[-1], torch.full((before * old - total,), -1.0)])  # padding is no value
    size = -(-total // after) + 1
    new = []
    for rank in range(after):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        new.append(own_part(parts, total, size))
    joined = torch.cat(new)
    assert torch.equal(joined[:total], line)
    assert not joined[total:].any()


# --- real ranks ---


class Runs(NamedTuple):
    """The runs of elastic_runs.py, and the checkpoints at their ends."""

    folder: Path
    phase: str
    optimizer: str

    def end(self, name: str) -> Committed:
        return committed(self.folder / name / "run" / PHASES[self.phase].folder)[0]


@pytest.fixture(scope="module", params=["adapter_only AdamW", "full AdamW", "full AdamW8bit"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("elastic")
    model = create_model(glide_config(make_config(folder)))
    shake(model)  # at its first values no gradient comes through to the adapter
    torch.save(model.state_dict(), folder / "weights.pt")
    command = [sys.executable, str(SCRIPT), str(folder), *request.param.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    return Runs(folder, *request.param.split())


def slots(folder: Path) -> dict[int, list[tuple[int, int]]]:
    """(sample, timestep) of every slot of each step; of W ranks, rank r has the slots that are r modulo W."""
    by_step: dict[int, list[list[tuple[int, int]]]] = {}
    for rank in range(4):
        path = folder / "run" / "trace" / f"rank{rank}.jsonl"
        for line in read_lines(path) if path.exists() else []:
            own = list(zip(line["sample_ids"], line["timesteps"], strict=True))
            by_step.setdefault(line["step"], []).append(own)
    return {step: [pair for turn in zip(*own, strict=True) for pair in turn] for step, own in by_step.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CHAINS if name != "straight"])
def test_a_run_continued_on_other_ranks_is_the_uninterrupted_one(runs: Runs, name: str, tmp_path: Path):
    if runs.optimizer == "AdamW8bit" and name == "grown":
        pytest.skip("one way will do")
    # 8-bit moments are quantised anew where a cut moved their blocks.
    of_loss, of_average = (1e-5, 1e-6) if runs.optimizer == "AdamW" else (2e-4, 1e-4)
    straight, other = (metrics(runs.folder / run)[-STEPS * 3 :] for run in ("straight", name))
    assert [line["step"] for line in other] == list(range(1, STEPS * 3 + 1))
    for whole, parted in zip(straight, other, strict=True):
        assert parted["loss"] == pytest.approx(whole["loss"], rel=of_loss)
        assert parted["lr_by_role"] == whole["lr_by_role"]
        assert parted["gate_offset"] == whole["gate_offset"]
    assert slots(runs.folder / name) == slots(runs.folder / "straight")
    assert [len(pairs) for pairs in slots(runs.folder / name).values()] == [12] * 3 * STEPS
    one, two = runs.end("straight"), runs.end(name)
    assert (one.world_size, two.world_size) == (2, CHAINS[name][-1])
    before, after = one.model_state(), two.model_state()
    frozen = [key for key in before if "clip" not in key] if runs.phase == "adapter_only" else []
    assert len(frozen) == (171 if runs.phase == "adapter_only" else 0)
    for key in frozen:
        assert torch.equal(before[key], after[key]), key
    averages = [
        export(end, tmp_path / f"{end.world_size}-{number}.pt", ema=True).popitem()[1]
        for number, end in enumerate((one, two))
    ]
    for key, average in averages[0].items():
        torch.testing.assert_close(averages[1][key], average, rtol=0, atol=of_average)
    first = committed(runs.folder / "straight" / "run" / PHASES[runs.phase].folder)[-1].model_state()
    assert any(not torch.equal(first[key], before[key]) for key in before)
