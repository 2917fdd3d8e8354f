"""The phases as data: roles, groups, freezing, the gate's schedule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_kit import ARCHITECTURE, make_config

from glide_ds.config.phases import PHASES, ROLES
from glide_ds.model import GlideConfig, create_model
from glide_ds.training.phases import count_by_role, gate_offset, gates, parameter_groups, role_of, trained_roles

WITH_CLIP = GlideConfig(**{**ARCHITECTURE, "clip_dim": 24})


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("clip_adapter.clip_null_embedding", "adapter"),
        ("clip_adapter.mlp.0.weight", "adapter"),
        ("clip_adapter.clip_gate", "gates"),
        ("clip_vector.out.weight", "adapter"),
        ("clip_vector.clip_gate", "gates"),
        ("input_blocks.1.1.clip_kv.weight", "adapter"),
        ("input_blocks.1.1.clip_gate", "gates"),
        ("input_blocks.1.1.encoder_kv.weight", "unet"),
        ("time_embed.0.weight", "unet"),
        ("out.2.bias", "unet"),
        ("transformer.resblocks.0.attn.c_qkv.weight", "text"),
        ("transformer_proj.weight", "text"),
        ("final_ln.bias", "text"),
        ("token_embedding.weight", "text"),
        ("positional_embedding", "text"),
        ("padding_embedding", "text"),
    ],
)
def test_a_name_has_one_role(name: str, role: str):
    assert role_of(name) == role


def test_every_text_module_is_text_and_nothing_else_is():
    plain = create_model(replace(WITH_CLIP, clip_dim=None))
    unet = ("time_embed", "input_blocks", "middle_block", "output_blocks", "out")
    for name, _ in plain.named_parameters():
        assert role_of(name) == ("unet" if name.split(".")[0] in unet else "text"), name


@pytest.mark.parametrize(
    ("phase", "scope", "roles"),
    [
        ("base", "all", {"unet", "text"}),
        ("base", "unet", {"unet"}),
        ("base", "text", {"text"}),
        ("adapter_only", "all", {"adapter"}),
        ("adapter_gates", "all", {"adapter", "gates"}),
        ("full", "all", set(ROLES)),
    ],
)
def test_a_phase_trains_its_roles_and_freezes_the_rest(tmp_path: Path, phase: str, scope: str, roles: set[str]):
    config = make_config(tmp_path, phase, train={"scope": scope})
    model = create_model(replace(WITH_CLIP, clip_dim=None) if phase == "base" else WITH_CLIP)
    groups = parameter_groups(model, config)
    assert set(trained_roles(config)) == {group["role"] for group in groups} == roles
    grouped = {id(p): group["role"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (role_of(name) in roles), name
        assert grouped.get(id(parameter)) == (role_of(name) if role_of(name) in roles else None), name
    assert sum(len(group["params"]) for group in groups) == len(grouped)  # none twice
    assert all(group["params"] for group in groups)  # DeepSpeed fails on an empty one


def test_groups_carry_their_rate_and_decay(tmp_path: Path):
    scales = {"adapter": 2.0, "gates": 10.0, "unet": 0.5, "text": 0.25}
    config = make_config(tmp_path, train={"lr_scale": scales})
    model = create_model(WITH_CLIP)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in parameter_groups(model, config):
        assert group["lr"] == pytest.approx(1e-3 * scales[group["role"]])
        for parameter in group["params"]:
            spared = parameter.ndim < 2 or "embedding" in names[id(parameter)]
            assert group["weight_decay"] == (0.0 if spared else 0.01), names[id(parameter)]
            assert group["quantize"] == (parameter.ndim > 1), names[id(parameter)]


def test_a_phase_can_be_frozen_anew_after_another(tmp_path: Path):
    model = create_model(WITH_CLIP)
    parameter_groups(model, make_config(tmp_path, "adapter_only"))
    parameter_groups(model, make_config(tmp_path, "full"))
    assert all(p.requires_grad for p in model.parameters())


def test_parents_stand_before_their_children():
    order = list(PHASES)
    for name, phase in PHASES.items():
        assert all(order.index(parent) < order.index(name) for parent in phase.parents)
    assert len({phase.folder for phase in PHASES.values()}) == len(PHASES)


def test_parameters_are_counted_by_role():
    model = create_model(WITH_CLIP)
    counts = count_by_role(model.named_parameters())
    assert list(counts) == list(ROLES)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters())
    assert counts["gates"] == sum(name.endswith("clip_gate") for name, _ in model.named_parameters())
    plain = create_model(replace(WITH_CLIP, clip_dim=None))
    assert set(count_by_role(plain.named_parameters())) == {"unet", "text"}


def test_the_gate_offset_ramps_from_its_start_to_its_target(tmp_path: Path):
    config = make_config(tmp_path, "adapter_only", train={"gate_offset": 10.0, "gate_warmup": 4})
    assert [gate_offset(config, 0.0, step) for step in range(6)] == pytest.approx([2, 4, 6, 8, 10, 10])
    assert [gate_offset(config, 5.0, step) for step in (0, 3, 4)] == pytest.approx([6, 9, 10])
    at_once = make_config(tmp_path, "full", train={"gate_offset": 7.0})
    assert gate_offset(at_once, 0.0, 0) == 7.0


def test_gates_are_read_per_block_with_the_offset():
    model = create_model(WITH_CLIP)
    model.clip_gate_offset.fill_(10.0)
    with torch.no_grad():
        model.clip_adapter.clip_gate.fill_(-8.0)
    read = dict(gates(model))
    assert read.pop("clip_adapter") == pytest.approx(torch.tensor(2.0).sigmoid().item())
    assert len(read) == 4 + 1  # the attention blocks, and the vector
    assert all(value == 0.5 for value in read.values())
