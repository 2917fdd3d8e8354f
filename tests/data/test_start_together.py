"""Three ranks open a set together over gloo: each looks at its part, and all know the same or raise the same."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from data_kit import write_shards
from ranks import Ranks as Processes
from ranks import Warm
from test_remote import local, s3  # noqa: F401 - fixtures

from glide_ds.data.tars.shards import open_shards
from glide_ds.data.tars.storage import Storage
from glide_ds.errors import GlideError
from glide_ds.training.faults.ranks import Ranks, agreed

pytestmark = pytest.mark.slow  # three processes
RANKS = 3


def open_on_a_rank(out: str, patterns: list[Any]) -> int:
    """Open one set after the other; what became of each, and how many files were asked for and read."""
    dist.init_process_group("gloo")
    rank, told = dist.get_rank(), []
    for pattern in patterns:
        asked: Counter[str] = Counter()
        stat, read_all = Storage.stat, Storage.read_all

        def counted_stat(storage: Storage, url: str, asked: Any = asked, stat: Any = stat) -> Any:
            asked["stat"] += 1
            return stat(storage, url)

        def counted_read(storage: Storage, url: str, asked: Any = asked, read_all: Any = read_all) -> Any:
            data = read_all(storage, url)
            asked[Path(url).suffix] += 1
            return data

        Storage.stat, Storage.read_all = counted_stat, counted_read  # type: ignore[method-assign]
        own = pattern[rank] if isinstance(pattern, list) else pattern
        try:
            shards = agreed(lambda own=own: open_shards(own, peers=Ranks()))  # type: ignore[misc]
            told.append({"fingerprint": shards.fingerprint, "samples": len(shards), **asked})
        except GlideError as error:
            told.append({"error": str(error)})
        Storage.stat, Storage.read_all = stat, read_all  # type: ignore[method-assign]
    Path(f"{out}-{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()
    return 0


def opened(warm: Warm, folder: Path, patterns: list[Any]) -> list[list[dict[str, Any]]]:
    """By set, what each rank tells."""
    processes = Processes(warm, folder / "logs")
    processes.start(RANKS, "test_start_together:open_on_a_rank", str(folder / "told"), patterns)
    try:
        assert processes.wait(120) == [0] * RANKS, processes.said()
    finally:
        processes.kill()
    ranks = [json.loads((folder / f"told-{rank}.json").read_text()) for rank in range(RANKS)]
    return [list(told) for told in zip(*ranks, strict=True)]


def test_each_looks_at_its_part_and_all_know_the_same(warm_process: Warm, tmp_path: Path) -> None:
    for name in ("s", "other", "changed"):
        (tmp_path / name).mkdir()
    pattern = write_shards(tmp_path / "s", [3] * 10)
    other = write_shards(tmp_path / "other", [3] * 9)
    changed = write_shards(tmp_path / "changed", [2] * 6)
    open_shards(changed)
    os.truncate(tmp_path / "changed" / "s-005.tar", 2048)  # in the last rank's part
    sets = [pattern, pattern, [pattern, other, pattern], changed, pattern]
    first, second, differing, broken, again = opened(warm_process, tmp_path, sets)
    alone = open_shards(pattern)
    for told in (first, second, again):
        assert [(each["fingerprint"], each["samples"]) for each in told] == [(alone.fingerprint, 30)] * RANKS
        assert [each["stat"] for each in told] == [3, 3, 4]
    assert len(list((tmp_path / "s").glob("*.catalog"))) == 1
    assert [each.get(".catalog", 0) for each in second] == [1, 0, 0]  # the first reads it for all
    assert not any(".index" in each for each in second)
    assert all("rank 1 finds other shards" in each["error"] for each in differing)
    assert all("s-005.tar has 2048 bytes" in each["error"] for each in broken)


def test_a_listing_serves_all_ranks(
    warm_process: Warm,
    s3: list[tuple[str, str]],  # noqa: F811
    tmp_path: Path,
) -> None:
    import s3fs

    bucket = s3fs.S3FileSystem(skip_instance_cache=True)
    data = bucket.cat_file("laion/s-000.tar")
    for number in range(40):
        bucket.pipe_file(f"laion/many/{number:03d}.tar", data)
    pattern = "s3://laion/many/{000..039}.tar"
    alone = open_shards(pattern)
    s3.clear()
    warm = Warm(tmp_path / "warm.log")  # which knows where the store is
    try:
        (told,) = opened(warm, tmp_path, [pattern])
    finally:
        warm.close()
    assert [each["fingerprint"] for each in told] == [alone.fingerprint] * RANKS
    assert [method for method, _ in s3] == ["GET"]
    bucket.pipe_file("laion/many/007.tar", bucket.cat_file("laion/s-001.tar"))
    with pytest.raises(GlideError, match=r"007\.tar has \d+ bytes, its index was made for"):
        open_shards(pattern)
    bucket.rm_file("laion/many/007.tar")
    with pytest.raises(GlideError, match=r"007\.tar can't be opened"):
        open_shards(pattern)
