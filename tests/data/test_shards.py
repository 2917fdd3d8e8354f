"""Shards are found by pattern, indexed exactly, and never shortened in silence."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_kit import sample, source, take, write_shards, write_tar

from glide_ds.data.order import Order
from glide_ds.data.tars import shards as shards_module
from glide_ds.data.tars.index import ShardIndex, load_index, scan_shard, store_index
from glide_ds.data.tars.scan import BLOCK, split_name
from glide_ds.data.tars.shards import ShardSet, expand, open_shards
from glide_ds.data.tars.storage import Storage
from glide_ds.errors import DataError, SurroundingsError


def test_patterns(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, [1, 1, 1])
    names = [str(tmp_path / f"s-{n:03d}.tar") for n in range(3)]
    assert expand(pattern) == names
    assert expand([names[2], names[0]]) == [names[2], names[0]]
    assert expand(str(tmp_path)) == names
    assert expand(f"{tmp_path}/*.tar") == names
    assert expand(f"file://{names[0]}") == names[:1]
    assert expand("s3://b/{0..2}.tar") == ["s3://b/0.tar", "s3://b/1.tar", "s3://b/2.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{d}/x-{{000..009}}.tar", r"'.*x-\{000\.\.009\}\.tar'.*matches no file.*nearest existing.*s-000\.tar"),
        ("{d}/s-{{000..009}}.tar", r"7 of 10 shards do not exist.*s-003\.tar.*nearest existing"),
        ("{d}/*.zip", "matches no file"),
        ("{d}/s-{{000..00", "nearest existing|unbalanced"),
        ("", "empty"),
    ],
)
def test_missing_shards_are_named(tmp_path: Path, pattern: str, message: str) -> None:
    write_shards(tmp_path, [1, 1, 1])
    with pytest.raises(DataError, match=message):
        expand(pattern.format(d=tmp_path))


def test_a_shard_named_twice_is_refused(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, [1, 1])
    with pytest.raises(DataError, match="more than once"):
        expand([pattern, str(tmp_path / "s-001.tar")])


def test_index_reads_what_tarfile_reads(tmp_path: Path) -> None:
    long = "a-folder/" + "n" * 150
    samples = [("k0", sample(0)), (long, sample(1)), ("k2", {"json": b"{}"}), ("d/k3", sample(3, cls=b"7"))]
    for number, kind in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=kind) as tar:
            for key, members in samples:
                if kind == tarfile.USTAR_FORMAT and key == long:
                    key = "a-folder/short"
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
            tar.addfile(tarfile.TarInfo("README"))
        shards = open_shards(str(path))
        assert len(shards) == 4
        assert [shards.read(i) for i in range(4)] == [members for _, members in samples]
        assert not shards.damaged


def test_keys_follow_webdataset() -> None:
    assert split_name("a.b/c.seg.png") == ("a.b/c", "seg.png")
    assert split_name("c.JPG") == ("c", "jpg")
    assert [split_name(name) for name in ("plain", ".hidden", "d/._x.jpg", "__meta.json")] == [None] * 4


@pytest.mark.parametrize("kinds", [255, 256, 257, 300, 2000])
def test_any_number_of_kinds_of_extension(tmp_path: Path, kinds: int) -> None:
    """A byte numbers 256 of them; samples of the others must not get somebody else's members."""
    members = [
        (f"{n}", {f"k{n}": f"kind {n}".encode(), "txt": f"photo {n}".encode()}) for n in range(kinds - 1)
    ]
    path = write_tar(tmp_path / "x.tar", members)
    for _ in range(2):  # made, then stored
        shards = open_shards(str(path))
        assert len(shards) == kinds - 1
        assert len(shards.heads[0].extensions) == kinds
        for n in (0, 100, 253, *range(kinds - 4, kinds - 1)):
            assert shards.read(n) == members[n][1]
        assert shards.read(kinds - 2, frozenset({"txt"})) == {f"k{kinds - 2}": f"kind {kinds - 2}".encode()}


