"""A tar that is not whole says so, and gives what is left of it; whatever made it."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
from data_kit import sample, write_tar

from glide_ds.data.tars.index import MAGIC, ShardIndex, open_index, scan_shard, store_index
from glide_ds.data.tars.scan import BLOCK, Scan, scan_tar
from glide_ds.data.tars.shards import open_shards
from glide_ds.data.tars.storage import Storage
from glide_ds.errors import DataError


def whole(folder: Path, first: int = 0, count: int = 8) -> bytes:
    return write_tar(
        folder / "whole.tar", [(f"{n}", sample(n)) for n in range(first, first + count)]
    ).read_bytes()


def scan(data: bytes) -> Scan:
    return scan_tar(lambda offset, size: data[offset : offset + size], len(data))


def names(found: Scan) -> list[str]:
    return [member.name for member in found.members]


def entry(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def tar_of(*entries: tuple[tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for info, data in entries:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def contents(data: bytes) -> dict[str, bytes]:
    return {member.name: data[member.offset : member.offset + member.size] for member in scan(data).members}


def test_two_tars_joined_are_named_and_both_found(tmp_path: Path) -> None:
    first, second = whole(tmp_path), whole(tmp_path, 8)
    (tmp_path / "t.tar").write_bytes(first + second)
    with pytest.raises(DataError, match=r"t\.tar: bytes \d+ to 30720 are no member, yet the tar goes on"):
        open_shards(str(tmp_path / "t.tar"))
    salvaged = open_shards(str(tmp_path / "t.tar"), salvage=True)
    assert [salvaged.read(n)["txt"] for n in range(16)] == [f"photo {n}".encode() for n in range(16)]


@pytest.mark.parametrize("blocks", [1, 2, 7, 5000])
def test_a_hole_is_named_and_what_follows_is_found(tmp_path: Path, blocks: int) -> None:
    data = whole(tmp_path)
    place = scan(data).members[6].offset - BLOCK
    found = scan(data[:place] + bytes(BLOCK * blocks) + data[place:])
    assert len(found.members) == 16
    assert found.damage == [
        f"bytes {place} to {place + blocks * BLOCK} are no member, yet the tar goes on: two were joined, or this is "
        "a hole"
    ]


def test_headers_lost_in_a_hole_take_only_their_members(tmp_path: Path) -> None:
    data = bytearray(whole(tmp_path))
    members = scan(bytes(data)).members
    start, end = members[5].offset - BLOCK, members[9].offset - BLOCK
    data[start:end] = bytes(end - start)
    found = scan(bytes(data))
    assert names(found) == [member.name for number, member in enumerate(members) if not 5 <= number < 9]
    assert len(found.damage) == 1


@pytest.mark.parametrize("tail", [20 * BLOCK, 64 * BLOCK, 1 << 20, (1 << 20) + 100])
def test_zeros_behind_the_padding_are_named(tmp_path: Path, tail: int) -> None:
    found = scan(whole(tmp_path) + bytes(tail))
    assert len(found.members) == 16
    assert len(found.damage) == 1
    assert "zero bytes, more than an end mark and padding take" in found.damage[0]


@pytest.mark.parametrize("cut", [1, 100, 400, BLOCK, 3 * BLOCK])
def test_a_preallocated_tar_that_ends_within_a_member_is_named(tmp_path: Path, cut: int) -> None:
    """Also where its zeros are as many as padding may be."""
    data = whole(tmp_path)
    picture = scan(data).members[14]
    written = data[: picture.offset + min(cut, picture.size - 20)]
    found = scan(written + bytes(len(data) - len(written)))
    assert len(found.damage) == 1, found.damage
    assert "zero" in found.damage[0]


@pytest.mark.parametrize("record", [1, 2, 8, 20])
def test_padding_of_every_record_size_is_no_damage(tmp_path: Path, record: int) -> None:
    data = whole(tmp_path)
    last = scan(data).members[-1]
    end = last.offset + -(-last.size // BLOCK) * BLOCK
    for mark in (1, 2):
        size = -(-(end + mark * BLOCK) // (record * BLOCK)) * record * BLOCK
        assert scan(data[:end].ljust(size, b"\0")).damage == []


def test_junk_behind_the_end_mark_is_named(tmp_path: Path) -> None:
    data = whole(tmp_path)
    for junk in (b"x" * 600, b"\0" * 700 + b"<html>" * 100):
        found = scan(data + junk.ljust(BLOCK * 4, b"x"))
        assert len(found.members) == 16
        assert len(found.damage) == 1


def test_a_padded_last_picture_is_no_damage(tmp_path: Path) -> None:
    padded = sample(0)["jpg"] + bytes(100)
    assert scan(tar_of(entry("a.txt", b"a"), entry("a.jpg", padded))).damage == []
    assert scan(tar_of(entry("a.txt", b"a"), entry("a.npy", bytes(100)))).damage == []


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_links_to_files_of_the_tar_are_these(form: int) -> None:
    data = tar_of(
        entry("d/a.txt", b"one"),
        entry("d/b.txt", type=tarfile.LNKTYPE, linkname="d/a.txt"),
        entry("d/c.txt", type=tarfile.SYMTYPE, linkname="a.txt"),
        entry("e/d.txt", type=tarfile.SYMTYPE, linkname="../d/c.txt"),
        entry("e/e.txt", type=tarfile.SYMTYPE, linkname="../f/later.txt"),
        entry("f/later.txt", b"two"),
        form=form,
    )
    assert scan(data).damage == []
    assert contents(data) == {
        **dict.fromkeys(("d/a.txt", "d/b.txt", "d/c.txt", "e/d.txt"), b"one"),
        **dict.fromkeys(("e/e.txt", "f/later.txt"), b"two"),
    }


def test_long_links_and_sizes_that_links_state() -> None:
    long = "d/" + "n" * 150 + ".txt"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        data = tar_of(entry(long, b"one"), entry("b.txt", type=tarfile.LNKTYPE, linkname=long), form=form)
        assert contents(data) == {long: b"one", "b.txt": b"one"}
    linked = entry("b.txt", type=tarfile.LNKTYPE, linkname="a.txt")[0]
    linked.size = 3
    data = linked.tobuf(tarfile.USTAR_FORMAT) + tar_of(entry("a.txt", b"one"))
    assert contents(data) == {"b.txt": b"one", "a.txt": b"one"}
    data = linked.tobuf(tarfile.USTAR_FORMAT) + b"two".ljust(BLOCK, b"\0") + tar_of(entry("a.txt", b"one"))
    assert contents(data) == {"b.txt": b"two", "a.txt": b"one"}


def test_links_that_lead_nowhere_are_named() -> None:
    found = scan(
        tar_of(
            entry("a.jpg", type=tarfile.SYMTYPE, linkname="/data/a.jpg"),
            entry("b.jpg", type=tarfile.SYMTYPE, linkname="c.jpg"),
            entry("c.jpg", type=tarfile.SYMTYPE, linkname="b.jpg"),
            entry("README", type=tarfile.SYMTYPE, linkname="docs"),
            entry("d.txt", b"d"),
        )
    )
    assert names(found) == ["d.txt"]
    assert [note.split(",")[0] for note in found.damage] == [
        "the member 'a.jpg' is a link to '/data/a.jpg'",
        "the member 'b.jpg' is a link to 'c.jpg'",
        "the member 'c.jpg' is a link to 'b.jpg'",
    ]


def test_contiguous_files_folders_and_devices() -> None:
    data = tar_of(
        entry("d", type=tarfile.DIRTYPE),
        entry("d/a.txt", b"one", type=tarfile.CONTTYPE),
        entry("d/null.dev", type=tarfile.CHRTYPE),
        entry("d/b.txt", b"two", type=tarfile.AREGTYPE),
    )
    assert scan(data).damage == []
    assert contents(data) == {"d/a.txt": b"one", "d/b.txt": b"two"}
    assert "'d/a.txt' is of the tar's kind 'M'" in scan(tar_of(entry("d/a.txt", b"one", type=b"M"))).damage[0]


@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_sparse_files_are_named(tmp_path: Path, form: str) -> None:
    with (tmp_path / "a.jpg").open("wb") as file:
        for hole in range(30):
            file.seek(hole << 17)
            file.write(b"x" * 4096)
    (tmp_path / "b.txt").write_bytes(b"two")
    command = ["tar", "--sparse", f"--format={form}", "-cf", "t.tar", "a.jpg", "b.txt"]
    subprocess.run(command, cwd=tmp_path, check=True)
    data = (tmp_path / "t.tar").read_bytes()
    found = scan(data)
    if "a.jpg" in names(found):
        pytest.skip("this file system keeps no holes")
    assert contents(data) == {"b.txt": b"two"}
    assert len(found.damage) == 1
    assert "'a.jpg' is stored without its holes" in found.damage[0]


def test_checksums_of_signed_characters() -> None:
    data = bytearray(tar_of(entry("é.txt", b"one"), form=tarfile.USTAR_FORMAT))
    header = data[:BLOCK]
    header[148:156] = b" " * 8
    total = sum(byte - 256 * (byte > 127) for byte in header)
    data[148:156] = f"{total:06o}\0 ".encode()
    assert scan(bytes(data)).damage == []
    assert contents(bytes(data)) == {"é.txt": b"one"}


def test_pax_values_may_hold_anything() -> None:
    data = tar_of(
        entry("a.txt", b"one", pax_headers={"comment": "\n12 path=evil.txt\n"}), form=tarfile.PAX_FORMAT
    )
    assert contents(data) == {"a.txt": b"one"}


def test_a_size_that_is_wrong_loses_one_member(tmp_path: Path) -> None:
    data = bytearray(whole(tmp_path))
    place = scan(bytes(data)).members[4].offset - BLOCK
    header = tarfile.TarInfo.frombuf(bytes(data[place : place + BLOCK]), "utf-8", "strict")
    header.size = 1 << 30
    data[place : place + BLOCK] = header.tobuf(tarfile.USTAR_FORMAT)
    found = scan(bytes(data))
    assert len(found.members) == 15
    assert "inside the member '2.jpg'" in found.damage[0]


def test_an_index_of_a_scanner_before_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "t.tar"
    path.write_bytes(whole(tmp_path) + whole(tmp_path, 8))
    index = scan_shard(str(path))
    head, tables = index.to_bytes()[33:].split(b"\n", 1)
    stored = json.loads(head)
    del stored["scanner"]
    stored["damage"] = []
    body = json.dumps(stored).encode() + b"\n" + tables
    old = ShardIndex.from_bytes(MAGIC + hashlib.blake2b(body, digest_size=16).digest() + body)
    store_index(str(path), old, Storage())
    assert open_index(str(path), Storage()).head.damage == index.head.damage
