"""A run directory that people copied, linked and kept backups in: it goes on at its newest step, or it is refused."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from train_kit import make_config, metrics, train_phase

from glide_ds.cli import main
from glide_ds.config import Config
from glide_ds.errors import CheckpointError
from glide_ds.model.tensor_files import sidecar
from glide_ds.preflight.checks import resume
from glide_ds.preflight.site import Site
from glide_ds.training.checkpoint.commit import BEST, LAST, MANIFEST, committed
from glide_ds.training.checkpoint.start import find_start

pytestmark = pytest.mark.usefixtures("group")


def followed(run: Path, copy: Path) -> None:
    """scp -r, cp -rL, zip: links become what they name."""
    shutil.copytree(run, copy)


def dropped(run: Path, copy: Path) -> None:
    """rsync -r, an object store: links are left out, and so are empty folders."""
    shutil.copytree(run, copy, ignore=lambda _, names: [name for name in names if name in (LAST, BEST)])


def by_scp(run: Path, copy: Path) -> None:
    subprocess.run(["scp", "-qr", str(run), str(copy)], check=True)


def by_cp(run: Path, copy: Path) -> None:
    subprocess.run(["cp", "-rL", str(run), str(copy)], check=True)


def by_rsync(run: Path, copy: Path) -> None:
    done = subprocess.run(
        ["rsync", "-r", f"{run}/", str(copy)],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert "skipping non-regular file" in done.stdout  # its links


def by_zip(run: Path, copy: Path) -> None:
    subprocess.run(["zip", "-qr", "../run.zip", "."], cwd=run, check=True)
    shutil.unpack_archive(run.parent / "run.zip", copy)
    (run.parent / "run.zip").unlink()


def by_object_store(run: Path, copy: Path) -> None:
    """s3fs's put and get of the whole folder."""
    store = fsspec.filesystem("s3", skip_instance_cache=True)
    store.mkdir("bucket")
    store.put(f"{run}/", "bucket/run/", recursive=True)
    store.get("bucket/run/", f"{copy}/", recursive=True)
    store.rm("bucket", recursive=True)  # moto keeps its state for the whole process


def archived(run: Path, copy: Path) -> None:
    """Its links stay."""
    copy.mkdir()
    subprocess.run(f"tar c -C {run} . | tar x -C {copy}", shell=True, check=True)


def newest_only(run: Path, copy: Path) -> None:
    """By hand: one checkpoint, without run.json."""
    newest = committed(run / "phase3")[0].path
    shutil.copytree(newest, copy / "phase3" / newest.name)


def moved(run: Path, copy: Path) -> None:
    """With a backup beside, and a link to another run's checkpoint."""
    shutil.copytree(run, copy, symlinks=True)
    first = copy / "phase3" / "step-00000004"
    shutil.copytree(first, first.with_name("step-00000004.bak"))
    (copy / "phase3" / "step-00000001").symlink_to(run / "phase3" / "step-00000004")


SIX_WAYS = {
    "scp": by_scp,
    "cp": by_cp,
    "rsync": by_rsync,
    "zip": by_zip,
    "tar": archived,
    "s3": by_object_store,
}
COPIES = [
    followed,
    dropped,
    newest_only,
    moved,
    *(
        pytest.param(
            copied,
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(tool != "s3" and not shutil.which(tool), reason=f"no {tool} here"),
            ],
        )
        for tool, copied in SIX_WAYS.items()
    ),
]


def here(folder: Path, steps: int) -> Config:
    return make_config(
        folder,
        train={"steps": steps, "lr_scale": {"gates": 3.0}},
        checkpoint={"every": 2, "keep": 1},
        ema={"decay": 0.5},
    )


@pytest.mark.parametrize("copied", COPIES)
def test_a_copy_is_gone_on_with_and_read(
    trained: Path, tmp_path: Path, copied: Callable[[Path, Path], None], request: pytest.FixtureRequest
):
    if copied is by_object_store:
        request.getfixturevalue("s3_server")
    copied(trained / "run", tmp_path / "run")
    before = {path.name for path in (tmp_path / "run" / "phase3").iterdir()}
    assert find_start(here(tmp_path, 6), verify=False).step == 5
    found = resume(Site([here(tmp_path, 6)], 1, 1))
    assert not found.faults
    assert found.text == "full goes on at step 5 of 6"
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "x.pt")]) == 0
    about = sidecar(tmp_path / "x.pt")
    assert about
    assert about["step"] == 5
    words = ["--prompt", "a red circle", "--steps", "1", "--out", str(tmp_path / "x.png")]
    assert main(["sample", str(tmp_path / "run"), *words]) == 0
    assert {path.name for path in (tmp_path / "run" / "phase3").iterdir()} == before
    train_phase(here(tmp_path, 6))
    assert [line["step"] for line in metrics(tmp_path)][-1] == 6
    assert committed(tmp_path / "run" / "phase3")[0].step == 6
    own = {} if copied is newest_only else {"step-00000004", "step-00000005"}
    assert before - {path.name for path in (tmp_path / "run" / "phase3").iterdir()} == {*own}
    assert len(committed(trained / "run" / "phase3")) == 2


def half(phase: Path) -> None:
    for name in ("step-00000004", "step-00000005"):
        next((phase / name).glob("model.*")).unlink()


def unsigned(phase: Path) -> None:
    for name in ("step-00000004", "step-00000005"):
        (phase / name / MANIFEST).unlink()


def renamed(phase: Path) -> None:
    for name in ("step-00000004", "step-00000005"):
        (phase / name).rename(phase / f"{name}-old")


def links_only(phase: Path) -> None:
    for name in ("step-00000004", "step-00000005"):
        shutil.rmtree(phase / name)


@pytest.mark.parametrize("spoiled", [half, unsigned, renamed, links_only])
def test_what_may_be_checkpoints_is_not_started_over(
    trained: Path, tmp_path: Path, spoiled: Callable[[Path], None]
):
    shutil.copytree(trained / "run", tmp_path / "run", symlinks=True)
    phase = tmp_path / "run" / "phase3"
    spoiled(phase)
    before = sorted(phase.rglob("*"))
    with pytest.raises(CheckpointError, match="none of them is whole") as caught:
        train_phase(here(tmp_path, 6))
    assert "start anew" in caught.value.faults[0].remedy
    assert sorted(phase.rglob("*")) == before
    if spoiled is not half:  # whose files a dry run does not read
        with pytest.raises(CheckpointError, match="none of them is whole"):
            find_start(here(tmp_path, 6), verify=False)
