"""What tests/training/test_ranks.py runs on two ranks: `rank_worker.py FOLDER`, results in FOLDER/rankN.json."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
from train_kit import PARITY, make_config, shake, train_phase

from glide_ds.training import checkpoint
from glide_ds.training.checkpoint import newest_good
from glide_ds.training.distributed import agreed, read_environment, start_process_group
from glide_ds.training.objective import Losses, Meter
from glide_ds.types import DataError, GlideError


def main(folder: Path) -> None:
    rank, _ = read_environment()
    start_process_group(120)
    results = {
        "agreed": error_on_one_rank(rank),
        "meter": mean_over_ranks(rank),
    }
    train_phase(make_config(folder / "two", **PARITY), shake)
    results["verified"] = damage_seen_by_all(rank, folder / "two" / "run" / "phase3")
    results["full_disk"] = save_that_fails_on_one_rank(rank, folder)
    resume_what_one_rank_began(folder)
    (folder / f"rank{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


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
    import torch

    meter = Meter(1000, "cpu")
    mse = torch.tensor([1.0, 2.0]) if rank == 0 else torch.tensor([6.0, 7.0])
    meter.add(Losses(mse.mean(), mse, mse, None, torch.tensor([0, 999])))
    return float(meter.read()["loss"])


def damage_seen_by_all(rank: int, folder: Path) -> list[object]:
    """The newest checkpoint loses one file's tail: every rank must fall back, whichever read that file."""
    newest, before = newest_good(folder)
    assert newest is not None
    path = newest.path / "mp_rank_00_model_states.pt"
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
    class Engine:
        full = False

        def save_checkpoint(self, folder: str, tag: str, client_state: object, save_latest: bool) -> None:
            target = Path(folder) / tag
            target.mkdir(exist_ok=True)
            dist.barrier()
            (target / f"part{rank}.pt").write_bytes(b"part")
            if self.full and rank == 1:
                raise OSError(28, "No space left on device")

    engine, home = Engine(), folder / "full_disk"
    first = checkpoint.save(engine, home, 1, {}, 1)
    engine.full = True
    try:
        checkpoint.save(engine, home, 2, {}, 1)
        told = "nothing"
    except GlideError as error:
        told = str(error)
    found, _ = newest_good(home)
    return [sorted(first.manifest["files"]), told, found.step if found else None]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
