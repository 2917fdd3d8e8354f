"""An epoch over HTTP with failing requests, or over S3, is the local epoch; a cached one makes no request."""

from __future__ import annotations

import errno
import random
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from data_kit import source, take, write_shards

from glide_ds.data import Source
from glide_ds.data.tars import storage as storage_module
from glide_ds.data.tars.shards import expand
from glide_ds.data.tars.storage import CacheOptions, DiskCache, Stat, Storage
from glide_ds.errors import ConfigError, DataError, SurroundingsError

pytest.importorskip("aiohttp", reason="reading HTTP shards needs aiohttp")


class FlakyServer(ThreadingHTTPServer):
    """Serves a folder by ranges; `fail` is the fraction of requests that fail, by error, cut or rubbish length."""

    def __init__(self, folder: Path, fail: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.fail = folder, fail
        self.random = random.Random(0)
        self.requests: list[str] = []
        self.failed = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: FlakyServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or the body waits 40 ms for the head to be acknowledged

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        server = self.server
        server.requests.append(self.path)
        path = server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        fails = server.random.random() < server.fail
        server.failed += fails
        if fails and server.random.random() < 0.5:
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data = path.read_bytes()
        total, first = len(data), 0
        if wanted := self.headers.get("Range"):
            first, last = (int(n) if n else total - 1 for n in wanted.removeprefix("bytes=").split("-"))
            data = data[first : last + 1]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{total}"')
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{total}")
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if fails else data)
            if fails:
                self.close_connection = True


@pytest.fixture
def local(tmp_path: Path) -> str:
    (tmp_path / "shards").mkdir()
    return write_shards(tmp_path / "shards", [20, 15, 13])


