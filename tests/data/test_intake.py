"""Whatever form people have their pictures in, they become shards; what can't is named, without a traceback."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from data_kit import encoded, photo
from PIL import Image

from glide_ds.commands.prepare_pack import add_arguments, run
from glide_ds.data.packing.pack import pack
from glide_ds.data.tars.shards import open_shards
from glide_ds.data.texts.captions import read_caption
from glide_ds.errors import DataError, GlideError


def packed(source: Path, per_shard: int = 3) -> tuple[list[str], dict[str, Any]]:
    """(the captions in the shards, the summary)"""
    out = source.parent / f"{source.name}-out"
    summary = pack(source, out, per_shard)
    shards = open_shards(str(out))
    return [read_caption(shards.read(n), 0.0)[0] for n in range(len(shards))], summary


def picture(path: Path, number: int = 0, kind: str = "PNG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(photo(number), kind))
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Five pictures a.png to e.png."""
    for number, name in enumerate("abcde"):
        picture(tmp_path / "in" / f"{name}.png", number)
    return tmp_path / "in"


def test_folders_links_and_what_is_hidden(photos: Path, tmp_path: Path) -> None:
    (photos / "a.TXT").write_text("of a")
    (photos / "b.caption").write_text("of b")
    (photos / "C.Text").write_text("of c")
    (photos / "d.png.txt").write_text("of d")
    (photos / "e.JSON").write_text('{"caption": "of e"}')
    far = picture(tmp_path / "far" / "f.JPG", 6, "JPEG")
    far.with_suffix(".txt").write_text("of f")
    (photos / "linked").symlink_to(tmp_path / "far")
    (far.parent / "back").symlink_to(photos)
    picture(photos / ".hidden" / "x.png").with_suffix(".txt").write_text("hidden")
    picture(photos / ".y.png")
    captions, summary = packed(photos)
    assert sorted(captions) == [f"of {name}" for name in "abcdef"]
    assert summary["skipped"] == []


def test_what_is_no_readable_picture_is_named_and_counted(photos: Path) -> None:
    for name in ("logo.svg", "raw.CR2", "raw.nef", "art.psd", "notes.md", "movie.mp4", "more.md"):
        (photos / name).write_bytes(b"something")
    for name in "abcde":
        (photos / f"{name}.txt").write_text(f"of {name}")
    (photos / "b.png").write_bytes(b"no picture")
    captions, summary = packed(photos)
    assert captions == ["of a", "of c", "of d", "of e"]
    told = "\n".join(summary["skipped"])
    for line in (
        "logo.svg: .svg is not packed: drawings",
        "raw.CR2: .cr2",
        "raw.nef",
        "art.psd",
        "b.png: unknown",
    ):
        assert line in told
    assert len(summary["skipped"]) == 5
    assert summary["other_files"] == {"md": 2, "mp4": 1}


def test_avif_and_heic(photos: Path) -> None:
    heif = pytest.importorskip("pillow_heif", reason="HEIC needs pillow-heif")
    picture(photos / "f.avif", 5, "AVIF")
    heif.from_pillow(Image.fromarray(photo(6))).save(photos / "g.HEIC")
    for name in "abcdefg":
        (photos / f"{name}.txt").write_text(f"of {name}")
    captions, summary = packed(photos)
    assert captions == [f"of {name}" for name in "abcdefg"], summary
    shards = open_shards(str(photos.parent / "in-out"))
    assert {kind for n in range(7) for kind in shards.read(n)} == {"png", "avif", "jpg", "txt"}


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_imagefolders_of_hugging_face(photos: Path, name: str) -> None:
    picture(photos / "deep" / "f.png", 6)
    rows = [{"file_name": f"{n}.png", "text": f"of {n}, indeed"} for n in "abcd"]
    rows.append({"file_name": "deep/f.png", "text": "of f"})
    if name.endswith("csv"):
        out = io.StringIO()
        writer = csv.DictWriter(out, ["file_name", "text"])
        writer.writeheader()
        writer.writerows(rows)
        (photos / name).write_text(out.getvalue())
    else:
        (photos / name).write_text("\n".join(map(json.dumps, rows)))
    (photos / "e.txt").write_text("of e, beside")
    captions, _ = packed(photos)
    assert set(captions) >= {"of a, indeed", "of b, indeed", "of c, indeed", "of d, indeed", "of e, beside"}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "semicolons", "json"])
