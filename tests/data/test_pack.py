"""`prepare pack` makes the same balanced shards of any input, and resumes after a kill at any instant."""

from __future__ import annotations

import argparse
import json
import os
import tarfile
from pathlib import Path

import pytest
from data_kit import encoded, kill_while_writing, photo
from PIL import Image

from glide_ds.commands.prepare_pack import run
from glide_ds.data.packing.pack import NOTHING, pack
from glide_ds.data.tars.patterns import expand, held_out_beside
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
    assert (summary["added"], summary["changed"], summary["removed"], summary["foreign"]) == (11, 0, 0, [])
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


def test_a_second_run_is_a_sync_by_content(folder: Path, tmp_path: Path) -> None:
    """Whatever changes in the input, the folder becomes what a first run would write; and the summary says it."""
    out, times = tmp_path / "out", iter(range(1, 100))

    def sync(per_shard: int = 3) -> tuple[int, int, int]:
        for path in [*folder.rglob("*"), folder]:  # whatever copies keep of a file's times
            os.utime(path, (1, 1))
        before = {path.name: path.read_bytes() for path in out.glob("*.tar")} if out.exists() else {}
        summary = pack(folder, out, per_shard)
        fresh = tmp_path / f"fresh{next(times)}"
        assert pack(folder, fresh, per_shard)["samples"] == summary["samples"]
        after, wanted = (
            {
                path.name: path.read_bytes()
                for path in place.iterdir()
                if path.suffix not in (".index", ".catalog", ".json")
            }
            for place in (out, fresh)
        )
        assert after == wanted
        assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in fresh.iterdir())
        assert open_shards(str(out)).fingerprint == open_shards(str(fresh)).fingerprint
        assert summary["removed_shards"] == len(set(before) - set(after))
        return summary["added"], summary["changed"], summary["removed"]

    assert sync() == (11, 0, 0)
    assert sync() == (0, 0, 0)
    (folder / "p00.txt").write_text("photo X\n")  # as long as it was
    assert sync() == (0, 1, 0)
    (folder / "p02.png").write_bytes(encoded(photo(77)))
    assert sync() == (0, 1, 0)
    (folder / "broken.jpg").write_bytes(encoded(photo(5), "JPEG"))  # mended
    (folder / "mute.txt").write_text("it speaks")
    assert sync() == (2, 0, 0)
    (folder / "p04.json").write_text('{"caption": "unused", "punsafe": 0.1}')
    assert sync() == (0, 1, 0)
    for n in range(1, 11, 2):
        (folder / "deep" / f"p{n:02d}.png").unlink()
    assert sync() == (0, 0, 5)
    assert sync(100) == (0, 0, 0)
    (folder / "p00.png").rename(folder / "z.png")
    (folder / "p00.txt").rename(folder / "z.txt")
    assert sync(100) == (1, 0, 1)


def test_pictures_held_out_stay_so_whatever_comes_and_goes(tmp_path: Path) -> None:
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()

    def add(numbers: range, prefix: str) -> None:
        for n in numbers:
            (folder / f"{prefix}{n:02d}.png").write_bytes(encoded(photo(n, 8, 8)))
            (folder / f"{prefix}{n:02d}.txt").write_text(f"photo {n}")

    def sides() -> tuple[set[str], set[str]]:
        found = [captions(out), captions(out / "held-out")]
        assert len(set(found[0]) | set(found[1])) == len(set(found[0])) + len(set(found[1]))
        return set(found[0]), set(found[1])

    add(range(60), "m")
    summary = pack(folder, out, 10, hold_out=0.2)
    assert summary["samples"] + summary["held_out"]["samples"] == 60
    assert 4 <= summary["held_out"]["samples"] <= 20
    assert not summary["held_out"]["trained_before"]
    trained, held = sides()
    add(range(60, 90), "a")  # before all others in the order
    add(range(10), "z")  # the same pictures again, under other names
    pack(folder, out, 7)  # the share is kept where none is given
    assert trained < sides()[0]
    assert held < sides()[1]
    for path in folder.glob("m*"):
        path.unlink()
    summary = pack(folder, out, 7, workers=2, hold_out=0.2)
    assert sides() == tuple(
        {f"photo {n}" for n in [*range(10), *range(60, 90)] if (f"photo {n}" in held | after) is told}
        for after in [sides()[1]]
        for told in (False, True)
    )
    with pytest.raises(DataError, match=r"--hold_out 0\.1, but .* was packed with 0\.2"):
        pack(folder, out, 7, hold_out=0.1)


