"""Exports: what is in the file, that it is what the checkpoint holds, and that a difference is found."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from train_kit import ARCHITECTURE, copy_run

from glide_ds.commands import export as module
from glide_ds.commands.export import add_arguments, assembled, compare, export
from glide_ds.commands.load import find_checkpoint
from glide_ds.errors import CheckpointError, WeightsError
from glide_ds.model import GlideConfig, create_model
from glide_ds.model.tensor_files import read_state, sidecar, write_state
from glide_ds.training.checkpoint.commit import MANIFEST, Committed, committed
from glide_ds.training.zero.ema import read_average
from glide_ds.training.zero.stored import MODEL_FILE, model_state

PLAIN = GlideConfig(**ARCHITECTURE)


@pytest.fixture(scope="module")
def checkpoint(trained: Path) -> Committed:
    return find_checkpoint(trained / "run")


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_an_export_is_the_checkpoints_weights_in_fp32(checkpoint: Committed, tmp_path: Path, name: str):
    path = tmp_path / "new" / name
    assert set(export(checkpoint, path)) == {path}
    state, live = read_state(path), model_state(checkpoint)
    assert state.keys() == live.keys()
    for key, tensor in state.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, live[key])


def test_a_pt_is_flat_and_read_without_executing_code(checkpoint: Committed, tmp_path: Path):
    export(checkpoint, tmp_path / "x.pt")
    state = torch.load(tmp_path / "x.pt", weights_only=True)
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    values = sum(tensor.numel() for tensor in state.values())
    assert (tmp_path / "x.pt").stat().st_size < 4 * values + 200_000  # no optimizer, no storage behind views


def test_glides_part_loads_strictly_into_plain_glide_and_the_rest_says_clip(
    checkpoint: Committed, tmp_path: Path
):
    export(checkpoint, tmp_path / "x.pt")
    state = read_state(tmp_path / "x.pt")
    plain = create_model(PLAIN)
    names = set(plain.state_dict())
    own = {name for name in state if "clip" not in name}
    assert own == names
    assert {name for name in state if name not in names} == {name for name in state if "clip" in name} != set()
    plain.load_state_dict({name: state[name] for name in own}, strict=True)


def published_names(blocks: int = 3, levels: int = 4, layers: int = 16) -> set[str]:
    """state_dict names of OpenAI's base model, written out from the grammar: attention in all levels but the first."""

    def norm_conv(prefix: str, *parts: str) -> set[str]:
        return {f"{prefix}.{part}.{kind}" for part in parts for kind in ("weight", "bias")}

    def residual(prefix: str, skip: bool) -> set[str]:
        parts = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"]
        return norm_conv(prefix, *parts, *(["skip_connection"] if skip else []))

    def attention(prefix: str) -> set[str]:
        return norm_conv(prefix, "norm", "qkv", "encoder_kv", "proj_out")

    names = {"positional_embedding", "padding_embedding", "token_embedding.weight"}
    names |= {f"{layer}.{kind}" for layer in ("final_ln", "transformer_proj") for kind in ("weight", "bias")}
    for layer in range(layers):
        parts = ["attn.c_qkv", "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2"]
        names |= norm_conv(f"transformer.resblocks.{layer}", *parts)
    names |= {f"time_embed.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    names |= {f"input_blocks.0.0.{kind}" for kind in ("weight", "bias")}
    number = 1
    for level in range(levels):
        for block in range(blocks):
            names |= residual(f"input_blocks.{number}.0", skip=level > 0 and block == 0)
            names |= attention(f"input_blocks.{number}.1") if level else set()
            number += 1
        if level < levels - 1:
            names |= residual(f"input_blocks.{number}.0", skip=False)  # halves the side
            number += 1
    names |= residual("middle_block.0", skip=False) | attention("middle_block.1")
    names |= residual("middle_block.2", skip=False)
    number = 0
    for level in reversed(range(levels)):
        for block in range(blocks + 1):
            names |= residual(f"output_blocks.{number}.0", skip=True)
            names |= attention(f"output_blocks.{number}.1") if level else set()
            if level and block == blocks:
                names |= residual(f"output_blocks.{number}.2", skip=False)  # doubles the side
            number += 1
    return names | {f"out.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}


def test_names_follow_the_grammar(checkpoint: Committed, tmp_path: Path):
    export(checkpoint, tmp_path / "x.safetensors")
    own = {name for name in read_state(tmp_path / "x.safetensors") if "clip" not in name}
    assert own == published_names(blocks=1, levels=2, layers=1)
    with torch.device("meta"):
        base = set(create_model(GlideConfig.published("base")).state_dict())
    assert base == published_names()
    assert len(base) == 783


def test_the_adapter_can_be_split_off(checkpoint: Committed, tmp_path: Path):
    parts = export(checkpoint, tmp_path / "x.pt", split_adapter=True)
    adapter = tmp_path / "x-clip.pt"
    assert set(parts) == {tmp_path / "x.pt", adapter}
    glide, clip = read_state(tmp_path / "x.pt"), read_state(adapter)
    assert all("clip" not in name for name in glide)
    assert all("clip" in name for name in clip)
    assert glide.keys() | clip.keys() == model_state(checkpoint).keys()
    about = sidecar(tmp_path / "x.pt"), sidecar(adapter)
    assert [a["model"]["clip_dim"] for a in about if a] == [None, 64]


def test_the_sidecar_says_what_it_is_and_where_from(checkpoint: Committed, tmp_path: Path):
    export(checkpoint, tmp_path / "x.pt")
    about = json.loads((tmp_path / "x.pt.json").read_text())
    assert GlideConfig(**about["model"]) == replace(PLAIN, clip_dim=64)
    assert about["model"].keys() == asdict(PLAIN).keys()
    assert (about["phase"], about["step"], about["samples_seen"]) == ("full", 5, 20)
    assert about["schedule"] == "squaredcos_cap_v2"
    assert about["clip"]["model"] == "builtin:tiny"
    assert about["lineage"] == {"full": {"start": "random", "sha256": None}}
    assert about["sha256"] == hashlib.sha256((tmp_path / "x.pt").read_bytes()).hexdigest()
    assert about["checkpoint_sha256"] == checkpoint.fingerprint


def test_the_average_is_exported_and_said_to_be_one(checkpoint: Committed, tmp_path: Path):
    export(checkpoint, tmp_path / "x.pt", ema=True)
    state, plain = read_state(tmp_path / "x.pt"), assembled(checkpoint)
    groups = checkpoint.manifest["engine"]["groups"]
    for names, part in zip(groups, read_average(checkpoint)[0][0], strict=True):
        flat = torch.cat([state[name].flatten() for name in names])
        assert torch.equal(flat, part[: flat.numel()])
    assert {name for name in state if torch.equal(state[name], plain[name])} >= {"clip_gate_offset"}
    assert not torch.equal(state["out.2.bias"], plain["out.2.bias"])
    assert [json.loads((tmp_path / "x.pt.json").read_text())["ema"], state.keys()] == [True, plain.keys()]
    compare(tmp_path / "x.pt", checkpoint, ema=True)
    for name in ("out.2.bias", "clip_gate_offset"):
        write_state(tmp_path / "y.pt", altered(state, name))
        with pytest.raises(WeightsError, match=f"in 1 tensors, first {name}"):
            compare(tmp_path / "y.pt", checkpoint, ema=True)
    without = {name: entry for name, entry in checkpoint.manifest["files"].items() if "ema" not in name}
    bare = replace(checkpoint, manifest={**checkpoint.manifest, "files": without})
    with pytest.raises(CheckpointError, match=r"ema\.decay"):
        export(bare, tmp_path / "z.pt", ema=True)


# --- differences are found ---


def altered(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    changed = state[name].clone()
    changed.view(-1)[-1] = torch.nextafter(changed.view(-1)[-1], torch.tensor(torch.inf))
    return {**state, name: changed}


@pytest.mark.parametrize("name", ["out.2.bias", "clip_adapter.clip_gate", "clip_gate_offset"])
def test_one_altered_weight_in_the_file_is_found(checkpoint: Committed, tmp_path: Path, name: str):
    path = tmp_path / "x.pt"
    export(checkpoint, path)
    compare(path, checkpoint)
    write_state(path, altered(read_state(path), name))
    with pytest.raises(WeightsError, match=rf"differs from .* in 1 tensors, first {name}"):
        compare(path, checkpoint)


def test_an_export_that_reads_back_otherwise_is_no_success(
    checkpoint: Committed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write = module.write_state
    monkeypatch.setattr(module, "write_state", lambda path, state: write(path, altered(state, "out.2.bias")))
    with pytest.raises(WeightsError, match=r"out\.2\.bias"):
        export(checkpoint, tmp_path / "x.pt")
    assert not (tmp_path / "x.pt.json").exists()


def test_weights_that_disagree_with_the_optimizers_are_found(checkpoint: Committed, tmp_path: Path):
    """The module's tensors and the fp32 partitions say different things: no export says which is right."""
    copy = Committed(tmp_path / "phase3" / checkpoint.path.name, checkpoint.step, checkpoint.manifest)
    shutil.copytree(checkpoint.path, copy.path)
    write_state(copy.path / MODEL_FILE, altered(model_state(checkpoint), "out.2.bias"))
    with pytest.raises(WeightsError, match=r"out\.2\.bias"):
        export(copy, tmp_path / "x.pt")


# --- finding ---


def copied(trained: Path, tmp_path: Path) -> Path:
    return copy_run(trained / "run", tmp_path / "run")


def test_a_checkpoint_is_found_by_run_phase_or_folder(trained: Path):
    run = trained / "run"
    newest, before = committed(run / "phase3")
    assert find_checkpoint(run) == find_checkpoint(run / "phase3") == find_checkpoint(run, "full") == newest
    assert find_checkpoint(before.path).step == before.step == 4
    assert find_checkpoint(run / "phase3" / "LAST").step == 5


def test_a_copy_is_read_under_any_name_and_without_links(trained: Path, tmp_path: Path):
    run = Path(shutil.copytree(trained / "run", tmp_path / "run"))  # as scp -r: LAST is a folder
    assert find_checkpoint(run) == find_checkpoint(run / "phase3") == committed(run / "phase3")[0]
    assert find_checkpoint(run / "phase3" / "LAST").step == 5
    shutil.rmtree(run / "phase3" / "LAST")
    backup = shutil.move(run / "phase3" / "step-00000005", run / "phase3" / "step-00000005.bak")
    (run / "phase3" / "step-00000009").mkdir()  # an interrupted copy
    assert find_checkpoint(run).step == find_checkpoint(run / "phase3").step == 4
    assert find_checkpoint(Path(backup)).step == 5


def test_no_checkpoint_is_told(trained: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="no committed checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="of phase base"):
        find_checkpoint(trained / "run", "base")


def test_the_newest_whole_one_is_taken_and_damaged_ones_are_told(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = copied(trained, tmp_path)
    model = run / "phase3" / "step-00000005" / MODEL_FILE
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.unlink()
    model.write_bytes(data)
    reasons = [rf"{MODEL_FILE} does not match its hash", r"manifest\.json is damaged"]
    for reason in reasons:
        for place in (run, run / "phase3"):
            assert find_checkpoint(place).step == 4
            said = capsys.readouterr().err
            assert re.search(rf"step-00000005 is damaged \({reason}\): step-00000004 is taken", said)
        with pytest.raises(CheckpointError, match=rf"step-00000005 is damaged \({reason}"):
            find_checkpoint(model.parent)  # which a person named
        (model.parent / MANIFEST).write_text("{")
    (run / "phase3" / "step-00000004" / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"step-00000005 is damaged \(.*\) and no older one is whole"):
        find_checkpoint(run)
    assert capsys.readouterr().err == ""


def test_another_ending_is_refused(checkpoint: Committed, tmp_path: Path):
    with pytest.raises(WeightsError, match=r"\.pt or \.safetensors"):
        export(checkpoint, tmp_path / "x.bin")


def test_the_command_says_what_it_wrote(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    monkeypatch.setenv("HOME", str(tmp_path))
    args: Any = parser.parse_args([str(trained / "run"), "--out=~/x.pt", "--split_adapter"])
    module.run(args)
    out = capsys.readouterr().out
    assert "step 5" in out
    assert f"wrote {tmp_path / 'x.pt'}: 171 tensors, 2,471,238 values, verified" in out
    assert "x-clip.pt: 38 tensors" in out
    assert io.StringIO(out).readline().startswith("exporting ")
