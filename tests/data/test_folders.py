"""A folder of pictures as data.shards packs itself into the cache."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import pytest
from data_kit import encoded, photo

from glide_ds.data.tars.patterns import expand
from glide_ds.data.tars.shards import open_shards
from glide_ds.errors import DataError, SurroundingsError


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GLIDE_DS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    for n in range(6):
        add(folder / ("deep" if n % 2 else "."), n)
    return folder


def add(folder: Path, n: int) -> None:
    (folder / f"p{n}.png").write_bytes(encoded(photo(n, 8, 8)))
    (folder / f"p{n}.txt").write_text(f"photo {n}")


def captions(pattern: Path) -> list[str]:
    shards = open_shards(str(pattern))
    return sorted(shards.read(n)["txt"].decode() for n in range(len(shards)))


def test_it_is_packed_once_and_again_when_it_changes(photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert captions(photos) == [f"photo {n}" for n in range(6)]
    told = capfd.readouterr().err
    assert f"{photos} holds pictures, which training reads from shards: packing them into " in told
    assert "6 pictures packed. To keep the shards" in told
    assert captions(photos) == [f"photo {n}" for n in range(6)]
    assert capfd.readouterr().err == ""
    (photos / "p2.txt").write_text("photo B")  # as long as it was
    assert captions(photos) == [*(f"photo {n}" for n in (0, 1, 3, 4, 5)), "photo B"]
    assert "6 pictures packed" in capfd.readouterr().err
    add(photos / "deep", 7)
    (photos / "p0.png").unlink()
    assert captions(photos) == [*(f"photo {n}" for n in (1, 3, 4, 5, 7)), "photo B"]
    assert "6 pictures packed" in capfd.readouterr().err


def test_a_cache_that_was_emptied_gives_the_same_samples(photos: Path, tmp_path: Path) -> None:
    """So that a run goes on: it compares the set's fingerprint."""
    before = open_shards(str(photos)).fingerprint
    shutil.rmtree(tmp_path / "cache")
    assert open_shards(str(photos)).fingerprint == before


def test_a_glob_takes_what_it_names(photos: Path, tmp_path: Path) -> None:
    assert captions(photos / "*.png") == ["photo 0", "photo 2", "photo 4"]
    assert captions(photos / "deep/*[13].png") == ["photo 1", "photo 3"]
    (tmp_path / "link").symlink_to(photos)
    assert captions(tmp_path / "link/p[0-3].png") == ["photo 0", "photo 2"]
    assert len(captions(photos / "**/*.png")) == 6
    with pytest.raises(DataError, match="names pictures"):
        expand(str(photos / "*.jpg"))


def test_ranks_that_start_together_pack_once(photos: Path, capfd: pytest.CaptureFixture[str]) -> None:
    # Not forked: this process has threads, and a child would wait for what they held.
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.map(expand, [str(photos)] * 2, chunksize=1)
    assert found[0] == found[1]
    assert capfd.readouterr().err.count("packing them into") == 1


def test_pictures_that_cant_be_used_leave_nothing_behind(photos: Path, tmp_path: Path) -> None:
    for path in photos.rglob("*.txt"):
        path.unlink()
    for _ in range(2):
        with pytest.raises(DataError, match=r"none of the 6 pictures .* give each picture a caption"):
            expand(str(photos))
    assert [path.suffix for path in (tmp_path / "cache" / "packed").iterdir()] == [".lock"]
    add(photos, 9)
    assert captions(photos) == ["photo 9"]


def test_a_cache_that_cant_be_written_is_told(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(SurroundingsError, match=r"can't be packed into .*GLIDE_DS_CACHE"):
        expand(str(photos))
