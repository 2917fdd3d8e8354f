"""What a person sees while training: a progress line, metrics.jsonl, trackers, sample grids, the trace.

Only rank 0 writes, except for the trace. Everything here is fed at log steps, so that reading a
device tensor (a sync point) costs once per `log.every` steps.
"""

from __future__ import annotations

import functools
import json
import math
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor

from glide_ds.config import Config
from glide_ds.errors import DataError
from glide_ds.files import write_file
from glide_ds.inference.draw import Row, grid, rows_grid, write_picture
from glide_ds.progress import Progress, duration
from glide_ds.training.trackers import Wandb
from glide_ds.types import Batch

STARTS_FILE = "starts.jsonl"
# TensorBoard's groups, by what a metric's name begins with; the first that fits.
GROUPS = (
    ("loss", ("loss", "vb", "kl", "alignment")),
    ("norms", ("grad_norm",)),
    ("rates", ("lr",)),
    ("speed", ("images_per_s", "mfu", "data_wait", "communication", "memory")),
    ("gates", ("gate",)),
    ("validation", ("validation",)),
    ("data", ("samples_seen",)),
)
OTHERS = "faults"  # skipped updates, rollbacks, saves that failed
WIDE = 4  # pictures side by side: with more TensorBoard's card makes their captions too small to read
MUCH_WAITING = 0.2  # of a step's time
MUCH_COMMUNICATION = 0.3


class JsonLines:
    """An append-only file of JSON objects, cut back to what a resumed phase has really done."""

    def __init__(self, path: Path, phase: str, done: int, rollbacks: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            try:
                kept = [line for line in _complete_lines(path) if not _is_later(line, phase, done, rollbacks)]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path} has a line that can't be read ({type(error).__name__}: {error})",
                    "it is unknown which of its lines this start will write again",
                    "take that line out, or move the file away: the run goes on without it",
                ) from error
            write_file(path, "".join(kept))
        self.file: IO[str] = path.open("a", encoding="utf-8", buffering=1)

    def write(self, values: Mapping[str, Any]) -> None:
        self.file.write(json.dumps(finite(values), allow_nan=False) + "\n")

    def close(self) -> None:
        self.file.close()


def _complete_lines(path: Path) -> Iterable[str]:
    """The lines of a file that a kill may have cut short in its last one."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield line


def _is_later(line: str, phase: str, done: int, rollbacks: int) -> bool:
    """Whether a resumed phase will write the line again; what went before a rollback is history."""
    values = json.loads(line)
    if values["phase"] != phase or values["step"] <= done:
        return False
    return bool(values.get("rollbacks", rollbacks) >= rollbacks)


def finite(values: Any) -> Any:
    """The same with None for every number that is not finite: JSON has no NaN."""
    if isinstance(values, Mapping):
        return {key: finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


class StepProgress:
    """Step, loss, images/s and time left: a bar on a terminal, elsewhere a line at every logged step."""

    def __init__(self, phase: str, done: int, total: int, shown: bool) -> None:
        self.progress = Progress(phase, total, "step", done=done, shown=shown, every_s=None)
        self.readings, self.diagnosed = 0, False

    def step(self, step: int, metrics: Mapping[str, Any] | None) -> None:
        """Called after every step; `metrics` where the step was logged."""
        progress = self.progress
        progress.advance()
        if metrics and progress.bar is not None:
            progress.note = (
                f"loss {metrics['loss']:.4f}, {metrics['images_per_s']:.1f} images/s, {_mfu(metrics['mfu'])}"
            )
        elif metrics:
            progress.line(
                f"{progress.what} step {step}/{progress.total}  loss {metrics['loss']:.4f}  "
                f"{metrics['images_per_s']:.1f} images/s  {_mfu(metrics['mfu'])}  "
                f"data wait {metrics['data_wait_share']:.0%}  communication {metrics['communication_share']:.0%}  "
                f"{metrics['memory_gib']:.1f} GiB  {duration(progress.left_s())} left"
            )
        if metrics:
            self._diagnose(metrics)

    def _diagnose(self, metrics: Mapping[str, Any]) -> None:
        """Say once what holds the training up. The first readings wait for loaders that are starting."""
        self.readings += 1
        cause = diagnosis(metrics) if self.readings > 2 and not self.diagnosed else None
        if cause:
            self.diagnosed = True
            self.line(cause)

    def line(self, text: str) -> None:
        self.progress.line(text)

    def close(self) -> None:
        self.progress.close()


def _mfu(share: float) -> str:
    """The share of the device's rate; more than all of it means that the rate was measured too low."""
    return f"MFU {share:.0%}" if share <= 1 else "MFU unknown"


def diagnosis(metrics: Mapping[str, Any]) -> str | None:
    """What keeps the device from training, where something does, and what to do about it."""
    waiting, sending = metrics["data_wait_share"], metrics["communication_share"]
    if waiting >= max(MUCH_WAITING, sending):
        return (
            f"data wait is {waiting:.0%} of the step, in which the device has nothing to do: raise data.workers, "
            "give the rank more cores, or compute CLIP embeddings beforehand (glide-ds prepare clip)"
        )
    if sending >= MUCH_COMMUNICATION:
        return (
            f"communication is {sending:.0%} of the step, for gradients, weights and waiting for slower ranks: raise "
            "train_micro_batch_size_per_gpu, which spares reductions, or check the network (glide-ds preflight)"
        )
    return None


