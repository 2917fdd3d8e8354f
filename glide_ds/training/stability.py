"""What happens to an update whose loss or gradient is no good: skipped, rolled back, or the end of the run.

Whether an update counts is decided on the device, within the moment in which DeepSpeed reads the gradient
norm, from sums over all ranks: every rank decides alike, and no further sync point is needed. A rollback is
a resume in the same process: the checkpoints after its target are removed, rollback.json beside them says
which data to pass over and at which rate to go on, and the phase is opened again. So a run that is killed at
any moment decides as the uninterrupted one does.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from glide_ds.config import Config
from glide_ds.errors import CheckpointError, GlideError, UnstableError
from glide_ds.files import write_file
from glide_ds.training.checkpoint import commit as checkpoint
from glide_ds.training.checkpoint.saver import Saver
from glide_ds.training.checkpoint.start import Start, folder_of
from glide_ds.training.logging import JsonLines, RunLog, finite
from glide_ds.training.metrics import Meter
from glide_ds.training.zero.engine import cut_rates
from glide_ds.types import Batch

ROLLBACK_FILE = "rollback.json"
REPORT_FILE = "stopped-report.json"
SKIPPED_FILE = "skipped.jsonl"
SIGMA = 1.4826  # a normal distribution's standard deviation, in median absolute deviations
LEAST_SPREAD = 0.02  # of the median: losses that hardly differ would make a spike of nothing
REPORTED = 20  # skipped updates that a report repeats


class RolledBack(Exception):  # noqa: N818 - no error: the phase is to be opened again
    """The run directory stands at an earlier checkpoint. Raised by all ranks alike."""


@dataclass
class Stability:
    """What a checkpoint holds of it."""

    data_offset: int = 0  # update `step` (0-based) reads global batch step + data_offset
    lr_cut: float = 1.0  # product of all cuts
    rollbacks: int = 0
    skipped: int = 0  # updates, in the whole phase
    recent: tuple[int, ...] = ()  # updates skipped within the last `window`, as numbers of updates done
    losses: tuple[float, ...] = ()  # the last accepted ones, at most `window`


class LossWindow:
    """The last accepted losses, on the device, and what a new one is compared with.

    A spike is a loss above median + factor · s, with s the median absolute deviation in units of a normal
    distribution's standard deviation (Rousseeuw & Croux 1993): outliers move neither.
    """

    def __init__(self, size: int, factor: float, losses: Sequence[float], device: torch.device) -> None:
        self.factor, self.places = factor, torch.arange(size, device=device)
        self.losses = torch.full((size,), torch.nan, dtype=torch.float64, device=device)
        kept = torch.tensor(losses[-size:], dtype=torch.float64)
        self.losses[: len(kept)] = kept.to(device)
        self.count = torch.tensor(len(kept), device=device)

    def limit(self) -> Tensor:
        """The loss [] above which there is a spike; infinite as long as half of the window is empty."""
        median = self.losses.nanmedian()
        spread = SIGMA * (self.losses - median).abs().nanmedian()
        limit = median + self.factor * torch.maximum(spread, LEAST_SPREAD * median)
        return torch.where(self.count * 2 >= len(self.places), limit, torch.inf)

    def add(self, loss: Tensor, accepted: Tensor) -> None:
        """Keep a loss [] in place of the oldest, where `accepted` [] is true."""
        here = (self.places == self.count % len(self.places)) & accepted
        self.losses = torch.where(here, loss, self.losses)
        self.count = self.count + accepted

    def read(self) -> tuple[float, ...]:
        """The losses, the oldest first. A sync point."""
        count, size = int(self.count), len(self.places)
        values = self.losses.tolist()
        return tuple(values[:count] if count < size else values[count % size :] + values[: count % size])


class Guard:
    """Skips bad updates, counts and reports them, and rolls the run back where there are too many.

    It waits for `saver`'s save under way: that would become the newest checkpoint after a rollback.
    """

    def __init__(
        self,
        config: Config,
        engine: Any,
        start: Start,
        log: RunLog,
        device: torch.device,
        saver: Saver,
    ) -> None:
        self.config, self.options, self.engine, self.log = config, config.stability, engine, log
        self.saver = saver
        self.run_dir, self.folder = Path(config.run.dir), folder_of(config, config.train.phase)
        manifest = start.resumed.manifest if start.resumed else {}
        saved = Stability(**manifest.get("stability", {}))
        self.state = self._newer(saved)
        if self.state.lr_cut != saved.lr_cut:
            cut_rates(engine, self.state.lr_cut / saved.lr_cut)
        self.window = LossWindow(self.options.window, self.options.spike_factor, self.state.losses, device)
        self.meter: Meter | None = None
        self.limit = torch.tensor(torch.inf, device=device)
        self.resumed_at = start.step
        self.file: JsonLines | None = None
        if dist.get_rank() == 0:
            (self.run_dir / REPORT_FILE).unlink(missing_ok=True)
            if (self.run_dir / SKIPPED_FILE).exists():
                self._open()  # cut back to what is done
        if self.state.rollbacks:
            log.line(
                f"after {self.state.rollbacks} rollbacks: {self.state.data_offset:,} global batches passed over, "
                f"learning rate x {self.state.lr_cut:g}"
            )

    @property
    def data_offset(self) -> int:
        return self.state.data_offset

    def watch(self, meter: Meter) -> None:
        """Judge the coming update by the losses that `meter` will have summed up."""
        self.meter = meter
        if self.options.spike_factor:
            self.engine.role_clipping.judge = self._judge

    def settle(self, done: int, batches: Sequence[Batch]) -> bool:
        """After update number `done`: whether it was skipped. Collective where it was.

        Raises RolledBack, or UnstableError where that was done often enough.
        """
        if self.engine.was_step_applied():
            return False
        self.engine.lr_scheduler.step()  # DeepSpeed doesn't, but the rate belongs to the step
        self.state.skipped += 1
        recent = [step for step in self.state.recent if step > done - self.options.window]
        self.state.recent = (*recent, done)
        self._record(done, batches)
        if self.options.skip_limit and len(self.state.recent) >= self.options.skip_limit:
            self.saver.wait()
            self._roll_back(done)
        return True

    def facts(self) -> dict[str, Any]:
        """What the manifest keeps. A sync point."""
        return asdict(self.state) | {"losses": self.window.read()}

    def metrics(self) -> dict[str, Any]:
        """What a line of metrics.jsonl says of it."""
        return {"skipped": self.state.skipped, "rollbacks": self.state.rollbacks, "lr_cut": self.state.lr_cut}

    def stop(self, done: int, reason: str, remedy: str, **values: Any) -> NoReturn:
        """Write the report and raise UnstableError. Called by all ranks alike."""
        path = self.run_dir / REPORT_FILE
        if dist.get_rank() == 0:
            report = {
                "reason": reason,
                "remedy": remedy,
                "phase": self.log.phase,
                "step": done,
                "time": time.time(),
                **self.metrics(),
                **values,
                "last_skipped": _tail(self.run_dir / SKIPPED_FILE, REPORTED),
            }
            write_file(path, json.dumps(finite(report), indent=1) + "\n")
        fact = f"step {done} of phase {self.log.phase!r}: {reason}"
        error = UnstableError(fact, remedy=f"{remedy}; the report: {path}")
        error.on_all_ranks = True
        raise error

    def close(self) -> None:
        if self.file:
            self.file.close()

    def _judge(self, norm: Tensor) -> Tensor:
        """The gradient norm [], or infinity where the update is to be skipped. On the device throughout."""
        assert self.meter is not None
        loss = self.meter.loss()
        self.limit = self.window.limit()
        accepted = loss.isfinite() & norm.isfinite() & (loss <= self.limit)
        self.window.add(loss, accepted)
        return torch.where(accepted, norm, torch.inf)

    def _record(self, done: int, batches: Sequence[Batch]) -> None:
        """Say which update was skipped, why, and what every rank had read for it."""
        assert self.meter is not None
        losses = torch.cat(self.meter.parts).tolist()
        slots = [slot for batch in batches for slot in batch.slots.tolist()]
        samples = [sample for batch in batches for sample in batch.sample_ids.tolist()]
        own = list(zip(slots, samples, losses, strict=True))
        gathered: list[list[tuple[int, int, float]]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(gathered, own)
        rows = sorted(row for part in gathered for row in part)
        loss = sum(row[2] for row in rows) / len(rows)
        norms = {role: float(norm) for role, norm in self.engine.role_clipping.norms.items()}
        if not math.isfinite(loss):
            cause = "the loss is not finite"
        elif not all(map(math.isfinite, norms.values())):
            cause = "the gradient is not finite"
        else:
            cause = "loss spike"
        text = f"step {done}: skipped, {cause} ({loss:.4g}, limit {float(self.limit):.4g})"
        self.log.line(f"{text}; its samples are in {self.run_dir / SKIPPED_FILE}")
        self._write(
            done,
            cause=cause,
            loss=loss,
            limit=float(self.limit),
            grad_norm_by_role=norms,
            sample_ids=[row[1] for row in rows],
            losses=[row[2] for row in rows],
        )

    def _roll_back(self, done: int) -> None:
        state, options = self.state, self.options
        count = f"{len(state.recent)} of the last {options.window} updates were skipped"
        if state.rollbacks >= options.max_rollbacks:
            self.stop(
                done,
                f"{count}, and stability.max_rollbacks = {options.max_rollbacks} rollbacks are used up",
                f"look at the samples in {self.run_dir / SKIPPED_FILE}, mend the data or lower the learning rate, "
                f"and start again; the last checkpoint in {self.folder} stands",
            )
        target = checkpoint.rewind(self.folder, state.recent[0], self.saver.owner)
        after = Stability(
            data_offset=done + state.data_offset - target,
            lr_cut=state.lr_cut * options.lr_cut,
            rollbacks=state.rollbacks + 1,
            skipped=state.skipped,
        )
        passed = f"{target + state.data_offset + 1:,} to {done + state.data_offset:,}"
        self.log.line(
            f"step {done}: {count}; back to step {target}, past global batches {passed}, learning rate x "
            f"{after.lr_cut:g} (rollback {after.rollbacks} of at most {options.max_rollbacks})"
        )
        self._write(done, cause="rollback", to=target, data_offset=after.data_offset, lr_cut=after.lr_cut)
        if dist.get_rank() == 0:
            write_file(self.folder / ROLLBACK_FILE, json.dumps(asdict(after)) + "\n")
        raise RolledBack

    def _newer(self, saved: Stability) -> Stability:
        """The checkpoint's state, or that of a rollback since, which no checkpoint holds yet."""
        found: list[Any] = [None]
        path = self.folder / ROLLBACK_FILE
        if dist.get_rank() == 0 and path.exists():
            found = [_rolled_back(path)]
        dist.broadcast_object_list(found)
        if isinstance(found[0], GlideError):
            raise found[0]
        if found[0] is None or found[0].rollbacks <= saved.rollbacks:
            return saved
        return replace(found[0], losses=saved.losses)

    def _open(self) -> JsonLines:
        if self.file is None:
            path = self.run_dir / SKIPPED_FILE
            self.file = JsonLines(path, self.log.phase, self.resumed_at, self.state.rollbacks)
        return self.file

    def _write(self, done: int, **values: Any) -> None:
        if dist.get_rank() == 0:
            about = {"step": done, "phase": self.log.phase, "rollbacks": self.state.rollbacks}
            self._open().write(about | values)


def _rolled_back(path: Path) -> Stability | GlideError:
    """What a rollback left; the error to raise where it can't be read."""
    try:
        state = Stability(**json.loads(path.read_text(encoding="utf-8")))
        numbers = (state.data_offset, state.lr_cut, state.rollbacks, state.skipped)
        if not all(isinstance(n, int | float) and math.isfinite(n) and n >= 0 for n in numbers):
            raise ValueError(f"numbers {numbers}")
        return state
    except (OSError, ValueError, TypeError) as error:
        told = CheckpointError(
            f"{path} can't be read ({error})",
            "it is unknown which batches a rollback has passed over",
            "restore it, or remove it to read them again",
        )
        told.on_all_ranks = True
        return told


def _tail(path: Path, count: int) -> list[Any]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[-count:]]
