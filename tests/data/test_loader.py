"""The loader delivers the same batches at any number of ranks and workers, whatever is wrong with the data."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from data_kit import encoded, json_bytes, sample, source, take, write_shards, write_tar
from PIL import Image

from glide_ds.config import ClipConfig, FilterConfig
from glide_ds.data import samples
from glide_ds.data.handover import Receiver, Sender
from glide_ds.data.loader import ENOUGH_TO_JUDGE
from glide_ds.data.pictures.decode import DecodeOptions, decode, decode_at
from glide_ds.data.tars.shards import ShardSet
from glide_ds.errors import ConfigError, DataError
from glide_ds.types import Batch

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def same(a: Batch, b: Batch) -> bool:
    tensors = ("sample_ids", "slots", "images", "tokens", "mask", "drop_clip")
    return a.captions == b.captions and all(torch.equal(getattr(a, n), getattr(b, n)) for n in tensors)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("shards"), [30, 7, 25, 40])


def test_a_batch_leaves_a_worker_whole(shards: str) -> None:
    """Whatever its parts' sizes: 7 samples of odd shapes, with embeddings and small pictures."""
    batch = replace(source(shards, batch=7, low_res=True).one(0), clip=torch.randn(7, 5).half())
    packed = Sender(1).pack(batch)
    arrived = Receiver().unpack(packed)
    assert arrived.captions == batch.captions
    for field in fields(batch):
        sent, got = getattr(batch, field.name), getattr(arrived, field.name)
        if isinstance(sent, torch.Tensor):
            assert (got.dtype, got.is_contiguous()) == (sent.dtype, True)
            assert torch.equal(got, sent)


def test_a_buffer_is_handed_over_once_and_written_again_after_it_was_read(shards: str) -> None:
    sender, receiver = Sender(2), Receiver()
    sent = [source(shards, batch=7).one(0) for _ in range(7)]
    for number, batch in enumerate(sent):
        batch.images.fill_(number)
    waiting = [sender.pack(batch) for batch in sent[:3]]  # two ahead of the one that is read
    arrived = []
    for batch in [*sent[3:], None, None, None]:
        arrived.append(receiver.unpack(waiting.pop(0)))
        if batch is not None:
            waiting.append(sender.pack(batch))
            assert waiting[-1].buffer is None
    assert all(same(got, was) for got, was in zip(arrived, sent, strict=True))


def test_a_batch_of_another_size_gets_a_buffer_of_its_own(shards: str) -> None:
    sender, receiver = Sender(0), Receiver()
    for size in (7, 3, 8, 8):
        batch = source(shards, batch=size).one(0)
        assert same(receiver.unpack(sender.pack(batch)), batch)


