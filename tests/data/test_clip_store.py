"""Embeddings join the samples they were made from, or are refused by name."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from data_kit import write_shards

from glide_ds.config import ClipConfig, DataConfig
from glide_ds.data.clip_store import ClipStore, Encoder, StoreNote, store_path, write_store
from glide_ds.data.loader import build_source
from glide_ds.data.tars.shards import ShardSet, open_shards
from glide_ds.errors import DataError

ENCODER = Encoder("ViT-B/32", "openai", "text")
DIM = 8


def fill(folder: Path, shards: ShardSet, encoder: Encoder = ENCODER) -> None:
    """Row of sample i: all i + 1."""
    first = 0
    for url, key_hash, size in zip(shards.urls, shards.key_hashes, shards.sizes.tolist(), strict=True):
        rows = np.repeat(np.arange(first + 1, first + size + 1, dtype=np.float16)[:, None], DIM, axis=1)
        write_store(
            store_path(folder, url, key_hash), rows, StoreNote(encoder, "h", key_hash, size, DIM, missing=0)
        )
        first += size


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return open_shards(write_shards(tmp_path, [12, 9]))


def test_rows_follow_samples(tmp_path: Path, shards: ShardSet) -> None:
    fill(tmp_path / "clip", shards)
    store = pickle.loads(pickle.dumps(ClipStore(tmp_path / "clip", shards, ENCODER)))
    wanted = np.array([20, 0, 11, 12])
    assert np.array_equal(store.rows(wanted)[:, 0], wanted + 1)


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
    fill(tmp_path / "clip", shards)
    path = store_path(tmp_path / "clip", shards.urls[0], shards.key_hashes[0])
    path.write_bytes(path.read_bytes()[:100])
    store = ClipStore(tmp_path / "clip", shards, ENCODER)
    with pytest.raises(DataError, match=r"s-000.*prepare them anew"):
        store.rows(np.array([0]))
    note = path.with_suffix(".json")
    note.write_bytes(note.read_bytes().replace(b'"samples": 12', b'"samples": 13'))
    with pytest.raises(DataError, match="13 other samples"):
        ClipStore(tmp_path / "clip", shards, ENCODER)


def test_a_sample_without_embedding_is_named(tmp_path: Path, shards: ShardSet) -> None:
    fill(tmp_path / "clip", shards)
    path = store_path(tmp_path / "clip", shards.urls[1], shards.key_hashes[1])
    rows = np.load(path)
    rows[3] = 0
    np.save(path, rows)
    with pytest.raises(DataError, match="sample 15 has no embedding"):
        ClipStore(tmp_path / "clip", shards, ENCODER).rows(np.array([14, 15]))
