"""Checkpoints that are committed or not there.

Every rank writes into a folder of its own name (`partial`) beside PHASE/step-N; when all are done, rank 0 writes
manifest.json there (run, step, size and hash of every file), syncs it and renames the folder to step-N. A folder whose
manifest and files verify is a checkpoint, however it came there; links and names are for people. The ranks share the
verification, and all agree on the newest good one. What is removed or overwritten is the run's own (`Owner`).

A checkpoint whose manifest names files that `stay` leaves these behind when it is pruned: committed as it was, with a
manifest of its own, as PHASE/averages/step-N.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from glide_ds.config import CheckpointConfig
from glide_ds.files import PARTIAL, point, sha256, sync_directory, write_file
from glide_ds.model.tensor_files import load_tensors

MANIFEST = "manifest.json"
LAST = "LAST"
BEST = "BEST"
AVERAGES = "averages"
OWN_HASH = "sha256"  # the manifest's own, of all its other entries
# What DeepSpeed put into the files of before beside tensors and plain values, and nobody reads.
DEEPSPEED_OBJECTS = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
STEP = re.compile(r"step-(\d{8,})")  # the whole name: step-00000500.bak is a person's


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
        """One of its files, its tensors memory-mapped. Raises WeightsError where reading it could execute code."""
        return dict(load_tensors(self.path / name, mmap=True, known=DEEPSPEED_OBJECTS))


@dataclass(frozen=True)
class Owner:
    """Whose checkpoints may be removed and overwritten: those of the run with this id."""

    run: str
    older: bool = False  # the run began before there were ids: what has none is its own too

    def owns(self, path: Path) -> bool:
        """Whether it is a folder, no link to one, of a step's name, and its manifest, whole or damaged, has the id."""
        if not STEP.fullmatch(path.name) or path.is_symlink() or not path.is_dir():
            return False
        try:
            text = (path / MANIFEST).read_bytes()
        except OSError:
            return self.older and not (path / MANIFEST).exists()
        return self.run.encode() in text or (self.older and b'"run"' not in text)


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def at(path: Path) -> Committed | None:
    """The checkpoint in that folder, whatever its name; None without a readable manifest. Files are not verified."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        own = manifest.pop(OWN_HASH, None)  # none: of an earlier version
        made = Committed(path, int(manifest["step"]), manifest)
        return made if own in (None, _hash(manifest)) else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def committed(folder: Path) -> list[Committed]:
    """The committed checkpoints below a phase's folder, the newest first. Files are not verified."""
    found = ((step, at(path)) for step, path in _steps(folder))
    return [made for step, made in found if made and made.step == step]


def unreadable(folder: Path) -> list[Path]:
    """Folders of steps after the newest of `committed`, without a manifest or with a damaged one; newest first."""
    newest = next((made.step for made in committed(folder)), -1)
    return [path for step, path in _steps(folder) if step > newest]


def lookalikes(folder: Path) -> list[Path]:
    """What a person would take for a checkpoint, whatever it is; no link that shows one beside it."""
    named = [path for path in _entries(folder) if path.name.startswith("step-") or path.name in (LAST, BEST)]
    return sorted(
        path for path in named if not (path.name in (LAST, BEST) and path.is_symlink() and path.exists())
    )


def newest_good(folder: Path) -> tuple[Committed | None, list[str]]:
    """The newest committed checkpoint whose files all verify, and what is wrong with newer ones.

    Where there is none, what is wrong with all that looks like one. Called by all ranks alike: each verifies its share
    of the files, and all return the same.
    """
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        found = [(committed(folder), unreadable(folder), lookalikes(folder))]
    dist.broadcast_object_list(found)  # a network file system may show the ranks different lists
    candidates, illegible, alike = found[0]
    damaged = [f"{path}: {no_manifest(path)}" for path in illegible]
    for candidate in candidates:
        faults: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(faults, verify(candidate, dist.get_rank(), dist.get_world_size()))
        problems = [fault for part in faults for fault in part]
        if not problems:
            return candidate, damaged
        damaged.append(f"{candidate.path}: {problems[0]}")
    told = {*illegible, *(candidate.path for candidate in candidates)}
    return None, damaged + [f"{path}: {_name_of(path)}" for path in alike if path not in told]


def _name_of(path: Path) -> str:
    """What is wrong with the name of something that looks like a checkpoint."""
    return "no checkpoint's name" if path.exists() else "it names nothing that is there"


def no_manifest(path: Path) -> str:
    """What is wrong with the manifest of an `unreadable` folder."""
    return f"{MANIFEST} is damaged" if (path / MANIFEST).exists() else f"{MANIFEST} is missing"


def rewind(folder: Path, before: int, owner: Owner) -> int:
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
            show(folder / LAST, good[-1].path)
        else:  # a link to nothing would look like a checkpoint that is missing
            for link in (folder / LAST, folder / BEST):
                if link.is_symlink():
                    link.unlink()
        for place in (folder, folder / AVERAGES):
            remove_after(place, chosen[0], owner)
    dist.broadcast_object_list(chosen)
    return chosen[0]


def remove_after(folder: Path, step: int, owner: Owner) -> list[Path]:
    """Remove the run's own of updates after `step`, the newest first: a kill leaves no gap before one that stands."""
    gone = [path for later, path in _steps(folder) if later > step and owner.owns(path)]
    for path in gone:
        remove(path, owner)
    return gone


