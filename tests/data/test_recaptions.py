"""Captions are drawn from the fields that are named, by weight, and CLIP sees the one that is drawn."""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_kit import json_bytes, sample, source, take, write_tar

from glide_ds.commands import prepare_clip
from glide_ds.config import ClipConfig, DataConfig
from glide_ds.data.loader import build_source
from glide_ds.data.tally import Cause, Unusable
from glide_ds.data.tars.shards import open_shards
from glide_ds.data.texts.recaptions import Captions
from glide_ds.errors import DataError, GlideError
from glide_ds.model.clip import FrozenClip

MEMBERS = {
    "txt": b"first line\nsecond line\r\n\n",
    "json": json_bytes(short="short", deep={"long": ["long 1", "long 2"]}, number=7, weighted=[{"text": "w"}]),
}


def drawn(
    fields: dict[str, float], members: dict[str, bytes] = MEMBERS, file: str | None = None
) -> Counter[str]:
    captions = Captions(fields, file)
    return Counter(captions.read(members, n / 600, lambda: "a/key")[0] for n in range(600))


@pytest.mark.parametrize(
    ("fields", "counts"),
    [
        ({"txt": 1}, {"first line second line": 600}),
        ({"txt.lines": 1}, {"first line": 300, "second line": 300}),
        ({"json.short": 5}, {"short": 600}),
        ({"json.deep.long": 1}, {"long 1": 300, "long 2": 300}),
        ({"txt": 1, "json.short": 2}, {"first line second line": 200, "short": 400}),
        ({"json.short": 1, "json.deep.long": 1}, {"short": 300, "long 1": 150, "long 2": 150}),
        ({"json.short": 1, "json.missing": 9, "caption": 9, "json.number": 9}, {"short": 600}),
        ({"json.short": 1, "txt": 0}, {"short": 600}),
        ({"json.weighted": 1}, {"w": 600}),
        ({"json": 1, "json.short": 1}, {"short": 600}),
    ],
)
def test_fields_by_weight(fields: dict[str, float], counts: dict[str, int]) -> None:
    assert drawn(fields) == counts


def test_a_sample_without_any_of_them_is_skipped_by_cause(tmp_path: Path) -> None:
    with pytest.raises(Unusable, match=r"none of data\.captions \(json\.none\)"):
        drawn({"json.none": 1})
    with pytest.raises(Unusable, match=Cause.BAD_JSON):
        drawn({"json.short": 1}, {"txt": b"a", "json": b"{"})
    members = [(f"{n}", sample(n, **({"json": json_bytes(short=f"s{n}")} if n % 2 else {}))) for n in range(16)]
    path = str(write_tar(tmp_path / "x.tar", members))
    made = source(path, captions={"json.short": 1.0})
    captions = {caption for batch in take(made, 2) for caption in batch.captions}
    assert captions <= {f"s{n}" for n in range(1, 16, 2)}
    assert made.report()["skipped"][Cause.NO_CAPTION] >= 8


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_side_file_by_key(tmp_path: Path, kind: str) -> None:
    write_tar(tmp_path / "x.tar", [(f"set/{n:04d}", sample(n)) for n in range(16)])
    records = [
        {"key": f"set/{n:04d}", "caption": [f"one {n}", f"two {n}"], "other": f"o{n}"} for n in range(15)
    ]
    path = tmp_path / f"side.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, reversed(records))))
    else:
        arrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
        from pyarrow import parquet

        parquet.write_table(arrow.Table.from_pylist(records), path)
    for workers in (0, 1):
        made = source(
            str(tmp_path / "x.tar"),
            captions={"file.caption": 1.0},
            caption_file=str(path),
            workers=workers,
            drop_caption=0.0,
            drop_both=0.0,
        )
        seen = set()
        for batch in take(made, 12):
            for number, caption in zip(batch.sample_ids.tolist(), batch.captions, strict=True):
                assert caption in (f"one {number}", f"two {number}")
                seen.add(caption)
        assert len(seen) > 15
        assert made.report()["skipped"] == {
            Cause.NO_CAPTION: made.report()["read"] - made.report()["delivered"]
        }


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no record with a key"),
        (b"{broken", r"line 1 is no JSON record"),
        (b"[1]", r"line 1 is no JSON record: a list"),
        (b'{"caption": "a"}', r"line 1 has the fields caption.*by the field key"),
        (b'{"key": "a"}\n{"key": "a"}', "two records of one key"),
    ],
)
def test_a_side_file_that_says_nothing_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "side.jsonl").write_bytes(data)
    with pytest.raises(DataError, match=message):
        Captions({"file.caption": 1}, str(tmp_path / "side.jsonl"))
    with pytest.raises(DataError, match="does not exist"):
        Captions({"file.caption": 1}, str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"captions": {"file.a": 1.0}}, "do not go together"),
        ({"captions": {"txt": 1.0}, "caption_file": "x.jsonl"}, "do not go together"),
        ({"captions": {"txt": 1.0, "file.a": 0.0}, "caption_file": "x.jsonl"}, "do not go together"),
        ({"caption_file": "x.jsonl"}, "do not go together"),
        ({"captions": {"txt": -1.0}}, r"data\.captions = .* weights that can't be drawn"),
        ({"captions": {"txt": 0.0}}, r"data\.captions = .* no caption to draw"),
        ({"captions": {"txt": float("inf")}}, "give a finite number"),
        ({"captions": {"txt": 1.0}, "shards": "builtin:shapes"}, "shapes have one caption each"),
    ],
)
def test_what_does_not_go_together(data: dict[str, Any], message: str) -> None:
    with pytest.raises(GlideError, match=message):
        DataConfig.of({"shards": "x.tar", **data}, "data")


