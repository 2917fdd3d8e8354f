"""A start trusts the catalog for what fits it, looks at the rest anew, and says so where it is wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_kit import sample, source, take, write_shards, write_tar
from test_index_command import arguments

from glide_ds.commands import prepare_index
from glide_ds.data.tars import catalog as catalog_module
from glide_ds.data.tars.catalog import Catalog, Entry, Place, load_catalog
from glide_ds.data.tars.index import ShardIndex
from glide_ds.data.tars.patterns import expand
from glide_ds.data.tars.peers import Alone
from glide_ds.data.tars.shards import ShardSet, open_shards
from glide_ds.data.tars.storage import Storage
from glide_ds.errors import DataError

SIZES = [4, 5, 3, 6]


@pytest.fixture
def pattern(tmp_path: Path) -> str:
    (tmp_path / "s").mkdir()
    return write_shards(tmp_path / "s", SIZES)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The indexes and catalogs that are read, by name."""
    seen: list[str] = []
    whole = Storage.read_all

    def counted(storage: Storage, url: str) -> bytes:
        data = whole(storage, url)
        seen.append(Path(url).suffix)
        return data

    monkeypatch.setattr(Storage, "read_all", counted)
    return seen


def catalogs(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.catalog"))


def same(a: ShardSet, b: ShardSet) -> bool:
    return [*a.heads] == [*b.heads] and a.fingerprint == b.fingerprint and a.urls == b.urls


@pytest.mark.parametrize("prepared", [True, False])
def test_a_start_reads_one_file_and_a_shards_tables_when_it_is_drawn_from(
    pattern: str, read: list[str], prepared: bool
) -> None:
    if prepared:
        assert prepare_index.run(arguments(pattern, "--workers", "1")) == 0
    else:
        open_shards(pattern)
    read.clear()
    shards = open_shards(pattern)
    assert read == [".catalog"]
    assert len(shards) == sum(SIZES)
    for number in (0, 1, 4, 5):
        assert shards.read(number)["txt"] == f"photo {number}".encode()
    assert read == [".catalog", ".index", ".index"]


def test_it_says_what_the_indexes_say(pattern: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "s" / "s-001.tar", [("a", sample(0)), ("a", sample(1, json=b"{}")), ("b", sample(2))])
    broken = tmp_path / "s" / "s-002.tar"
    broken.write_bytes(broken.read_bytes()[:5000])
    first, again = (open_shards(pattern, salvage=True) for _ in range(2))
    assert same(first, again)
    assert first.damaged == again.damaged != []
    assert again.duplicates == 1
    assert [len(head.extensions) for head in again.heads] == [2, 3, 2, 2]
    with pytest.raises(DataError, match=r"s-002\.tar: it ends at byte 5000"):
        open_shards(pattern)


def test_the_order_is_that_of_the_indexes(pattern: str) -> None:
    """The fingerprint decides the order of data: of the shards' own, in one string, as before there were catalogs."""
    open_shards(pattern)
    own = [ShardIndex.from_bytes(Path(f"{url}.index").read_bytes()).head.fingerprint for url in expand(pattern)]
    digest = catalog_module.hashlib.blake2b("".join(own).encode(), digest_size=8).hexdigest()
    assert open_shards(pattern).fingerprint == digest


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 9)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def rubbish(path: Path) -> None:
    path.write_bytes(b"no catalog")


