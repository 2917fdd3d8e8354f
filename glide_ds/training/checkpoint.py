"""Checkpoints that are committed or not there.

Every rank writes into PHASE/step-N; barrier; rank 0 writes manifest.json (size and hash of every
file) and syncs it; one atomic rename moves the link PHASE/LAST. Loading checks the manifest, the
ranks share that work, and all agree on the newest good checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from glide_ds.model.tensor_files import sha256, sync_directory
from glide_ds.types import CheckpointError

MANIFEST = "manifest.json"
LAST = "LAST"
MODEL_FILE = "mp_rank_00_model_states.pt"


@dataclass(frozen=True)
class Committed:
    """One committed checkpoint of one phase."""

    path: Path
    step: int  # updates done
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """The hash of the manifest, which holds the hash of every file: the checkpoint's identity."""
        return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()

    @property
    def world_size(self) -> int:
        return int(self.manifest["world_size"])

    def model_state(self) -> dict[str, torch.Tensor]:
        """The module's state_dict as trained: fp32, or bf16 where the engine keeps a bf16 replica."""
        return dict(self.read(MODEL_FILE)["module"])

    def read(self, name: str) -> dict[str, Any]:
        """One of DeepSpeed's files, its tensors memory-mapped. The manifest vouches for it being ours."""
        return dict(torch.load(self.path / name, map_location="cpu", weights_only=False, mmap=True))


def save(engine: Any, folder: Path, step: int, facts: dict[str, Any], keep: int) -> Committed:
    """Write and commit the engine's state as `folder`/step-N. Called by all ranks alike.

    `facts` goes into the manifest. A failure leaves the previous commit standing and raises
    CheckpointError on every rank.
    """
    tag = f"step-{step:08d}"
    target = folder / tag
    _agree(lambda: _clear(target) if dist.get_rank() == 0 else None, f"{target} can't be prepared")
    _agree(
        lambda: engine.save_checkpoint(str(folder), tag=tag, client_state={"step": step}, save_latest=False),
        f"{target} can't be written",
    )
    own = _hashes(target, dist.get_rank(), dist.get_world_size())
    gathered: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    files = {name: entry for part in gathered for name, entry in sorted(part.items())}
    manifest = {"step": step, "world_size": dist.get_world_size(), **facts, "files": files}
    _agree(lambda: _commit(target, manifest) if dist.get_rank() == 0 else None, f"{target} can't be committed")
    if dist.get_rank() == 0:
        _prune(folder, keep)
    return Committed(target, step, manifest)


def committed(folder: Path) -> list[Committed]:
    """The committed checkpoints below a phase's folder, the newest first. Files are not verified."""
    if not folder.is_dir():
        return []
    found = []
    last = _last_step(folder)
    for path in sorted(folder.glob("step-*"), reverse=True):
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            candidate = Committed(path, int(manifest["step"]), manifest)
        except (OSError, ValueError, KeyError):
            continue  # no readable manifest: never committed, or damaged since
        if candidate.step <= last:
            found.append(candidate)
    return found


def newest_good(folder: Path) -> tuple[Committed | None, list[str]]:
    """The newest committed checkpoint whose files all verify, and what is wrong with newer ones.

    Called by all ranks alike: each verifies its share of the files, and all return the same.
    """
    damaged: list[str] = []
    candidates: list[Any] = [committed(folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(candidates)  # a network file system may show the ranks different lists
    for candidate in candidates[0]:
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
            _point(good[-1].path)
        for path in folder.glob("step-*"):
            if int(path.name.removeprefix("step-")) > chosen[0]:
                shutil.rmtree(path)
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


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that a reader, or a crash, sees the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def _commit(target: Path, manifest: dict[str, Any]) -> None:
    for name in manifest["files"]:
        with (target / name).open("rb") as file:
            os.fsync(file.fileno())
    write_atomically(target / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    _point(target)


def _point(target: Path) -> None:
    """Make `target` the newest checkpoint, by one atomic rename."""
    link = target.parent / f".{LAST}.{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(target.name)
    link.replace(target.parent / LAST)
    sync_directory(target.parent)


def _hashes(folder: Path, part: int, parts: int) -> dict[str, Any]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())[part::parts]
    return {str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": sha256(p)} for p in files}


def _last_step(folder: Path) -> int:
    try:
        return int((folder / LAST).readlink().name.removeprefix("step-"))
    except (OSError, ValueError):
        return -1  # nothing was ever committed here


def _clear(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        shutil.rmtree(target)


def _prune(folder: Path, keep: int) -> None:
    last = _last_step(folder)
    kept = [c.path for c in committed(folder)[: keep or None]]
    for path in folder.glob("step-*"):
        # Anything newer than LAST is being written by nobody: this runs between commits.
        if path not in kept and int(path.name.removeprefix("step-")) <= last:
            shutil.rmtree(path)


def _agree(action: Any, consequence: str) -> None:
    """Run `action`; where it fails on any rank, every rank raises the same CheckpointError."""
    failure = None
    try:
        action()
    except (OSError, RuntimeError, CheckpointError) as error:
        failure = f"{type(error).__name__}: {error}"
    failures: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure)
    first = next(((rank, text) for rank, text in enumerate(failures) if text), None)
    if first:
        shared = CheckpointError(
            f"{consequence} (rank {first[0]}: {first[1]}); the previous checkpoint stands. Check free disk "
            "space and permissions, then start the same command again"
        )
        shared.on_all_ranks = True
        raise shared