def test_a_json_record_is_read_only_where_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no rule asks for it and the text says something; the sample whose text is blank takes its caption."""
    record = json_bytes(caption="from the record", WIDTH=300, HEIGHT=300)
    picture = sample(0)["jpg"]
    texts: list[dict[str, bytes]] = [{"txt": b"from the text"}, {"txt": b" \n"}, {}]
    members = [(f"{n}", {"jpg": picture, "json": record, **text}) for n, text in enumerate(texts)]
    path = str(write_tar(tmp_path / "x.tar", members))
    read: list[tuple[int, tuple[str, ...]]] = []
    whole = ShardSet.read

    def noted(shards: ShardSet, number: int, unread: frozenset[str] = frozenset()) -> dict[str, bytes]:
        found = whole(shards, number, unread)
        read.append((number, tuple(sorted(found))))
        return found

    monkeypatch.setattr(ShardSet, "read", noted)
    (batch,) = take(source(path, batch=3, drop_caption=0, drop_both=0), 1)
    captions = dict(zip(batch.sample_ids.tolist(), batch.captions, strict=True))
    assert captions == {0: "from the text", 1: "from the record", 2: "from the record"}
    assert sorted(read) == [
        (0, ("jpg", "txt")),
        (1, ("jpg", "json", "txt")),
        (1, ("jpg", "txt")),
        (2, ("jpg",)),
        (2, ("jpg", "json")),
    ]
    read.clear()
    take(source(path, batch=3, filter=FilterConfig(min_size=256)), 1)
    assert {found for _, found in read} == {("jpg", "json", "txt"), ("jpg", "json")}


def test_a_batch_is_what_types_promises(shards: str) -> None:
    (batch,) = take(source(shards, batch=8, micro=4, rank=1, ranks=2, low_res=True), 1)
    assert batch.slots.tolist() == [1, 3, 5, 7]
    assert (batch.images.shape, batch.images.dtype) == ((4, 16, 16, 3), torch.uint8)
    assert batch.low_res.shape == (4, 4, 4, 3)
    assert batch.tokens.shape == batch.mask.shape == (4, 12)
    assert batch.captions == tuple(f"photo {i}" for i in batch.sample_ids.tolist())
    assert batch.clip is None


@pytest.mark.parametrize(
    ("ranks", "workers"),
    [
        pytest.param(ranks, workers, marks=pytest.mark.slow if ranks * workers > 4 else ())
        for ranks, workers in product((1, 2, 3, 4, 6, 8), (0, 1, 3))
    ],
)
def test_ranks_and_workers_never_change_the_data(shards: str, ranks: int, workers: int) -> None:
    steps = 102 // 24
    reference = source(shards, batch=24)
    whole = take(reference, steps)
    assert steps == reference.batches_per_epoch
    ids = torch.full((steps, 24), -1)
    images = torch.zeros((steps, 24, 16, 16, 3), dtype=torch.uint8)
    for rank in range(ranks):
        parts = take(source(shards, batch=24, rank=rank, ranks=ranks, workers=workers), steps)
        for step, part in enumerate(parts):
            assert len(part) == 24 // ranks
            ids[step, part.slots] = part.sample_ids
            images[step, part.slots] = part.images
    assert torch.equal(ids, torch.stack([batch.sample_ids for batch in whole]))
    assert torch.equal(images, torch.stack([batch.images for batch in whole]))
    assert len(ids.unique()) == steps * 24


def test_starting_at_a_step_is_going_on(shards: str) -> None:
    first = take(source(shards, micro=4), 30)
    again = take(source(shards, micro=4), 10, start=10)  # two micro-batches a step
    assert all(same(a, b) for a, b in zip(first[20:], again, strict=True))


def test_stopped_on_two_ranks_it_goes_on_with_one_and_with_three(shards: str) -> None:
    uninterrupted = [batch.sample_ids for batch in take(source(shards, batch=24), 9)]
    trace = []
    for ranks, start, stop in ((2, 0, 3), (1, 3, 4), (3, 4, 9)):
        parts = [
            take(source(shards, batch=24, rank=rank, ranks=ranks), stop - start, start) for rank in range(ranks)
        ]
        for step in zip(*parts, strict=True):
            ids = torch.empty(24, dtype=torch.int64)
            for part in step:
                ids[part.slots] = part.sample_ids
            trace.append(ids)
    assert torch.equal(torch.stack(trace), torch.stack(uninterrupted))


def test_epochs_differ_and_so_do_seeds(shards: str) -> None:
    made = source(shards, batch=34)
    first, second = take(made, 3), take(made, 3, start=3)
    flat = [torch.cat([b.sample_ids for b in batches]) for batches in (first, second)]
    assert not torch.equal(*flat)
    assert torch.equal(*(ids.sort().values for ids in flat))
    assert not torch.equal(take(source(shards, batch=34, seed=1), 1)[0].sample_ids, first[0].sample_ids)


def test_dropout_and_flips_follow_their_probabilities(shards: str) -> None:
    batches = take(source(shards, batch=100, drop_caption=0.3, drop_both=0.2, flip=0.5), 8)
    emptied = torch.cat([~b.mask.any(1) for b in batches]).float().mean()
    both = torch.cat([b.drop_clip for b in batches])
    assert 0.43 < emptied < 0.57
    assert 0.14 < both.float().mean() < 0.26
    assert all((~b.mask.any(1))[b.drop_clip].all() for b in batches)
    assert all(caption for b in batches for caption in b.captions)
    plain = take(source(shards, batch=100, flip=0), 8)
    flipped = [
        torch.equal(a, b.flip(1)) and not torch.equal(a, b)
        for one, two in zip(batches, plain, strict=True)
        for a, b in zip(one.images, two.images, strict=True)
    ]
    assert 0.43 < np.mean(flipped) < 0.57
    assert not any(b.drop_clip.any() for b in take(source(shards, drop_caption=0, drop_both=0), 5))


def test_the_built_in_shapes() -> None:
    batch = take(source("builtin:shapes", size=32, shapes_samples=100), 1)[0]
    assert all(caption.startswith(("a small", "a large")) for caption in batch.captions)
    held_out = take(source("builtin:shapes-heldout", size=32, shapes_samples=100), 1)[0]
    assert set(held_out.captions) != set(batch.captions)
    with pytest.raises(DataError, match="builtin:shapes-heldout"):
        source("builtin:shape")


def bad_samples() -> list[tuple[str, dict[str, bytes]]]:
    return [
        ("corrupt", sample(0) | {"jpg": b"\xff\xd8\xff rubbish"}),
        ("empty", sample(0) | {"txt": b" "}),
        ("pixel", sample(0) | {"jpg": encoded(np.zeros((1, 1, 3), np.uint8))}),
        ("lonely", {"txt": b"no image"}),
    ]


def test_bad_samples_keep_their_slot_and_are_counted(tmp_path: Path) -> None:
    good = [(f"{n:03d}", sample(n)) for n in range(36)]
    good.insert(7, ("latin", sample(99) | {"txt": "caf\xe9".encode("cp1252")}))
    path = str(write_tar(tmp_path / "x.tar", good[:20] + bad_samples() + good[20:]))
    made = source(path, batch=41)
    (batch,) = take(made, 1)
    report = made.report()
    causes = {"corrupt image": 1, "empty caption": 1, "image too small": 1, "no image": 1}
    assert {cause: min(count, 1) for cause, count in report["skipped"].items()} == causes
    assert report["read"] == 41 + report["replaced"]
    assert report["tolerated"]["caption not UTF-8"] >= 1
    assert "x.tar corrupt.jpg" in report["examples"]["corrupt image"][0]
    assert len(batch) == 41
    parts = [take(source(path, batch=41, micro=1, rank=r, ranks=41), 1)[0] for r in range(41)]
    assert [int(p.sample_ids) for p in parts] == batch.sample_ids.tolist()
    worked = source(path, batch=41, workers=2)
    assert same(take(worked, 1)[0], batch)
    assert worked.report() == report


@pytest.mark.parametrize("workers", [0, 1])
def test_all_bad_is_an_error_that_names_causes(tmp_path: Path, workers: int) -> None:
    path = write_tar(tmp_path / "x.tar", bad_samples() * 2)
    with pytest.raises(DataError, match=r"no usable sample.*corrupt image.*x\.tar") as caught:
        take(source(str(path), batch=8, workers=workers), 1)
    assert "Traceback" not in str(caught.value)


def test_max_bad_fraction_stops_the_run(tmp_path: Path) -> None:
    samples = [(f"{n}", sample(n) if n % 2 else {"txt": b"x"}) for n in range(40)]
    path = str(write_tar(tmp_path / "x.tar", samples))
    steps = ENOUGH_TO_JUDGE // 8 + 1
    assert len(take(source(path, max_bad_fraction=0.7), steps)) == steps
    with pytest.raises(DataError, match=r"data\.max_bad_fraction=0\.1"):
        take(source(path, max_bad_fraction=0.1), steps)


def test_padding_is_marked(shards: str) -> None:
    made = source(shards, batch=40, drop_last=False)
    ids = torch.cat([batch.sample_ids for batch in take(made, made.batches_per_epoch)])
    assert (ids < 0).sum() == 3 * 40 - 102
    assert sorted(ids[ids >= 0].tolist()) == list(range(102))
    assert torch.equal(-1 - ids[ids < 0], ids[:18])


def test_layouts_of_known_sets_side_by_side(tmp_path: Path) -> None:
    """img2dataset's three members, LAION's record alone, and COCO's annotations, of which one is drawn an epoch."""
    picture = sample(1)["jpg"]
    status = {"url": "u", "key": "000000000", "status": "success", "error_message": None, "exif": "{}"}
    img2dataset = json_bytes(caption="from img2dataset", width=48, height=40, similarity=0.3, **status)
    laion = json_bytes(URL="u", TEXT="from laion", WIDTH=300, HEIGHT=200, similarity=0.33, punsafe=0.01)
    coco = b'[{"id": 1, "caption": "one of coco"}, {"id": 2, "caption": "two of coco"}]'
    layouts = [
        {"jpg": picture, "json": img2dataset, "txt": b"from img2dataset"},
        {"jpg": picture, "json": laion},
        {"jpg": picture, "json": coco},
    ]
    path = str(write_tar(tmp_path / "x.tar", [(f"part/{n:09d}", layout) for n, layout in enumerate(layouts)]))
    epochs = [set(batch.captions) for batch in take(source(path, batch=3, drop_caption=0, drop_both=0), 12)]
    assert all(epoch > {"from img2dataset", "from laion"} for epoch in epochs)
    assert set().union(*epochs) - {"from img2dataset", "from laion"} == {"one of coco", "two of coco"}


