"""Embeddings join the samples they were made from, or are refused by name."""

from __future__ import annotations

import json
import pickle
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from data_kit import sample, write_shards, write_tar
from test_catalog import Part

from glide_ds.config import ClipConfig, DataConfig
from glide_ds.data import clip_notes
from glide_ds.data.clip_notes import Encoder, StoreNote
from glide_ds.data.clip_store import ClipStore, Embeddings, picture_hash, text_hash, write_store
from glide_ds.data.loader import build_source
from glide_ds.data.tars.index import scan_shard
from glide_ds.data.tars.shards import ShardSet, open_shards
from glide_ds.errors import DataError

ENCODER = Encoder("ViT-B/32", "openai", "text")
DIM = 8


def fill(
    folder: Path, shards: ShardSet, encoder: Encoder = ENCODER, *, add: int = 1, weights: str = "h"
) -> list[Path]:
    """Row of sample i: all i + `add`."""
    first, paths = 0, []
    for url, head in zip(shards.urls, shards.heads, strict=True):
        numbers = np.arange(first, first + head.samples)
        rows = np.repeat((numbers + add).astype(np.float16)[:, None], DIM, axis=1)
        note = StoreNote(encoder, weights, head.fingerprint, head.version, head.samples, DIM, missing=0)
        paths.append(write_store(folder, url, rows, np.array(hashes(shards, numbers), np.uint64), note))
        first += head.samples
    return paths


def hashes(shards: ShardSet, numbers: np.ndarray) -> list[int]:
    return [text_hash(shards.read(n)["txt"].decode()) for n in numbers.tolist()]


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return open_shards(write_shards(tmp_path, [12, 9]))


def test_rows_follow_samples(tmp_path: Path, shards: ShardSet) -> None:
    fill(tmp_path / "clip", shards)
    store = pickle.loads(pickle.dumps(ClipStore(tmp_path / "clip", shards, ENCODER)))
    wanted = np.array([20, 0, 11, 12])
    assert np.array_equal(store.rows(wanted, hashes(shards, wanted))[:, 0], wanted + 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_joins_them(tmp_path: Path, shards: ShardSet, workers: int) -> None:
    fill(tmp_path / "clip", shards)
    config = DataConfig(shards=tuple(shards.urls), clip_store=str(tmp_path / "clip"), workers=workers)
    clip = ClipConfig(model="ViT-B/32")
    layout = {"global_batch": 7, "micro_batch": 7, "rank": 0, "world_size": 1, "seed": 0}
    source = build_source(config, image_size=16, context_length=8, clip=clip, **layout)  # type: ignore[arg-type]
    batch = next(iter(source.batches(0)))
    assert batch.clip is not None
    assert batch.clip.dtype == torch.float16
    assert torch.equal(batch.clip[:, 0].long(), batch.sample_ids + 1)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (Encoder("ViT-L/14", "openai", "text"), r"clip\.model=ViT-B/32, this run has ViT-L/14"),
        (Encoder("ViT-B/32", "laion", "text"), r"clip\.weights=openai"),
        (Encoder("ViT-B/32", "openai", "image"), r"clip\.source=text"),
    ],
)
def test_another_encoder_is_refused(tmp_path: Path, shards: ShardSet, other: Encoder, message: str) -> None:
    fill(tmp_path / "clip", shards)
    with pytest.raises(DataError, match=message):
        ClipStore(tmp_path / "clip", shards, other)


def test_missing_changed_and_damaged_stores_are_named(tmp_path: Path, shards: ShardSet) -> None:
    with pytest.raises(DataError, match="prepare clip"):
        ClipStore(tmp_path / "none", shards, ENCODER)
    path = fill(tmp_path / "clip", shards)[0]
    whole = path.read_bytes()
    for size in (100, len(whole) - 8):
        path.write_bytes(whole[:size])
        store = ClipStore(tmp_path / "clip", shards, ENCODER)
        with pytest.raises(DataError, match=r"s-000.*prepare them anew"):
            store.rows(np.array([0]), [1])
    note = path.with_suffix(".json")
    note.write_bytes(note.read_bytes().replace(b'"samples": 12', b'"samples": 13'))
    with pytest.raises(DataError, match="13 other samples"):
        ClipStore(tmp_path / "clip", shards, ENCODER)


def test_a_sample_without_embedding_is_named(tmp_path: Path, shards: ShardSet) -> None:
    path = fill(tmp_path / "clip", shards)[1]
    data = bytearray(path.read_bytes())
    data[len(data) - 8 * 6 : len(data) - 8 * 5] = bytes(8)
    path.write_bytes(data)
    wanted = np.array([14, 15])
    with pytest.raises(DataError, match=r"sample 3 of .*s-001\.tar has no embedding"):
        ClipStore(tmp_path / "clip", shards, ENCODER).rows(wanted, hashes(shards, wanted))


def test_what_was_embedded_must_be_what_is_joined(tmp_path: Path, shards: ShardSet) -> None:
    """Another data set with shards of the same names, keys and sizes to the byte."""
    (tmp_path / "other").mkdir()
    for number, url in enumerate(shards.urls):
        data = Path(url).read_bytes().replace(b"photo", b"image")
        (tmp_path / "other" / f"s-{number:03d}.tar").write_bytes(data)
    others = open_shards(str(tmp_path / "other"))
    assert others.fingerprint == shards.fingerprint
    every = np.arange(21)
    fill(tmp_path / "clip", shards)
    for wanted in (every, every[20:]):
        with pytest.raises(DataError, match=r"is not what was embedded.*prepare clip. again"):
            ClipStore(tmp_path / "clip", others, ENCODER).rows(wanted, hashes(others, wanted))
    fill(tmp_path / "clip", others, add=100)
    for _ in range(2):
        for given, add in ((shards, 1), (others, 100)):
            store = ClipStore(tmp_path / "clip", given, ENCODER)
            assert np.array_equal(store.rows(every, hashes(given, every))[:, 0], every + add)


def test_a_shard_that_was_written_again_is_refused_at_the_start(tmp_path: Path, shards: ShardSet) -> None:
    fill(tmp_path / "clip", shards)
    members = [(f"{n:06d}", sample(n, txt=f"a caption mended {n}".encode())) for n in range(12)]
    write_tar(Path(shards.urls[0]), members)
    Path(f"{shards.urls[0]}.index").unlink()
    with pytest.raises(DataError, match=r"embeddings of another s-000\.tar than.*prepare clip. again"):
        ClipStore(tmp_path / "clip", open_shards(shards.urls), ENCODER)


def test_other_weights_of_the_same_name_are_refused(tmp_path: Path, shards: ShardSet) -> None:
    fill(tmp_path / "clip", shards)
    store = ClipStore(tmp_path / "clip", shards, ENCODER)
    store.of_weights("h")
    with pytest.raises(DataError, match=r"weights with the hash h, this run's clip\.weights have other"):
        store.of_weights("other")
    fill(tmp_path / "clip", shards, add=50, weights="other")
    store, wanted = ClipStore(tmp_path / "clip", shards, ENCODER), np.array([3])
    with pytest.raises(DataError, match="different weights"):
        store.rows(wanted, hashes(shards, wanted))
    store.of_weights("other")
    assert store.rows(wanted, hashes(shards, wanted))[0, 0] == 53


def test_a_store_of_a_version_before_is_refused_with_the_remedy(tmp_path: Path, shards: ShardSet) -> None:
    (tmp_path / "clip").mkdir()
    for url, head in zip(shards.urls, shards.heads, strict=True):
        key_hash = scan_shard(url).head.key_hash
        old = tmp_path / "clip" / f"{Path(url).stem}.{key_hash[:12]}.npy"
        np.save(old, np.zeros((head.samples, DIM), np.float16))
        note = {"encoder": asdict(ENCODER), "weights_hash": "h", "key_hash": key_hash, "samples": 1}
        old.with_suffix(".json").write_text(json.dumps({**note, "dim": DIM, "missing": 0}))
    with pytest.raises(DataError, match=r"version before.*prepare clip. again"):
        ClipStore(tmp_path / "clip", shards, ENCODER)


def test_another_picture_has_another_hash() -> None:
    data = sample(0)["jpg"]
    others = [sample(n)["jpg"] for n in range(1, 40)]
    others += [data + b"\0", data[:-1], data[:-1] + b"\0", b"\0" + data[1:], b"", data * 100, bytes(len(data))]
    start = len(data) * 100 // 2
    others.append((data * 100)[:start] + bytes(600) + (data * 100)[start + 600 :])
    assert len({picture_hash(other) for other in [data, *others]}) == 1 + len(others)


# ---- the store's catalog


@pytest.fixture
def notes_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The notes that are read, by the number of their shard."""
    read: list[str] = []
    whole = clip_notes.read_note

    def counted(path: Path) -> StoreNote:
        read.append(path.name.split(".")[0])
        return whole(path)

    monkeypatch.setattr(clip_notes, "read_note", counted)
    return read


def test_a_start_reads_one_file_and_the_notes_that_changed(
    tmp_path: Path, shards: ShardSet, notes_read: list[str]
) -> None:
    fill(tmp_path / "clip", shards)
    wanted = np.arange(21)
    rows = ClipStore(tmp_path / "clip", shards, ENCODER).rows(wanted, hashes(shards, wanted))
    assert sorted(notes_read) == ["s-000", "s-001"]
    notes_read.clear()
    again = ClipStore(tmp_path / "clip", shards, ENCODER)
    assert notes_read == []
    assert np.array_equal(again.rows(wanted, hashes(shards, wanted)), rows)
    (note,) = (tmp_path / "clip").glob("s-001.*.json")
    note.write_bytes(note.read_bytes() + b" ")
    ClipStore(tmp_path / "clip", shards, ENCODER)
    assert notes_read == ["s-001"]
    note.unlink()
    with pytest.raises(DataError, match=r"none of .*s-001\.tar"):
        ClipStore(tmp_path / "clip", shards, ENCODER)


def test_sets_that_share_a_store_share_its_catalog(
    tmp_path: Path, shards: ShardSet, notes_read: list[str]
) -> None:
    (tmp_path / "o").mkdir()
    write_tar(tmp_path / "o" / "s-000.tar", [(f"x{n}", sample(90 + n)) for n in range(4)])
    others = open_shards(str(tmp_path / "o"))
    pictures = Encoder("ViT-B/32", "openai", "image", "center", trim=True)
    for each, encoder in ((shards, ENCODER), (others, ENCODER), (shards, pictures)):
        fill(tmp_path / "clip", each, encoder)
    for _ in range(2):
        for each, encoder in (
            (shards, ENCODER),
            (others, ENCODER),
            (shards, pictures),
            (shards + others, ENCODER),
        ):
            store = ClipStore(tmp_path / "clip", each, encoder)
            wanted = np.array([2])
            assert store.rows(wanted, hashes(each, wanted))[0, 0] == 3
        assert len(notes_read) == 5  # each once, by the first start
    wanted = np.array([20, 21, 24])
    both = ClipStore(tmp_path / "clip", shards + others, ENCODER)
    assert both.rows(wanted, hashes(shards + others, wanted))[:, 0].tolist() == [21, 1, 4]


def test_a_damaged_catalog_of_notes_is_made_anew_and_said(
    tmp_path: Path, shards: ShardSet, notes_read: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "clip", shards)
    ClipStore(tmp_path / "clip", shards, ENCODER)
    path = tmp_path / "clip" / clip_notes.NOTES
    path.write_bytes(path.read_bytes()[:-3])
    ClipStore(tmp_path / "clip", shards, ENCODER)
    assert f"the catalog {path} is damaged: it is made anew" in capsys.readouterr().out
    notes_read.clear()
    ClipStore(tmp_path / "clip", shards, ENCODER)
    assert notes_read == []


def test_a_store_that_is_read_only_has_its_catalog_in_the_cache(
    tmp_path: Path, shards: ShardSet, notes_read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLIDE_DS_CACHE", str(tmp_path / "cache"))
    fill(tmp_path / "clip", shards)
    (tmp_path / "clip").chmod(0o555)
    try:
        for _ in range(2):
            ClipStore(tmp_path / "clip", shards, ENCODER)
    finally:
        (tmp_path / "clip").chmod(0o755)
    assert len(notes_read) == 2
    assert not (tmp_path / "clip" / clip_notes.NOTES).exists()


@pytest.mark.parametrize("size", [2, 5])
def test_processes_that_read_their_part_of_the_notes_know_all(
    tmp_path: Path, shards: ShardSet, notes_read: list[str], size: int
) -> None:
    fill(tmp_path / "clip", shards)
    fill(tmp_path / "clip", shards, weights="other")
    store = Embeddings(tmp_path / "clip", shards, [ENCODER], Part(size))
    assert sorted(notes_read) == ["s-000"] * 2 + ["s-001"] * 2  # each by one of them
    store.of_weights("h")
    wanted = np.array([20, 0])
    assert store.rows(wanted, hashes(shards, wanted), np.zeros(2, np.bool_))[:, 0].tolist() == [21, 1]
