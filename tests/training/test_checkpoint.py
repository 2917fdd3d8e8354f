"""Checkpoints are committed or not there: the protocol with files of a few bytes."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from glide_ds.config import CheckpointConfig
from glide_ds.errors import CheckpointError
from glide_ds.files import write_file
from glide_ds.training.checkpoint import commit as checkpoint
from glide_ds.training.checkpoint import saver as background
from glide_ds.training.checkpoint.commit import (
    BEST,
    LAST,
    MANIFEST,
    Committed,
    Owner,
    committed,
    newest_good,
    prune,
    unreadable,
    verify,
)
from glide_ds.training.checkpoint.saver import Saver
from glide_ds.training.zero import snapshot

pytestmark = pytest.mark.usefixtures("group")
OWNER = Owner("0123456789abcdef")


FROZEN = {"layer": torch.zeros(10)}


class Small(Saver):
    """Saves two files of a few tensors."""

    def __init__(self, folder: Path, owner: Owner = OWNER, timeout_s: float = 10, **config: Any) -> None:
        super().__init__(FROZEN, folder, CheckpointConfig(**config), owner, timeout_s)
        self.weights = torch.zeros(100)

    def save(self, step: int, facts: Any) -> None:  # type: ignore[override]
        state = {"head": self.weights[:50], "tail": self.weights[50:], "step": torch.tensor(step), **FROZEN}
        super().save(step, facts, dict.fromkeys(("model.safetensors", "optimizer.safetensors"), state))


def saver(folder: Path, **config: Any) -> Small:
    return Small(folder, **config)


def saved(folder: Path, step: int, keep: int = 0, **facts: Any) -> Committed:
    saver(folder, keep=keep, async_save=False).save(step, {"phase": "full", **facts})
    return next(c for c in committed(folder) if c.step == step)


def last(folder: Path) -> str:
    return (folder / LAST).readlink().name


def test_a_commit_lists_every_file_with_size_and_hash(tmp_path: Path):
    made = saved(tmp_path, 5)
    assert made.path == tmp_path / "step-00000005"
    told = json.loads((made.path / MANIFEST).read_text())
    assert told.pop("sha256") == made.fingerprint
    assert told == made.manifest
    assert set(made.manifest["files"]) == {"model.safetensors", "optimizer.safetensors"}
    assert (
        made.manifest["files"]["model.safetensors"]["size"] == (made.path / "model.safetensors").stat().st_size
    )
    assert (made.manifest["step"], made.manifest["phase"], made.world_size) == (5, "full", 1)
    assert last(tmp_path) == "step-00000005"
    assert verify(made) == []
    assert newest_good(tmp_path) == (made, [])
    assert saved(tmp_path / "other", 5).fingerprint == made.fingerprint
    assert made.manifest["run"] == OWNER.run
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
        (truncate, r"has \d+ bytes instead of \d+"),
        (Path.unlink, "is missing"),
    ],
)
def test_damage_falls_back_to_the_checkpoint_before_and_says_so(
    tmp_path: Path, damage: Callable[[Path], None], told: str
):
    good, bad = saved(tmp_path, 4), saved(tmp_path, 8)
    damage(bad.path / "model.safetensors")
    found, damaged = newest_good(tmp_path)
    assert found == good
    assert re.fullmatch(f"{bad.path}: model.safetensors {told}", *damaged)
    damage(good.path / "model.safetensors")
    found, damaged = newest_good(tmp_path)
    assert found is None
    assert len(damaged) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path, path.stat().st_size - 2),
        lambda path: path.write_text(path.read_text().replace('"phase": "full"', '"phase": "fuml"')),
        lambda path: path.write_text(path.read_text().replace('"files"', '"fimes"')),
        lambda path: path.write_text(path.read_text().replace('"step": 8', '"step": 9')),
        lambda path: path.write_bytes(path.read_bytes().replace(b"model.safetensors", b"mode\xec.safetensors")),
    ],
    ids=["truncated", "value", "key", "step", "letter"],
)
def test_a_damaged_manifest_falls_back_and_says_so(tmp_path: Path, damage: Callable[[Path], None]):
    good, bad = saved(tmp_path, 4), saved(tmp_path, 8)
    damage(bad.path / MANIFEST)
    assert newest_good(tmp_path) == (good, [f"{bad.path}: manifest.json is damaged"])
    again = saved(tmp_path, 8)  # the run goes on from 4 and comes here again
    assert newest_good(tmp_path) == (again, [])


def test_the_ranks_share_the_verification(tmp_path: Path):
    made = saved(tmp_path, 1)
    for name in ("model.safetensors", "optimizer.safetensors"):
        flip(made.path / name)
    parts = [verify(made, part, 2) for part in range(2)]
    assert [len(part) for part in parts] == [1, 1]
    assert parts[0] != parts[1]


def test_files_without_a_manifest_are_no_checkpoint(tmp_path: Path):
    good = saved(tmp_path, 4)
    torn = tmp_path / "step-00000008"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"half")
    assert newest_good(tmp_path) == (good, [f"{torn}: manifest.json is missing"])
    (torn / MANIFEST).write_text('{"step": 8, "fi')
    assert newest_good(tmp_path) == (good, [f"{torn}: manifest.json is damaged"])
    with pytest.raises(CheckpointError, match=f"{torn} is there and was not written by this run; move it away"):
        saved(tmp_path, 8)
    assert (torn / "model.safetensors").read_bytes() == b"half"
    saved(tmp_path, 9, keep=1)
    assert newest_good(tmp_path)[0] == committed(tmp_path)[0] != good
    assert (torn / "model.safetensors").read_bytes() == b"half"


def without_links(folder: Path, copy: Path) -> Path:
    """As scp -r and zip copy."""
    return Path(shutil.copytree(folder, copy))


def lost_links(folder: Path, copy: Path) -> Path:
    """As rsync -r and object stores copy."""
    return Path(shutil.copytree(folder, copy, ignore=lambda _, names: [n for n in names if n in (LAST, BEST)]))


@pytest.mark.parametrize("copied", [without_links, lost_links])
def test_a_copy_goes_on_where_the_original_is(tmp_path: Path, copied: Callable[[Path, Path], Path]):
    for step in (4, 8):
        saved(tmp_path / "one", step, validation_loss=step)
    copy = copied(tmp_path / "one", tmp_path / "copy")
    found, damaged = newest_good(copy)
    assert found is not None
    assert (found.path, found.step, damaged) == (copy / "step-00000008", 8, [])
    again = saver(copy, keep=1, async_save=False)
    again.save(12, {})
    assert [c.step for c in committed(copy)] == [12, 4]  # the best stays, by its manifest
    assert again.failure is None


def test_what_looks_like_a_checkpoint_is_told_where_there_is_none(tmp_path: Path):
    saved(tmp_path, 4).path.rename(tmp_path / "step-00000004.bak")
    (tmp_path / "step-00000008.zip").touch()
    found, damaged = newest_good(tmp_path)
    assert found is None
    assert damaged == [
        f"{tmp_path / name}: {why}"
        for name, why in (
            ("LAST", "it names nothing that is there"),
            ("step-00000004.bak", "no checkpoint's name"),
            ("step-00000008.zip", "no checkpoint's name"),
        )
    ]


def foreign(folder: Path, step: int) -> Path:
    """A checkpoint of another run, as a folder."""
    Small(folder, Owner("another"), keep=0, async_save=False).save(step, {})
    return folder / f"step-{step:08d}"


def test_only_the_runs_own_folders_are_pruned_and_rewound(tmp_path: Path):
    theirs = foreign(tmp_path, 2)
    linked = tmp_path / "step-00000003"
    linked.symlink_to(foreign(tmp_path / "elsewhere", 3))
    backup = tmp_path / "step-00000004.bak"
    shutil.copytree(saved(tmp_path, 4).path, backup)
    (tmp_path / "step-5").mkdir()
    (tmp_path / "step-00000007.txt").touch()
    for step in (6, 8, 10):
        saved(tmp_path, step, keep=1)
    stays = {theirs.name, linked.name, backup.name, "step-5", "step-00000007.txt"}
    assert {path.name for path in tmp_path.glob("step-*")} == {*stays, "step-00000010"}
    assert verify(Committed(linked, 3, next(c for c in committed(tmp_path) if c.step == 3).manifest)) == []
    assert checkpoint.rewind(tmp_path, 9, OWNER) == 3
    assert {path.name for path in tmp_path.glob("step-*")} == stays
    assert checkpoint.rewind(tmp_path, 1, OWNER) == 2
    assert {path.name for path in tmp_path.glob("step-*")} == stays
    assert newest_good(tmp_path)[0] is not None


def test_anothers_checkpoint_is_gone_on_from_and_not_overwritten(tmp_path: Path):
    theirs = foreign(tmp_path, 4)
    found, _ = newest_good(tmp_path)
    assert found is not None
    assert found.path == theirs
    with pytest.raises(CheckpointError, match="was not written by this run"):
        saved(tmp_path, 4)
    assert verify(found) == []
    assert saved(tmp_path, 5).step == 5


def test_a_run_of_before_there_were_ids_owns_what_has_none(tmp_path: Path):
    for step in (2, 4):
        path = saved(tmp_path, step).path / MANIFEST
        told = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in told.items() if key not in ("run", "sha256")}))
    (tmp_path / "step-00000003").mkdir()
    before = sorted(tmp_path.glob("step-*"))
    prune(tmp_path, CheckpointConfig(keep=1), OWNER, 4)
    assert sorted(tmp_path.glob("step-*")) == before
    prune(tmp_path, CheckpointConfig(keep=1), Owner(OWNER.run, older=True), 4)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-00000004"]


def test_no_folder_and_an_empty_folder_hold_nothing(tmp_path: Path):
    assert newest_good(tmp_path / "none") == (None, [])
    assert newest_good(tmp_path) == (None, [])


def test_a_checkpoint_gets_its_name_after_its_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved(tmp_path, 4)
    order = []
    write, rename = write_file, Path.rename

    def written(path: Path, text: str) -> None:
        assert last(tmp_path) == "step-00000004"
        assert (path.parent / "optimizer.safetensors").exists()  # all else is there
        assert not (tmp_path / "step-00000008").exists()
        write(path, text)
        order.append("manifest")

    def renamed(self: Path, target: Path) -> Path:
        assert (self / MANIFEST).exists()
        order.append("name")
        return rename(self, target)

    monkeypatch.setattr(checkpoint, "write_file", written)
    monkeypatch.setattr(Path, "rename", renamed)
    saved(tmp_path, 8)
    assert order == ["manifest", "name"]


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("moment", ["folder", "writing", "manifest", "name"])
@pytest.mark.parametrize("behind", [True, False])
def test_a_failure_while_saving_leaves_the_previous_checkpoint(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    moment: str,
    behind: bool,
):
    good = saved(tmp_path, 4, keep=1)
    target = {
        "folder": (checkpoint, "prepare"),
        "writing": (snapshot, "save_file"),
        "manifest": (checkpoint, "write_file"),
        "name": (Path, "rename"),
    }[moment]
    failing = saver(tmp_path, keep=1, async_save=behind)
    with monkeypatch.context() as patch:
        patch.setattr(*target, full_disk)
        if behind:
            failing.save(8, {})  # training goes on
            failing.wait()
        with pytest.raises(CheckpointError, match="No space left on device") as caught:
            failing.finish() if behind else failing.save(8, {})
    assert "the previous checkpoint stands" in str(caught.value)
    assert str(tmp_path / "step-00000008") in str(caught.value)
    assert f"!! CHECKPOINT NOT SAVED: {tmp_path / 'step-00000008'}" in capsys.readouterr().out
    assert failing.failures == 1
    assert last(tmp_path) == "step-00000004"
    assert newest_good(tmp_path) == (good, [])
    assert sorted(os.listdir(tmp_path)) == [LAST, "step-00000004"]  # no half that fills the disk
    failing.save(8, {})
    failing.finish()
    assert newest_good(tmp_path)[0] == committed(tmp_path)[0] != good
    assert last(tmp_path) == "step-00000008"


def test_a_later_save_makes_up_for_one_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = saver(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "save_file", full_disk)
        made.save(4, {})
        made.wait()
    made.save(8, {})
    made.finish()
    assert [c.step for c in committed(tmp_path)] == [8]
    assert made.failures == 1


def test_a_snapshot_that_can_not_be_taken_is_told_by_the_thread(tmp_path: Path):
    made = saver(tmp_path)
    made.weights = torch.empty(4, device="meta")  # no data to copy
    made.save(4, {})
    with pytest.raises(CheckpointError, match=r"rank 0: .*meta"):
        made.finish()


def test_what_is_written_is_the_state_at_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Training changes the weights while the thread writes, and the buffers are used again."""
    made, write, gate = saver(tmp_path), snapshot.save_file, threading.Event()

    def slow(*arguments: Any) -> None:
        gate.wait(10)
        write(*arguments)

    monkeypatch.setattr(snapshot, "save_file", slow)
    for step in (1, 2):
        gate.clear()
        made.weights.fill_(step)
        made.save(step, {})
        made.weights.fill_(-1)
        assert committed(tmp_path)[:1] == [] if step == 1 else committed(tmp_path)[0].step == 1
        gate.set()
        made.finish()
        state = committed(tmp_path)[0].read("model.safetensors")
        assert state["step"] == step
        assert torch.equal(torch.cat([state["head"], state["tail"]]), torch.full((100,), float(step)))
    assert [len(buffer) for buffer in made.snapshot.buffers.values()] == [400, 8]  # a storage is copied once


