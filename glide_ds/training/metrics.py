"""The numbers of a logged step: sums over all ranks, norms, gates, speed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from glide_ds.diffusion.losses import QUARTILES
from glide_ds.training.objective import Losses
from glide_ds.training.phases import gates

if TYPE_CHECKING:
    from glide_ds.training.setup import PhaseRun


class Meter:
    """Sums of one update over its micro-batches, kept on the device until they are read."""

    def __init__(self, timesteps: int, device: Any) -> None:
        self.timesteps = timesteps
        self.parts: list[Tensor] = []  # every sample's loss, by micro-batch
        self.sums = torch.zeros(2 + 2 * QUARTILES + 3, dtype=torch.float64, device=device)

    def add(self, losses: Losses) -> None:
        """Add one micro-batch; no sync point."""
        quartile = losses.timesteps * QUARTILES // self.timesteps
        count = torch.zeros(QUARTILES, dtype=torch.float64, device=self.sums.device)
        mse = losses.mse.double()
        self.parts.append(losses.mse)
        parts = [
            mse.sum().view(1),
            torch.full_like(mse[:1], len(mse)),
            count.index_add(0, quartile, mse),
            count.index_add(0, quartile, torch.ones_like(mse)),
            losses.vb.double().sum().view(1),
            torch.zeros_like(mse[:1]) if losses.kl is None else losses.kl.double().view(1),
            torch.full_like(mse[:1], float(losses.kl is not None)),
        ]
        self.sums += torch.cat(parts)

    def read(self) -> dict[str, Any]:
        """Means over all ranks. Collective and a sync point: called by all ranks at log steps."""
        torch.distributed.all_reduce(self.sums)
        values = self.sums.tolist()
        mse, count = values[:2]
        by_quartile, counts = values[2 : 2 + QUARTILES], values[2 + QUARTILES : 2 + 2 * QUARTILES]
        vb, kl, kl_count = values[2 + 2 * QUARTILES :]
        read: dict[str, Any] = {"loss": mse / count, "vb": vb / count}
        read["loss_by_quartile"] = {
            f"q{i + 1}": total / n for i, (total, n) in enumerate(zip(by_quartile, counts, strict=True)) if n
        }
        if kl_count:
            read["kl"] = kl / kl_count
        return read


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


def read_metrics(run: PhaseRun, done: int, meter: Meter, clock: Clock) -> dict[str, Any]:
    """One line of metrics.jsonl: this update's losses over all ranks, norms, gates, speed. Collective."""
    groups = run.engine.optimizer.param_groups
    rates = {group["role"]: group["lr"] for group in groups}
    norms = {role: float(norm) for role, norm in run.engine.role_clipping.norms.items()}
    means = meter.read()
    open_gates = dict(gates(run.model)) if run.clip is not None else {}
    steps, seconds, waited = clock.read()
    images_per_s = steps * run.arithmetic.global_batch / seconds
    per_rank = images_per_s / run.arithmetic.world_size
    return {
        "step": done,
        "phase": run.config.train.phase,
        "loss": means.pop("loss"),
        "grad_norm": sum(norm**2 for norm in norms.values()) ** 0.5,
        "lr": max(rates.values()),
        "images_per_s": images_per_s,
        "images_per_s_per_rank": per_rank,
        "mfu": per_rank / run.peak_images_per_s if run.peak_images_per_s else 0.0,
        "data_wait_s": waited / steps,
        "data_wait_share": waited / seconds,
        "communication_share": run.traffic.read() / seconds,
        "samples_seen": done * run.arithmetic.global_batch,
        "gate_mean": sum(open_gates.values()) / len(open_gates) if open_gates else 0.0,
        "gate_offset": float(run.model.clip_gate_offset) if open_gates else 0.0,
        **means,
        **run.guard.metrics(),
        **run.validation.metrics(),
        "lr_by_role": rates,
        "grad_norm_by_role": norms,
        "gates": open_gates,
        "saves_failed": run.saver.failures,
        "memory_gib": _memory(run.device) / 2**30,
    }


def _memory(device: torch.device) -> int:
    """This rank's peak so far, in bytes: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def data_report(run: PhaseRun) -> dict[str, Any]:
    """What all ranks read, skipped, filtered and replaced since the start of this process. Collective."""
    reports = [run.source.report()]
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