def verify(checkpoint: Committed, part: int = 0, parts: int = 1, *, hashes: bool = True) -> list[str]:
    """What is wrong with every `parts`-th file of the manifest, starting at `part`; empty when all is well.

    Without `hashes` only whether it is there in its size, which takes no reading.
    """
    problems = []
    for name, entry in sorted(checkpoint.manifest["files"].items())[part::parts]:
        path = checkpoint.path / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != entry["size"]:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {entry['size']}")
        elif hashes and sha256(path) != entry["sha256"]:
            problems.append(f"{name} does not match its hash")
    return problems


def partial(folder: Path, step: int, owner: Owner) -> Path:
    """Where that step's checkpoint is written until it is whole."""
    return folder / f".{step_name(step)}.{owner.run}{PARTIAL}"


def prepare(folder: Path, step: int, owner: Owner) -> Path:
    """An empty folder to write that step's checkpoint into; what earlier tries of the run left is removed.

    Raises FileExistsError where a checkpoint could not be put in place, for something stands there that is not the
    run's own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in leftovers(folder, owner):
        shutil.rmtree(left)
    target = folder / step_name(step)
    if (target.exists() or target.is_symlink()) and not owner.owns(target):
        raise FileExistsError(f"{target} is there and was not written by this run; move it away")
    made = partial(folder, step, owner)
    made.mkdir()
    return made


def commit(folder: Path, manifest: dict[str, Any], owner: Owner) -> Committed:
    """Make what was written for the manifest's step a checkpoint. Its files are on the disk already."""
    made = _place(folder, manifest, owner)
    show(folder / LAST, made.path)
    return made


def _place(folder: Path, manifest: dict[str, Any], owner: Owner) -> Committed:
    step = manifest["step"]
    source, target = partial(folder, step, owner), folder / step_name(step)
    write_file(source / MANIFEST, json.dumps(manifest | {OWN_HASH: _hash(manifest)}, indent=1) + "\n")
    if owner.owns(target):  # damaged, or the run would not have come here again
        remove(target, owner)
    source.rename(target)
    sync_directory(folder)
    return Committed(target, step, manifest)


def show(link: Path, path: Path) -> None:
    """Let LAST or BEST name a checkpoint, for people: where there are links, and nothing of theirs has that name."""
    with suppress(OSError):
        point(link, path)


def best(found: list[Committed]) -> Committed | None:
    """The one of the lowest validation loss."""
    measured = (
        made for made in reversed(found) if math.isfinite(made.manifest.get("validation_loss", math.nan))
    )
    return min(measured, key=lambda made: float(made.manifest["validation_loss"]), default=None)


def prune(folder: Path, config: CheckpointConfig, owner: Owner, newest: int) -> None:
    """Remove of the run's own what `config` does not keep: all but the newest, every `keep_every`-th, the best.

    `newest` is the step committed last. What stands after it was damaged when the run went on before it: it counts for
    nothing, or it would be kept in the place of what is whole, and it stays for people until its step is saved again.
    """
    kept, others = sorted_out(folder, config, owner, newest)
    if config.best and (lowest := best(kept)):
        show(folder / BEST, lowest.path)
    for path in others:
        retire(path, owner)


def sorted_out(
    folder: Path, config: CheckpointConfig, owner: Owner, newest: float = math.inf
) -> tuple[list[Committed], list[Path]]:
    """The run's own checkpoints up to step `newest` that `config` keeps, the newest first, and the other folders."""
    own = [made for made in committed(folder) if made.step <= newest and owner.owns(made.path)]
    places = {made.path for made in own[: config.keep or None]}
    if config.best and (lowest := best(own)):
        places.add(lowest.path)
    if config.keep_every:
        places |= {made.path for made in own if made.step % config.keep_every == 0}
    others = [
        path
        for step, path in _steps(folder)
        if path not in places and own and step <= own[0].step and owner.owns(path)
    ]
    return [made for made in own if made.path in places], others


def leftovers(folder: Path, owner: Owner) -> list[Path]:
    """Folders of the run's own saves and removals that were cut short."""
    return sorted(folder.glob(f".step-*.{owner.run}*{PARTIAL}"))


def retire(path: Path, owner: Owner) -> None:
    """Remove a checkpoint's folder once the files of it that are to stay are committed on their own.

    Raises OSError, and removes nothing, where one of them is not there.
    """
    made = at(path)
    if made and (stay := made.manifest.get("stay")):
        place = prepare(path.parent / AVERAGES, made.step, owner)
        for name in stay:
            _copy(path / name, place / name)
        files = {name: made.manifest["files"][name] for name in stay}
        _place(path.parent / AVERAGES, {**made.manifest, "files": files}, owner)
    remove(path, owner)


def _copy(source: Path, target: Path) -> None:
    """A second name for a file, or where the file system has none, a copy that is on the disk."""
    try:
        target.hardlink_to(source)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
        with target.open("rb+") as file:
            os.fsync(file.fileno())


def remove(path: Path, owner: Owner) -> None:
    """Remove a checkpoint's folder. It loses its name first, so half of one is not taken for a damaged one."""
    gone = path.with_name(f".{path.name}.{owner.run}.gone{PARTIAL}")
    if gone.exists():
        shutil.rmtree(gone)
    path.rename(gone)
    shutil.rmtree(gone)


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """The folders, and links to folders, that are named as a step's checkpoint is; the newest first."""
    named = ((STEP.fullmatch(path.name), path) for path in _entries(folder))
    return sorted(((int(match[1]), path) for match, path in named if match and path.is_dir()), reverse=True)


def _entries(folder: Path) -> Iterator[Path]:
    return folder.iterdir() if folder.is_dir() else iter(())


def _hash(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