def test_the_store_keeps_no_keys_of_old_saves(tmp_path: Path):
    made = saver(tmp_path)
    made.save(1, {})
    made.finish()
    before = made.store.num_keys()
    for step in range(2, 6):
        made.save(step, {})
    made.finish()
    assert made.store.num_keys() == before


def test_a_rank_that_never_finishes_is_named_and_not_waited_for_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = Small(tmp_path, timeout_s=0.2)
    monkeypatch.setattr(background.dist, "get_world_size", lambda: 2)
    made.save(4, {})
    made.wait()
    assert "wait timeout" in str(made.failure)
    assert committed(tmp_path) == []


@pytest.mark.parametrize(("keep", "left"), [(1, [6]), (2, [4, 6]), (0, [2, 4, 6])])
def test_pruning_keeps_the_newest(tmp_path: Path, keep: int, left: list[int]):
    for step in (2, 4, 6):
        saved(tmp_path, step, keep)
    assert [c.step for c in reversed(committed(tmp_path))] == left
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-{step:08d}" for step in left]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_damaged_ones_that_were_passed_over_are_not_kept_in_the_place_of_new_ones(tmp_path: Path, keep: int):
    for step in (2, 4, 6, 8):
        saved(tmp_path, step, keep=0)
    for step in (4, 6, 8):
        flip(tmp_path / f"step-{step:08d}" / "model.safetensors")
    found, damaged = newest_good(tmp_path)
    assert found is not None
    assert (found.step, len(damaged)) == (2, 3)
    assert saved(tmp_path, 3, keep=keep).step == 3
    found, _ = newest_good(tmp_path)
    assert found is not None
    assert found.step == 3
    left = {step for step in (2, 3) if step > 3 - keep or keep > 1}
    assert {made.step for made in committed(tmp_path)} == {4, 6, 8} | left
    assert saved(tmp_path, 4, keep=keep).step == 4  # in the place of the damaged one
    found, _ = newest_good(tmp_path)
    assert found is not None
    assert found.step == 4