def test_what_was_trained_on_before_it_was_held_out_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = argparse.Namespace(input=folder, out=tmp_path / "out", per_shard=5, hold_out=None, workers=1)
    run(words)
    words.hold_out = 1e-9
    run(words)
    assert "holds none of these pictures out: give a larger one" in capsys.readouterr().out
    words.hold_out = 0.4
    run(words)
    assert "a model trained on it has seen these pictures" in capsys.readouterr().out
    for share in (1.0, -0.1):
        with pytest.raises(DataError, match="is no share"):
            pack(folder, tmp_path / "other", hold_out=share)
    with pytest.raises(DataError, match=r"sets all .* aside"):
        pack(folder, tmp_path / "all", hold_out=1 - 1e-12)


def test_held_out_shards_are_not_trained_on_where_their_parent_is_named(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(folder, out, 100, hold_out=0.4)
    for pattern in (out, out / "*.tar", tmp_path, tmp_path / "**/*.tar"):
        assert expand(str(pattern)) == [str(out / "000000.tar")]
    for pattern in (out / "held-out", out / "held-out/**/*.tar"):
        assert expand(str(pattern)) == [str(out / "held-out/000000.tar")]
    assert held_out_beside(str(out / "*.tar")) == [str(out / "held-out")]
    assert held_out_beside([str(out / "held-out")]) == []
    mine = tmp_path / "mine" / "held-out"  # a person's own folder of that name
    mine.mkdir(parents=True)
    (mine / "000000.tar").write_bytes((out / "000000.tar").read_bytes())
    assert expand(str(tmp_path / "mine")) == [str(mine / "000000.tar")]


def test_tars_of_others_stay_and_are_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    pack(folder, out, 3)
    (out / "000009.tar").write_bytes(b"mine")
    words = argparse.Namespace(input=folder, out=out, per_shard=6, hold_out=None, workers=1)
    run(words)
    assert f"would be used: {out / '000009.tar'}" in capsys.readouterr().out
    assert (out / "000009.tar").read_bytes() == b"mine"
    assert len(list(out.glob("*.tar"))) == 4


def test_a_tar_that_a_kill_left_without_its_note_is_ours(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(folder, out, 3)
    for note in out.glob("*.packed.json"):
        note.write_text(json.dumps(NOTHING._asdict()))
    summary = pack(folder, out, 100)
    assert summary["foreign"] == []
    assert [path.name for path in out.glob("*.tar")] == ["000000.tar"]


def test_a_tar_that_was_cut_off_is_written_again(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "out", 3)
    path = tmp_path / "out" / "000001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    assert pack(folder, tmp_path / "out", 3)["changed"] == 0
    assert path.read_bytes() == whole


def test_an_input_of_nothing_usable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(encoded(photo(1)))
    with pytest.raises(DataError, match=r"none of the 1 pictures.*a\.png.*no caption"):
        pack(tmp_path / "in", tmp_path / "out")


def test_bad_input_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"image": "a.png", "caption": "a"}\n{"image": "b.png"}')
    with pytest.raises(DataError, match=r"x\.jsonl line 2 has the fields image"):
        pack(tmp_path / "x.jsonl", tmp_path / "out")
    with pytest.raises(DataError, match="no folder"):
        pack(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="0 pictures"):
        pack(tmp_path / "empty", tmp_path / "out")


def test_parallel_and_later_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "a", per_shard=3, workers=1)
    for path in folder.rglob("*.*"):
        os.utime(path, (1e9, 1e9))
    pack(folder, tmp_path / "b", per_shard=3, workers=3)
    a, b = ({p.name: p.read_bytes() for p in (tmp_path / d).glob("*.tar")} for d in "ab")
    assert a == b
    told = set()
    for path in (tmp_path / "a").glob("*.tar"):
        with tarfile.open(path) as tar:
            told |= {(m.uid, m.gid, m.uname, m.gname, m.mtime, m.mode) for m in tar}
    assert told == {(0, 0, "", "", 0, 0o644)}


@pytest.mark.slow
def test_killed_at_random_instants_it_ends_byte_identical(folder: Path, tmp_path: Path) -> None:
    for n in range(300):
        (folder / f"q{n:03d}.png").write_bytes(encoded(photo(n)))
        (folder / f"q{n:03d}.txt").write_text(f"more {n}")
    code = "import sys; from pathlib import Path; from glide_ds.data.packing.pack import pack; "
    code += "pack(Path(sys.argv[1]), Path(sys.argv[2]), 10, 2)"
    out = tmp_path / "killed"
    kill_while_writing(code, [str(folder), str(out)], out, "*.tar", (1, 9, 18))
    assert len(list(out.glob("*.tar"))) < 32
    pack(folder, tmp_path / "killed", 10)
    pack(folder, tmp_path / "whole", 10)
    killed, whole = (
        {p.name: p.read_bytes() for p in (tmp_path / d).glob("[!.]*") if p.suffix not in (".index", ".catalog")}
        for d in ("killed", "whole")
    )  # which know a tar's time
    assert killed == whole
    assert captions(tmp_path / "killed") == captions(tmp_path / "whole")
