"""A password or signature is nowhere that a person or a file gets to read; a resume takes it anew."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import pytest
from data_kit import source, take, write_shards
from ranks import COMMAND, Ranks, Run, Warm
from train_kit import make_config, metrics, trace, write_config

from glide_ds.cli import main
from glide_ds.data.tars.patterns import expand
from glide_ds.errors import DataError, GlideError, SurroundingsError
from glide_ds.masking import MASK, bare, masked

SECRET = "sEcReT"


@pytest.mark.parametrize(
    "text",
    [
        "https://me:{}@host:8080/x.tar",
        "https://me:p@{}@host/x.tar",
        "s3://KEY:{}@box/{{000..009}}.tar",
        "https://{}@host/x.tar",
        "https://h/x.tar?sv=2024&sig={}%2Bab%3D&se=2030",
        "https://h/{{0..9}}.tar?X-Amz-Signature={}&X-Amz-Date=1",
        "https://h/x.tar?X-Amz-Credential={}/2026/us-east-1 was refused",
        "https://h/x.tar?X-Amz-Security-Token={}/+ab==",
        "https://h/x.tar?X-Goog-Signature={}",
        "https://h/x.tar?AWSAccessKeyId={}&Expires=1",
        "a.tar?token={},https://h/b.tar?access_token={}",
        "403, url=URL('https://h/x?Key-Pair-Id=1&Policy={}&Signature={}')",
        "<a href='https://h/x?a=1&amp;sig={}'>",
        "pipe:curl -H 'Authorization: Bearer {}' https://h/x",
        '{{"headers": {{"Authorization": "Basic {}"}}}}',
        "pipe:curl -u me:{} https://h/x",
        "pipe:aws --token {} s3 cp",
        "pipe:wget --password={} ftp://h",
        "AWS_SECRET_ACCESS_KEY={}/x aws s3 cp",
        "fsspec.filesystem('s3', secret='{}')",
        "{{'aws_secret_access_key': '{}'}}",
        "AccountName=a;AccountKey={}==;EndpointSuffix=core.windows.net",
    ],
)
def test_a_secret_is_masked_and_its_neighbours_stay(text: str):
    told = text.format(*[SECRET] * text.count("{}"))
    shown = masked(told)
    assert SECRET not in shown
    assert MASK in shown
    assert shown.partition(MASK)[0] == told.partition(SECRET)[0].removesuffix("p@")
    assert masked(shown) == shown
    for error in (
        GlideError(told, told, told),
        GlideError.all_of([*GlideError(told).faults, *GlideError("x").faults]),
    ):
        assert SECRET not in f"{error} {error!r} {error.faults}"


@pytest.mark.parametrize(
    "text",
    [
        "s3://box/{000..009}.tar",
        "abfss://box@account.dfs.core.windows.net/x.tar",
        "https://host:8080/me@there.tar?download=true",
        "https://h/x.tar?sig=$SIGNATURE&token=${TOKEN}",
        "https://me:${PASSWORD}@h/x.tar",
        "glide_ds.model.architecture.clip_tokens: 8 → 4",
        "train.seed=3 clip_tokens=8 step-00000005: key 'token' has no default",
        "hf://datasets/a/b@main/x.tar",
    ],
)
def test_what_is_no_secret_stays(text: str):
    assert masked(text) == text
    assert bare(text) == text


def test_a_file_is_the_same_whoever_asks_for_it():
    signed = "https://h/x.tar?file=3&X-Amz-Date={}&X-Amz-Expires=60&X-Amz-Signature={}"
    assert bare(signed.format(1, "a")) == bare(signed.format(2, "b")) == "https://h/x.tar?file=3"
    assert (
        bare("https://h/x.tar?sv=1&se=2&sig=3") == bare("https://h/x.tar?sv=4&se=5&sig=6") == "https://h/x.tar"
    )
    assert bare("https://me:a@h:8/x.tar") == bare("https://you:b@h:8/x.tar") == "https://h:8/x.tar"
    assert bare("https://h/get?key=a.tar&sig=1") != bare("https://h/get?key=b.tar&sig=1")
    assert bare("https://h/x.tar?file=3&sig=1") != bare("https://h/x.tar?file=4&sig=1")
    with pytest.raises(DataError, match="more than once"):
        expand([signed.format(1, "a"), signed.format(2, "b")])


class Signed(BaseHTTPRequestHandler):
    """Gives files to whoever has a valid signature, and the others their request back, as stores do."""

    valid: ClassVar[set[str]] = set()
    folder = Path()
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        place = urlsplit(self.path)
        path = self.folder / place.path.lstrip("/")
        allowed = set(parse_qs(place.query).get("sig", [])) & self.valid
        data = path.read_bytes() if allowed and path.is_file() else b""
        code, first, last, total = 200 if allowed else 403, 0, len(data), len(data)
        if allowed and (wanted := self.headers.get("Range")):
            first, last = (int(n) for n in wanted.removeprefix("bytes=").split("-"))
            code, data = 206, data[first : last + 1]
        self.send_response(
            code, "OK" if allowed else f"no such signature: sig={place.query.partition('sig=')[2]}"
        )
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{total}"')
        self.send_header("Accept-Ranges", "bytes")
        if code == 206:
            self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{total}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The pattern of two shards that a server gives to those with the signature first-sEcReT or second-sEcReT."""
    pytest.importorskip("aiohttp", reason="reading HTTP shards needs aiohttp")
    (tmp_path / "served").mkdir()
    write_shards(tmp_path / "served", [8, 8])
    monkeypatch.setattr(Signed, "folder", tmp_path / "served")
    monkeypatch.setattr(Signed, "valid", {f"first-{SECRET}", f"second-{SECRET}"})
    monkeypatch.setattr("glide_ds.data.tars.storage.ATTEMPTS", 1)
    monkeypatch.setenv("GLIDE_DS_CACHE", str(tmp_path / "cache"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Signed)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/s-{{000..001}}.tar?sig="
    server.shutdown()
    server.server_close()


def unseen(*places: Path) -> None:
    """Neither in a name nor in a file below them."""
    for place in places:
        for path in place.rglob("*"):
            assert SECRET not in str(path)
            assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


def test_another_signature_is_the_same_data(signed: str, tmp_path: Path):
    one = source(f"{signed}first-{SECRET}", cache_dir=str(tmp_path / "blocks"))
    batch = take(one, 1)[0]
    stored = sorted((tmp_path / "cache").rglob("*.index")), sorted((tmp_path / "blocks").rglob("*"))
    other = source(f"{signed}second-{SECRET}", cache_dir=str(tmp_path / "blocks"))
    assert one.fingerprint == other.fingerprint
    assert (batch.images == take(other, 1)[0].images).all()
    assert stored == (sorted((tmp_path / "cache").rglob("*.index")), sorted((tmp_path / "blocks").rglob("*")))
    assert len(stored[0]) == 2
    assert stored[1]
    unseen(tmp_path)
    assert SECRET not in one.samples.name(0)


def test_a_refused_signature_is_not_told(signed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises((DataError, SurroundingsError), match=f"sig={MASK} can't be opened") as caught:
        source(f"{signed}expired-{SECRET}")
    assert SECRET not in str(caught.value)
    assert main(["prepare", "index", f"{signed}expired-{SECRET}", "--workers", "1"]) == 1
    config = write_config(tmp_path, data={"shards": f"{signed}expired-{SECRET}", "crop": "round"})
    assert main(["train", "--ds_config", str(config), "--dry_run"]) == 2
    assert (
        main(["train", "--ds_config", str(config), "--dry_run", "--set", f"data.shard={signed}{SECRET}"]) == 2
    )
    told = "".join(capsys.readouterr())
    assert told.count(MASK) > 2
    assert SECRET not in told


def test_a_configuration_is_shown_without_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    places = []
    for host in ("one", "two"):
        shards = [f"https://me:{SECRET}@{host}/x.tar", f"https://{host}/y.tar?sig={SECRET}"]
        config = make_config(tmp_path / host, data={"shards": shards})
        assert config.data.shards == tuple(shards)
        assert SECRET not in json.dumps(config.to_json())
        places.append(str(tmp_path / host / "full.json"))
    assert main(["config", "diff", *places]) == 1
    told = "".join(capsys.readouterr())
    assert MASK in told
    assert SECRET not in told


def test_a_pipe_is_refused_without_its_words(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(DataError, match="pipe:curl …") as caught:
        expand(f"pipe:curl --odd-header {SECRET} https://h/x.tar")
    assert SECRET not in str(caught.value)


@pytest.mark.slow
def test_a_run_keeps_no_signature_and_goes_on_with_another(warm: Warm, signed: str, tmp_path: Path):
    run = Run(
        warm, tmp_path / "a", log={"tensorboard": True, "every": 1}, data={"index_dir": str(tmp_path / "i")}
    )
    run.train(1, 2, f"data.shards={signed}first-{SECRET}", "data.workers=1")
    assert run.wait() == [0], run.said()
    run.train(1, 4, f"data.shards={signed}second-{SECRET}")
    assert run.wait() == [0], run.said()
    assert "resumes at step 2" in run.said()
    assert [line["step"] for line in metrics(run.folder)] == [1, 2, 3, 4]
    assert len({i for line in trace(run.folder) for i in line["sample_ids"]}) == 16  # one epoch, none twice
    again = Ranks(warm, tmp_path / "b")
    again.start(1, COMMAND, ["train", "--ds_config", str(run.dir / "run.json")])
    assert again.wait() == [2]
    assert "has a secret that was masked" in again.said()
    run.train(1, 6, f"data.shards={signed}expired-{SECRET}")
    assert run.wait() != [0]
    assert SECRET not in run.said() + again.said()
    unseen(tmp_path)
