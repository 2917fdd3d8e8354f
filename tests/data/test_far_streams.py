"""Gzip shards of web servers and of Hugging Face's hub, which a stream reads once, from beginning to end."""

from __future__ import annotations

import gzip
import json
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote

import pytest
from data_kit import sample, source, write_tar

from glide_ds.data import Source
from glide_ds.data.tars import storage as storage_module
from glide_ds.errors import DataError, SurroundingsError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Server(ThreadingHTTPServer):
    """A folder without ranges, as a hub's repository me/set too. `fails` and `cuts`: GETs of files, one by one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.fails, self.cuts = folder, 0, 0
        self.requests = Counter[str]()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path)
        if path.startswith("/api/"):
            about = {"id": "me/set", "sha": COMMIT}
            self.say(200 if "/me/set" in path else 404, json.dumps(about).encode(), "application/json")
            return
        file = self.server.folder / path.rpartition("/")[2]
        self.server.requests[f"{self.command} {file.name}"] += 1
        if self.server.fails and self.command == "GET":
            self.server.fails -= 1
            self.say(503, b"")
        elif not file.is_file():
            self.say(404, b"")
        else:
            self.say(200, file.read_bytes())

    def do_POST(self) -> None:
        """What the hub is asked of a file by name, so that it need not list the folder."""
        asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["paths"]
        files = [self.server.folder / name for name in asked]
        found = [
            {"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0"} for f in files if f.exists()
        ]
        self.say(200, json.dumps(found).encode(), "application/json")

    def say(self, status: int, body: bytes, kind: str = "application/octet-stream") -> None:
        cut = status == 200 and kind != "application/json" and self.server.cuts > 0
        self.server.cuts -= cut
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", kind)
        self.send_header("ETag", f'"{len(body)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if status == 404:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        self.close_connection = cut


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(storage_module, "FIRST_WAIT", 0.001)
    for shard in range(3):
        tar = write_tar(tmp_path / "t", [(f"{n:03d}", sample(n)) for n in range(6 * shard, 6 * shard + 6)])
        (tmp_path / f"s-{shard}.tar.gz").write_bytes(gzip.compress(tar.read_bytes(), 1))
    server = Server(tmp_path)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(params=["http", "hf"])
def shards(request: pytest.FixtureRequest, server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The pattern of the server's shards, without their numbers' braces filled in."""
    if request.param == "http":
        pytest.importorskip("aiohttp", reason="reading over HTTP needs aiohttp")
        return f"{server.url}/s-{{0..2}}.tar.gz"
    constants = pytest.importorskip("huggingface_hub.constants", reason="hf:// is read by huggingface_hub")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    return "hf://datasets/me/set/s-{0..2}.tar.gz"


def streamed(shards: str, **options: Any) -> Source:
    return source(shards, batch=6, reader="stream", shuffle_buffer=4, **options)


def epoch(made: Source) -> list[str]:
    found: list[str] = []
    for batch in made.batches(0):
        assert made.began
        if made.began[0] == 1:
            break
        found += batch.captions
    return found


def test_an_epoch_reads_each_shard_once(server: Server, shards: str) -> None:
    if shards.startswith("http"):  # what fails is asked for again; the hub's client does so too, seconds later
        server.fails = 2
    made = streamed(shards)
    batches = made.batches(0)
    read = [caption for _ in range(3) for caption in next(batches).captions]
    assert sorted(read) == sorted(f"photo {n}" for n in range(18))
    assert sum(
        count for what, count in server.requests.items() if what.startswith("GET")
    ) == 3 + 2 * shards.startswith("http")
    assert server.fails == 0


def test_a_connection_that_breaks_is_no_damage(server: Server, shards: str) -> None:
    server.cuts = 50
    with pytest.raises(SurroundingsError, match=r"s-\d\.tar\.gz can't be read"):
        epoch(streamed(shards, damaged_shards="salvage"))


def test_a_shard_that_is_not_there_is_named(server: Server, shards: str) -> None:
    (server.folder / "s-1.tar.gz").unlink()
    with pytest.raises(SurroundingsError, match=r"s-1\.tar\.gz can't be read"):
        epoch(streamed(shards))


def test_a_page_in_a_shards_place_is_named(server: Server, shards: str) -> None:
    (server.folder / "s-1.tar.gz").write_bytes(b"<!DOCTYPE html><html>please sign in</html>")
    with pytest.raises(DataError, match=r"s-1\.tar\.gz is a page or message"):
        epoch(streamed(shards))


@pytest.mark.parametrize(
    ("url", "package", "remedy"),
    [
        ("http://host/a.tar.gz", "aiohttp", r"pip install 'glide_ds\[remote\]'"),
        ("s3://bucket/a.tar.gz", "s3fs", r"pip install 'glide_ds\[remote\]'"),
        ("hf://datasets/me/set/a.tar.gz", "huggingface_hub", "huggingface_hub"),
    ],
)
def test_what_is_not_installed_is_named(
    monkeypatch: pytest.MonkeyPatch, url: str, package: str, remedy: str
) -> None:
    for name in (package, *(name for name in sys.modules if name.startswith(f"{package}."))):
        monkeypatch.setitem(sys.modules, name, None)
    for protocol in ("http", "s3", "hf"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    with pytest.raises(DataError, match=f"can't be read.*{remedy}"):
        epoch(streamed(url))