def describe_report(report: Mapping[str, Any]) -> str:
    """What became of the data, in one line; causes with an example each."""
    parts = [f"data: {report['delivered']:,} samples delivered of {report['read']:,} read"]
    for name in ("skipped", "filtered", "tolerated"):
        if counts := report.get(name):
            causes = []
            for cause, count in counts.items():
                examples = report["examples"].get(cause)
                causes.append(f"{cause} {count:,}" + (f" (such as {examples[0]})" if examples else ""))
            parts.append(f"{name} {', '.join(causes)}")
    return "; ".join(parts)


class RunLog:
    """All outputs of one phase on one rank."""

    def __init__(self, config: Config, rank: int, done: int) -> None:
        self.config = config
        self.folder = Path(config.run.dir)
        self.phase = config.train.phase
        self.progress = StepProgress(self.phase, done, config.train.steps, shown=rank == 0)
        path = self.folder / "metrics.jsonl"
        self.metrics = JsonLines(path, self.phase, done) if rank == 0 else None
        self.trace = None
        if config.data.trace:
            self.trace = JsonLines(self.folder / "trace" / f"rank{rank}.jsonl", self.phase, done)
        if rank == 0:
            _note_start(self.folder / STARTS_FILE, self.phase, done)
        self.done = done
        tracked = rank == 0 and config.log.wandb.project
        self.wandb = Wandb(config, _complete_lines(path), self.line) if tracked else None
        self.tensorboard_wanted = rank == 0 and config.log.tensorboard

    @functools.cached_property
    def tensorboard(self) -> Any:
        """The writer, or None. Made once there is something to write: importing it takes a second of the start."""
        if not self.tensorboard_wanted:
            return None
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self.folder / "tensorboard" / self.phase), purge_step=self.done + 1)
        text = json.dumps(self.config.to_json(), indent=1)
        writer.add_text("configuration", "".join(f"    {line}\n" for line in text.splitlines()), self.done)
        return writer

    def trace_step(self, step: int, batches: Sequence[Batch], timesteps: Sequence[Tensor]) -> None:
        """Which samples and timesteps this rank trained on in update `step`."""
        if self.trace:
            self.trace.write(
                {
                    "step": step,
                    "phase": self.phase,
                    "sample_ids": [i for batch in batches for i in batch.sample_ids.tolist()],
                    "timesteps": [t for part in timesteps for t in part.tolist()],
                }
            )

    def step(self, step: int, metrics: Mapping[str, Any] | None, recorded: bool) -> None:
        """After every update; `metrics` (see loop.read_metrics) where they are shown, `recorded` where also kept."""
        if recorded and metrics and self.metrics:
            self.metrics.write(metrics)
            if self.wandb:
                self.wandb.line(finite(metrics))
        self.progress.step(step, metrics)
        if recorded and metrics and self.tensorboard:
            for name, value in _flat(metrics):
                self.tensorboard.add_scalar(tag(name), value, step)
            if gates := metrics.get("gates"):
                self.tensorboard.add_histogram("gates/all", torch.tensor(list(gates.values())), step)

    def adapter(self, step: int, norms: Sequence[float]) -> None:
        """The norms of the adapter's tensors, as a histogram for TensorBoard."""
        if norms and self.tensorboard:
            self.tensorboard.add_histogram("norms/adapter", torch.tensor(norms), step)

    def pictures(self, step: int, rows: Sequence[Row]) -> Path:
        """Write a grid of samples to samples/ and TensorBoard, at most WIDE beside each other."""
        rows = folded(rows, WIDE)
        picture = grid(*rows[0]) if len(rows) == 1 else rows_grid(rows)
        path = self.folder / "samples" / f"{self.phase}-{step:08d}.png"
        write_picture(path, picture)
        if self.tensorboard:
            pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
            self.tensorboard.add_image("samples", pixels.view(*picture.size[::-1], 3), step, dataformats="HWC")
        return path

    def data_report(self, report: Mapping[str, Any]) -> None:
        """Say what became of the data, and keep it in data-PHASE.json. Rank 0 only."""
        path = self.folder / f"data-{self.phase}.json"
        write_file(path, json.dumps(report, indent=1) + "\n")
        self.line(describe_report(report))

    def line(self, text: str) -> None:
        self.progress.line(text)

    def close(self) -> None:
        self.progress.close()
        for output in (self.metrics, self.trace, self.__dict__.get("tensorboard"), self.wandb):
            if output:
                output.close()


def folded(rows: Sequence[Row], wide: int) -> list[Row]:
    """Rows of at most `wide` pictures: the first of each row one below the other, then the next of each."""
    longest = max(len(row.labels) for row in rows)
    parts = (
        Row(row.images[first : first + wide], row.labels[first : first + wide])
        for first in range(0, longest, wide)
        for row in rows
    )
    return [part for part in parts if part.labels]


def tag(name: str) -> str:
    """A metric's name in TensorBoard, which shows what stands before the first slash as a group."""
    group = next((group for group, begins in GROUPS if name.startswith(begins)), OTHERS)
    return name if name.startswith(f"{group}/") else f"{group}/{name}"


def _note_start(path: Path, phase: str, done: int) -> None:
    """Append that a phase starts or goes on now, and on what: metrics.jsonl shows no resume."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    about = {"step": done, "phase": phase, "time": time.time(), "host": socket.gethostname(), "ranks": ranks}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(about) + "\n")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and math.isfinite(value) and key != "step":
            yield f"{prefix}{key}", value