def test_names_with_dots_that_make_one_sample_of_many_are_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", [(f"IMG.{n:04d}", sample(n)) for n in range(10)])
    with pytest.raises(
        DataError, match=r"its 20 files make 1 sample.*IMG\.0000\.jpg and IMG\.0009\.txt.*IMG-0000\.jpg"
    ):
        open_shards(str(path))
    assert len(open_shards(str(path), salvage=True)) == 1
    extras = {"mask.png": b"m", "depth.png": b"d", "seg.png": b"s", "normal.png": b"n"}
    for count in (1, 2, 5):
        members = [(f"{n}", {**sample(n), **extras}) for n in range(count)]
        assert len(open_shards(str(write_tar(tmp_path / f"{count}.tar", members)))) == count


def test_index_round_trip_and_damage(tmp_path: Path) -> None:
    write_shards(tmp_path, [3])
    index = scan_shard(str(tmp_path / "s-000.tar"))
    data = index.to_bytes()
    assert ShardIndex.from_bytes(data).members(2) == index.members(2)
    for broken in (data[:-1], data[:40] + b"x" + data[41:], b""):
        with pytest.raises(ValueError, match="index"):
            ShardIndex.from_bytes(broken)


def test_a_damaged_index_is_made_again(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, [3])
    before = open_shards(pattern).fingerprint
    sidecar = tmp_path / "s-000.tar.index"
    sidecar.write_bytes(sidecar.read_bytes()[:-4])
    assert open_shards(pattern).fingerprint == before
    assert open_shards(pattern).read(2)["txt"] == b"photo 2"
    assert load_index(str(tmp_path / "s-000.tar"), Storage()) is not None


def test_read_only_folders_use_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    pattern = write_shards(shards, [2])
    monkeypatch.setenv("GLIDE_DS_CACHE", str(tmp_path / "cache"))
    shards.chmod(0o555)
    try:
        open_shards(pattern)
    finally:
        shards.chmod(0o755)
    assert not list(shards.glob("*.index"))
    assert len(list((tmp_path / "cache").rglob("*.index"))) == 1


def test_a_tar_that_changed_is_named(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, [3, 3])
    open_shards(pattern)
    path = tmp_path / "s-001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"s-001\.tar has \d+ bytes, its index was made for \d+"):
        open_shards(pattern)
    path.write_bytes(whole.replace(b"000003.jpg", b"x00003.jpg").replace(b"000003.txt", b"x00003.txt"))
    with pytest.raises(DataError, match=r"s-001\.tar"):
        open_shards(pattern)
    path.write_bytes(whole)
    os.utime(path, (1, 1))
    assert len(open_shards(pattern)) == 6


@pytest.mark.parametrize("keep", ["half a member", "no end mark"])
def test_a_truncated_tar_stops_the_start(tmp_path: Path, keep: str) -> None:
    path = write_tar(tmp_path / "t.tar", [(f"{n}", sample(n)) for n in range(4)])
    whole = path.read_bytes()
    index = scan_shard(str(path))
    start = index.members(3)[0][1]
    path.write_bytes(whole[: start + 100] if keep == "half a member" else whole[: start - BLOCK])
    with pytest.raises(DataError, match=r"t\.tar: it ends at byte .*salvage"):
        open_shards(str(path))
    salvaged = open_shards(str(path), salvage=True)
    assert len(salvaged) == 3
    assert salvaged.damaged


def test_a_tar_that_is_cut_off_while_it_is_read_is_named(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, [3])
    made = source(pattern, batch=3)
    path = tmp_path / "s-000.tar"
    offset = scan_shard(str(path)).members(2)[0][1]
    first = made.samples.load(0, 0.0)
    os.truncate(path, offset + 100)
    assert np.array_equal(made.samples.load(0, 0.0).pixels, first.pixels)
    with pytest.raises(DataError, match=rf"s-000\.tar ends after {offset + 100} bytes.*prepare index --force"):
        made.samples.load(2, 0.0)
    assert made.samples.name(2) == f"{path} 000002.jpg"


