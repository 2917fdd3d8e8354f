"""Weights: what is refused, what is reported, what fits, what is downloaded."""

import base64
import hashlib
import json
import os
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_glide import CLIP_DIM, tiny_config, tiny_inputs, tiny_model
from torch import nn

from glide_ds.errors import WeightsError
from glide_ds.files import sha256
from glide_ds.model import GlideConfig, create_model, download, weights
from glide_ds.model.download import fetch
from glide_ds.model.tensor_files import (
    pack_rows,
    read_state,
    sidecar,
    unpack_rows,
    write_sidecar,
    write_state,
)
from glide_ds.model.weights import infer_config, load_weights, stored_config

# --- files --------------------------------------------------------------------------------------------------


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.randn(3, 4), "b": torch.arange(5), "half": torch.randn(2).half()}


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_state_round_trip(tmp_path: Path, state: dict[str, torch.Tensor], name: str) -> None:
    write_state(tmp_path / name, state)
    back = read_state(tmp_path / name)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in state.items())
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_equal_tensors_give_equal_bytes(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    for suffix in ("pt", "safetensors"):
        write_state(tmp_path / f"one.{suffix}", state)
        write_state(tmp_path / f"two.{suffix}", state)
        assert sha256(tmp_path / f"one.{suffix}") == sha256(tmp_path / f"two.{suffix}")


def test_a_view_is_written_alone(tmp_path: Path) -> None:
    big = torch.randn(1000, 100)
    write_state(tmp_path / "x.pt", {"row": big[0], "same": big[0]})
    assert (tmp_path / "x.pt").stat().st_size < 10_000


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_state(tmp_path / "x.pt", {"a": torch.ones(1)})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WeightsError, match="No space left"):
        write_state(tmp_path / "x.pt", {"a": torch.zeros(1)})
    assert read_state(tmp_path / "x.pt")["a"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"\.ckpt"):
        write_state(tmp_path / "x.ckpt", {})


def test_sidecar_round_trip(tmp_path: Path) -> None:
    assert sidecar(tmp_path / "x.pt") is None
    write_sidecar(tmp_path / "x.pt", {"model": {"kind": "base"}})
    assert sidecar(tmp_path / "x.pt") == {"model": {"kind": "base"}}
    (tmp_path / "x.pt.json").write_text("{")
    with pytest.raises(WeightsError, match="not JSON"):
        sidecar(tmp_path / "x.pt")


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_not_run(tmp_path: Path, legacy: bool) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"a": Bomb(tmp_path / "pwned")}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match="can execute code"):
        read_state(path)
    assert not (tmp_path / "pwned").exists()


