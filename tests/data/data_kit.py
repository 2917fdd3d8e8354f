"""Tar shards and images for the data tests, made where they are needed."""

from __future__ import annotations

import io
import json
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from glide_ds.config import ClipConfig, DataConfig
from glide_ds.data import Source, build_source


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def photo(seed: int, height: int = 48, width: int = 40) -> np.ndarray:
    """A smooth random picture without borders: uint8 [height, width, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def sample(number: int, **extra: bytes) -> dict[str, bytes]:
    return {"jpg": encoded(photo(number), "JPEG", quality=90), "txt": f"photo {number}".encode(), **extra}


def write_tar(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, sizes: Iterable[int]) -> str:
    """Shards of photos, `sizes[i]` in shard i, captioned "photo NUMBER" in order. Returns their pattern."""
    number = 0
    count = 0
    for count, size in enumerate(sizes):
        members = [(f"{n:06d}", sample(n)) for n in range(number, number + size)]
        write_tar(folder / f"s-{count:03d}.tar", members)
        number += size
    return f"{folder}/s-{{000..{count:03d}}}.tar"


def json_bytes(**record: Any) -> bytes:
    return json.dumps(record).encode()


def source(
    shards: str,
    *,
    batch: int = 8,
    micro: int | None = None,
    rank: int = 0,
    ranks: int = 1,
    seed: int = 0,
    size: int = 16,
    low_res: bool = False,
    masked: bool = False,
    clip: ClipConfig | None = None,
    clip_side: int | None = None,
    **data: Any,
) -> Source:
    data = {"workers": 0, **data}
    return build_source(
        DataConfig.of({"shards": shards, **data}, "data"),
        image_size=size,
        context_length=12,
        global_batch=batch,
        micro_batch=micro or batch // ranks,
        rank=rank,
        world_size=ranks,
        seed=seed,
        low_res=low_res,
        masked=masked,
        clip=clip,
        clip_side=clip_side,
    )


def kill_while_writing(code: str, words: list[str], folder: Path, files: str, moments: Iterable[int]) -> None:
    """Run Python code again and again, killed just after `folder` holds so many files of that pattern."""
    dice = random.Random(0)
    for moment in moments:
        process = psutil.Popen([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL)
        # The kill before may have come after this moment's files: then it is the first worker that is waited for.
        while len(list(folder.glob(files))) < moment or not (workers := process.children(recursive=True)):
            assert process.poll() is None, "it ended before it was to be killed"
            time.sleep(0.0005)
        time.sleep(dice.uniform(0, 0.01))
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it had ended"
        _, left = psutil.wait_procs(workers, timeout=5)
        assert not left, "its workers outlive it"


def take(source: Source, batches: int, start: int = 0) -> list[Any]:
    iterator = source.batches(start)
    return [next(iterator) for _ in range(batches)]
