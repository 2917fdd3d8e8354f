"""What a phase makes of a model: which parameters train, in which groups, how far its gates are open."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from glide_ds.config import Config
from glide_ds.config.phases import PHASES, ROLES
from glide_ds.model.glide import Glide

TEXT_MODULES = (
    "transformer.",
    "transformer_proj.",
    "final_ln.",
    "token_embedding.",
    "positional_embedding",
    "padding_embedding",
)


def hash64(*parts: int) -> int:
    """A well-mixed non-negative 63-bit seed from whole numbers."""
    digest = hashlib.blake2b(struct.pack(f"<{len(parts)}q", *parts), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def phase_seed(config: Config) -> int:
    """Of everything random in a phase, so that no phase sees another's noise and order of data again."""
    phase = PHASES[config.train.phase]
    return hash64(config.train.seed, hash64(*phase.name.encode()) if phase.number is None else phase.number)


def role_of(name: str) -> str:
    """The role of the parameter with that state_dict name."""
    if "clip" in name:
        return "gates" if name.endswith("gate") else "adapter"
    return "text" if name.startswith(TEXT_MODULES) else "unet"


def trained_roles(config: Config) -> tuple[str, ...]:
    """The roles that the configuration trains; `train.scope` narrows phase base."""
    scope = config.train.scope
    return PHASES[config.train.phase].trains if scope == "all" else (scope,)


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Freeze what the phase does not train and group the rest by role and kind.

    Matrices (and kernels of convolutions) are decayed; embeddings are not. Neither are vectors (norm gains,
    biases, gate logits), whose moments AdamW8bit leaves in fp32: they are 0.1 % of the model, and side by side
    in one block their gradients differ by orders of magnitude. Groups without parameters are left out:
    DeepSpeed fails on them.
    """
    roles = trained_roles(config)
    rate = config.deepspeed["optimizer"]["params"]["lr"]
    decay = config.deepspeed["optimizer"]["params"].get("weight_decay", 0.0)
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        role, kind = role_of(name), kind_of(name, parameter)
        parameter.requires_grad_(role in roles)
        if role in roles:
            group = groups.setdefault(
                (role, kind),
                {
                    "params": [],
                    "lr": rate * getattr(config.train.lr_scale, role),
                    "weight_decay": decay if kind == "matrix" else 0.0,
                    "quantize": kind != "vector",
                    "role": role,
                },
            )
            group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def kind_of(name: str, parameter: nn.Parameter) -> str:
    """`matrix`, `embedding` or `vector`: what decides on weight decay and on the form of the moments."""
    if parameter.ndim < 2:
        return "vector"
    return "embedding" if "embedding" in name else "matrix"


def count_by_role(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, int]:
    """Parameters per role, in the order of ROLES; roles without any are left out."""
    counts = dict.fromkeys(ROLES, 0)
    for name, parameter in named:
        counts[role_of(name)] += parameter.numel()
    return {role: count for role, count in counts.items() if count}


def gates(model: Glide) -> Iterator[tuple[str, float]]:
    """Every attention block's gate σ(logit + offset), by block name. Reads from the device: a sync point."""
    for name, parameter in model.named_parameters():
        if role_of(name) == "gates":
            value = (parameter.detach().float() + model.clip_gate_offset.float()).sigmoid().mean()
            yield name.rpartition(".")[0], value.item()


def gate_offset(config: Config, start: float, step: int) -> float:
    """The offset for update `step` (0-based): a linear ramp from the phase's start value to `train.gate_offset`."""
    target, warmup = config.train.gate_offset, config.train.gate_warmup
    return target if step >= warmup else start + (target - start) * (step + 1) / (warmup + 1)
