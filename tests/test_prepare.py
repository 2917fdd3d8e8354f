"""`prepare clip` embeds every shard once, on any number of processes, and resumes."""

from __future__ import annotations

import argparse
import io
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from data.data_kit import encoded, photo, source, write_tar
from PIL import Image
from ranks import COMMAND, Ranks, Warm

from glide_ds.commands import prepare_clip as prepare
from glide_ds.config import ClipConfig
from glide_ds.data import clip_inputs, shapes
from glide_ds.data.clip_notes import Encoder
from glide_ds.data.clip_store import ClipStore, picture_hash, text_hash
from glide_ds.data.pictures.decode import DecodeOptions, decode, image_member
from glide_ds.data.shapes import write_shards
from glide_ds.data.tars.shards import open_shards
from glide_ds.errors import DataError
from glide_ds.model.clip import FrozenClip, weights_hash


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    prepare.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("source", ["text", "image"])
def test_embeddings_are_the_encoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    write_shards(tmp_path / "s", 10, per_shard=4, size=32)
    words = [str(tmp_path / "s"), "--out", str(tmp_path / "c"), "--model", "builtin:tiny"]
    words += ["--weights", "builtin", "--source", source, "--batch", "3"]
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        prepare.run(arguments(*words))
    before = {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()}
    prepare.run(arguments(*words))
    assert {p.name: p.read_bytes() for p in (tmp_path / "c").iterdir()} == before
    shards = open_shards(str(tmp_path / "s"))
    cropping = (None, None) if source == "text" else ("center", True)
    store = ClipStore(tmp_path / "c", shards, Encoder("builtin:tiny", "builtin", source, *cropping))
    members = [shards.read(n) for n in range(10)]
    encoder = FrozenClip("builtin:tiny", "builtin", source=source)
    if source == "text":
        wanted = encoder.encode_text([each["txt"].decode() for each in members])
    else:
        pictures = [decode(image_member(each), DecodeOptions(32)) for each in members]
        wanted = encoder.encode_image(torch.from_numpy(np.stack(pictures)))
    hashes = [
        text_hash(each["txt"].decode()) if source == "text" else picture_hash(image_member(each))
        for each in members
    ]
    rows = store.rows(np.arange(10), hashes)
    assert np.abs(rows - wanted.numpy()).max() < 1e-3
    assert np.ptp(wanted.numpy(), axis=0).max() > 0.1  # they differ, so that none stands for another
    assert np.allclose(np.linalg.norm(rows.astype(float), axis=1), 1, atol=1e-2)
    with pytest.raises(DataError, match="another --out"):
        prepare.run(arguments(*words, "--weights", "other"))


def test_store_training_and_validation_embed_a_picture_alike(tmp_path: Path) -> None:
    """Whatever its format and border, and the side that is trained on: to 1e-3 of the cosine, in float16."""
    frame = ((9, 9), (40, 40), (0, 0))
    big = np.asarray(Image.fromarray(shapes.draw(5, 96)[0]).resize((300, 200)))
    layer = np.dstack([shapes.draw(6, 64)[0], np.full((64, 64), 128, np.uint8)])
    pictures = [
        {"png": encoded(shapes.draw(1, 64)[0])},
        {"jpg": encoded(big, "JPEG", quality=85)},
        {"jpg": encoded(np.pad(big, frame), "JPEG", quality=95)},
        {"png": encoded(np.pad(shapes.draw(3, 64)[0], frame, constant_values=255))},
        {"webp": encoded(shapes.draw(4, 80)[0], "WEBP", quality=90)},
        {"png": encoded(layer)},
    ]
    tar = write_tar(
        tmp_path / "x.tar", [(f"{i}", {**m, "txt": f"t {i}".encode()}) for i, m in enumerate(pictures)]
    )
    clip, weights = FrozenClip("builtin:tiny"), weights_hash("builtin:tiny", "openai")
    for number, (crop, trim) in enumerate(product(("center", "pad"), (True, False))):
        folder = tmp_path / f"clip-{number}"
        words = [str(tar), "--out", str(folder), "--model", "builtin:tiny", "--source", "both", "--crop", crop]
        prepare.run(arguments(*words, *([] if trim else ["--no_trim"])))
        data = {"crop": crop, "trim": trim, "drop_both": 0.0, "shuffle": False, "batch": 6}
        for side, kind in ((16, "image"), (64, "image"), (32, "both")):
            config = ClipConfig(model="builtin:tiny", source=kind)
            stored = source(str(tar), size=side, clip=config, clip_store=str(folder), **data)
            stored.clip.of_weights(weights)
            kept, trained = stored.one(0), source(str(tar), size=side, clip=config, clip_side=32, **data).one(0)
            assert torch.equal(kept.pictured, trained.pictured)
            assert kept.clip_images is None
            cosine = torch.cosine_similarity(kept.clip.float(), clip.embed(trained))
            assert (cosine > 1 - 1e-3).all(), (side, kind, crop, trim, cosine)
            others = torch.cosine_similarity(kept.clip.float(), clip.embed(trained).roll(1, 0))
            assert others.min() < 0.9