def test_lists_in_every_form_and_encoding(photos: Path, kind: str, encoding: str) -> None:
    texts = ["ein süßer Hund", 'zwei, "drei"', "a café", "plain", "über alles"]
    rows = [{"image": f"{n}.png", "caption": text} for n, text in zip("abcde", texts, strict=True)]
    out = io.StringIO()
    if kind == "jsonl":
        out.write("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    elif kind == "json":
        out.write(json.dumps(rows, ensure_ascii=False))
    else:
        separator = {"csv": ",", "tsv": "\t", "semicolons": ";"}[kind]
        writer = csv.DictWriter(out, ["image", "caption"], delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    path = photos / f"list.{'csv' if kind == 'semicolons' else kind}"
    path.write_bytes(out.getvalue().encode(encoding))
    assert packed(path)[0] == texts


def test_a_record_is_passed_over_for_its_own_fault(photos: Path) -> None:
    lines = [
        b'{"image": "a.png", "caption": "one\xe2\x80\xa8line"}',  # U+2028 within
        b'{"image": "b.png", "caption": "lone \\ud800 surrogate"}',
        b"{broken",
        b'{"image": "c.png"}',
        b'{"image": "gone.png", "caption": "gone"}',
        b'{"image": "https://host/x.png", "caption": "far"}',
        b'{"image": ["c.png"], "caption": "a list"}',
        b"7",
        b'{"image": "d.png", "caption": "caf\xe9 cr\xe8me"}',
        b"[" * 5000,
        b'{"image": "e.png", "caption": "\xff\x00"}',
        b"",
    ]
    (photos / "list.jsonl").write_bytes(b"\n".join(lines))
    captions, summary = packed(photos / "list.jsonl")
    assert captions == ["one line", "lone surrogate", "café crème"]
    assert len(summary["skipped"]) == 8
    told = "\n".join(summary["skipped"])
    assert all(f"line {number}" in told for number in (3, 4, 6, 7, 8, 10, 11)), told
    assert "gone.png: No such file" in told


@pytest.mark.parametrize(
    ("name", "text", "passed"),
    [
        ("x.csv", "Image, Caption\na.png,a\n", 0),
        ("x.csv", "image\tcaption\na.png\ta\n", 0),
        ("x.csv", "IMAGE|TEXT\na.png|a\n", 0),
        ("x.jsonl", '{"image": "a.png", "caption": "a", "n": ' + "9" * 5000 + "}", 0),
        ("x.jsonl", '{"image": "a\\u0000.png", "caption": "b"}\n{"image": "a.png", "caption": "a"}', 1),
        ("x.jsonl", '{"image": "\\ud800.png", "caption": "b"}\n{"image": "a.png", "caption": "a"}', 1),
        (
            "x.json",
            '{"images": [{"id": "1", "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": "a"}]}',
            0,
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_more_forms_of_lists(photos: Path, name: str, text: str, passed: int) -> None:
    (photos / name).write_text(text)
    captions, summary = packed(photos / name)
    assert (captions, len(summary["skipped"])) == (["a"], passed)


def test_pipes_and_names_of_any_bytes_are_passed_over(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "a.txt").write_text("of a")
    os.mkfifo(photos / "pipe.png")  # who reads it waits for ever
    (photos / "pipe.txt").write_text("of a pipe")
    odd = os.fsencode(photos) + b"/\xff.png"
    with open(odd, "wb") as file:
        file.write(encoded(photo(1)))
    arguments = argparse.ArgumentParser()
    add_arguments(arguments)
    run(arguments.parse_args([str(photos), "--out", str(tmp_path / "out"), "--workers", "1"]))
    told = capsys.readouterr().out
    assert "pipe.png: it is no regular file" in told
    assert "\\udcff.png: no caption" in told
    assert '"samples": 1' in told


def test_captions_of_coco(photos: Path, tmp_path: Path) -> None:
    for number, name in enumerate("abcde"):
        picture(tmp_path / "coco" / "train2017" / f"{name}.png", number)
    images = [{"id": n, "file_name": f"{name}.png"} for n, name in enumerate("abcde")]
    notes = [{"image_id": n, "caption": f"{text} of {n}"} for n in range(4) for text in ("one", "two")]
    (tmp_path / "coco" / "annotations").mkdir()
    path = tmp_path / "coco" / "annotations" / "captions.json"
    path.write_text(json.dumps({"images": images, "annotations": [*notes, {"image_id": [], "caption": 1}, 7]}))
    captions, summary = packed(path)
    assert captions == [f"one of {n}" for n in range(4)]
    assert len(summary["skipped"]) == 1
    shards = open_shards(str(path.parent / "captions.json-out"))
    assert {read_caption(shards.read(0), draw)[0] for draw in (0.0, 0.9)} == {"one of 0", "two of 0"}


def test_parquet_of_bytes_paths_and_dicts(photos: Path, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    from pyarrow import parquet

    data = [(photos / f"{name}.png").read_bytes() for name in "abcde"]
    captions = [f"of {name}" for name in "abcde"]
    columns: dict[str, list[Any]] = {
        "bytes": data,
        "paths": [f"{name}.png" for name in "abcde"],
        "dicts": [{"bytes": each, "path": None} for each in data],
        "dicts of paths": [{"bytes": None, "path": f"{name}.png"} for name in "abcde"],
    }
    for name, column in columns.items():
        table = arrow.table({"image": column, "caption": captions, "similarity": [0.1] * 5})
        parquet.write_table(table, photos / f"{name}.parquet", row_group_size=2)
        for per_shard in (2, 5):
            assert packed(photos / f"{name}.parquet", per_shard)[0] == captions, name
    late = arrow.array([10**18] * 5, arrow.timestamp("us"))  # no year that Python has
    parquet.write_table(
        arrow.table({"IMAGE": columns["paths"], "TEXT": captions, "at": late}), photos / "l.parquet"
    )
    assert packed(photos / "l.parquet")[0] == captions
    gaps = arrow.table({"jpg": [data[0], None, data[2]], "caption": ["a", "b", None], "url": ["u"] * 3})
    (tmp_path / "set").mkdir()
    parquet.write_table(
        gaps, tmp_path / "set" / "00000.parquet"
    )  # as img2dataset and Hugging Face write folders
    parquet.write_table(gaps, tmp_path / "set" / "00001.parquet")
    captions, summary = packed(tmp_path / "set")
    assert captions == ["a", "a"]
    assert len(summary["skipped"]) == 4


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.jsonl", b"", "0 pictures"),
        ("x.jsonl", b"{broken", r"0 pictures.*line 1: is no JSON"),
        ("x.csv", b"\xff\x00\x81", "is no text|0 pictures"),
        ("x.csv", b"a,b\n1,2\n", r"0 pictures.*line 2 has the fields a, b"),
        ("x.tsv", b'image\tcaption\n"unclosed', "0 pictures"),
        ("x.json", b"{", "is no JSON"),
        ("x.json", b"{}", "neither a list of records nor COCO"),
        ("x.json", b'{"annotations": [], "images": null}', "0 pictures"),
        ("x.json", b'{"annotations": [], "images": 5}', "0 pictures"),
        ("x.json", b"[" * 9000, "is no JSON"),
        ("x.parquet", b"PAR1 and nothing", "can't be read as parquet"),
        ("x.parquet", b"", "can't be read as parquet"),
        ("x.doc", b"x", "is no folder"),
        ("folder/x.tar", b"x", r"holds tar shards.*data\.shards"),
        ("folder/x.md", b"x", "0 pictures"),
    ],
)
def test_an_input_of_nothing_is_refused_by_name(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        pack(path.parent if "/" in name else path, tmp_path / "out")
    assert not list(tmp_path.glob("out/*.tar"))


def test_out_may_lie_in_the_input(photos: Path) -> None:
    for name in "abcde":
        (photos / f"{name}.txt").write_text(f"of {name}")
    for _ in range(2):
        assert pack(photos, photos / "shards", 3)["samples"] == 5
    with pytest.raises(GlideError, match="is the input itself"):
        pack(photos, photos, 3)