def of_others(path: Path) -> None:
    folder = path.parent / "others"
    folder.mkdir()
    open_shards(write_shards(folder, [2]))
    path.write_bytes(catalogs(folder)[0].read_bytes())


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (cut, "is damaged"),
        (flip, "is damaged"),
        (rubbish, "is no catalog of this version"),
        (of_others, "is of another data set"),
    ],
)
def test_a_catalog_that_is_wrong_is_made_anew_and_said(
    pattern: str, tmp_path: Path, spoil: Callable[[Path], None], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = open_shards(pattern)
    (path,) = catalogs(tmp_path)
    whole = path.read_bytes()
    spoil(path)
    assert same(open_shards(pattern), before)
    assert f"{path} {why}: it is made anew" in capsys.readouterr().out
    assert path.read_bytes() == whole


def test_one_of_a_scanner_before_is_made_anew(
    pattern: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(catalog_module, "SCANNER", 1)
    before = open_shards(pattern)
    monkeypatch.undo()
    assert same(open_shards(pattern), before)
    assert "looked less closely: it is made anew" in capsys.readouterr().out


def test_only_shards_that_changed_are_looked_at(pattern: str, tmp_path: Path, read: list[str]) -> None:
    open_shards(pattern)
    os.utime(tmp_path / "s" / "s-002.tar", (1, 1))  # the same bytes, copied
    write_tar(tmp_path / "s" / "s-003.tar", [("x", sample(7))])
    (tmp_path / "s" / "s-003.tar.index").unlink()  # as prepare index --force would make it anew
    read.clear()
    shards = open_shards(pattern)
    assert shards.sizes.tolist() == [4, 5, 3, 1]
    assert read == [".catalog", ".index"]
    assert shards.heads[2].version == "mtime 1000000000"
    read.clear()
    assert same(open_shards(pattern), shards)
    assert read == [".catalog"]


def test_a_shard_that_changed_is_refused_as_without_a_catalog(pattern: str, tmp_path: Path) -> None:
    open_shards(pattern)
    path = tmp_path / "s" / "s-001.tar"
    changed = path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes()[:-512])
    os.utime(path, ns=(changed, changed))
    with pytest.raises(DataError, match=r"s-001\.tar has \d+ bytes, its index was made for"):
        open_shards(pattern)
    path.unlink()
    with pytest.raises(DataError, match="1 of 4 shards do not exist"):
        open_shards(pattern)


def test_a_moved_set_keeps_its_catalog_and_a_part_has_its_own(
    pattern: str, tmp_path: Path, read: list[str]
) -> None:
    before = open_shards(pattern)
    (tmp_path / "s").rename(tmp_path / "moved")
    read.clear()
    moved = open_shards(pattern.replace("/s/", "/moved/"))
    assert (read, moved.fingerprint) == ([".catalog"], before.fingerprint)
    part = moved.urls[1:3]
    assert len(open_shards(part)) == 8
    assert len(open_shards(part)) == 8
    assert len(open_shards(moved.urls[::-1])) == sum(SIZES)
    read.clear()
    assert same(open_shards(moved.urls), moved)
    assert read == [".catalog"]


def test_where_the_shards_are_read_only_it_is_kept_in_the_cache(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GLIDE_DS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "s").chmod(0o555)
    try:
        before = open_shards(pattern)
        said = capsys.readouterr().out
        assert "can't be written to" in said
        assert f"it is kept in {tmp_path}/cache/index/" in said
        assert same(open_shards(pattern), before)
        assert capsys.readouterr().out == ""
    finally:
        (tmp_path / "s").chmod(0o755)
    assert catalogs(tmp_path / "s") == []


def test_where_nothing_takes_it_the_start_goes_on_and_says_so(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    open_shards(pattern)  # the indexes are there
    for path in catalogs(tmp_path):
        path.unlink()
    (tmp_path / "file").touch()
    monkeypatch.setenv("GLIDE_DS_CACHE", str(tmp_path / "file"))
    (tmp_path / "s").chmod(0o555)
    try:
        assert len(open_shards(pattern)) == sum(SIZES)
    finally:
        (tmp_path / "s").chmod(0o755)
    assert "every start looks at every shard: set data.index_dir" in capsys.readouterr().out


def test_many_shards_say_how_far_they_are(
    pattern: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(catalog_module, "MANY", 3)
    open_shards(pattern)
    assert "looking at 4 of 4 shards: there is no catalog yet" in capsys.readouterr().out
    open_shards(pattern)
    assert capsys.readouterr().out == ""


def test_prepare_index_writes_none_where_a_shard_cant_be_read(pattern: str, tmp_path: Path) -> None:
    (tmp_path / "s" / "s-001.tar").write_bytes(b"")
    assert prepare_index.run(arguments(pattern, "--workers", "1")) == 1
    assert catalogs(tmp_path) == []


def test_a_mix_reads_what_its_parts_read(pattern: str, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    other = write_tar(tmp_path / "t" / "o.tar", [(f"o{n}", sample(50 + n, json=b"{}")) for n in range(8)])
    mix: dict[str, Any] = {"a": {"shards": pattern, "weight": 1}, "b": {"shards": str(other), "weight": 2}}
    made = [take(source(pattern, mix=mix, batch=6), 5) for _ in range(2)]
    for one, again in zip(*made, strict=True):
        assert one.captions == again.captions


class Part(Alone):
    """One of several processes, each of which looks at its part; the others' answers are made here too."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.rank = size, 0

    def mine(self, count: int) -> np.ndarray:
        return np.arange(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def each(self, action: Callable[[], Any]) -> list[Any]:
        found = []
        for rank in range(self.size):
            self.rank = rank
            found.append(action())
        return found


@pytest.mark.parametrize("size", [2, 3, 8])
def test_processes_that_look_at_their_parts_find_the_same(pattern: str, tmp_path: Path, size: int) -> None:
    alone = open_shards(pattern)
    (path,) = catalogs(tmp_path)
    whole = path.read_bytes()
    path.unlink()
    os.utime(tmp_path / "s" / "s-001.tar", (1, 1))
    urls = expand(pattern)
    rows = catalog_module.look(urls, Storage(), peers=Part(size))
    assert [each.fingerprint for each in rows] == [each.fingerprint for each in alone.heads]
    assert [each.version for each in rows] == [Storage().stat(url).version for url in urls]
    stored = load_catalog(Place.for_shards(urls, None), Catalog.from_bytes, Storage())
    assert stored is not None
    assert [*stored] == [*rows]
    assert path.read_bytes() != whole


def test_rows_survive_joining_and_taking() -> None:
    entries = [
        Entry(5, 10, "v", "f" * 32, 0, ("jpg", "txt"), ()),
        Entry(6, 11, "an etag that is longer", "e" * 32, 1, ("png",), ("cut", "off")),
        Entry(0, 12, "é", "d" * 32, 0, (), ()),
    ]
    whole = Catalog.of(entries[:1]) + Catalog.of(entries[1:])
    assert [*whole] == entries
    turned = whole.take(np.array([2, 1, 1]))
    assert [*turned] == [entries[2], entries[1], entries[1]]
    assert set(turned.forms) == {("png",), ()}
    assert [*Catalog.from_bytes(turned.to_bytes("x"), "x")] == [*turned]
