"""Every way to name shards is understood, or refused by name with the way to write it; what is no tar is named."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import time
import zipfile
from pathlib import Path

import fsspec
import pytest
from data_kit import sample, write_shards, write_tar

from glide_ds.data.tars.patterns import expand
from glide_ds.data.tars.shards import open_shards
from glide_ds.data.tars.storage import Storage
from glide_ds.data.tars.stream import members
from glide_ds.errors import DataError


@pytest.fixture
def names(tmp_path: Path) -> list[str]:
    write_shards(tmp_path, [1, 1, 1])
    return [str(tmp_path / f"s-{n:03d}.tar") for n in range(3)]


def test_home_and_variables(names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHARDS", str(tmp_path))
    for pattern in (
        "~",
        "~/s-{000..002}.tar",
        "$SHARDS",
        "${SHARDS}/s-*.tar",
        "file://$SHARDS/s-{000..002}.tar",
    ):
        assert expand(pattern) == names, pattern
    assert expand("s3://$HOME/{0..1}.tar") == [f"s3://{tmp_path}/{n}.tar" for n in range(2)]
    monkeypatch.delenv("SHARDS")
    with pytest.raises(DataError, match=r"variable SHARDS, which is not set"):
        expand("$SHARDS/x.tar")
    monkeypatch.setenv("SHARDS", "")
    with pytest.raises(DataError, match=r"variable SHARDS, which is not set, or empty"):
        expand("$SHARDS/x.tar")


def test_one_shard_by_two_spellings_is_one(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, name = os.path.split(names[0])
    monkeypatch.chdir(folder)
    for other in (name, f"./{name}", f"{folder}//{name}", f"{folder}/../{os.path.basename(folder)}/{name}"):
        with pytest.raises(DataError, match=r"s-000\.tar more than once"):
            expand([names[0], other])


def test_a_comma_in_a_name_behind_a_variable(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = os.path.dirname(names[0])
    monkeypatch.setenv("SHARDS", folder)
    os.rename(names[0], f"{folder}/a, b.tar")
    assert expand("$SHARDS/a, b.tar") == [f"{folder}/a, b.tar"]


def test_lists_in_one_text(names: list[str]) -> None:
    for joint in (",", ", ", "::"):
        assert expand(joint.join(names)) == names
    folder = os.path.dirname(names[0])
    assert expand(f"{folder}/s-{{000,001}}.tar,{folder}/s-{{002..002}}.tar") == names
    assert expand("s3://b/0.tar::s3://b/1.tar") == ["s3://b/0.tar", "s3://b/1.tar"]
    assert expand("s3://b/0.tar,s3://b/1.tar") == ["s3://b/0.tar", "s3://b/1.tar"]
    assert expand("s3://b/a,b.tar") == ["s3://b/a,b.tar"]
    with pytest.raises(DataError, match=r"nothing\.tar"):
        expand(f"{names[0]},{folder}/nothing.tar")


def test_folders_with_subfolders_links_and_any_case(names: list[str], tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for place in ("deep/er/Z.TAR", ".hidden/h.tar", ".x.tar", "deep/a.Tar", "deep/no.tar.gz"):
        (tmp_path / place).write_bytes(b"x")
    (tmp_path / "deep" / "loop").symlink_to(tmp_path)
    linked = tmp_path.parent / f"{tmp_path.name}-linked"
    linked.mkdir()
    (linked / "l.tar").write_bytes(b"x")
    (tmp_path / "link").symlink_to(linked)
    found = [str(tmp_path / name) for name in ("deep/a.Tar", "deep/er/Z.TAR", "link/l.tar")] + names
    assert expand(str(tmp_path)) == found
    assert expand(f"{tmp_path}/") == found
    assert expand(f"{tmp_path}/**/*.[tT]*[rR]") == [*found[:3], *names]
    assert expand(f"{tmp_path}/s-00[01].tar") == names[:2]
    assert expand(f"{tmp_path}/s-00?.tar") == names
    (tmp_path / "s-[1].tar").write_bytes(b"x")
    (tmp_path / "{a}.tar").write_bytes(b"x")
    assert expand(f"{tmp_path}/s-[1].tar") == [f"{tmp_path}/s-[1].tar"]
    assert expand(f"{tmp_path}/{{a}}.tar") == [f"{tmp_path}/{{a}}.tar"]


@pytest.mark.parametrize(
    ("pattern", "range"),
    [
        ("{0..12}", range(13)),
        ("{000..012}", None),
        ("{3..1}", (3, 2, 1)),
        ("{08..10}", None),
        ("{7..007}", None),
    ],
)
def test_ranges_are_braceexpands(pattern: str, range: object) -> None:
    from braceexpand import braceexpand

    assert expand(f"s3://b/x{pattern}.tar") == list(braceexpand(f"s3://b/x{pattern}.tar"))


@pytest.mark.parametrize(
    "pattern", ["{d}/x-{{0000000..0999999}}.tar", "{d}/{{a,b,c}}/{{b,c}}/{{000000..199999}}.tar"]
)
def test_a_million_missing_names_answer_within_a_second(names: list[str], tmp_path: Path, pattern: str) -> None:
    for number in range(3000):
        (tmp_path / f"other-{number}.tar").touch()
    started = time.monotonic()
    with pytest.raises(DataError, match=r"matches no file.*nearest existing are .*\.tar"):
        expand(pattern.format(d=tmp_path))
    assert time.monotonic() - started < 1


def test_stores_are_listed(tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    for name in ("a-0.tar", "a-1.tar", "deep/b.TAR", "notes.txt"):
        store.pipe_file(f"/patterns/{name}", b"x")
    assert expand("memory://patterns/a-*.tar") == ["memory:///patterns/a-0.tar", "memory:///patterns/a-1.tar"]
    assert len(expand("memory://patterns/")) == 3
    with pytest.raises(DataError, match="the store lists no such file"):
        expand("memory://patterns/z-*.tar")


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("https://host/set/*.tar", r"can't be asked for its files.*brace pattern"),
        ("https://host/set/", r"can't be asked for its files.*brace pattern"),
        ("pipe:aws s3 cp s3://b/{0..3}.tar -", r"names a command.*give the store's URL"),
        ("simplecache::s3://b/0.tar", r"chains file systems.*cache_dir"),
        (" ", "empty pattern"),
        ("", "empty pattern"),
    ],
)
def test_what_is_not_understood_is_refused_with_the_way_to_write_it(pattern: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        expand(pattern)


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.txt", "a")
    return out.getvalue()


NO_TARS = {
    "gzip": gzip.compress(b"x" * 100),
    "xz": lzma.compress(b"x" * 100),
    "bzip2": bz2.compress(b"x" * 100),
    "zstd": b"\x28\xb5\x2f\xfd" + bytes(100),
    "a zip archive": zipped(),
    "git-lfs pointer.*git lfs pull": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
    "a page or message.*<!DOCTYPE html>.*expired": b"<!DOCTYPE html>\n<html><body>404</body></html>",
    "a page or message, ": b"\n\n  <HTML lang=en>",
    "a page or message": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
    "a page or message, no tar": b'{"error": "not found"}',
    "is empty: it has 0 bytes": b"",
    "a page or message.*Too Many Requests": b"Too Many Requests\n",
    "a page or message.*https://example": b"https://example.com/a.tar",
    "a page or message, no tar; it begins '<!--": b"<!-- cached --><html>" + b"x" * 600,
    "is a git-lfs pointer": b"\xef\xbb\xbfversion https://git-lfs.github.com/spec/v1\noid",
    "is zstd-compressed": b"\x50\x2a\x4d\x18\x04\0\0\0" + bytes(600),
    "is lzma-compressed": lzma.compress(b"x" * 100, format=lzma.FORMAT_ALONE),
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(600),
    "a parquet file": b"PAR1" + bytes(600),
    "a JPEG picture.*prepare pack": sample(0)["jpg"],
    "no tar header": b"something else altogether" * 100,
}


@pytest.mark.parametrize("what", NO_TARS)
@pytest.mark.parametrize("salvage", [False, True])
def test_what_is_no_tar_is_named(tmp_path: Path, what: str, salvage: bool) -> None:
    (tmp_path / "x.tar").write_bytes(NO_TARS[what])
    with pytest.raises(DataError, match=what if not (salvage and "header" in what) else "hold no sample"):
        open_shards(str(tmp_path / "x.tar"), salvage=salvage)


@pytest.mark.parametrize(
    "key", ["PAR1", "BZh91", "Rar!", "{[", "<html>", "PK\x03\x04", "GIF89a", "LZIP", "RIFF"]
)
def test_a_tar_is_one_whatever_its_first_member_is_called(tmp_path: Path, key: str) -> None:
    path = write_tar(tmp_path / "x.tar", [(key, sample(0))])
    assert open_shards(str(path)).key(0) == key
    assert [name for name, _ in members(str(path), Storage())] == [f"{key}.jpg", f"{key}.txt"]


def test_a_tar_that_is_not_sorted_by_key_is_named(tmp_path: Path) -> None:
    members = [
        (f"{n}", {kind: data}) for kind in ("jpg", "txt") for n in range(4) for data in [sample(n)[kind]]
    ]
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(
        DataError, match=r"not sorted by key: the members of 4 samples.*0\.jpg and 0\.txt.*--sort=name"
    ):
        open_shards(str(tmp_path / "x.tar"))
    twice = [("a", sample(0)), ("b", sample(1)), ("a", sample(2))]
    assert open_shards(str(write_tar(tmp_path / "y.tar", twice))).duplicates == 1