def test_a_sample_without_caption_gets_zeros(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in (("a.txt", b"a small red circle"), ("b.txt", b" ")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    prepare.run(arguments(str(tmp_path / "x.tar"), "--out", str(tmp_path), "--model", "builtin:tiny"))
    (path,) = tmp_path.glob("*.npy")
    assert np.load(path).any(axis=1).tolist() == [True, False]


class Counted(FrozenClip):
    """An encoder that says what it is given."""

    given: ClassVar[list[str]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        tokenize = self.tokenize

        def told(captions: list[str]) -> torch.Tensor:
            self.given.extend(captions)
            return tokenize(captions)

        self.tokenize = told


def checked_rows(store: Path, shards: Path, captions: Sequence[str]) -> None:
    """The store gives these captions' embeddings."""
    opened = ClipStore(store, open_shards(str(shards)), Encoder("builtin:tiny", "builtin", "text"))
    rows = opened.rows(np.arange(len(captions)), [text_hash(caption) for caption in captions])
    wanted = FrozenClip("builtin:tiny", "builtin").encode_text(captions)
    assert np.abs(rows - wanted.numpy()).max() < 1e-3


def write_captions(folder: Path, captions: Sequence[str], per_shard: int = 4) -> None:
    """Shards of one picture with many captions, as `prepare pack` would name them: alike for every set."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    picture = encoded(photo(0))
    for n in range(0, len(captions), per_shard):
        part = [
            (f"{i:04d}", {"png": picture, "txt": text.encode()})
            for i, text in enumerate(captions[n : n + per_shard])
        ]
        write_tar(folder / f"{n // per_shard:03d}.tar", part)


TINY = ("--model", "builtin:tiny", "--weights", "builtin")


def test_only_what_changed_is_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare, "FrozenClip", Counted)

    def embed(*captions: str, per_shard: int = 4, words: Sequence[str] = ()) -> list[str]:
        Counted.given.clear()
        write_captions(tmp_path / "s", captions, per_shard)
        prepare.run(
            arguments(str(tmp_path / "s"), "--out", str(tmp_path / "c"), *TINY, *words, "--workers", "0")
        )
        checked_rows(tmp_path / "c", tmp_path / "s", captions)
        return list(Counted.given)

    colours = ["red", "blue", "green", "white", "black", "brown", "grey", "pink", "gold"]
    assert embed(*colours) == colours
    assert embed(*colours) == []
    assert "0 embeddings computed, 9 kept" in capsys.readouterr().out
    assert embed(*colours[:2], "lime!", *colours[3:]) == ["lime!"]  # as long as what it was
    assert embed(*colours[:2], "a longer one", *colours[3:]) == ["a longer one"]
    assert embed("first", *colours) == ["first"]  # all others move
    assert embed(*colours, per_shard=3) == []
    assert embed(*colours[3:], per_shard=2) == []
    assert embed(*colours, words=["--force"]) == colours


@pytest.mark.parametrize("source", ["text", "image"])
def test_batches_run_over_shards_and_workers_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], source: str
) -> None:
    write_shards(tmp_path / "s", 23, per_shard=3, size=32)
    sizes: list[tuple[int, ...]] = []

    def told(self: Any, inputs: torch.Tensor) -> torch.Tensor:
        sizes.append(tuple(inputs.shape[:2]))
        return encode(self, inputs)

    name = "encode_tokens" if source == "text" else "encode_image"
    encode = getattr(FrozenClip, name)
    monkeypatch.setattr(FrozenClip, name, told)
    for workers in ("0", "2"):
        words = [
            str(tmp_path / "s"),
            "--out",
            str(tmp_path / workers),
            *TINY,
            "--source",
            source,
            "--batch",
            "5",
        ]
        prepare.run(arguments(*words, "--workers", workers))
    assert [count for count, _ in sizes] == 2 * [5, 5, 5, 5, 3]
    if source == "text":  # no batch is longer than its longest caption
        assert sizes[0][1] < sizes[4][1] <= 16
    assert contents(tmp_path / "0") == contents(tmp_path / "2")
    assert "23 embeddings computed, 0 kept that were there, 0 samples have none" in capsys.readouterr().out


def test_a_picture_that_is_known_is_not_decoded_and_one_that_breaks_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [(f"{n}", {"png": encoded(photo(n))}) for n in range(4)]
    write_tar(tmp_path / "x.tar", members)
    words = [
        str(tmp_path / "x.tar"),
        "--out",
        str(tmp_path / "c"),
        *TINY,
        "--source",
        "image",
        "--workers",
        "0",
    ]
    prepare.run(arguments(*words))
    half = encoded(photo(9))
    write_tar(tmp_path / "x.tar", [*members, ("4", {"png": half[: len(half) // 2]}), ("5", {"png": half})])
    read: list[bytes] = []
    monkeypatch.setattr(
        clip_inputs, "decode", lambda data, options: (read.append(data), decode(data, options))[1]
    )
    (tmp_path / "x.tar.index").unlink()
    prepare.run(arguments(*words))
    assert len(read) == 2
    assert "1 embeddings computed, 4 kept that were there, 1 samples have none" in capsys.readouterr().out


def test_bf16_says_what_it_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_shards(tmp_path / "s", 6, per_shard=3, size=16)
    rows = {}
    for precision in ("fp32", "bf16"):
        words = [str(tmp_path / "s"), "--out", str(tmp_path / precision), *TINY, "--precision", precision]
        prepare.run(arguments(*words, "--workers", "0"))
        said = capsys.readouterr().out
        assert ("bf16 changes the cosine of these embeddings by up to" in said) == (precision == "bf16")
        rows[precision] = np.concatenate(
            [np.load(path) for path in sorted((tmp_path / precision).glob("*.npy"))]
        )
    assert not np.array_equal(rows["fp32"], rows["bf16"])
    assert np.abs(rows["fp32"].astype(float) - rows["bf16"]).max() < 0.02


def test_two_sets_in_one_store(tmp_path: Path) -> None:
    sets = {name: [f"{name} {n}" for n in range(6)] for name in "ab"}
    for name, captions in sets.items():
        write_captions(tmp_path / name, captions)
        prepare.run(arguments(str(tmp_path / name), "--out", str(tmp_path / "c"), *TINY))
    for name, captions in sets.items():
        checked_rows(tmp_path / "c", tmp_path / name, captions)


def contents(folder: Path) -> dict[str, bytes]:
    """Of a store, without what a killed process left of a file that it had not yet named."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def assert_same_store(one: dict[str, bytes], other: dict[str, bytes]) -> None:
    """Byte for byte but for how embeddings are rounded, which follows what was computed beside them."""
    assert one.keys() == other.keys()
    for name, data in one.items():
        if not name.endswith(".npy"):
            assert data == other[name]
            continue
        rows = [np.load(io.BytesIO(each)) for each in (data, other[name])]
        np.testing.assert_allclose(*rows, rtol=2e-3, atol=1e-4)
        assert data[-8 * len(rows[0]) :] == other[name][-8 * len(rows[1]) :]  # of what is embedded


@pytest.mark.slow
def test_killed_at_any_instant_it_ends_with_the_same_store(warm: Warm, tmp_path: Path) -> None:
    write_shards(tmp_path / "s", 320, per_shard=20, size=16)
    ranks, dice = Ranks(warm, tmp_path / "log"), random.Random(0)

    def begin(out: Path) -> None:
        words = [str(tmp_path / "s"), "--out", str(out), "--model", "builtin:tiny", "--weights", "builtin"]
        ranks.start(2, COMMAND, ["prepare", "clip", *words, "--batch", "7"])

    def arrays(out: Path) -> int:
        return len(list(out.glob("*.npy")))

    begin(tmp_path / "whole")
    assert ranks.wait() == [0, 0], ranks.said()
    whole = contents(tmp_path / "whole")
    assert len(whole) == 2 * 16
    for moment in (1, 2, 8):
        out = tmp_path / str(moment)
        begin(out)
        ranks.until(lambda moment=moment, out=out: arrays(out) >= moment, every_s=0.0005)
        time.sleep(dice.uniform(0, 0.01))
        ranks.kill()
        assert -signal.SIGKILL in ranks.wait(), "all was done before the kill"
        assert moment <= arrays(out) < 16
        begin(out)
        assert ranks.wait() == [0, 0], ranks.said()
        assert_same_store(contents(out), whole)


@pytest.mark.slow
def test_torchrun_gives_each_rank_its_share(root: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "s", 10, per_shard=2, size=16)
    command = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "glide_ds", "prepare", "clip", str(tmp_path / "s"), "--model", "builtin:tiny"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "c")], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rank 0: 3 shards to embed by text, 0 are done" in done.stdout
    assert "rank 1: 2 shards to embed by text, 0 are done" in done.stdout
    prepare.run(arguments(str(tmp_path / "s"), "--out", str(tmp_path / "one"), "--model", "builtin:tiny"))
    assert_same_store(contents(tmp_path / "c"), contents(tmp_path / "one"))


@pytest.mark.parametrize(("seconds", "kept"), [((9, 1, 2), 1), ((9, 2, 1), 3)])
def test_the_encoder_keeps_the_threads_that_are_faster_beside_its_workers(
    monkeypatch: pytest.MonkeyPatch, seconds: tuple[int, ...], kept: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    clock = iter(tick for last in seconds for tick in (0.0, float(last)))
    monkeypatch.setattr(prepare, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    used: list[int] = []

    def encode(inputs: torch.Tensor) -> torch.Tensor:
        used.append(torch.get_num_threads())
        return inputs

    try:
        threads = prepare.Threads(workers=2)
        for _ in range(5):
            threads.run(encode, torch.zeros(4, 2))
        assert used == [1, 1, 3, kept, kept]
        threads.give_back()
        assert torch.get_num_threads() == 3
        alone = prepare.Threads(workers=0)
        alone.run(encode, torch.zeros(4, 2))
        assert used[-1] == 3
    finally:
        torch.set_num_threads(before)
