"""A fault of the surroundings ends the run as one, told as such; it never passes for a bad sample."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from data_kit import sample, source, take, write_shards, write_tar
from ranks import Run, Warm
from test_clip_store import ENCODER, fill
from test_remote import FlakyServer, local, server  # noqa: F401 - fixtures

from glide_ds.config import ClipConfig, DataConfig
from glide_ds.data import build_source, open_shards
from glide_ds.data.samples import open_samples
from glide_ds.data.tars import storage as storage_module
from glide_ds.data.tars.index import load_index, scan_shard
from glide_ds.errors import EXIT_LOST, EXIT_MISTAKE, ConfigError, DataError, GlideError, SurroundingsError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def ends_with(kind: type[GlideError], shards: str, spoil: Callable[[], None], **data: Any) -> GlideError:
    """What reading raises after `spoil`, nothing having been replaced."""
    made = source(shards, batch=6, **data)
    spoil()
    with pytest.raises(kind) as caught:
        take(made, made.batches_per_epoch)
    assert type(caught.value) is kind
    assert "Traceback" not in str(caught.value)
    assert all(caught.value.faults[0])
    assert made.report()["replaced"] == 0
    return caught.value


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    folder = tmp_path / "tars"
    folder.mkdir()
    write_shards(folder, [4, 5, 3])
    return folder


def delete(folder: Path) -> None:
    for path in folder.glob("*.tar"):
        path.unlink()


def unmount(folder: Path) -> None:
    shutil.rmtree(folder)


def put_files_in_place(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("spoil", [delete, unmount, put_files_in_place])
def test_shards_that_go_under_way(tars: Path, spoil: Callable[[Path], None], workers: int) -> None:
    error = ends_with(SurroundingsError, str(tars), lambda: spoil(tars), workers=workers)
    assert error.exit_code == EXIT_LOST
    assert str(tars) in str(error)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.EMFILE])
@pytest.mark.parametrize("call", ["open", "pread"])
def test_calls_that_fail(tars: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    def failing(*_: Any) -> Any:
        raise OSError(number, os.strerror(number))

    error = ends_with(SurroundingsError, str(tars), lambda: monkeypatch.setattr(os, call, failing))
    assert os.strerror(number) in str(error)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_shorter_than_its_index_is_data_that_changed(tars: Path, workers: int) -> None:
    def cut() -> None:
        for path in tars.glob("*.tar"):
            os.truncate(path, 700)

    assert ends_with(DataError, str(tars), cut, workers=workers).exit_code == EXIT_MISTAKE


def test_a_shard_that_is_replaced_with_its_index_is_data_that_changed(tars: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_shards(other, [3, 3, 3])
    source(str(other), batch=6)
    ends_with(DataError, str(tars), lambda: shutil.copytree(other, tars, dirs_exist_ok=True) and None)  # type: ignore[func-returns-value]


# ---- remote shards and their cache


@pytest.fixture
def small_cache(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def remote(server: FlakyServer) -> str:  # noqa: F811
    return f"{server.url}/s-{{000..002}}.tar"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_cache(server: FlakyServer, tmp_path: Path, small_cache: Path, workers: int) -> None:  # noqa: F811
    take(source(remote(server), index_dir=str(tmp_path / "i"), cache_dir=str(tmp_path / "other")), 1)
    options = {"index_dir": str(tmp_path / "i"), "cache_dir": str(small_cache), "workers": workers}
    error = ends_with(SurroundingsError, remote(server), lambda: None, **options)
    assert "No space left" in str(error)
    assert f"{small_cache} (data.cache_dir)" in str(error)


def test_a_cache_that_goes(server: FlakyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(storage_module, "BLOCKS_IN_MEMORY", 1)
    cache = tmp_path / "cache"
    options = {"index_dir": str(tmp_path / "i"), "cache_dir": str(cache)}
    error = ends_with(SurroundingsError, remote(server), lambda: put_files_in_place(cache), **options)
    assert str(cache) in str(error)


def test_a_cache_that_can_not_be_written_is_told_at_the_start(server: FlakyServer, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(ConfigError, match=r"data\.cache_dir"):
        open_samples(DataConfig(shards=remote(server), cache_dir=str(tmp_path / "cache")), 16)


@pytest.mark.parametrize("workers", [0, 1])
def test_retries_that_are_used_up(
    server: FlakyServer,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    monkeypatch.setattr(storage_module, "ATTEMPTS", 3)
    options = {"index_dir": str(tmp_path / "i"), "cache_dir": str(tmp_path / "cache"), "workers": workers}

    def fail() -> None:
        shutil.rmtree(tmp_path / "cache")
        server.fail = 1.0

    error = ends_with(SurroundingsError, remote(server), fail, **options)
    assert "3 attempts failed" in str(error)


def test_a_server_that_fails_at_the_start(server: FlakyServer, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(storage_module, "ATTEMPTS", 2)
    server.fail = 1.0
    with pytest.raises(SurroundingsError, match=r"s-000\.tar can't be read.*2 attempts failed"):
        source(remote(server))


def test_an_index_that_can_not_be_stored(tars: Path, tmp_path: Path) -> None:
    (tmp_path / "i").write_text("no folder")
    with pytest.raises(SurroundingsError, match=r"NotADirectory|Not a directory"):
        source(str(tars), index_dir=str(tmp_path / "i"))
    assert load_index(str(tars / "s-000.tar"), storage_module.Storage()) is None


# ---- what lies beside the shards


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("spoil", ["lost", "cut off", "of another shard"])
def test_an_index_that_goes_under_way_is_made_again(
    tars: Path, spoil: str, workers: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is read when a shard is first drawn from, and says nothing that the shard doesn't."""
    wanted = take(source(str(tars), batch=6), 4)
    made = source(str(tars), batch=6, workers=workers)
    for path in sorted(tars.glob("*.index"))[1:]:
        if spoil == "lost":
            path.unlink()
        elif spoil == "cut off":
            os.truncate(path, path.stat().st_size - 4)
        else:
            path.write_bytes((tars / "s-000.tar.index").read_bytes())
    for batch, before in zip(take(made, 4), wanted, strict=True):
        assert torch.equal(batch.sample_ids, before.sample_ids)
        assert torch.equal(batch.images, before.images)
    assert capfd.readouterr().out.count("it was made again in") == 2


def test_a_shard_that_is_replaced_under_way_with_its_index(tars: Path) -> None:
    def replace() -> None:
        for path in tars.glob("*.tar"):
            write_tar(path, [(f"x{n}", sample(n)) for n in range(5)])
            Path(f"{path}.index").write_bytes(scan_shard(str(path)).to_bytes())

    error = ends_with(DataError, str(tars), replace)
    assert "changed since this run opened it" in str(error)


def test_an_index_that_is_cut_off_after_it_was_read_gives_no_other_samples(tmp_path: Path) -> None:
    """A mapped one would give zeros, hence samples without members."""
    shards = open_shards(write_shards(tmp_path, [200]))
    wanted = [shards.read(number)["txt"] for number in range(200)]
    os.truncate(tmp_path / "s-000.tar.index", 4096)
    assert [shards.read(number)["txt"] for number in range(200)] == wanted


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("spoil", ["lost", "cut off"])
def test_embeddings_that_go_under_way(tars: Path, tmp_path: Path, spoil: str, workers: int) -> None:
    shards = open_shards(str(tars))
    fill(tmp_path / "c", shards)
    config = DataConfig(shards=str(tars), clip_store=str(tmp_path / "c"), workers=workers)
    layout = {"global_batch": 6, "micro_batch": 6, "rank": 0, "world_size": 1, "seed": 0}
    made = build_source(config, image_size=16, context_length=8, clip=ClipConfig(model=ENCODER.model), **layout)  # type: ignore[arg-type]
    for path in (tmp_path / "c").glob("*.npy"):
        os.truncate(path, 200) if spoil == "cut off" else path.unlink()
    with pytest.raises(DataError if spoil == "cut off" else SurroundingsError) as caught:
        take(made, 2)
    assert "Traceback" not in str(caught.value)
    assert ".npy" in str(caught.value)


@pytest.mark.slow
def test_all_ranks_end_and_the_same_command_goes_on(warm: Warm, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    write_shards(shards, [2] * 600)  # most of them not yet open when they go
    run = Run(warm, tmp_path, "base", data={"shards": str(shards), "workers": 1})
    run.train(2, 100_000, checkpoint={"every": 5})
    run.until(lambda: run.newest() is not None)
    shards.rename(tmp_path / "elsewhere")
    assert run.wait() == [EXIT_LOST, EXIT_LOST], run.said()[-3000:]
    assert "SurroundingsError" in run.said()
    assert "start the same command again" in run.said()
    (tmp_path / "elsewhere").rename(shards)
    last = run.newest()
    assert last
    run.train(2, last.step + 5)
    assert run.wait() == [0, 0], run.said()[-3000:]