def test_keys_longer_than_a_tar_header_has_room_for(tmp_path: Path) -> None:
    """GNU and pax put a long name before the member's own header; a hard link's data lies elsewhere."""
    keys = [f"{'folder/' * 30}{n:03d}" for n in range(3)] + ["ü" * 90 + "3", "4", "5"]
    (tmp_path / "side.jsonl").write_bytes(b"\n".join(json_bytes(key=key, a=f"of {key}") for key in keys))
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tmp_path / f"{form}.tar"
        with tarfile.open(path, "w", format=form) as tar:
            for number, key in enumerate(keys):
                for extension, data in sample(number).items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(data)
                    if key == "4" and extension == "jpg":
                        info = tarfile.TarInfo(f"{key}.{extension}")
                        info.type, info.linkname = tarfile.LNKTYPE, f"{keys[0]}.jpg"
                    tar.addfile(info, io.BytesIO(data))
                    tar.addfile(tarfile.TarInfo("README"))
        shards = open_shards(str(path), str(tmp_path / f"index {form}"))
        assert [shards.key(n) for n in range(len(keys))] == keys
        for reader in ("indexed", "stream"):
            fields = {"captions": {"file.a": 1.0}, "caption_file": str(tmp_path / "side.jsonl")}
            made = source(str(path), batch=5, reader=reader, drop_caption=0, drop_both=0, **fields)
            captions = {caption for batch in take(made, 3) for caption in batch.captions}
            assert captions <= {f"of {key}" for key in keys}
            assert len(captions) > 4


def test_a_stream_draws_captions_too(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", [(f"a/{n}", sample(n)) for n in range(8)])
    (tmp_path / "side.jsonl").write_bytes(b"\n".join(json_bytes(key=f"a/{n}", c=f"side {n}") for n in range(8)))
    made = source(
        str(tmp_path / "x.tar"),
        reader="stream",
        captions={"txt": 1.0, "file.c": 1.0},
        caption_file=str(tmp_path / "side.jsonl"),
        workers=1,
    )
    seen = {caption for batch in take(made, 6) for caption in batch.captions}
    assert seen == {f"{kind} {n}" for n in range(8) for kind in ("photo", "side")}


def test_clip_sees_the_caption_that_is_drawn(tmp_path: Path) -> None:
    """One embedding per caption; the same bits at any number of workers."""
    members = [
        (f"{n}", sample(n, json=json_bytes(all=[f"red {n}", f"blue {n}", f"green {n}"][: n % 3 + 1])))
        for n in range(12)
    ]
    shards = str(write_tar(tmp_path / "x.tar", members))
    fields, store = {"txt": 1.0, "json.all": 3.0}, str(tmp_path / "clip")
    parser = argparse.ArgumentParser()
    prepare_clip.add_arguments(parser)
    words = [
        shards,
        "--out",
        store,
        "--model",
        "builtin:tiny",
        "--captions",
        json.dumps(fields),
        "--batch",
        "5",
    ]
    prepare_clip.run(parser.parse_args(words))
    layout: dict[str, Any] = {"global_batch": 12, "micro_batch": 12, "rank": 0, "world_size": 1, "seed": 0}
    encoder, seen, traces = FrozenClip("builtin:tiny"), Counter[str](), []
    for workers in (0, 1):
        config = DataConfig(shards=(shards,), clip_store=store, captions=fields, workers=workers)
        made = build_source(
            config, image_size=16, context_length=8, clip=ClipConfig(model="builtin:tiny"), **layout
        )
        batches = take(made, 6)
        traces.append([batch.captions for batch in batches])
        for batch in batches:
            wanted = encoder.encode_text(batch.captions).numpy()
            assert batch.clip is not None
            assert np.abs(batch.clip.numpy() - wanted).max() < 1e-3
            seen.update(batch.captions)
    assert traces[0] == traces[1]
    assert len(seen) > 20
    config = DataConfig(shards=(shards,), clip_store=store, captions={"json.all": 1.0}, workers=0)
    made = build_source(
        config, image_size=16, context_length=8, clip=ClipConfig(model="builtin:tiny"), **layout
    )
    take(made, 2)  # fewer of the captions than were embedded


def test_a_store_of_one_caption_a_sample_is_refused_where_others_may_be_drawn(
    tmp_path: Path,
) -> None:
    shards = str(write_tar(tmp_path / "x.tar", [(f"{n}", sample(n)) for n in range(4)]))
    store = str(tmp_path / "clip")
    parser = argparse.ArgumentParser()
    prepare_clip.add_arguments(parser)
    prepare_clip.run(parser.parse_args([shards, "--out", store, "--model", "builtin:tiny"]))
    config = DataConfig(shards=(shards,), clip_store=store, captions={"txt": 1.0}, workers=0)
    layout: dict[str, Any] = {"global_batch": 4, "micro_batch": 4, "rank": 0, "world_size": 1, "seed": 0}
    with pytest.raises(DataError, match=r"one embedding a sample.*--captions '\{\"txt\": 1\.0\}'"):
        build_source(config, image_size=16, context_length=8, clip=ClipConfig(model="builtin:tiny"), **layout)


def test_side_files_of_older_writers(tmp_path: Path) -> None:
    """Texts that parquet calls binary, and an integer of more digits than Python converts."""
    arrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    from pyarrow import parquet

    for kind in (arrow.binary(), arrow.large_binary()):
        columns = {name: arrow.array([text], kind) for name, text in (("key", b"a/1"), ("c", "é".encode()))}
        parquet.write_table(arrow.table(columns), tmp_path / "x.parquet")
        captions = Captions({"file.c": 1.0}, str(tmp_path / "x.parquet"))
        assert captions.read({}, 0.5, lambda: "a/1") == ("é", ())
    (tmp_path / "x.jsonl").write_text('{"key": "a/1", "c": "of a", "n": ' + "9" * 5000 + "}")
    captions = Captions({"file.c": 1.0}, str(tmp_path / "x.jsonl"))
    assert captions.read({}, 0.5, lambda: "a/1") == ("of a", ())