def test_milestones_are_kept_for_good(tmp_path: Path):
    made = saver(tmp_path, keep=1, keep_every=3)
    for step in range(1, 8):
        made.save(step, {})
    made.finish()
    assert [c.step for c in committed(tmp_path)] == [7, 6, 3]


@pytest.mark.parametrize(("best", "left"), [(True, [5, 2]), (False, [5])])
def test_the_best_by_validation_loss_is_kept(tmp_path: Path, best: bool, left: list[int]):
    made = saver(tmp_path, keep=1, best=best)
    losses: dict[int, dict[str, float]] = {1: {"validation_loss": 0.9}, 2: {"validation_loss": 0.3}}
    losses |= {3: {"validation_loss": 0.5}, 4: {}, 5: {"validation_loss": math.nan}}
    for step, facts in losses.items():
        made.save(step, facts)
    made.finish()
    assert [c.step for c in committed(tmp_path)] == left
    assert (tmp_path / BEST).is_symlink() == best
    if best:
        assert (tmp_path / BEST).readlink().name == "step-00000002"


def test_the_next_save_clears_torn_folders_away(tmp_path: Path):
    for step in (3, 9):
        checkpoint.prepare(tmp_path, step, OWNER).joinpath("half").touch()
        assert newest_good(tmp_path) == (None, [])  # a kill during the first save is no loss
    saved(tmp_path, 6, keep=1)
    assert sorted(os.listdir(tmp_path)) == [LAST, "step-00000006"]


def test_a_checkpoint_that_is_half_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved(tmp_path, 3)
    good = saved(tmp_path, 6)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path: (path / "model.safetensors").unlink())  # and is killed
        prune(tmp_path, CheckpointConfig(keep=1), OWNER, 6)
    assert committed(tmp_path) == [good]
    assert unreadable(tmp_path) == []
    saved(tmp_path, 9)
    assert sorted(os.listdir(tmp_path)) == [LAST, "step-00000006", "step-00000009"]


def test_without_links_a_commit_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Path, "symlink_to", full_disk)
    made = saved(tmp_path, 4, validation_loss=1.0)
    assert newest_good(tmp_path) == (made, [])
    assert os.listdir(tmp_path) == ["step-00000004"]


def test_the_model_is_read_from_a_committed_checkpoint_only_with_the_manifest(tmp_path: Path):
    made = saved(tmp_path, 4)
    (made.path / MANIFEST).unlink()
    assert committed(tmp_path) == []