def test_no_more_shards_stay_open_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "OPEN_SHARDS", 2)
    shards = open_shards(write_shards(tmp_path, [1] * 6))
    before = len(os.listdir("/dev/fd"))
    for number in (*range(6), *range(6)):
        assert shards.read(number)["txt"] == f"photo {number}".encode()
        assert len(os.listdir("/dev/fd")) <= before + 2


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_that_are_read_in_turn_stay_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """More than a process holds open unless it is told: a cache in turn over more than it holds never hits."""
    count = 10
    monkeypatch.setattr(shards_module, "OPEN_SHARDS", 6)
    opens = tmp_path / "opens"
    opens.touch()
    whole = ShardSet._open

    def counted(shards: ShardSet, shard: int) -> Any:
        with opens.open("a") as file:
            file.write(f"{shard}\n")
        return whole(shards, shard)

    monkeypatch.setattr(ShardSet, "_open", counted)
    made = source(write_shards(tmp_path, [2] * count), batch=10, workers=workers)
    take(made, 2 * 2 * count // 10)  # two epochs
    assert len(opens.read_text().split()) == count


def test_the_order_says_how_many_shards_a_rank_reads_in_turn() -> None:
    def in_turn(shards: int, samples: int, ranks: int) -> int:
        return Order(np.full(shards, samples), 64, 0, 0).shards_in_turn(ranks)

    assert in_turn(10, 100, 1) == 10  # all there are
    assert in_turn(41_000, 10_000, 8) == 489  # 3072 lanes, 384 a rank's, at times two shards in one
    assert in_turn(41_000, 10_000, 1) == 3855
    assert in_turn(41_000, 10_000, 7) == 3855  # which does not divide the lanes: each rank reads all


def test_a_limit_of_open_files_is_raised_as_far_as_it_may(tmp_path: Path) -> None:
    code = """
import resource, sys
from glide_ds.data.tars.storage import open_at_once
resource.setrlimit(resource.RLIMIT_NOFILE, (600, 2000))
print(open_at_once(100), *resource.getrlimit(resource.RLIMIT_NOFILE))
print(open_at_once(700), *resource.getrlimit(resource.RLIMIT_NOFILE))
print(open_at_once(9000), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["100 712 2000", "700 1912 2000", "744 2000 2000"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_is_lost_under_way_is_no_bad_sample(tmp_path: Path, workers: int) -> None:
    pattern = write_shards(tmp_path, [4] * 3)
    made = source(pattern, batch=4, workers=workers, shuffle=False)
    (tmp_path / "s-001.tar").rename(tmp_path / "elsewhere")
    with pytest.raises(
        SurroundingsError, match=r"s-001\.tar can't be read.*start the same command again"
    ) as caught:
        take(made, 3)
    assert caught.value.exit_code == 75
    assert made.report()["skipped"] == {}


def test_a_corrupt_header_loses_one_member_not_the_rest(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "t.tar", [(f"{n}", sample(n)) for n in range(6)])
    header = scan_shard(str(path)).members(2)[0][1] - BLOCK
    data = bytearray(path.read_bytes())
    data[header + 3] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DataError, match="no tar header"):
        open_shards(str(path))
    salvaged = open_shards(str(path), salvage=True)
    assert len(salvaged) == 6  # sample 2 keeps its caption; the loader counts its missing image
    assert salvaged.read(3)["txt"] == b"photo 3"


def test_shards_without_samples(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [])
    with pytest.raises(DataError, match="hold no sample"):
        open_shards(str(tmp_path / "x.tar"))


def test_duplicate_keys_become_samples_of_their_own(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "x.tar", [("a", sample(0)), ("a", sample(1)), ("b", sample(2)), ("a", sample(3))]
    )
    shards = open_shards(str(path))
    assert [shards.read(n)["txt"] for n in range(4)] == [f"photo {n}".encode() for n in range(4)]
    assert shards.duplicates == 2


def test_index_dir(tmp_path: Path) -> None:
    pattern = write_shards(tmp_path, [2])
    open_shards(pattern, str(tmp_path / "indexes"))
    assert sorted(p.suffix for p in (tmp_path / "indexes").iterdir()) == [".catalog", ".index"]
    assert not list(tmp_path.glob("*.index"))
    url = expand(pattern)[0]
    assert Path(store_index(url, scan_shard(url), Storage(), str(tmp_path / "more"))).exists()


def test_names_lead_a_person_to_the_sample(tmp_path: Path) -> None:
    shards = open_shards(write_shards(tmp_path, [2, 2]))
    assert shards.name(3) == f"{tmp_path}/s-001.tar 000003.jpg"
