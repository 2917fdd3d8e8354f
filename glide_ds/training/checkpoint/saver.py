"""Saving off the critical path: a copy in host memory, written and committed while training goes on.

Training stops only while the state is copied. A thread on every rank then writes the rank's own files, puts
them on the disk and hashes them. The threads meet over a connection of their own to the process group's
store, never in a collective, which would mix with training's: each rank leaves its hashes there, rank 0
commits once it has all, and every rank reads the outcome.
"""

from __future__ import annotations

import itertools
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from glide_ds.config import CheckpointConfig
from glide_ds.errors import CheckpointError
from glide_ds.model.tensor_files import State
from glide_ds.training.checkpoint import commit as checkpoint
from glide_ds.training.checkpoint.commit import Owner, partial, step_name
from glide_ds.training.faults.ranks import attempt
from glide_ds.training.zero.group import own_store
from glide_ds.training.zero.snapshot import Snapshot

# Numbers the saves of this process, so that the keys of two never meet; all ranks save alike.
SAVES = itertools.count()
PEERS_S = 30.0  # for a save under way when an error ends the phase: its peers may be gone


class Saver:
    """Saves one phase's state as `folder`/step-N. All ranks call its methods alike; nobody writes to `frozen`.

    With `config.async_save` off a save returns once it is committed. A failed save is reported by one line
    and leaves the previous commit standing; `finish` raises where the last one failed.
    """

    def __init__(
        self,
        frozen: Mapping[str, Tensor],
        folder: Path,
        config: CheckpointConfig,
        owner: Owner,
        timeout_s: float,
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder, self.config, self.owner, self.say = folder, config, owner, say
        self.patience = timedelta(seconds=timeout_s)  # for the slowest rank's writing
        self.store = own_store()
        self.snapshot = Snapshot(frozen.values())
        self.thread: threading.Thread | None = None
        self.step = 0  # of the last save
        self.failure: str | None = None  # of the last save
        self.failures = 0
        self.stale: list[str] = []  # the last save's keys in the store

    def save(
        self,
        step: int,
        facts: Mapping[str, Any],
        files: Mapping[str, State],
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy the state after update `step`, and have it written. Waits for the save before.

        `facts` goes into the manifest; of what it holds as `validation_loss`, the lowest is kept. `files` are this
        rank's own, by name. Rank 0 calls `then` beside the training, whatever became of the save.
        """
        self.wait()
        self.step, started = step, time.monotonic()
        self.snapshot.take(files)
        stall = time.monotonic() - started
        manifest = {"run": self.owner.run, "step": step, "world_size": dist.get_world_size(), **facts}
        self.failure = f"rank {dist.get_rank()}'s writing thread died"  # until it says otherwise
        self.thread = threading.Thread(
            target=self._write,
            args=(next(SAVES), manifest, started, stall, then),
            name="checkpoint",
            daemon=True,
        )
        self.thread.start()
        if not self.config.async_save:
            self.finish()

    def wait(self, limit_s: float | None = None) -> None:
        """Wait for the save under way, whatever becomes of it, at most `limit_s`. Not collective."""
        if self.thread is not None:
            self.thread.join(limit_s)
            self.thread = None
            self.failures += self.failure is not None

    def finish(self) -> None:
        """Wait until the last save is committed. Collective; raises CheckpointError on all ranks where it failed."""
        self.wait()
        failures: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, self.failure)
        first = next((failure for failure in failures if failure), None)
        if first:
            self.failure = None
            error = CheckpointError(
                f"{first}; the previous checkpoint stands",
                remedy="check free disk space and permissions, then start the same command again",
            )
            error.on_all_ranks = True
            raise error

    def metrics(self) -> dict[str, int]:
        """What a line of metrics.jsonl says of it."""
        return {"saves_failed": self.failures}

    def _write(
        self, number: int, manifest: dict[str, Any], started: float, stall: float, then: Callable[[], None]
    ) -> None:
        """The thread: write, tell rank 0, and hear what became of it."""
        rank, target = dist.get_rank(), self.folder / step_name(manifest["step"])
        keys = {name: f"save{number}/{name}" for name in ("ready", "outcome")}
        try:
            if rank == 0:
                unready = attempt(lambda: checkpoint.prepare(self.folder, manifest["step"], self.owner))
                self.store.set(keys["ready"], "")
            self.store.wait([keys["ready"]], self.patience)
            failure = self.snapshot.failure or (unready if rank == 0 else None)
            written: dict[str, Any] = {}
            if failure is None:
                place = partial(self.folder, manifest["step"], self.owner)
                failure = attempt(lambda: written.update(self.snapshot.write(place)))
            own = {"failure": failure, "files": written}
            self.store.set(f"save{number}/rank{rank}", json.dumps(own))
            if rank == 0:
                self.store.set(keys["outcome"], self._commit(number, target, manifest) or "")
            # Rank 0 may first have to wait for another rank as long as its patience lasts, then commit.
            self.store.wait([keys["outcome"]], 2 * self.patience)
            self.failure = self.store.get(keys["outcome"]).decode() or None
        except RuntimeError as error:  # the store's own
            self.failure = f"{target} can't be committed: rank {rank} lost touch with the others ({error})"
        if rank == 0:
            self._report(target, time.monotonic() - started, stall)
            if trouble := attempt(then):
                self.say(f"!! {self.folder}: {trouble}")

    def _commit(self, number: int, target: Path, manifest: dict[str, Any]) -> str | None:
        """Rank 0: gather the ranks' files and commit them. Returns what went wrong."""
        keys = [f"save{number}/rank{rank}" for rank in range(dist.get_world_size())]
        for key in self.stale:  # nobody reads the last save's any more
            self.store.delete_key(key)
        self.stale = [*keys, f"save{number}/ready", f"save{number}/outcome"]
        failure = attempt(lambda: self.store.wait(keys, self.patience))
        if failure is None:
            parts = [json.loads(self.store.get(key)) for key in keys]
            failures = [f"rank {rank}: {part['failure']}" for rank, part in enumerate(parts) if part["failure"]]
            files = {name: entry for part in parts for name, entry in sorted(part["files"].items())}
            failure = next(iter(failures), None)
        if failure is None:
            whole = {**manifest, "files": files}
            failure = attempt(lambda: checkpoint.commit(self.folder, whole, self.owner))
        if failure is None:
            step = manifest["step"]
            if trouble := attempt(lambda: checkpoint.prune(self.folder, self.config, self.owner, step)):
                self.say(f"!! {self.folder}: {trouble}; the commit itself stands")
            return None
        free = shutil.disk_usage(self.folder).free
        # Half a checkpoint is of no use, and the disk may be full.
        shutil.rmtree(partial(self.folder, manifest["step"], self.owner), ignore_errors=True)
        return f"{target} can't be written ({failure}; {free / 2**20:,.0f} MiB were free)"

    def _report(self, target: Path, seconds: float, stall: float) -> None:
        if self.failure is None:
            waited = f", training waited {stall:.2f} s" if self.config.async_save else ""
            self.say(f"committed {target} in {seconds:.1f} s{waited}")
        else:
            self.say(f"!! CHECKPOINT NOT SAVED: {self.failure}; the previous checkpoint stands")
