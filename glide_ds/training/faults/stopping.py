"""Stopping well: one agreed step on all ranks, a checkpoint, RUN/STOPPED.json, exit code 0.

A run is asked to stop by a signal to any of its ranks (signals.py), by the file RUN/STOP, or by
`run.max_hours`. The ranks agree by the largest wish of all, reduced on a gloo group of its own beside the
step: started at one step and read at the next, it waits for no device and next to never for a rank. A stop
ends the whole command: phases that follow don't start. The same command continues the run.

What reaches the ranks, and how long they have, by launcher:

- plain `glide-ds train` or one process per rank: Ctrl-C and `kill` reach the process; no limit of time.
- `deepspeed` (0.19): Ctrl-C reaches the ranks from the terminal, and its launcher adds SIGTERM to the first rank
  and its workers, waits 30 s for them, then sends SIGKILL: the step and the save have 30 s. The `deepspeed`
  command itself returns to the prompt at once, while the ranks still save; its exit code says nothing of them,
  and is 0 where the launcher died of a signal. `kill DEEPSPEED` ends only that command; the ranks see it and
  stop well, without a limit. `kill LAUNCHER` (launch.py) is SIGTERM to the first rank with the 30 s.
- torchrun: Ctrl-C or `kill` is handed on to all ranks, SIGKILL after --shutdown_timeout (30 s); its own exit
  code is not 0 even where all ranks end with 0.
- srun: signals reach all ranks; SIGKILL comes after KillWait (30 s) or the partition's GraceTime.
- Both launchers die of SIGUSR1 and SIGUSR2: start them with it ignored (`trap '' USR1; exec deepspeed …`); the
  ranks catch it.

Where a save takes longer than those limits, use RUN/STOP, which has none.
"""

from __future__ import annotations

import datetime
import json
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from glide_ds.config import RunConfig
from glide_ds.files import write_file
from glide_ds.training.faults.signals import SIGNALS

STOP_FILE, MARKER = "STOP", "STOPPED.json"
# By rising weight, where ranks have different ones: a person's own stop file goes before all others.
REASONS = (
    "",
    "max_hours",
    "SIGXCPU",
    "SIGUSR2",
    "SIGUSR1",
    "SIGHUP",
    "SIGTERM",
    "SIGINT",
    "stop_file",
)
POLL_S = 1.0  # between two looks for the stop file


class Stop(NamedTuple):
    """An agreed stop: why, and after how many updates of which phase."""

    reason: str  # one of REASONS
    phase: str
    step: int


class Stopper:
    """Asks all ranks once a step whether to stop. Made and closed by all ranks alike."""

    def __init__(self, config: RunConfig, phase: str) -> None:
        self.folder, self.max_hours, self.phase = Path(config.dir), config.max_hours, phase
        timeout = datetime.timedelta(seconds=config.timeout_s)
        self.group: dist.ProcessGroup | None = dist.new_group(backend="gloo", timeout=timeout)  # type: ignore[assignment]
        self.stop: Stop | None = None
        self._vote = torch.zeros(1, dtype=torch.int64)
        self._work: dist.Work | None = None
        self._deadline = Deadline(config.max_hours * 3600)
        self._looked, self._found = -POLL_S, False

    def agreed(self, step: int) -> bool:
        """Whether to stop now that `step` updates are done. The first call of a phase waits for its answer.

        Collective, and the same on all ranks: what they wished for at the call before.
        """
        self._deadline.tick(time.monotonic())
        if self._work is None:
            self._cast()
        if self._counted(step):
            return True
        self._cast()
        return False

    def close(self, step: int) -> Stop | None:
        """Read the last vote: the stop that ends the command after `step` updates, if any. Collective."""
        if self._work is not None:
            self._counted(step)
        dist.destroy_process_group(self.group)
        return self.stop

    def _cast(self) -> None:
        self._vote.fill_(REASONS.index(self._wish()))
        self._work = dist.all_reduce(self._vote, dist.ReduceOp.MAX, self.group, async_op=True)

    def _counted(self, step: int) -> bool:
        assert self._work is not None
        self._work.wait()
        self._work = None
        if reason := REASONS[int(self._vote)]:
            self.stop = Stop(reason, self.phase, step)
        return self.stop is not None

    def _wish(self) -> str:
        if dist.get_rank() == 0 and self._stop_file():  # one rank's look at a shared file system is enough
            return "stop_file"
        if SIGNALS.asked is not None:
            return SIGNALS.asked.name
        return "max_hours" if self._deadline.reached(time.monotonic()) else ""

    def _stop_file(self) -> bool:
        now = time.monotonic()
        if not self._found and now - self._looked >= POLL_S:
            self._looked, self._found = now, (self.folder / STOP_FILE).exists()
        return self._found


class Deadline:
    """When to stop so that the final save still fits into `limit_s` seconds since the process's start.

    It leaves twice the longest time between two steps so far (with what was saved and drawn between them),
    and at least a twentieth of the limit or ten minutes, whichever is less.
    """

    def __init__(self, limit_s: float, started: float | None = None) -> None:
        self.limit_s, self.started = limit_s, SIGNALS.started if started is None else started
        self._last: float | None = None
        self._longest = 0.0

    def tick(self, now: float) -> None:
        """Called at every step."""
        if self._last is not None:
            self._longest = max(self._longest, now - self._last)
        self._last = now

    def reached(self, now: float) -> bool:
        room = max(2 * self._longest, min(600.0, self.limit_s / 20))
        return self.limit_s > 0 and now - self.started >= self.limit_s - room


def start_again(folder: Path) -> None:
    """The run goes on: its marker is no longer true."""
    (folder / MARKER).unlink(missing_ok=True)


def told_stop(stop: Stop, folder: str) -> str:
    """What a person is told last where a run was stopped."""
    saved = f"saved in {folder}" if stop.step else "nothing was to be saved yet"
    return (
        f"glide_ds: stopped at step {stop.step:,} of phase {stop.phase} ({stop.reason}), {saved}; the same command "
        "goes on there"
    )


def mark_stopped(folder: Path, stop: Stop, *, finished: bool) -> None:
    """Leave the marker, unless the run is finished, and honour the stop file. After the checkpoint; rank 0 only."""
    if not finished:
        marker = {**stop._asdict(), "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}
        write_file(folder / MARKER, json.dumps(marker) + "\n")
    (folder / STOP_FILE).unlink(missing_ok=True)
