"""Checkpoints are committed or not there: the protocol with files of a few bytes."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glide_ds.training import checkpoint
from glide_ds.training.checkpoint import (
    LAST,
    MANIFEST,
    Committed,
    committed,
    newest_good,
    save,
    verify,
    write_atomically,
)
from glide_ds.types import CheckpointError

pytestmark = pytest.mark.usefixtures("group")


class Engine:
    """Writes what DeepSpeed would, in small."""

    def __init__(self, fail: Callable[[Path], None] | None = None) -> None:
        self.fail = fail

    def save_checkpoint(self, folder: str, tag: str, client_state: dict[str, Any], save_latest: bool) -> bool:
        assert not save_latest  # DeepSpeed's own pointer moves before the files are complete
        target = Path(folder) / tag
        target.mkdir()
        (target / "model.pt").write_bytes(b"model" * 100 + bytes([client_state["step"]]))
        if self.fail:
            self.fail(target)
        (target / "optimizer.pt").write_bytes(b"moments" * 100)
        return True


def saved(folder: Path, step: int, keep: int = 0, engine: Engine | None = None) -> Committed:
    return save(engine or Engine(), folder, step, {"phase": "full"}, keep)


def last(folder: Path) -> str:
    return (folder / LAST).readlink().name


def test_a_commit_lists_every_file_with_size_and_hash(tmp_path: Path):
    made = saved(tmp_path, 5)
    assert made.path == tmp_path / "step-00000005"
    assert json.loads((made.path / MANIFEST).read_text()) == made.manifest
    assert set(made.manifest["files"]) == {"model.pt", "optimizer.pt"}
    assert made.manifest["files"]["model.pt"]["size"] == 501
    assert (made.manifest["step"], made.manifest["phase"], made.world_size) == (5, "full", 1)
    assert last(tmp_path) == "step-00000005"
    assert verify(made) == []
    assert newest_good(tmp_path) == (made, [])
    assert saved(tmp_path / "other", 5).fingerprint == made.fingerprint
    assert saved(tmp_path / "other", 6).fingerprint != made.fingerprint


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (flip, "does not match its hash"),
        (truncate, "has 500 bytes instead of 501"),
        (Path.unlink, "is missing"),
    ],
)
def test_damage_falls_back_to_the_checkpoint_before_and_says_so(
    tmp_path: Path, damage: Callable[[Path], None], told: str
):
    good, bad = saved(tmp_path, 4), saved(tmp_path, 8)
    damage(bad.path / "model.pt")
    found, damaged = newest_good(tmp_path)
    assert found == good
    assert damaged == [f"{bad.path}: model.pt {told}"]
    damage(good.path / "model.pt")
    found, damaged = newest_good(tmp_path)
    assert found is None
    assert len(damaged) == 2


def test_the_ranks_share_the_verification(tmp_path: Path):
    made = saved(tmp_path, 1)
    for name in ("model.pt", "optimizer.pt"):
        flip(made.path / name)
    parts = [verify(made, part, 2) for part in range(2)]
    assert [len(part) for part in parts] == [1, 1]
    assert parts[0] != parts[1]


def test_files_without_a_manifest_are_no_checkpoint(tmp_path: Path):
    good = saved(tmp_path, 4)
    torn = tmp_path / "step-00000008"
    Engine().save_checkpoint(str(tmp_path), torn.name, {"step": 8}, save_latest=False)
    assert newest_good(tmp_path) == (good, [])
    (torn / MANIFEST).write_text('{"step": 8, "fi')
    assert newest_good(tmp_path) == (good, [])
    again = saved(tmp_path, 8)  # and stand in nobody's way
    assert newest_good(tmp_path) == (again, [])


def test_a_manifest_that_the_pointer_never_reached_is_not_committed(tmp_path: Path):
    good = saved(tmp_path, 4)
    Engine().save_checkpoint(str(tmp_path), "step-00000008", {"step": 8}, save_latest=False)
    manifest = good.manifest | {"step": 8}
    (tmp_path / "step-00000008" / MANIFEST).write_text(json.dumps(manifest))
    assert committed(tmp_path) == [good]


def test_no_folder_and_an_empty_folder_hold_nothing(tmp_path: Path):
    assert newest_good(tmp_path / "none") == (None, [])
    assert newest_good(tmp_path) == (None, [])


def test_the_pointer_moves_after_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved(tmp_path, 4)
    order = []
    write, replace = write_atomically, Path.replace

    def written(path: Path, text: str) -> None:
        assert last(tmp_path) == "step-00000004"
        assert (path.parent / "optimizer.pt").exists()  # all else is there
        write(path, text)
        order.append("manifest")

    def replaced(self: Path, target: Path) -> Path:
        if target.name == LAST:
            assert (tmp_path / "step-00000008" / MANIFEST).exists()
            order.append("pointer")
        return replace(self, target)

    monkeypatch.setattr(checkpoint, "write_atomically", written)
    monkeypatch.setattr(Path, "replace", replaced)
    saved(tmp_path, 8)
    assert order == ["manifest", "pointer"]


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("moment", ["writing", "manifest", "pointer"])
def test_a_failure_while_saving_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
):
    good = saved(tmp_path, 4, keep=1)
    engine = Engine(full_disk if moment == "writing" else None)
    if moment == "manifest":
        monkeypatch.setattr(checkpoint, "write_atomically", full_disk)
    if moment == "pointer":
        monkeypatch.setattr(Path, "symlink_to", full_disk)
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        saved(tmp_path, 8, keep=1, engine=engine)
    assert "the previous checkpoint stands" in str(caught.value)
    assert str(tmp_path / "step-00000008") in str(caught.value)
    monkeypatch.undo()
    assert last(tmp_path) == "step-00000004"
    assert newest_good(tmp_path) == (good, [])
    again = saved(tmp_path, 8, keep=1)
    assert newest_good(tmp_path) == (again, [])


def test_a_full_disk_is_survived(tmp_path: Path):
    """/dev/full answers every write with ENOSPC, as a disk without room does."""
    good = saved(tmp_path, 4)

    def fill(target: Path) -> None:
        with (target / "optimizer.pt").open("wb"), Path("/dev/full").open("wb", buffering=0) as full:
            full.write(b"moments")

    with pytest.raises(CheckpointError, match="No space left"):
        saved(tmp_path, 8, engine=Engine(fill))
    assert newest_good(tmp_path) == (good, [])


@pytest.mark.parametrize(("keep", "left"), [(1, [6]), (2, [4, 6]), (0, [2, 4, 6])])
def test_pruning_keeps_the_newest(tmp_path: Path, keep: int, left: list[int]):
    for step in (2, 4, 6):
        saved(tmp_path, step, keep)
    assert [c.step for c in reversed(committed(tmp_path))] == left
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-{step:08d}" for step in left]


def test_pruning_clears_torn_folders_away(tmp_path: Path):
    (tmp_path / "step-00000003").mkdir()
    (tmp_path / "step-00000009").mkdir()  # newer than what is committed: not ours to judge
    saved(tmp_path, 6, keep=1)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-00000006", "step-00000009"]


def test_small_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "run.json"
    write_atomically(path, "old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_the_model_is_read_from_a_committed_checkpoint_only_with_the_manifest(tmp_path: Path):
    made = saved(tmp_path, 4)
    (made.path / MANIFEST).unlink()
    assert committed(tmp_path) == []
