"""Power-function averages of the weights, and averages of other lengths put together from them afterwards.

Karras et al. 2023, arXiv 2312.02696, section 3. After t updates the average of exponent γ weighs the weights of update
s by s^γ; its length σ is the standard deviation of that profile as a share of t (equation 3):
σ² = (γ + 1) / ((γ + 2)² (γ + 3)). Two such averages are kept, sharded like the masters; every checkpoint has them, and
those named by ema.snapshot_every leave them behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from glide_ds.errors import CheckpointError
from glide_ds.model.tensor_files import State
from glide_ds.training.checkpoint.commit import AVERAGES, Committed, committed, verify
from glide_ds.training.zero.elastic import trained_weights
from glide_ds.training.zero.ema import take

KEPT = (0.05, 0.10)  # lengths; the paper's (section 3.2)
LONGEST = 0.28  # σ of a uniform average is 0.289
MISSED = 0.05  # of a profile: more is another average


class PowerAverages:
    """Two averages of this rank's part of every parameter group, from the phase's update `began` on.

    Checkpoints of a multiple of `every` updates leave them behind.
    """

    def __init__(self, engine: Any, every: int, began: int) -> None:
        self.zero, self.every, self.began, self.updates = engine.optimizer, every, began, 0
        masters = self.zero.single_partition_of_fp32_groups
        self.parts = {length: [master.detach().clone() for master in masters] for length in KEPT}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of one more update in; where its step was skipped, none."""
        if self.zero.overflow:
            return
        self.updates += 1
        masters = [master.detach() for master in self.zero.single_partition_of_fp32_groups]
        for length, parts in self.parts.items():
            torch._foreach_lerp_(parts, masters, 1 - decay_at(length, self.updates))

    def files(self) -> dict[str, State]:
        """This rank's file of a checkpoint, by name: of each length its part of each parameter group."""
        parts = {f"{length}/{i}": part for length, own in self.parts.items() for i, part in enumerate(own)}
        return {file_name(dist.get_rank()): parts}

    def facts(self, step: int) -> dict[str, Any]:
        """What the manifest has of them at that step: among it the files that outlive the checkpoint."""
        names = [file_name(rank) for rank in range(dist.get_world_size())]
        return {
            AVERAGES: {"updates": self.updates, "began": self.began},
            "stay": [] if step % self.every else names,
        }

    def load(self, checkpoint: Committed) -> bool:
        """Take the averages of a checkpoint of any number of ranks; False, and no change, where it holds none."""
        if AVERAGES not in checkpoint.manifest:
            return False
        files, about = _files(checkpoint), checkpoint.manifest[AVERAGES]
        self.updates, self.began = about["updates"], about["began"]
        for length, own in self.parts.items():
            take(own, self.zero, _parts(files, length))
        return True


def file_name(rank: int) -> str:
    return f"power-rank-{rank}.safetensors"


def exponent(length: float) -> float:
    """γ of a length: the largest root of (γ + 2)² (γ + 3) σ² = γ + 1."""
    return float(np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max())


def decay_at(length: float, update: int) -> float:
    """How much of the average stays at update number `update`, counted from 1 (equation 2)."""
    return float((1 - 1 / update) ** (exponent(length) + 1))


# ---- afterwards


class Fit(NamedTuple):
    """An average of some length as a sum of kept ones."""

    snapshots: list[Committed]
    factors: list[dict[float, float]]  # of each snapshot, by the length kept
    missed: float  # what the profile lacks, as a share of its norm

    def __str__(self) -> str:
        steps = [made.step for made in self.snapshots]
        return (
            f"from the averages of {len(steps)} checkpoints (step {steps[0]:,} to {steps[-1]:,}), its profile met to "
            f"{self.missed:.1%}"
        )