def test_the_upsamplers_pair_comes_from_one_decode(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    monkeypatch.setattr(samples, "decode_at", lambda *words: decoded.append(words) or decode_at(*words))
    (batch,) = take(source(shards, batch=6, size=256, low_res=True, flip=0.5), 1)
    assert len(decoded) == 6
    assert (batch.images.shape, batch.low_res.shape) == ((6, 256, 256, 3), (6, 64, 64, 3))
    for large, small in zip(batch.images.numpy(), batch.low_res.numpy(), strict=True):
        wanted = np.asarray(Image.fromarray(large).resize((64, 64), Image.Resampling.LANCZOS))
        assert np.abs(small.astype(int) - wanted).max() <= 1


def test_clips_pictures_come_from_the_same_bytes_unmirrored_at_its_own_side(shards: str) -> None:
    """And are those that `prepare clip` and an image prompt make of the file."""
    plain = source(shards, batch=6, flip=1.0)
    seen = source(shards, batch=6, flip=1.0, clip=ClipConfig(source="image"), clip_side=24)
    (batch,), (before,) = take(seen, 1), take(plain, 1)
    assert same(replace(batch, images=before.images), before)
    assert batch.pictured is not None
    assert batch.pictured.all()
    for sample_id, picture in zip(batch.sample_ids.tolist(), batch.clip_images.numpy(), strict=True):
        jpeg = sample(sample_id)["jpg"]
        assert np.array_equal(picture, decode(jpeg, DecodeOptions(24)))
    assert (before.pictured, before.clip_images) == (None, None)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_share_of_the_samples_shows_its_picture_the_same_at_any_number_of_ranks(
    shards: str, workers: int
) -> None:
    given = {"clip": ClipConfig(source="both", image_share=0.3), "clip_side": 8, "workers": workers}
    whole = take(source(shards, batch=24, **given), 16)
    shown = torch.cat([batch.pictured for batch in whole])
    assert 0.2 < shown.float().mean() < 0.4
    assert all(len(batch.clip_images) == batch.pictured.sum() for batch in whole)
    parts = [take(source(shards, batch=24, ranks=2, rank=rank, **given), 16) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        by_slot = {}
        for part in (batch, parts[0][step], parts[1][step]):
            pictures = iter([] if part.clip_images is None else part.clip_images)
            for slot, is_shown in zip(part.slots.tolist(), part.pictured.tolist(), strict=True):
                by_slot.setdefault(slot, []).append(next(pictures) if is_shown else None)
        for one, other in by_slot.values():
            assert one is other is None or torch.equal(one, other)
    ids = torch.cat([batch.sample_ids for batch in whole]).tolist()
    again = {number: set() for number in ids}
    for number, is_shown in zip(ids, shown.tolist(), strict=True):
        again[number].add(is_shown)
    assert any(len(kinds) == 2 for kinds in again.values())  # drawn anew in each epoch


def test_layout_errors(shards: str) -> None:
    with pytest.raises(ConfigError, match="use 8"):
        source(shards, batch=10, micro=4, ranks=2)
    with pytest.raises(DataError, match=r"102 samples.*global batch of 200"):
        source(shards, batch=200)
    with pytest.raises(ConfigError, match=r"data\.drop_caption"):
        source(shards, drop_caption=0.6, drop_both=0.6)


def test_random_state_is_left_alone(shards: str) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    take(source(shards, workers=1), 1)
    assert torch.equal(torch.rand(3), expected)


def children() -> list[Any]:
    return psutil.Process().children(recursive=True)


def test_workers_end_with_the_iterator(shards: str) -> None:
    iterator = source(shards, workers=2).batches(0)
    next(iterator)
    started = children()
    assert len(started) >= 2
    begin = time.perf_counter()
    iterator.close()  # type: ignore[attr-defined]
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive
    assert time.perf_counter() - begin < 5


@pytest.mark.slow  # torch's worker looks for its parent every 5 s
def test_workers_die_with_their_parent(shards: str) -> None:
    code = f"""
import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
from data_kit import source
iterator = source({shards!r}, workers=2).batches(0)
next(iterator); print("ready", flush=True); sys.stdin.read()
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    workers = psutil.Process(parent.pid).children(recursive=True)
    assert len(workers) >= 2
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive
