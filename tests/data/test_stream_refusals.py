"""Every way to ask a stream for what only an index has is refused by name; all else of the section works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_kit import json_bytes, sample, source, take, write_tar

from glide_ds.config import DataConfig
from glide_ds.data import Source
from glide_ds.errors import ConfigError, DataError, GlideError


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"mix": {"a": {"shards": "a.tar"}}}, "data.mix"),
        ({"clip_store": "clip"}, "data.clip_store"),
        ({"drop_last": False}, "data.drop_last"),
        ({"shards": "builtin:shapes"}, "data.shards"),
        ({"shards": "builtin:shapes-heldout"}, "data.shards"),
        ({"shards": ["builtin:shapes"]}, "data.shards"),
        ({"shards": ["a.tar", "builtin:shapes"]}, "data.shards"),
        ({"shuffle": False, "shuffle_buffer": 5}, "data.shuffle_buffer"),
        ({"captions": {"file.c": 1.0}}, "data.caption_file"),
        ({"caption_file": "side.jsonl"}, "data.captions"),
    ],
    ids=str,
)
def test_what_needs_an_index_is_refused_by_name(given: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as refused:
        DataConfig.of({"shards": "a.tar", "reader": "stream", **given}, "data")
    assert refused.value.faults[0].remedy


@pytest.mark.parametrize(
    "shards", ["memory://nothing/a.tar.gz", "pipe:", "pipe:  ", "nosuch://a.tar", "https://host/*.tar.gz", ""]
)
def test_streams_that_can_not_be_are_refused(shards: str) -> None:
    with pytest.raises(GlideError) as refused:
        take(streamed(shards), 1)
    assert refused.value.faults[0].remedy


def streamed(shards: Any, **options: Any) -> Source:
    return source(shards, batch=4, workers=0, reader="stream", **options)


@pytest.mark.parametrize(
    ("options", "captions"),
    [
        ({"filter": {"max_punsafe": 0.5}}, "photo"),
        ({"captions": {"json.c": 1.0}}, "record"),
        ({"captions": {"txt.lines": 1.0}, "shuffle": False}, "photo"),
        ({"min_side": 3, "max_pixels": 10_000, "crop": "pad", "trim": True}, "photo"),
        ({"shuffle_buffer": 1}, "photo"),
        ({"drop_caption": 0.0, "drop_both": 1.0}, "photo"),
    ],
    ids=str,
)
def test_what_needs_none_works(tmp_path: Path, options: dict[str, Any], captions: str) -> None:
    records = [json_bytes(punsafe=0.1 if n < 8 else 0.9, c=f"record {n}") for n in range(12)]
    shards = write_tar(tmp_path / "a.tar", [(f"{n:03d}", sample(n, json=records[n])) for n in range(12)])
    usable = 8 if "filter" in options else 12
    batches = take(streamed(str(shards), **options), usable // 4)
    assert {caption for batch in batches for caption in batch.captions} == {
        f"{captions} {n}" for n in range(usable)
    }


def test_more_bad_samples_than_allowed_stop_a_stream(tmp_path: Path) -> None:
    bad = [(f"{n:04d}", {"txt": b"no picture"} if n % 2 else sample(n % 9)) for n in range(300)]
    shards = str(write_tar(tmp_path / "a.tar", bad))
    with pytest.raises(DataError, match=r"data\.max_bad_fraction=0\.4"):
        take(streamed(shards, max_bad_fraction=0.4), 60)
