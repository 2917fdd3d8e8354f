"""Checkpoints that are committed or not there.

Every rank writes into PHASE/step-N (background.py); when all are done, rank 0 writes manifest.json (size
and hash of every file) and syncs it; one atomic rename moves the link PHASE/LAST. Loading checks the
manifest, the ranks share that work, and all agree on the newest good checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from glide_ds.config import CheckpointConfig
from glide_ds.files import point, sha256, sync_directory, write_file

MANIFEST = "manifest.json"
LAST = "LAST"
BEST = "BEST"
OWN_HASH = "sha256"  # the manifest's own, of all its other entries


@dataclass(frozen=True)
class Committed:
    """One committed checkpoint of one phase."""

    path: Path
    step: int  # updates done
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """The hash of the manifest, which holds the hash of every file: the checkpoint's identity."""
        return _hash(self.manifest)

    @property
    def world_size(self) -> int:
        return int(self.manifest["world_size"])

    def read(self, name: str) -> dict[str, Any]:
        """One of its files, its tensors memory-mapped. The manifest vouches for it being ours."""
        return dict(torch.load(self.path / name, map_location="cpu", weights_only=False, mmap=True))


def committed(folder: Path) -> list[Committed]:
    """The committed checkpoints below a phase's folder, the newest first. Files are not verified."""
    if not folder.is_dir():
        return []
    found = []
    last = _last_step(folder)
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            own = manifest.pop(OWN_HASH, None)
            candidate = Committed(path, int(manifest["step"]), manifest)
        except (OSError, ValueError, KeyError, AttributeError):
            continue  # no readable manifest: never committed, or damaged since
        if candidate.step <= last and own in (None, _hash(manifest)):  # none: of an earlier version
            found.append(candidate)
    return found


def unreadable(folder: Path) -> list[Path]:
    """What was committed after the newest of `committed`, and has a damaged manifest; the newest first."""
    newest = next((made.step for made in committed(folder)), -1)
    last = _last_step(folder)
    return [
        path
        for path in sorted(folder.glob("step-*"), reverse=True)
        if newest < (step := _step(path)) <= last and (step == last or (path / MANIFEST).exists())
    ]


def newest_good(folder: Path) -> tuple[Committed | None, list[str]]:
    """The newest committed checkpoint whose files all verify, and what is wrong with newer ones.

    Called by all ranks alike: each verifies its share of the files, and all return the same.
    """
    found: list[Any] = [(committed(folder), unreadable(folder)) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)  # a network file system may show the ranks different lists
    candidates, illegible = found[0]
    damaged = [f"{path}: {MANIFEST} is damaged" for path in illegible]
    for candidate in candidates:
        faults: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(faults, verify(candidate, dist.get_rank(), dist.get_world_size()))
        problems = [fault for part in faults for fault in part]
        if not problems:
            return candidate, damaged
        damaged.append(f"{candidate.path}: {problems[0]}")
    return None, damaged


def rewind(folder: Path, before: int) -> int:
    """Go back to the newest good checkpoint of an update before number `before`, and remove those after it.

    Where there is none, the oldest good one; where there is none at all, the phase's beginning. Returns its
    number of updates done. Called by all ranks alike.
    """
    good = []
    for candidate in committed(folder) if dist.get_rank() == 0 else []:
        if not verify(candidate):
            good.append(candidate)
            if candidate.step < before:
                break
    chosen = [good[-1].step if good else 0]
    if dist.get_rank() == 0:
        if good:
            point(folder / LAST, good[-1].path)
            sync_directory(folder)
        for path in folder.glob("step-*"):
            if _step(path) > chosen[0]:
                remove(path)
    dist.broadcast_object_list(chosen)
    return chosen[0]


def verify(checkpoint: Committed, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with every `parts`-th file of the manifest, starting at `part`; empty when all is well."""
    problems = []
    for name, entry in sorted(checkpoint.manifest["files"].items())[part::parts]:
        path = checkpoint.path / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry["size"]:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {entry['size']}")
        elif sha256(path) != entry["sha256"]:
            problems.append(f"{name} does not match its hash")
    return problems


def commit(target: Path, manifest: dict[str, Any]) -> None:
    """Make the files in `target` a checkpoint: from here on it is the newest one. They are on the disk already."""
    vouched = manifest | {OWN_HASH: _hash(manifest)}
    write_file(target / MANIFEST, json.dumps(vouched, indent=1) + "\n")
    point(target.parent / LAST, target)
    sync_directory(target.parent)


def mark_best(made: Committed) -> None:
    """Move BEST to a checkpoint whose manifest holds the lowest `validation_loss` so far. Not pruned while best."""
    loss = made.manifest.get("validation_loss")
    best = _best(made.path.parent)
    if loss is not None and math.isfinite(loss) and (best is None or loss < best.manifest["validation_loss"]):
        point(made.path.parent / BEST, made.path)


def prune(folder: Path, config: CheckpointConfig) -> None:
    """Remove what `config` does not keep: all but the newest, every `keep_every`-th, the best; torn folders too."""
    last, best = _last_step(folder), _best(folder)
    kept = [c.path for c in committed(folder)[: config.keep or None]]
    if config.best and best is not None:
        kept.append(best.path)
    for path in folder.glob("step-*"):
        step = _step(path)
        milestone = config.keep_every and step % config.keep_every == 0 and (path / MANIFEST).exists()
        # Anything newer than LAST is being written by nobody: this runs between commits.
        if path not in kept and not milestone and step <= last:
            remove(path)


def remove(path: Path) -> None:
    """Remove a checkpoint's folder. The manifest goes first, so half of one is not taken for a damaged one."""
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path)


def clear(target: Path) -> None:
    """An empty folder to write into; what an earlier try left is removed."""
    if target.exists():
        remove(target)
    target.mkdir(parents=True)


def _best(folder: Path) -> Committed | None:
    """The checkpoint that BEST names, if it is still there."""
    name = (folder / BEST).readlink().name if (folder / BEST).is_symlink() else None
    found = (c for c in committed(folder) if c.path.name == name and "validation_loss" in c.manifest)
    return next(found, None)


def _hash(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _last_step(folder: Path) -> int:
    try:
        return _step((folder / LAST).readlink())
    except (OSError, ValueError):
        return -1  # nothing was ever committed here
