"""`prepare pack` makes the same balanced shards of any input, and resumes after a kill at any instant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_kit import encoded, kill_while_writing, photo
from PIL import Image

from glide_ds.commands.prepare_pack import pack
from glide_ds.data.tars.shards import open_shards
from glide_ds.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    (root / "deep").mkdir(parents=True)
    for n in range(11):
        place = root / ("deep" if n % 2 else ".")
        (place / f"p{n:02d}.png").write_bytes(encoded(photo(n)))
        (place / f"p{n:02d}.txt").write_text(f"photo {n}\n")
    (root / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (root / "broken.txt").write_text("a broken one")
    (root / "mute.png").write_bytes(encoded(photo(1)))
    (root / "notes.md").write_text("no picture")
    return root


def captions(out: Path) -> list[str]:
    shards = open_shards(str(out))
    return [shards.read(n)["txt"].decode() for n in range(len(shards))]


def test_a_folder(folder: Path, tmp_path: Path) -> None:
    summary = pack(folder, tmp_path / "out", per_shard=5)
    assert sorted(captions(tmp_path / "out")) == sorted(f"photo {n}" for n in range(11))
    assert (summary["shards"], summary["samples"]) == (3, 11)
    assert [line.split(":")[0] for line in summary["skipped"]] == ["broken.jpg", "mute.png"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert Image.open(tmp_path / "out" / "contact.png").size == (768, 768)
    assert len(list((tmp_path / "out").glob("*.tar.index"))) == 3


def test_jsonl_and_parquet(folder: Path, tmp_path: Path) -> None:
    lines = [{"image": f"p{n:02d}.png", "caption": f"photo {n}", "similarity": 0.3} for n in range(0, 11, 2)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pack(folder / "pairs.jsonl", tmp_path / "a", per_shard=4)
    assert captions(tmp_path / "a") == [f"photo {n}" for n in range(0, 11, 2)]
    assert json.loads(open_shards(str(tmp_path / "a")).read(0)["json"]) == {
        "caption": "photo 0",
        "similarity": 0.3,
    }
    arrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    from pyarrow import parquet

    table = arrow.table({"image": [encoded(photo(n)) for n in range(3)], "text": ["a", "b", "c"]})
    parquet.write_table(table, tmp_path / "p.parquet")
    pack(tmp_path / "p.parquet", tmp_path / "b")
    assert captions(tmp_path / "b") == ["a", "b", "c"]


def test_a_second_run_keeps_what_fits_and_remakes_what_changed(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(encoded(photo(1)))
    lines = [{"image": "p.png", "caption": f"number {n}"} for n in range(4)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pack(tmp_path / "x.jsonl", tmp_path / "out", per_shard=2)
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").glob("*.tar"))]
    lines[3]["caption"] = "changed"
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pack(tmp_path / "x.jsonl", tmp_path / "out", per_shard=2)
    again = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert [a == b for a, b in zip(times, again, strict=True)] == [True, False]
    assert captions(tmp_path / "out")[3] == "changed"


def test_bad_input_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"image": "a.png", "caption": "a"}\n{"image": "b.png"}')
    with pytest.raises(DataError, match=r"x\.jsonl line 2 has the fields image"):
        pack(tmp_path / "x.jsonl", tmp_path / "out")
    with pytest.raises(DataError, match="no folder"):
        pack(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="0 pictures"):
        pack(tmp_path / "empty", tmp_path / "out")


def test_parallel_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "a", per_shard=3, workers=1)
    pack(folder, tmp_path / "b", per_shard=3, workers=3)
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / d).glob("*.tar")} for d in "ab")
    assert a == b


@pytest.mark.slow
def test_killed_at_random_instants_it_ends_byte_identical(folder: Path, tmp_path: Path) -> None:
    for n in range(300):
        (folder / f"q{n:03d}.png").write_bytes(encoded(photo(n)))
        (folder / f"q{n:03d}.txt").write_text(f"more {n}")
    code = "import sys; from pathlib import Path; from glide_ds.commands.prepare_pack import pack; "
    code += "pack(Path(sys.argv[1]), Path(sys.argv[2]), 10, 2)"
    out = tmp_path / "killed"
    kill_while_writing(code, [str(folder), str(out)], out, "*.tar", (1, 9, 18))
    assert len(list(out.glob("*.tar"))) < 32
    pack(folder, tmp_path / "killed", 10)
    pack(folder, tmp_path / "whole", 10)
    killed, whole = (
        {p.name: p.read_bytes() for p in (tmp_path / d).glob("[!.]*") if p.suffix != ".index"}
        for d in ("killed", "whole")
    )  # an index knows its tar's time
    assert killed == whole
    assert captions(tmp_path / "killed") == captions(tmp_path / "whole")