def test_a_malicious_torchscript_archive_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"a": Bomb(tmp_path / "pwned")}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("evil/constants.pkl", b"")
    with pytest.raises(WeightsError, match="can execute code"):
        read_state(path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>404 Not Found</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "git lfs pull"),
        (b"just some text in a file", "not a weight file"),
    ],
)
def test_what_is_no_weight_file(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(WeightsError, match=says):
        read_state(tmp_path / "x.pt")


def test_missing_directory_and_foreign_zip(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no weight file at"):
        read_state(tmp_path / "none.pt")
    with pytest.raises(WeightsError, match="directory"):
        read_state(tmp_path)
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(WeightsError, match="without tensors"):
        read_state(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize("share", [0.3, 0.95])
def test_a_truncated_file_is_named_so(tmp_path: Path, name: str, share: float) -> None:
    path = tmp_path / name
    write_state(path, {"a": torch.randn(200, 50), "b": torch.randn(7)})
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(WeightsError, match="truncated or damaged"):
        read_state(path)


def test_nesting_and_prefixes_are_undone_and_told(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"epoch": 3, "state_dict": {"module._orig_mod.a": torch.ones(2), "module._orig_mod.b": 7}}, path)
    assert list(read_state(path)) == ["a"]
    from glide_ds.model.tensor_files import read_state_file

    told = " ".join(read_state_file(path).notes)
    assert "'state_dict'" in told
    assert "'module.'" in told
    assert "no tensors" in told
    torch.save({"epoch": 3, "optimizer": [1, 2]}, path)
    with pytest.raises(WeightsError, match="holds no tensors"):
        read_state(path)


def test_packed_rows_round_trip(tmp_path: Path) -> None:
    table = torch.zeros(50257, 8)
    table[[0, 7, 50256]] = torch.randn(3, 8)
    state = {"emb.weight": table, "other": torch.randn(3)}
    packed = pack_rows(state, ["emb.weight"])
    assert packed["emb.weight"].shape == (3, 8)
    assert torch.equal(unpack_rows(packed)["emb.weight"], table)
    write_state(tmp_path / "x.safetensors", packed)
    assert (tmp_path / "x.safetensors").stat().st_size < 1000
    back = read_state(tmp_path / "x.safetensors")
    assert set(back) == set(state)
    assert torch.equal(back["emb.weight"], table)
    with pytest.raises(WeightsError, match=r"emb\.weight"):
        unpack_rows(packed | {"emb.weight.rows": torch.tensor([0, 7, 50257])})


# --- architecture -------------------------------------------------------------------------------------------


def shapes_of(config: GlideConfig) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return create_model(config).state_dict()


@pytest.mark.parametrize("kind", ["base", "upsample", "base-inpaint", "upsample-inpaint"])
def test_published_architectures_show_in_the_shapes(kind: str) -> None:
    for clip in ({}, {"clip_dim": 768, "clip_tokens": 4}):
        config = GlideConfig.published(kind, **clip)
        assert infer_config(shapes_of(config)) == config


def test_other_architectures_show_in_the_shapes() -> None:
    config = tiny_config(channel_mult=(1, 2, 2), attention_ds=(1, 4), num_res_blocks=2, clip_dim=CLIP_DIM)
    found = infer_config(shapes_of(config))
    for name in ("model_channels", "channel_mult", "attention_ds", "num_res_blocks", "xf_width", "xf_layers"):
        assert getattr(found, name) == getattr(config, name)
    assert (found.text_ctx, found.clip_dim, found.clip_tokens) == (12, CLIP_DIM, 8)


def test_the_sidecar_says_more_than_the_shapes(tmp_path: Path) -> None:
    config = tiny_config(image_size=16, xf_heads=4)
    write_state(tmp_path / "x.pt", tiny_model().state_dict())
    assert stored_config(tmp_path / "x.pt").image_size == 64
    write_sidecar(tmp_path / "x.pt", {"model": asdict(config)})
    assert stored_config(tmp_path / "x.pt") == config
    write_sidecar(tmp_path / "x.pt", {"model": {"kind": "base", "colour": 3}})
    with pytest.raises(WeightsError, match="colour"):
        stored_config(tmp_path / "x.pt")


# --- loading ------------------------------------------------------------------------------------------------


@pytest.fixture
def plain_file(tmp_path: Path) -> Path:
    write_state(tmp_path / "plain.pt", tiny_model(seed=1).state_dict())
    return tmp_path / "plain.pt"


def test_load_copies_every_value(plain_file: Path) -> None:
    model, source = tiny_model(seed=2), tiny_model(seed=1).state_dict()
    report = load_weights(model, plain_file)
    assert all(torch.equal(value, source[key]) for key, value in model.state_dict().items())
    assert (len(report.loaded), report.kept, report.ignored) == (len(source), (), ())
    assert report.values == sum(value.numel() for value in source.values())


def test_a_plain_file_loads_into_a_clip_model(plain_file: Path) -> None:
    model = tiny_model(seed=2, clip_dim=CLIP_DIM)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = load_weights(model, plain_file)
    assert report.kept
    assert all("clip" in key for key in report.kept)
    assert all(torch.equal(model.state_dict()[key], before[key]) for key in report.kept)
    text = report.paragraph()
    assert str(plain_file) in text
    assert f"{len(report.loaded)} tensors" in text
    assert f"{len(report.kept)} tensors" in text
    assert report.kept[0] in text
    assert "\n" not in text


def test_a_clip_file_loads_into_a_plain_model(tmp_path: Path) -> None:
    write_state(tmp_path / "clip.safetensors", tiny_model(clip_dim=CLIP_DIM).state_dict())
    report = load_weights(tiny_model(seed=2), tmp_path / "clip.safetensors")
    assert report.ignored
    assert all("clip" in key for key in report.ignored)
    assert report.ignored[0] in report.paragraph()


def test_half_precision_is_cast_and_told(tmp_path: Path) -> None:
    write_state(tmp_path / "x.pt", {k: v.half() for k, v in tiny_model(seed=1).state_dict().items()})
    model = tiny_model(seed=2)
    report = load_weights(model, tmp_path / "x.pt")
    assert next(model.parameters()).dtype == torch.float32
    assert "float16 to float32" in report.paragraph()


def test_random_reads_nothing() -> None:
    model = tiny_model()
    report = load_weights(model, "random")
    assert len(report.kept) == len(model.state_dict())
    assert "random" in report.paragraph()


def refusal(model: nn.Module, path: Path | str) -> str:
    """The message; and nothing of the model has changed."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(model, path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return str(caught.value)


def test_an_upsampler_given_to_the_base_model(tmp_path: Path) -> None:
    write_state(tmp_path / "up.pt", tiny_model(kind="upsample").state_dict())
    message = refusal(tiny_model(), tmp_path / "up.pt")
    assert "input_blocks.0.0.weight 32×6×3×3 in the file, 32×3×3×3 in the model" in message
    assert "kind upsample (6 input channels)" in message
    assert "base.pt" in message
    assert "model.preset=upsample" in message


@pytest.mark.parametrize("kind", ["base", "upsample"])
@pytest.mark.parametrize("side", [16, 64])  # torch takes another convolution for pictures of either
@pytest.mark.parametrize("nhwc", [False, True])
def test_an_inpainting_model_begins_as_its_plain_twin(tmp_path: Path, kind: str, side: int, nhwc: bool) -> None:
    plain = tiny_model(seed=1, kind=kind, image_size=side)
    write_state(tmp_path / "plain.pt", plain.state_dict())
    twin = tiny_model(seed=2, kind=f"{kind}-inpaint", image_size=side)
    report = load_weights(twin, tmp_path / "plain.pt")
    assert f"start at zero: the file is of kind {kind}" in report.paragraph()
    inputs = tiny_inputs(plain, batch=1)
    if nhwc:
        inputs["x"] = inputs["x"].contiguous(memory_format=torch.channels_last)
    image = torch.randn(1, 3, side, side)
    with torch.no_grad():
        told, again = (
            plain(**inputs),
            twin(**inputs, inpaint_image=image, inpaint_mask=image[:, :1].sign().relu()),
        )
    assert torch.equal(told, again)


def test_an_inpainting_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    write_state(tmp_path / "x.pt", tiny_model(kind="upsample").state_dict())
    assert "kind upsample" in refusal(tiny_model(kind="base-inpaint"), tmp_path / "x.pt")
    write_state(tmp_path / "x.pt", tiny_model(kind="base-inpaint").state_dict())
    assert "kind base-inpaint" in refusal(tiny_model(), tmp_path / "x.pt")


def test_adapters_of_another_clip_width(tmp_path: Path) -> None:
    write_state(tmp_path / "b32.pt", tiny_model(clip_dim=512).state_dict())
    message = refusal(tiny_model(clip_dim=768), tmp_path / "b32.pt")
    assert "512" in message
    assert "768" in message
    assert "clip.model" in message


def test_another_architecture_is_described(plain_file: Path) -> None:
    message = refusal(tiny_model(model_channels=64), plain_file)
    assert "model_channels 32 (the model: 64)" in message
    message = refusal(tiny_model(xf_layers=3), plain_file)
    assert "missing (transformer.resblocks.2" in message
    assert "xf_layers 2 (the model: 3)" in message


def test_incomplete_and_foreign_files(tmp_path: Path) -> None:
    state = tiny_model().state_dict()
    del state["out.2.bias"]
    write_state(tmp_path / "x.pt", state)
    message = refusal(tiny_model(), tmp_path / "x.pt")
    assert "1 missing (out.2.bias)" in message
    assert "incomplete" in message
    write_state(tmp_path / "x.pt", {"visual.proj": torch.ones(2, 2), "positional_embedding": torch.ones(3, 3)})
    assert "a CLIP model" in refusal(tiny_model(), tmp_path / "x.pt")
    write_state(tmp_path / "x.pt", {"backbone.conv1": torch.ones(2, 2)})
    assert "backbone.conv1" in refusal(tiny_model(), tmp_path / "x.pt")


def test_heads_that_no_shape_shows(plain_file: Path) -> None:
    write_sidecar(plain_file, {"model": asdict(tiny_config(num_head_channels=8))})
    assert "num_head_channels 8 (the model: 16)" in refusal(tiny_model(), plain_file)


UNFIT = {
    "int8": (lambda value: (value * 100).to(torch.int8), "is of type int8"),
    "uint8": (lambda value: value.to(torch.uint8), "is of type uint8"),
    "int64": (lambda value: value.to(torch.int64), "is of type int64"),
    "float8": (lambda value: value.to(torch.float8_e4m3fn), "is of type float8_e4m3fn"),
    "sparse": (lambda value: value.to_sparse(), "is stored as sparse_coo"),
    "rows": (lambda value: value.to_sparse_csr(), "is stored as sparse_csr"),
    "meta": (lambda value: value.to("meta"), "has a shape and no numbers"),
    "quantized": (lambda value: torch.quantize_per_tensor(value, 0.1, 0, torch.qint8), "is quantized"),
}


@pytest.mark.parametrize("kind", UNFIT)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_weights_of_a_kind_that_would_load_wrong_are_refused_by_name(
    plain_file: Path, tmp_path: Path, kind: str, suffix: str
) -> None:
    change, says = UNFIT[kind]
    state = read_state(plain_file)
    name = next(name for name, value in state.items() if value.dim() == 2)
    state[name] = change(state[name])
    path = tmp_path / f"changed.{suffix}"
    if suffix == "pt":
        torch.save(state, path)
    elif kind in ("int8", "uint8", "int64", "float8"):
        save_file(state, path)
    else:
        pytest.skip("the format has no such tensors")
    assert f"{name} {says}" in refusal(tiny_model(), path)


@pytest.mark.parametrize("numbers", [[torch.nan], [-torch.inf], [torch.inf, -torch.inf]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_numbers_that_are_not_finite(tmp_path: Path, numbers: list[float], dtype: torch.dtype) -> None:
    state = tiny_model().state_dict()
    bias = torch.zeros_like(state["out.2.bias"])
    bias[: len(numbers)] = torch.tensor(numbers)
    torch.save(state | {"out.2.bias": bias.to(dtype)}, tmp_path / "x.pt")
    assert "not finite (first in out.2.bias)" in refusal(tiny_model(), tmp_path / "x.pt")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_numbers_whose_sum_overflows_are_finite(tmp_path: Path, dtype: torch.dtype) -> None:
    state = tiny_model().state_dict()
    bias = torch.full_like(state["out.2.bias"], torch.finfo(dtype).max).to(dtype)
    assert not bias.sum().isfinite()
    torch.save(state | {"out.2.bias": bias}, tmp_path / "x.pt")
    model = tiny_model()
    load_weights(model, tmp_path / "x.pt")
    assert torch.equal(model.state_dict()["out.2.bias"], bias.float())


def test_sources_that_do_not_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "openai, random or builtin:tiny" in refusal(tiny_model(), "opnai")
    assert "no weight file" in refusal(tiny_model(), "missing/base.pt")
    monkeypatch.setattr(weights, "BUILTIN_WEIGHTS", tmp_path / "none.safetensors")
    assert "launch/train_tiny_glide.py" in refusal(tiny_model(), "builtin:tiny")


# --- downloads ----------------------------------------------------------------------------------------------


@dataclass
class Server:
    """A file server that can be told to misbehave."""

    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)  # the Range of each request
    cut_after: int | None = None  # end the next reply after so many bytes
    status: list[int] = field(default_factory=list)  # answers to give first
    headers: dict[str, str] = field(default_factory=dict)
    etag: str = '"1"'
    url: str = ""

    def reply(self, handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range", "")
        self.requests.append(wanted)
        body = self.files.get(handler.path.rpartition("/")[2])
        if self.status or body is None:
            handler.send_error(self.status.pop(0) if self.status else 404)
            return
        start = 0
        if wanted and handler.headers.get("If-Range") == self.etag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
        if start and start >= len(body):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(body)}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(body) - start))
        handler.send_header("ETag", self.etag)
        for name, value in self.headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        part = body[start:] if self.cut_after is None else body[start : start + self.cut_after]
        self.cut_after = None
        handler.wfile.write(part)
        handler.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    told = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told.reply(self)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr(download, "PAUSE", 0.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        told.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield told
        http.shutdown()
        thread.join()


@pytest.fixture
def blob(tmp_path: Path, server: Server) -> bytes:
    write_state(tmp_path / "blob.pt", {"a": torch.randn(300, 30)})
    server.files["x.pt"] = (tmp_path / "blob.pt").read_bytes()
    return server.files["x.pt"]


def md5(content: bytes) -> str:
    return base64.b64encode(hashlib.md5(content).digest()).decode()


def test_openai_is_downloaded_checked_and_kept(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_model(seed=1)
    write_state(tmp_path / "base.pt", source.state_dict())
    server.files["base.pt"] = (tmp_path / "base.pt").read_bytes()
    monkeypatch.setenv("GLIDE_DS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GLIDE_DS_OPENAI_URL", server.url + "/dec-2021/")
    model = tiny_model(seed=2)
    first = load_weights(model, "openai")
    assert torch.equal(model.out[2].weight, source.out[2].weight)
    assert first.path == tmp_path / "cache" / "base.pt"
    assert "downloaded" in first.paragraph()
    digest = sha256(first.path)
    assert (tmp_path / "cache" / "base.pt.sha256").read_text().split()[0] == digest
    assert len(server.requests) == 1
    again = load_weights(tiny_model(seed=2), "openai")
    assert len(server.requests) == 1, "a cached file is not asked for again"
    assert "in the cache" in again.paragraph()


def test_a_cut_transfer_is_resumed(tmp_path: Path, server: Server, blob: bytes) -> None:
    server.cut_after = 10_000
    fetched = fetch(server.url + "/x.pt", tmp_path / "c" / "x.pt")
    assert server.requests == ["", "bytes=10000-"]
    assert fetched.path.read_bytes() == blob
    names = {p.name for p in (tmp_path / "c").iterdir()}
    assert names == {"x.pt", "x.pt.sha256", ".x.pt.lock"}


def test_the_next_run_goes_on_where_this_one_failed(
    tmp_path: Path, server: Server, blob: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    server.cut_after = 10_000
    server.status = []
    path = tmp_path / "x.pt"
    reply = server.reply

    def fail_second(handler: BaseHTTPRequestHandler) -> None:
        if server.requests:
            server.status = [503]
        reply(handler)

    monkeypatch.setattr(server, "reply", fail_second)
    with pytest.raises(WeightsError, match=r"HTTP 503.*10,000 bytes are kept"):
        fetch(server.url + "/x.pt", path)
    monkeypatch.setattr(server, "reply", reply)
    assert not path.exists()
    assert fetch(server.url + "/x.pt", path).path.read_bytes() == blob
    assert server.requests[-1] == "bytes=10000-"


def test_a_file_that_changed_meanwhile_starts_over(tmp_path: Path, server: Server, blob: bytes) -> None:
    (tmp_path / "x.pt.part").write_bytes(b"old" * 100)
    (tmp_path / "x.pt.part.etag").write_text('"0"')
    assert fetch(server.url + "/x.pt", tmp_path / "x.pt").path.read_bytes() == blob


def test_a_complete_part_is_only_checked(tmp_path: Path, server: Server, blob: bytes) -> None:
    (tmp_path / "x.pt.part").write_bytes(blob)
    (tmp_path / "x.pt.part.etag").write_text(server.etag)
    assert fetch(server.url + "/x.pt", tmp_path / "x.pt").path.read_bytes() == blob
    assert len(server.requests) == 1


def test_passing_failures_are_waited_out(tmp_path: Path, server: Server, blob: bytes) -> None:
    server.status = [503, 429]
    fetch(server.url + "/x.pt", tmp_path / "x.pt")
    assert len(server.requests) == 3


def test_a_wrong_hash_is_refused(tmp_path: Path, server: Server, blob: bytes) -> None:
    with pytest.raises(WeightsError, match=r"SHA-256 is .* instead of 1234"):
        fetch(server.url + "/x.pt", tmp_path / "x.pt", digest="1234")
    assert not (tmp_path / "x.pt").exists()
    assert not (tmp_path / "x.pt.part").exists()
    digest = hashlib.sha256(blob).hexdigest()
    assert fetch(server.url + "/x.pt", tmp_path / "x.pt", digest=digest).sha256 == digest


@pytest.mark.parametrize("header", ["Content-MD5", "x-ms-blob-content-md5"])
def test_the_announced_md5_counts(tmp_path: Path, server: Server, blob: bytes, header: str) -> None:
    server.headers = {header: md5(blob + b"!")}
    with pytest.raises(WeightsError, match="MD5"):
        fetch(server.url + "/x.pt", tmp_path / "x.pt")
    server.headers = {header: md5(blob)}
    assert "MD5 as announced" in fetch(server.url + "/x.pt", tmp_path / "x.pt").checks


def test_the_md5_of_a_part_is_not_the_files(tmp_path: Path, server: Server, blob: bytes) -> None:
    """Azure answers a Range with the part's Content-MD5; only the first reply's is the whole file's."""
    server.headers, server.cut_after = {"Content-MD5": md5(blob)}, 10_000
    reply = server.reply

    def of_part(handler: BaseHTTPRequestHandler) -> None:
        if server.requests:
            server.headers = {"Content-MD5": md5(blob[10_000:])}
        reply(handler)

    server.reply = of_part  # type: ignore[method-assign]
    assert "MD5 as announced" in fetch(server.url + "/x.pt", tmp_path / "x.pt").checks


def test_a_flipped_bit_is_found_without_any_hash(tmp_path: Path, server: Server, blob: bytes) -> None:
    server.files["x.pt"] = blob[:9000] + bytes([blob[9000] ^ 1]) + blob[9001:]
    with pytest.raises(WeightsError, match="checksum of its entry"):
        fetch(server.url + "/x.pt", tmp_path / "x.pt")


def test_another_size_than_published_is_refused(tmp_path: Path, server: Server, blob: bytes) -> None:
    with pytest.raises(WeightsError, match=f"offers {len(blob):,} bytes, the published file has 99"):
        fetch(server.url + "/x.pt", tmp_path / "x.pt", size=99)
    assert not (tmp_path / "x.pt").exists()


def test_pages_instead_of_files(tmp_path: Path, server: Server, blob: bytes) -> None:
    with pytest.raises(WeightsError, match="HTTP 404"):
        fetch(server.url + "/none.pt", tmp_path / "none.pt")
    assert len(server.requests) == 1, "404 is not tried again"
    server.headers = {"Content-Type": "text/html; charset=utf-8"}
    with pytest.raises(WeightsError, match="web page"):
        fetch(server.url + "/x.pt", tmp_path / "x.pt")


def test_a_damaged_cache_that_cant_be_fetched_again_is_told(
    tmp_path: Path, server: Server, blob: bytes
) -> None:
    path = tmp_path / "x.pt"
    fetch(server.url + "/x.pt", path)
    path.write_bytes(blob[:1000])
    told = r"x\.pt is damaged or not the file expected, and can't be fetched again: .*put a whole copy there"
    with pytest.raises(WeightsError, match=told):
        fetch(server.url + "/none.pt", path)
    assert len(path.read_bytes()) == 1000
    assert fetch(server.url + "/x.pt", path).path.read_bytes() == blob


def test_a_damaged_cache_is_fetched_again(tmp_path: Path, server: Server, blob: bytes) -> None:
    path = tmp_path / "x.pt"
    fetch(server.url + "/x.pt", path)
    path.write_bytes(blob[:-1] + b"?")
    assert fetch(server.url + "/x.pt", path).path.read_bytes() == blob
    assert len(server.requests) == 2


def test_a_file_put_into_the_cache_by_hand_is_used(tmp_path: Path, server: Server, blob: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(blob)
    with pytest.raises(WeightsError, match="another file"):
        fetch(server.url + "/x.pt", tmp_path / "x.pt", size=99)
    fetch(server.url + "/x.pt", tmp_path / "x.pt")
    assert not server.requests


@pytest.mark.parametrize("size", [None, 99])
def test_a_cut_file_put_into_the_cache_is_removed_and_fetched(
    tmp_path: Path, server: Server, blob: bytes, size: int | None
) -> None:
    (tmp_path / "x.pt").write_bytes(blob[:9000])
    if size is None:
        assert fetch(server.url + "/x.pt", tmp_path / "x.pt").path.read_bytes() == blob
        assert sha256(tmp_path / "x.pt") == (tmp_path / "x.pt.sha256").read_text().split()[0]
        return
    with pytest.raises(WeightsError, match="offers"):  # asked for, where it was called another file
        fetch(server.url + "/x.pt", tmp_path / "x.pt", size=size)
    assert not (tmp_path / "x.pt").exists()


def test_what_is_no_address(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no address"):
        fetch("mirror/x.pt", tmp_path / "x.pt")


def test_a_reply_that_does_not_say_how_long_it_is(tmp_path: Path, server: Server, blob: bytes) -> None:
    def without_length(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(blob)
        handler.close_connection = True

    server.reply = without_length  # type: ignore[method-assign]
    with pytest.raises(WeightsError, match="how long"):
        fetch(server.url + "/x.pt", tmp_path / "x.pt")


def test_a_disk_that_fills_up_is_no_reason_to_try_again(
    tmp_path: Path, server: Server, blob: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(download.os, "fsync", full)
    with pytest.raises(WeightsError, match=r"No space left.*GLIDE_DS_CACHE"):
        fetch(server.url + "/x.pt", tmp_path / "x.pt")
    assert len(server.requests) == 1


def test_no_server_and_no_room(
    tmp_path: Path, server: Server, blob: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(WeightsError, match=r"could not download .* give its path"):
        fetch("http://127.0.0.1:1/x.pt", tmp_path / "x.pt")
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="GLIDE_DS_CACHE"):
        fetch(server.url + "/x.pt", tmp_path / "file" / "x.pt")
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(WeightsError, match="100 bytes free"):
        fetch(server.url + "/x.pt", tmp_path / "x.pt")


def test_kinds_have_files() -> None:
    assert json.dumps(sorted(weights.OPENAI_FILES)) == json.dumps(sorted(weights._INPUT_CHANNELS))
