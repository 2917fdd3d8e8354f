"""What tests/training/test_ranks.py runs on two ranks: `main`, whose results are in FOLDER/rankN.json."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from test_capturing import keeping_places
from train_kit import IN_BF16, PARITY, make_config, opened, shake, train_phase

from glide_ds.config import CheckpointConfig
from glide_ds.environment import read_environment
from glide_ds.errors import DataError, GlideError
from glide_ds.training import setup
from glide_ds.training.checkpoint.commit import Owner, committed, newest_good
from glide_ds.training.checkpoint.saver import Saver
from glide_ds.training.faults.ranks import agreed
from glide_ds.training.loop import train
from glide_ds.training.metrics import Meter
from glide_ds.training.objective import Losses
from glide_ds.training.speed import cuda_graph as capturing
from glide_ds.training.speed.meta import zeros
from glide_ds.training.zero import snapshot
from glide_ds.training.zero.group import start_process_group


def main(place: str) -> None:
    folder = Path(place)
    rank, _ = read_environment()
    start_process_group(120)
    results = {
        "agreed": error_on_one_rank(rank),
        "recompute": recomputing_where_one_rank_has_less(rank, folder),
        "meter": mean_over_ranks(rank),
    }
    train_phase(make_config(folder / "two", **PARITY), shake)
    train_recorded(folder / "recorded")
    results["verified"] = damage_seen_by_all(rank, folder / "two" / "run" / "phase3")
    results["full_disk"] = save_that_fails_on_one_rank(rank, folder)
    resume_what_one_rank_began(folder)
    train_phase(make_config(folder / "bf16", "adapter_only", **IN_BF16), shake)
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def train_recorded(folder: Path) -> None:
    """Phase full with gradients at the places where a CUDA graph would have them."""
    config = make_config(folder, **PARITY)
    launched, torch.cuda.make_graphed_callables = torch.cuda.make_graphed_callables, keeping_places
    with opened(config, shake) as run:
        inputs = zeros(run.model.config, config, run.arithmetic.micro_batch, run.device)
        capturing.record(run.model, inputs, run.arithmetic.accumulation)
        train(run)
        capturing.forget(run.model)
    torch.cuda.make_graphed_callables = launched


def recomputing_where_one_rank_has_less(rank: int, folder: Path) -> list[str]:
    """What train.recompute=auto comes to where rank 1's memory holds nothing."""
    config = make_config(folder / "auto", train={"recompute": "auto"})
    glide = setup.glide_config(config)
    setup.limit_here = lambda _: 1e12 if rank == 0 else 1.0  # type: ignore[assignment]
    chosen, fit = setup.fit_together(config, config.batch_arithmetic(2), glide, torch.device("cpu"))
    assert fit is not None
    return [chosen.train.recompute, fit.dial]


def error_on_one_rank(rank: int) -> str:
    def check() -> None:
        if rank == 1:
            raise DataError("only rank 1 sees this")

    try:
        agreed(check)
    except GlideError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def mean_over_ranks(rank: int) -> float:
    meter = Meter(1000, "cpu")
    mse = torch.tensor([1.0, 2.0]) if rank == 0 else torch.tensor([6.0, 7.0])
    meter.add(Losses(mse.mean(), mse, mse, None, torch.tensor([0, 999])))
    return float(meter.read()["loss"])


def damage_seen_by_all(rank: int, folder: Path) -> list[object]:
    """The newest checkpoint loses one file's tail: every rank must fall back, whichever read that file."""
    newest, before = newest_good(folder)
    assert newest is not None
    path = newest.path / "model.safetensors"
    whole = path.read_bytes()
    dist.barrier()
    if rank == 0:
        path.write_bytes(whole[:-1])
    dist.barrier()
    found, damaged = newest_good(folder)
    dist.barrier()
    if rank == 0:
        path.write_bytes(whole)
    return [newest.step, before, found.step if found else None, len(damaged)]


def resume_what_one_rank_began(folder: Path) -> None:
    while not (folder / "grown.ready").exists():
        time.sleep(0.05)
    train_phase(make_config(folder / "grown", **PARITY), shake)


def save_that_fails_on_one_rank(rank: int, folder: Path) -> list[object]:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def save(step: int) -> None:
        saver.save(step, {}, {f"part{rank}.safetensors": {"part": torch.tensor(rank)}})

    home = folder / "full_disk"
    saver = Saver({}, home, CheckpointConfig(keep=1), Owner("mine"), timeout_s=60)
    save(1)
    saver.finish()
    (first,) = committed(home)
    if rank == 1:
        snapshot.save_file = full  # type: ignore[assignment]
    save(2)
    try:
        saver.finish()
        told = "nothing"
    except GlideError as error:
        told = str(error)
    snapshot.save_file = save_file
    found, _ = newest_good(home)
    return [sorted(first.manifest["files"]), told, found.step if found else None]
