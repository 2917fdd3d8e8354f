"""`prepare clip` embeds every shard once, on any number of processes, and resumes."""

from __future__ import annotations

import argparse
import io
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import COMMAND, Ranks, Warm

from glide_ds.commands import prepare_clip as prepare
from glide_ds.data.clip_store import ClipStore, Encoder
from glide_ds.data.pictures.decode import DecodeOptions, decode, image_member
from glide_ds.data.shapes import write_shards
from glide_ds.data.tars.shards import open_shards
from glide_ds.errors import DataError
from glide_ds.model.clip import FrozenClip


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
    store = ClipStore(tmp_path / "c", shards, Encoder("builtin:tiny", "builtin", source))
    members = [shards.read(n) for n in range(10)]
    encoder = FrozenClip("builtin:tiny", "builtin", source=source)
    if source == "text":
        wanted = encoder.encode_text([each["txt"].decode() for each in members])
    else:
        pictures = [decode(image_member(each), DecodeOptions(prepare.PICTURE_SIDE)) for each in members]
        wanted = encoder.encode_image(torch.from_numpy(np.stack(pictures)))
    assert np.abs(store.rows(np.arange(10)) - wanted.numpy()).max() < 1e-3
    assert np.ptp(wanted.numpy(), axis=0).max() > 0.1  # they differ, so that none stands for another
    assert np.allclose(np.linalg.norm(store.rows(np.arange(10)).astype(float), axis=1), 1, atol=1e-2)
    with pytest.raises(DataError, match="another --out"):
        prepare.run(arguments(*words, "--source", "image" if source == "text" else "text"))


def test_a_sample_without_caption_gets_zeros(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in (("a.txt", b"a small red circle"), ("b.txt", b" ")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    prepare.run(arguments(str(tmp_path / "x.tar"), "--out", str(tmp_path), "--model", "builtin:tiny"))
    (path,) = tmp_path.glob("*.npy")
    assert np.load(path).any(axis=1).tolist() == [True, False]


def contents(folder: Path) -> dict[str, bytes]:
    """Of a store, without what a killed process left of a file that it had not yet named."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.slow
def test_killed_at_any_instant_it_ends_byte_identical(warm: Warm, tmp_path: Path) -> None:
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
        assert contents(out) == whole


@pytest.mark.slow
def test_torchrun_gives_each_rank_its_share(root: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "s", 10, per_shard=2, size=16)
    command = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "glide_ds", "prepare", "clip", str(tmp_path / "s"), "--model", "builtin:tiny"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "c")], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rank 0: 3 shards to embed, 0 are done" in done.stdout
    assert "rank 1: 2 shards to embed, 0 are done" in done.stdout
    prepare.run(arguments(str(tmp_path / "s"), "--out", str(tmp_path / "one"), "--model", "builtin:tiny"))
    assert contents(tmp_path / "c") == contents(tmp_path / "one")
