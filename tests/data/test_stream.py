"""Streams: gzip, xz and zstd tars and commands, split over ranks and workers, with their damage told."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import signal
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from data_kit import encoded, photo, sample, take, write_tar
from ranks import Ranks as Processes
from ranks import Run, Warm
from train_kit import metrics, trace

from glide_ds.config import ClipConfig, DataConfig
from glide_ds.data import build_source, open_shards
from glide_ds.data.streams.reading import stream_urls
from glide_ds.data.streams.source import StreamSource
from glide_ds.data.tars.storage import Storage
from glide_ds.data.tars.stream import Damaged, members, shares
from glide_ds.errors import DataError, GlideError, SurroundingsError
from glide_ds.training.faults.ranks import Ranks


def gzipped(folder: Path, sizes: list[int]) -> str:
    """Gzip shards of `sizes`, captioned "photo NUMBER" in order."""
    folder.mkdir(exist_ok=True)
    number = 0
    for shard, size in enumerate(sizes):
        tar = write_tar(folder / "t.tar", [(f"{n:06d}", sample(n)) for n in range(number, number + size)])
        (folder / f"s-{shard:02d}.tar.gz").write_bytes(gzip.compress(tar.read_bytes(), 1))
        tar.unlink()
        number += size
    return f"{folder}/s-{{00..{len(sizes) - 1:02d}}}.tar.gz"


def stream(shards: Any, *, batch: int = 4, clip: ClipConfig | None = None, **options: Any) -> StreamSource:
    ranks = {key: options.pop(key) for key in ("rank", "world_size", "peers") if key in options}
    given = {"workers": 0, "shuffle_buffer": 5, "trim": False, **options}
    source = build_source(
        DataConfig.of({"reader": "stream", "shards": shards, **given}, "data"),
        image_size=8,
        context_length=8,
        global_batch=batch,
        micro_batch=batch // ranks.get("world_size", 1) // 2,
        seed=3,
        clip=clip,
        clip_side=16 if clip else None,
        **({"rank": 0, "world_size": 1} | ranks),
    )
    assert isinstance(source, StreamSource)
    return source


def epochs(source: StreamSource, count: int, start: int = 0) -> list[list[str]]:
    """The captions of whole epochs."""
    found: list[list[str]] = []
    for batch in source.batches(start):
        assert source.began
        if source.began[0] == count:
            return found
        found += [[] for _ in range(source.began[0] + 1 - len(found))]
        found[-1] += batch.captions
    raise AssertionError("a source has no end")


def test_shares_cover_every_sample_once_at_any_number_of_readers():
    for shards in (1, 2, 5, 12):
        for readers in (1, 2, 3, 7, 24):
            read = Counter[tuple[int, int]]()
            counts = []
            for reader in range(readers):
                mine = [
                    (share.shard, row)
                    for share in shares(np.arange(shards), reader, readers)
                    for row in range(24 * 7)
                    if share.has(row)
                ]
                counts.append(len(mine))
                read.update(mine)
            assert set(read.values()) == {1}
            assert len(read) == shards * 24 * 7
            assert max(counts) == min(counts)


@pytest.mark.parametrize("workers", [0, 2])
def test_each_epoch_gives_every_sample_once_in_another_order(tmp_path: Path, workers: int):
    source = stream(gzipped(tmp_path, [7, 5, 6, 8]), workers=workers)
    first, second = epochs(source, 2)
    assert Counter(first).most_common(1)[0][1] == 1
    assert len(first) == len(second) == 24
    assert first != second
    assert first != sorted(first)
    assert source.report()["left_out"] == 4


def test_a_resumed_stream_goes_on_with_the_same_batches(tmp_path: Path):
    shards = gzipped(tmp_path, [7, 5, 6, 8])
    whole = stream(shards)
    batches = whole.batches(0)
    straight = [(next(batches).sample_ids.tolist(), whole.began) for _ in range(30)]
    for step in (0, 3, 6, 9, 13):
        again = stream(shards)
        again.began = straight[max(0, 2 * step - 1)][1]
        resumed = again.batches(step)
        assert [next(resumed).sample_ids.tolist() for _ in range(4)] == [
            ids for ids, _ in straight[2 * step : 2 * step + 4]
        ]


def test_what_is_mirrored_dropped_and_encoded_is_as_in_indexed_shards(tmp_path: Path):
    tar = write_tar(tmp_path / "a.tar", [(f"{n:03d}", sample(n)) for n in range(8)])
    options = {"workers": 0, "trim": False, "shuffle": False, "flip": 0.5, "drop_caption": 0.4}
    shape = {"image_size": 8, "context_length": 8, "global_batch": 8, "micro_batch": 8, "seed": 3}
    clip = {"clip": ClipConfig(source="both"), "clip_side": 16}
    known, batch = (
        next(
            build_source(DataConfig.of(given | options, "data"), rank=0, world_size=1, **shape, **clip).batches(
                0
            )
        )
        for given in ({"shards": str(tar)}, {"shards": f"pipe:cat {tar}", "reader": "stream"})
    )
    assert batch.captions == known.captions
    for name in ("images", "tokens", "mask", "drop_clip", "pictured", "clip_images", "sample_ids", "slots"):
        assert (getattr(batch, name) == getattr(known, name)).all(), name


def test_parts_of_clips_pictures_go_with_their_rows(tmp_path: Path):
    source = stream(gzipped(tmp_path, [7, 6, 5]), clip=ClipConfig(source="both"), batch=6, workers=2)
    batches = source.batches(0)
    for batch in (next(batches) for _ in range(10)):
        assert batch.pictured is not None
        shown = int(batch.pictured.sum())
        assert shown == (0 if batch.clip_images is None else len(batch.clip_images))
        assert len(batch.images) == len(batch.tokens) == len(batch.captions) == 3


@pytest.mark.parametrize(
    "pack",
    [
        gzip.compress,
        bz2.compress,
        lzma.compress,
        partial(lzma.compress, format=lzma.FORMAT_ALONE),
        "zstd",
        bytes,
    ],
)
def test_what_tars_are_packed_with_is_seen_by_their_bytes(tmp_path: Path, pack: Any):
    tar = write_tar(tmp_path / "a.tar", [(f"{n:03d}", sample(n)) for n in range(3)]).read_bytes()
    if pack == "zstd":
        pyarrow = pytest.importorskip("pyarrow")

        def pack(data: bytes) -> bytes:
            packed: bytes = pyarrow.compress(data, "zstd", asbytes=True)
            return packed

    for end in (None, -20):
        (tmp_path / "b.tar").write_bytes(pack(tar)[:end] if pack is not bytes else tar[: 4000 if end else None])
        if end is None:
            assert [name for name, _ in members(str(tmp_path / "b.tar"), Storage())][-1] == "002.txt"
        else:
            with pytest.raises(Damaged):
                list(members(str(tmp_path / "b.tar"), Storage()))


def broken(data: bytes, how: str) -> bytes:
    if how == "cut":
        return data[: len(data) // 2]
    if how == "no end":
        return data.rstrip(b"\0") + b"\0" * (-len(data.rstrip(b"\0")) % 512)
    if how == "header":
        at = data.rindex(b"ustar") - 257
        return data[:at] + b"\xff" * 512 + data[at + 512 :]
    return data + data


@pytest.mark.parametrize("how", ["cut", "no end", "header", "twice"])
@pytest.mark.parametrize("packed", [True, False])
def test_damage_stops_or_is_counted(tmp_path: Path, how: str, packed: bool):
    tar = write_tar(tmp_path / "a.tar", [(f"{n:03d}", sample(n)) for n in range(9)]).read_bytes()
    data = broken(tar, how)
    (tmp_path / "b.tar").write_bytes(gzip.compress(data) if packed else data)
    other = write_tar(tmp_path / "c.tar", [(f"{n:03d}", sample(n)) for n in range(9)])
    with pytest.raises(DataError, match=r"damaged.*b\.tar"):
        epochs(stream([str(tmp_path / "b.tar"), str(other)]), 1)
    source = stream([str(tmp_path / "b.tar"), str(other)], damaged_shards="salvage")
    epochs(source, 1)
    report = source.report()
    assert report["skipped"]["damaged shard"] >= 1
    assert "b.tar" in report["examples"]["damaged shard"][0]


def test_a_cut_gzip_is_damage(tmp_path: Path):
    shards = gzipped(tmp_path, [9])
    file = tmp_path / "s-00.tar.gz"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(DataError, match="damaged"):
        epochs(stream(f"{tmp_path}/s-00.tar.gz"), 1)
    assert shards


@pytest.mark.parametrize(
    "command", ["cat {}; exit 3", "head -c 3000 {}; exit 3", "exit 3", "no-such-command {}"]
)
def test_a_command_that_fails_is_no_damage(tmp_path: Path, command: str):
    tar = write_tar(tmp_path / "a.tar", [(f"{n:03d}", sample(n)) for n in range(9)])
    with pytest.raises(SurroundingsError, match="can't be read"):
        epochs(stream(f"pipe:{command.format(tar)}", damaged_shards="salvage"), 1)


def test_bad_samples_are_skipped_by_cause(tmp_path: Path):
    good = {"jpg": encoded(photo(1), "JPEG"), "txt": b"good"}
    dull = {"json": b'{"caption": "x", "punsafe": 0.9}'}
    safe = {"json": b'{"punsafe": 0.1}'}
    samples = [
        ("a", {"jpg": b"no picture", "txt": b"x", **safe}),
        ("b", {"jpg": good["jpg"], **safe}),
        ("c", {"txt": b"x", **safe}),
        ("d", {"jpg": good["jpg"], **dull}),
        *((f"e{n}", good | safe) for n in range(8)),
    ]
    source = stream(str(write_tar(tmp_path / "a.tar", samples)), filter={"max_punsafe": 0.5}, batch=8)
    assert [batch.captions for batch in take(source, 2)] == [("good",) * 4] * 2
    report = source.report()
    assert sum(report["skipped"].values()) == 3
    assert report["skipped"]["no caption"] == report["skipped"]["no image"] == 1
    assert report["filtered"] == {"max_punsafe": 1}
    assert "a.tar a" in str(report["examples"])


def test_streams_without_a_whole_batch_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="no whole global batch of 40"):
        next(stream(gzipped(tmp_path, [9, 9]), batch=40).batches(0))


def test_names_of_streams(tmp_path: Path):
    assert stream_urls("pipe:cat /x/{0..1}.tar") == ["pipe:cat /x/0.tar", "pipe:cat /x/1.tar"]
    with pytest.raises(DataError, match="more than once"):
        stream_urls(["pipe:cat a", "pipe:cat a"])
    with pytest.raises(DataError, match="matches no file"):
        stream_urls(f"{tmp_path}/none.tar.gz")


def test_the_indexed_reader_names_the_streams(tmp_path: Path):
    shards = gzipped(tmp_path, [2])
    for pattern in (shards, f"pipe:cat {shards}"):
        with pytest.raises(DataError, match=r"data\.reader=stream"):
            open_shards(pattern)


# ---- ranks


def read_on_a_rank(out: str, cases: list[dict[str, Any]]) -> int:
    """What this rank reads of two epochs of each case, or the error it meets."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    told: list[Any] = []
    for case in cases:
        try:
            source = stream(**case, rank=rank, world_size=world, peers=Ranks())
            told.append({"epochs": epochs(source, 2), "left_out": source.report()["left_out"]})
        except GlideError as error:
            told.append({"error": str(error)})
    Path(f"{out}-{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_take_equal_steps_and_read_nothing_twice(warm: Warm, tmp_path: Path, ranks: int):
    sizes = [12, 12, 12, 12, 12, 12, 12]
    even = gzipped(tmp_path / "even", sizes)
    uneven = gzipped(tmp_path / "uneven", [30, 4, 11, 17])
    cut = gzipped(tmp_path / "cut", [9, 9, 9])
    file = tmp_path / "cut" / "s-02.tar.gz"
    file.write_bytes(file.read_bytes()[:-100])
    cases = [
        {"shards": even, "batch": 12},
        {"shards": even, "batch": 12, "workers": 2},
        {"shards": f"pipe:cat {even} | gunzip", "batch": 12},
        {"shards": uneven, "batch": 12},
        {"shards": cut, "batch": 6},
    ]
    processes = Processes(warm, tmp_path / "logs")
    processes.start(ranks, "test_stream:read_on_a_rank", str(tmp_path / "told"), cases)
    try:
        assert processes.wait(120) == [0] * ranks, processes.said()
    finally:
        processes.kill()
    told = [json.loads((tmp_path / f"told-{rank}.json").read_text()) for rank in range(ranks)]
    for number in range(4):
        by_rank = [each[number] for each in told]
        held = 62 if number == 3 else 84
        for epoch in range(2):
            read = [rank["epochs"][epoch] for rank in by_rank]
            assert len({len(each) for each in read}) == 1  # the same number of steps
            counted = Counter(caption for each in read for caption in each)
            assert set(counted.values()) == {1}
            if number < 3:  # shards of one size: nothing is missed but the last batch
                assert held - len(counted) < 12 + 12 * (ranks > 1)
        left = sum(rank["left_out"] for rank in by_rank)
        assert left + sum(len(each) for rank in by_rank for each in rank["epochs"]) in (2 * held, 3 * held)
    errors = {each[4]["error"] for each in told}
    assert len(errors) == 1
    assert "damaged" in errors.pop()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_stopped_and_killed_read_on_as_if_they_had_not(warm: Warm, tmp_path: Path, workers: int):
    """A run that goes on has an uninterrupted one's samples and losses; on one rank, whole epochs after its own."""
    options: dict[str, Any] = {
        "train_batch_size": 12,
        "train_micro_batch_size_per_gpu": 3,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 3}},
        "data": {
            "shards": gzipped(tmp_path / "shards", [12] * 5),
            "reader": "stream",
            "shuffle_buffer": 7,
            "workers": workers,
            "trace": True,
        },
        "checkpoint": {"every": 4},
    }

    def told(run: Run, ranks: int, key: str = "sample_ids") -> list[list[list[int]]]:
        by_rank = [{line["step"]: line[key] for line in trace(run.folder, rank)} for rank in range(ranks)]
        return [[rank[step] for rank in by_rank] for step in sorted(by_rank[0])]

    straight, broken = (Run(warm, tmp_path / name, "base", **options) for name in ("straight", "broken"))
    straight.train(2, 20)
    assert straight.wait() == [0, 0], straight.said()
    broken.train(2, 6)  # an epoch has 5 steps, or 4 where a share does not fill a step
    assert broken.wait() == [0, 0], broken.said()
    broken.train(2, 20)
    broken.until(lambda: broken.updates() >= 10)
    broken.kill()
    assert set(broken.wait()) == {-signal.SIGKILL}
    broken.train(2, 20)
    assert broken.wait() == [0, 0], broken.said()
    assert told(broken, 2) == told(straight, 2)
    losses = [{line["step"]: line["loss"] for line in metrics(run.folder)} for run in (straight, broken)]
    assert losses[0] == losses[1]
    broken.train(1, 36)
    assert broken.wait() == [0], broken.said()
    steps = told(broken, 1)
    assert len(steps) == 36
    whole = [sample for (ids,) in steps[-15:] for sample in ids]
    assert len(set(whole)) == 60
    assert set(Counter(whole).values()) <= {2, 3, 4}  # two whole epochs, and parts of two others