def fit(checkpoint: Committed, length: float) -> Fit:
    """How the average of that length at a checkpoint is put together.

    Raises CheckpointError where it holds no averages, those before it are damaged, or they are too few.
    """
    if not checkpoint.manifest.get(AVERAGES, {}).get("updates"):
        raise CheckpointError(
            f"{checkpoint.path} holds no averages to put others together from: it was trained with "
            "ema.snapshot_every=0",
            remedy="do without --ema_length",
        )
    found = snapshots(checkpoint)
    for made in found:
        if problems := verify(made):
            raise CheckpointError(
                f"{made.path} is damaged ({problems[0]})",
                "its averages can't be trusted",
                "move it away: others may do",
            )
    factors, missed = solve([made.manifest[AVERAGES]["updates"] for made in found], length)
    if missed > MISSED:
        raise CheckpointError(
            f"an average of length {length:g} can't be put together from those of {len(found)} checkpoints: its "
            f"profile would be missed by {missed:.0%}",
            "it would be another average",
            f"choose a length nearer to {KEPT[0]:g} to {KEPT[1]:g}, or train with a smaller ema.snapshot_every",
        )
    return Fit(found, factors, missed)


def put_together(checkpoint: Committed, length: float) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 tensor) of every trained parameter, averaged over that length up to the checkpoint."""
    found = fit(checkpoint, length)
    streams, factors = [], []
    for made, of_snapshot in zip(found.snapshots, found.factors, strict=True):
        files = _files(made)
        for kept, factor in of_snapshot.items():
            streams.append(trained_weights(checkpoint, _parts(files, kept)))
            factors.append(factor)
    for row in zip(*streams, strict=True):
        total = sum(factor * tensor.double() for factor, (_, tensor) in zip(factors, row, strict=True))
        yield row[0][0], torch.as_tensor(total).float()


def snapshots(checkpoint: Committed) -> list[Committed]:
    """Those of the same averages up to the checkpoint, itself the last: left behind ones, and whole checkpoints."""
    folder = checkpoint.path.parent
    found = {made.step: made for place in (folder / AVERAGES, folder) for made in committed(place)}
    found[checkpoint.step] = checkpoint
    began, run = checkpoint.manifest[AVERAGES]["began"], checkpoint.manifest["run"]
    return [
        made
        for step, made in sorted(found.items())
        if step <= checkpoint.step
        and made.manifest["run"] == run
        and (about := made.manifest.get(AVERAGES))
        and about["began"] == began
        and about["updates"]
    ]


def solve(updates: list[int], length: float) -> tuple[list[dict[float, float]], float]:
    """Factors of the averages kept after so many updates, for the length at the last of them; and what is missed.

    The least squares of the profiles (section 3.2, algorithm 3), under the condition that the factors' sum is 1, so
    that a weight which never moved stays what it is.
    """
    times = np.repeat(np.array(updates, float), len(KEPT))
    exponents = np.tile([exponent(kept) for kept in KEPT], len(updates))
    last, wanted = np.array(float(updates[-1])), np.array(exponent(length))
    products = profile_product(times[:, None], exponents[:, None], times, exponents)
    against = profile_product(times, exponents, last, wanted)
    size = len(times)
    system = np.zeros((size + 1, size + 1))
    system[:size, :size] = products
    system[:size, size] = system[size, :size] = 1
    factors = np.linalg.lstsq(system, np.append(against, 1), rcond=None)[0][:size]
    norm = profile_product(last, wanted, last, wanted)
    missed = float(np.sqrt(max(factors @ products @ factors - 2 * factors @ against + norm, 0) / norm))
    return [dict(zip(KEPT, map(float, row), strict=True)) for row in factors.reshape(-1, len(KEPT))], missed


def profile_product(t: np.ndarray, a: np.ndarray, u: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The integral of two profiles' product: of exponents `a` after `t` and `b` after `u` updates (appendix C)."""
    overlap = np.where(t < u, (t / u) ** b, (u / t) ** a)
    return np.asarray((a + 1) * (b + 1) * overlap / ((a + b + 1) * np.maximum(t, u)))


def _files(checkpoint: Committed) -> list[State]:
    return [checkpoint.read(file_name(rank)) for rank in range(checkpoint.world_size)]


def _parts(files: list[State], length: float) -> list[list[Tensor]]:
    """Every rank's part of each parameter group of one average."""
    groups = sum(name.startswith(f"{length}/") for name in files[0])
    return [[file[f"{length}/{i}"] for i in range(groups)] for file in files]
