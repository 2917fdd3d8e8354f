"""The numbers of a logged step: sums over all ranks, norms, gates, speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from glide_ds.config import BatchArithmetic
from glide_ds.diffusion.losses import QUARTILES
from glide_ds.model.glide import Glide
from glide_ds.training.objective import Losses
from glide_ds.training.phases import gates
from glide_ds.training.speed.traffic import Traffic
from glide_ds.training.zero.clipping import RoleClipping
from glide_ds.types import BatchSource

# What an update sums up, and in how many numbers: one tensor, so that one all-reduce does.
SUMS = {
    "mse": 1,
    "samples": 1,
    "mse_by_quartile": QUARTILES,
    "samples_by_quartile": QUARTILES,
    "vb": 1,
    "kl": 1,
    "kl_terms": 1,
    "alignment": 1,
    "alignment_terms": 1,
}


class Meter:
    """Sums of one update over its micro-batches, kept on the device until they are read."""

    def __init__(self, timesteps: int, device: Any) -> None:
        self.timesteps = timesteps
        self.parts: list[Tensor] = []  # every sample's loss, by micro-batch
        self.sums = torch.zeros(sum(SUMS.values()), dtype=torch.float64, device=device)

    def add(self, losses: Losses) -> None:
        """Add one micro-batch; no sync point."""
        quartile = losses.timesteps * QUARTILES // self.timesteps
        none = torch.zeros(QUARTILES, dtype=torch.float64, device=self.sums.device)
        mse = losses.mse.double()
        self.parts.append(losses.mse)
        parts = {
            "mse": mse.sum().view(1),
            "samples": torch.full_like(mse[:1], len(mse)),
            "mse_by_quartile": none.index_add(0, quartile, mse),
            "samples_by_quartile": none.index_add(0, quartile, torch.ones_like(mse)),
            "vb": losses.vb.double().sum().view(1),
            **_term("kl", losses.kl, mse),
            **_term("alignment", losses.alignment, mse),
        }
        self.sums += torch.cat([parts[name] for name in SUMS])

    def loss(self) -> Tensor:
        """The mean loss [] over all ranks, on the device. Collective."""
        named = _named(self.sums)
        sums = torch.cat([named["mse"], named["samples"]])
        dist.all_reduce(sums)
        return sums[0] / sums[1]

    def read(self) -> dict[str, Any]:
        """Means over all ranks. Collective and a sync point: called by all ranks at log steps."""
        dist.all_reduce(self.sums)
        sums = {name: part.tolist() for name, part in _named(self.sums.cpu()).items()}
        (mse,), (samples,), (vb,) = sums["mse"], sums["samples"], sums["vb"]
        quartiles = zip(sums["mse_by_quartile"], sums["samples_by_quartile"], strict=True)
        read: dict[str, Any] = {"loss": mse / samples, "vb": vb / samples}
        read["loss_by_quartile"] = {f"q{i}": total / n for i, (total, n) in enumerate(quartiles, 1) if n}
        for name in ("kl", "alignment"):
            (total,), (terms,) = sums[name], sums[f"{name}_terms"]
            if terms:
                read[name] = total / terms
        return read


def _term(name: str, value: Tensor | None, like: Tensor) -> dict[str, Tensor]:
    """A term that not every step has, and whether this one had it."""
    zero = torch.zeros_like(like[:1])
    return {
        name: zero if value is None else value.double().view(1),
        f"{name}_terms": zero + (value is not None),
    }


def _named(sums: Tensor) -> dict[str, Tensor]:
    return dict(zip(SUMS, sums.split(list(SUMS.values())), strict=True))


class Clock:
    """Updates, their time and the wait for data since the last reading; saving and drawing don't count."""

    def __init__(self) -> None:
        self.steps, self.waited, self.since = 0, 0.0, time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the next batch."""
        started = time.monotonic()
        yield
        self.waited += time.monotonic() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no training."""
        started = time.monotonic()
        yield
        self.since += time.monotonic() - started

    def read(self) -> tuple[int, float, float]:
        """(updates, seconds, seconds of waiting for data) since the last reading."""
        now = time.monotonic()
        read = self.steps, now - self.since, self.waited
        self.steps, self.waited, self.since = 0, 0.0, now
        return read


@dataclass(frozen=True)
class Readings:
    """Reads one line of metrics.jsonl: this update's losses over all ranks, norms, gates, speed."""

    phase: str
    arithmetic: BatchArithmetic
    device: torch.device
    model: Glide
    groups: Sequence[Mapping[str, Any]]  # the optimizer's
    clipping: RoleClipping
    traffic: Traffic
    peak_images_per_s: (
        float  # of one rank, if all its time went to products at this machine's rate; 0: not rank 0
    )
    others: Sequence[Callable[[], Mapping[str, Any]]]  # what the guard, validation and so on say of the update

    def read(self, done: int, meter: Meter, clock: Clock) -> dict[str, Any]:
        """After update number `done`. Collective, and a sync point."""
        rates = {group["role"]: group["lr"] for group in self.groups}
        norms = {role: float(norm) for role, norm in self.clipping.norms.items()}
        means = meter.read()
        open_gates = dict(gates(self.model)) if self.model.config.clip_dim else {}
        steps, seconds, waited = clock.read()
        images_per_s = steps * self.arithmetic.global_batch / seconds
        per_rank = images_per_s / self.arithmetic.world_size
        told = {name: value for source in self.others for name, value in source().items()}
        return {
            "step": done,
            "phase": self.phase,
            "loss": means.pop("loss"),
            "grad_norm": sum(norm**2 for norm in norms.values()) ** 0.5,
            "lr": max(rates.values()),
            "images_per_s": images_per_s,
            "images_per_s_per_rank": per_rank,
            "mfu": per_rank / self.peak_images_per_s if self.peak_images_per_s else 0.0,
            "data_wait_s": waited / steps,
            "data_wait_share": waited / seconds,
            "communication_share": self.traffic.read() / seconds,
            "samples_seen": done * self.arithmetic.global_batch,
            "gate_mean": sum(open_gates.values()) / len(open_gates) if open_gates else 0.0,
            "gate_offset": float(self.model.clip_gate_offset) if open_gates else 0.0,
            **means,
            **told,
            "lr_by_role": rates,
            "grad_norm_by_role": norms,
            "gates": open_gates,
            "memory_gib": _memory(self.device) / 2**30,
        }


def _memory(device: torch.device) -> int:
    """This rank's peak so far, in bytes: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def data_report(source: BatchSource) -> dict[str, Any]:
    """What all ranks read, skipped, filtered and replaced since the start of this process. Collective."""
    reports = [source.report()]
    if dist.get_world_size() > 1:  # training waits, and a gathering of one takes a millisecond
        own, reports = reports[0], [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(reports, own)
    return merge_reports(reports)


def merge_reports(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ranks' accounts of their data (BatchSource.report) as one: counts added, examples joined."""
    merged: dict[str, Any] = {}
    for report in reports:
        for key, value in report.items():
            if isinstance(value, Mapping):
                merged[key] = merge_reports([merged.get(key, {}), value])
            elif isinstance(value, list):
                merged[key] = [*merged.get(key, []), *value]
            else:
                merged[key] = merged.get(key, 0) + value
    return merged
