"""The arithmetic of repartitioning, and runs that two ranks begin and others continue."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import Run, Warm
from train_kit import PARITY, make_config, metrics, read_lines, shake

from glide_ds.commands.export import export
from glide_ds.config import CheckpointConfig
from glide_ds.config.phases import PHASES
from glide_ds.model import create_model
from glide_ds.model.tensor_files import read_state
from glide_ds.training.checkpoint.commit import AVERAGES, Committed, Owner, committed, prune
from glide_ds.training.setup import glide_config
from glide_ds.training.zero.elastic import masters, own_part, trained_weights
from glide_ds.training.zero.power import decay_at
from glide_ds.training.zero.stored import model_state

STEPS = 2  # of each part
CHAINS = {"straight": (2,), "shrunk": (2, 1, 2), "grown": (2, 3, 4)}  # ranks of each part
KINDS = {"adapter_only-AdamW": CHAINS, "full-AdamW": CHAINS, "full-AdamW8bit": ("straight", "shrunk")}
OPTIONS: dict[str, Any] = {
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}},
    "train_batch_size": 12,
    "train_micro_batch_size_per_gpu": 2,  # 3, 6, 2 and 1.5, so 1 x 3, micro-batches on 2, 1, 3 and 4 ranks
    "checkpoint": {"every": STEPS, "keep": 0},
    "ema": {"decay": 0.9},
}


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
    """The runs of one phase and optimizer, and the checkpoints at their ends."""

    folder: Path
    phase: str
    optimizer: str

    def end(self, name: str) -> Committed:
        return committed(self.folder / name / "run" / PHASES[self.phase].folder)[0]


@pytest.fixture(scope="module")
def folder(warm_process: Warm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of a phase and an optimizer are in FOLDER/PHASE-OPTIMIZER; all begin with FOLDER/weights.pt."""
    folder = tmp_path_factory.mktemp("elastic")
    model = create_model(glide_config(make_config(folder)))
    shake(model)  # at its first values no gradient comes through to the adapter
    torch.save(model.state_dict(), folder / "weights.pt")
    for kind, names in KINDS.items():
        for name in names:
            train_chain(warm_process, folder, kind, name)
    return folder


def train_chain(warm: Warm, folder: Path, kind: str, name: str) -> None:
    phase, optimizer = kind.split("-")
    options = OPTIONS | {"optimizer": PARITY["optimizer"] | {"type": optimizer}}
    run = Run(warm, folder / kind / name, phase, model={"weights": f"{folder}/weights.pt"}, **options)
    longest = STEPS * max(map(len, CHAINS.values()))
    for part, ranks in enumerate(CHAINS[name], start=1):
        run.train(ranks, longest if part == len(CHAINS[name]) else STEPS * part)
        assert run.wait() == [0] * ranks, f"{kind}: {name} on {ranks} ranks: {run.said()[-3000:]}"


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
@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in KINDS.items() for name in names if name != "straight"]
)
def test_a_run_continued_on_other_ranks_is_the_uninterrupted_one(
    folder: Path, kind: str, name: str, tmp_path: Path
):
    runs = Runs(folder / kind, *kind.split("-"))
    of_loss = 1e-5 if runs.optimizer == "AdamW" else 1e-4
    straight, other = (metrics(runs.folder / run)[-STEPS * 3 :] for run in ("straight", name))
    assert [line["step"] for line in other] == list(range(1, STEPS * 3 + 1))
    for line, same in zip(other, straight, strict=True):
        assert line["loss"] == pytest.approx(same["loss"], rel=of_loss)
        assert line["lr_by_role"] == same["lr_by_role"]
        assert line["gate_offset"] == same["gate_offset"]
    assert slots(runs.folder / name) == slots(runs.folder / "straight")
    assert [len(pairs) for pairs in slots(runs.folder / name).values()] == [12] * 3 * STEPS
    one, two = runs.end("straight"), runs.end(name)
    assert (one.world_size, two.world_size) == (2, CHAINS[name][-1])
    before, after = model_state(one), model_state(two)
    frozen = [key for key in before if "clip" not in key] if runs.phase == "adapter_only" else []
    assert len(frozen) == (171 if runs.phase == "adapter_only" else 0)
    for key in frozen:
        assert torch.equal(before[key], after[key]), key
    first = committed(runs.folder / "straight" / "run" / PHASES[runs.phase].folder)[-1]
    files = [tmp_path / f"{name}.pt" for name in ("start", "whole", "parted")]
    for end, file in zip((first, one, two), files, strict=True):
        export(end, file, ema=True)
    start, whole, parted = (
        torch.cat([tensor.flatten() for tensor in read_state(file).values()]) for file in files
    )
    assert not torch.equal(start, whole)
    if runs.optimizer == "AdamW":
        torch.testing.assert_close(parted, whole, rtol=0, atol=1e-6)
    else:  # 8-bit moments are quantised anew where a cut moves their blocks
        assert (parted - whole).norm() / (whole - start).norm() < 0.02


@pytest.mark.slow
def test_an_average_put_together_over_other_ranks_is_the_one_kept_directly(warm: Warm, tmp_path: Path):
    run = Run(
        warm,
        tmp_path,
        "full",
        ema={"snapshot_every": 2},
        checkpoint={"every": 1, "keep": 0},
        train_batch_size=6,
    )
    for ranks, steps in ((2, 6), (3, 11), (1, 16)):
        run.train(ranks, steps)
        assert run.wait() == [0] * ranks, run.said()[-3000:]
    folder = run.dir / PHASES["full"].folder
    found = committed(folder)
    assert [made.world_size for made in reversed(found)] == [2] * 6 + [3] * 5 + [1] * 5
    average: dict[str, torch.Tensor] = {}
    for update, made in enumerate(reversed(found), start=1):
        for name, tensor in trained_weights(made, masters(made)):
            average[name] = torch.lerp(tensor, average.get(name, tensor), decay_at(0.07, update))
    last = dict(trained_weights(found[0], masters(found[0])))
    prune(folder, CheckpointConfig(keep=1), Owner(found[0].manifest["run"]), 16)
    assert [made.step for made in committed(folder)] == [16]
    assert [made.step for made in committed(folder / AVERAGES)] == [14, 12, 10, 8, 6, 4, 2]
    export(found[0], tmp_path / "x.pt", ema=0.07)
    state = read_state(tmp_path / "x.pt")
    got, wanted, end = (
        torch.cat([part[name].flatten() for name in average]) for part in (state, average, last)
    )
    assert (got - wanted).norm() / wanted.norm() < 1e-4
    assert (got - wanted).norm() / (end - wanted).norm() < 0.05  # beside what the average is off the end by