@pytest.fixture
def server(local: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyServer]:
    monkeypatch.setattr(storage_module, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(storage_module, "BLOCK_BYTES", 4096)
    monkeypatch.setenv("GLIDE_DS_CACHE", str(tmp_path / "user-cache"))
    server = FlakyServer(Path(local).parent)
    # Every so often it looks whether it shall end: half a second, if not told otherwise.
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def epoch(shards: str, steps: int = 6, **data: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    made = source(shards, **data)
    batches = take(made, steps)
    ids = torch.cat([b.sample_ids for b in batches])
    return ids, torch.cat([b.images for b in batches]), made.report()


@pytest.mark.parametrize(("workers", "fail"), [(0, 0.2), pytest.param(2, 0.05, marks=pytest.mark.slow)])
def test_a_flaky_server_gives_the_local_epoch(
    local: str, server: FlakyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, fail: float
) -> None:
    if workers:
        monkeypatch.setattr(storage_module, "BLOCK_BYTES", 512)
    ids, images, _ = epoch(local, index_dir=str(tmp_path / "a"))
    server.fail = fail
    remote = f"{server.url}/s-{{000..002}}.tar"
    far_ids, far_images, report = epoch(remote, index_dir=str(tmp_path / "b"), workers=workers)
    assert server.failed > 0
    assert torch.equal(ids, far_ids)
    assert torch.equal(images, far_images)
    assert report["replaced"] == 0


def test_the_second_cached_epoch_makes_no_request(local: str, server: FlakyServer, tmp_path: Path) -> None:
    cached = {"index_dir": str(tmp_path / "i"), "cache_dir": str(tmp_path / "cache")}
    made = source(f"{server.url}/s-{{000..002}}.tar", **cached)
    first = take(made, 6)
    before = len(server.requests)
    again = take(made, 6)
    assert len(server.requests) == before
    assert torch.equal(first[0].images, again[0].images)
    # A new process asks only whether the shards are the same.
    take(source(f"{server.url}/s-{{000..002}}.tar", **cached), 6)
    assert len(server.requests) - before <= 2 * 3


def test_indexes_beside_remote_shards_are_used(
    local: str, server: FlakyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glide_ds.data.tars.index import scan_shard

    monkeypatch.setenv("GLIDE_DS_CACHE", str(tmp_path / "cache"))
    for url in expand(f"{server.url}/s-{{000..002}}.tar"):
        name = url.rsplit("/", 1)[1]
        (server.folder / f"{name}.index").write_bytes(scan_shard(url).to_bytes())
    server.requests.clear()
    source(f"{server.url}/s-{{000..002}}.tar")
    assert sum(path.endswith(".index") for path in server.requests) >= 3
    assert sum(path.endswith(".tar") for path in server.requests) <= 2 * 3  # size and ETag only


def test_missing_and_unknown_urls_are_named(server: FlakyServer) -> None:
    with pytest.raises(DataError, match=r"nothing\.tar can't be opened"):
        source(f"{server.url}/nothing.tar")
    with pytest.raises(DataError, match=r"warp://x\.tar can't be read.*install"):
        source("warp://x.tar")


def test_a_dead_server_ends_in_an_error(server: FlakyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.fail = 1.0
    monkeypatch.setattr(storage_module, "ATTEMPTS", 3)
    with pytest.raises(OSError, match="3 attempts failed"):
        Storage().open(f"{server.url}/s-000.tar", Stat(1000, "v")).read(0, 10)


def indexed_only(server: FlakyServer, folder: Path, **options: Any) -> Source:
    """A source whose shards have indexes, and none of whose blocks is in the cache."""
    pattern = f"{server.url}/s-{{000..002}}.tar"
    source(pattern, index_dir=str(folder / "i"), cache_dir=str(folder / "other"))
    return source(pattern, index_dir=str(folder / "i"), cache_dir=str(folder / "c"), **options)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_that_dies_under_way_is_no_bad_sample(
    server: FlakyServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, workers: int
) -> None:
    monkeypatch.setattr(storage_module, "ATTEMPTS", 2)
    made = indexed_only(server, tmp_path, workers=workers)
    server.fail = 1.0
    with pytest.raises(SurroundingsError, match=r"2 attempts failed.*start the same command again") as caught:
        take(made, 6)
    assert caught.value.exit_code == 75
    assert made.report()["skipped"] == {}


def test_a_cache_that_cannot_be_written_is_told_at_the_start(server: FlakyServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data\.cache_dir: .*file can't be written.*choose another"):
        source(f"{server.url}/s-{{000..002}}.tar", cache_dir=str(tmp_path / "file"))


def test_a_cache_that_fills_up_under_way_is_no_bad_sample(
    server: FlakyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = indexed_only(server, tmp_path)

    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SurroundingsError, match=r"data\.cache_dir.*takes no block: No space left on device"):
        take(made, 6)
    assert made.report()["skipped"] == {}


def test_the_cache_is_bounded_and_keyed_by_version(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10_000)
    for number in range(100):
        cache.put(("u", "v1", number), bytes(1000))
    cache._evict()
    assert sum(p.stat().st_size for p in tmp_path.glob("*/*")) <= 10_000
    assert cache.read(("u", "v1", 99), 1000, slice(10, 30)) == bytes(20)
    assert cache.read(("u", "v1", 99), 999, slice(10, 30)) is None  # cut by a power cut
    assert cache.read(("u", "v2", 99), 1000, slice(10, 30)) is None
    assert not list(tmp_path.glob("*/.*"))


def test_blocks_serve_ranges_across_their_edges(server: FlakyServer, tmp_path: Path) -> None:
    data = (server.folder / "s-000.tar").read_bytes()
    far = Storage(CacheOptions(str(tmp_path / "c"))).open(f"{server.url}/s-000.tar")
    for offset, size in ((0, 10), (8190, 5), (100, 20_000), (len(data) - 7, 7)):
        assert far.read(offset, size) == data[offset : offset + size]
    with pytest.raises(EOFError):
        far.read(len(data) - 3, 10)


@pytest.fixture
def s3(
    local: str, s3_server: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[list[tuple[str, str]]]:
    """s3://laion with the local shards; (method, path) of every request that reaches it since."""
    import s3fs

    monkeypatch.setenv("GLIDE_DS_CACHE", str(tmp_path / "user-cache"))
    bucket = s3fs.S3FileSystem(skip_instance_cache=True)
    bucket.mkdir("laion")
    for path in expand(local):
        bucket.pipe_file(f"laion/{Path(path).name}", Path(path).read_bytes())
    s3_server.clear()
    yield s3_server
    bucket.rm("laion", recursive=True)  # moto keeps its state for the whole process


@pytest.mark.slow
def test_s3_gives_the_local_epoch(local: str, s3: list[tuple[str, str]], tmp_path: Path) -> None:
    ids, images, _ = epoch(local, index_dir=str(tmp_path / "a"))
    far = epoch("s3://laion/s-{000..002}.tar", index_dir=str(tmp_path / "b"), workers=2)
    assert s3
    assert torch.equal(ids, far[0])
    assert torch.equal(images, far[1])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_second_cached_epoch_over_s3_makes_no_request(
    s3: list[tuple[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(storage_module, "BLOCK_BYTES", 1024)  # the scan leaves some for the epoch
    monkeypatch.setattr(storage_module, "BLOCKS_IN_MEMORY", 1)  # what serves the epoch again is the disk
    shards, cached = "s3://laion/s-{000..002}.tar", {"cache_dir": str(tmp_path / "cache"), "workers": workers}
    made = source(shards, **cached)
    steps = made.batches_per_epoch
    s3.clear()
    first = take(made, steps)
    assert {("GET", f"/laion/s-{n:03d}.tar") for n in range(3)} <= set(s3)
    s3.clear()
    again = take(made, steps)
    assert s3 == []
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one.sample_ids, other.sample_ids)
        assert torch.equal(one.images, other.images)
    # A new process asks for size and ETag, once per shard, and for none of a shard's bytes.
    fresh = source(shards, **cached)
    assert Counter(s3) == {("HEAD", f"/laion/s-{n:03d}.tar"): 1 for n in range(3)}
    s3.clear()
    take(fresh, 2 * steps)  # its second half is an epoch in another order
    assert s3 == []
