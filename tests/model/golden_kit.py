"""The golden numbers' rule: parameters and inputs that names and shapes alone determine."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from glide_ds.model import GlideConfig, create_model
from glide_ds.model.glide import Glide
from glide_ds.tokenizer import encode

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden_public.json").read_text())
KINDS = {"base": "base", "sr": "upsample", "inpaint": "base-inpaint", "srinpaint": "upsample-inpaint"}
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-8}


def raw(name: str, shape: Sequence[int]) -> Tensor:
    """Standard normal values that follow from the name."""
    seed = zlib.crc32((GOLDEN["salt"] + name).encode())
    generator = np.random.Generator(np.random.PCG64(seed))
    return torch.from_numpy(generator.standard_normal(tuple(shape)))


@lru_cache(maxsize=8)
def golden_model(case: str, dtype: torch.dtype) -> Glide:
    """The case's model with its golden parameters, in eval mode; shared between tests."""
    entry = GOLDEN["models"][case]
    config = GlideConfig(KINDS[entry["kind"]], entry["image_size"], **entry["config"])
    model = create_model(config).to(dtype)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            value.copy_(_fill(name, value.shape))
    return model.eval()


def _fill(name: str, shape: torch.Size) -> Tensor:
    values = raw(name, shape)
    if len(shape) >= 2:
        return values / math.sqrt(math.prod(shape[1:]))
    return 1 + 0.1 * values if name.endswith("weight") else 0.1 * values


def captions(indices: Sequence[int | str]) -> tuple[Tensor, Tensor]:
    """Tokens and mask of the golden tokenizer items of those numbers."""
    items = GOLDEN["tokenizer"]["items"]
    return encode(["" if index == "empty" else items[index]["text"] for index in indices])


def golden_inputs(case: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The keyword arguments of the case's forward pass."""
    entry = GOLDEN["models"][case]
    batch, side = entry["batch"], entry["image_size"]
    tokens, mask = captions(entry["captions"])
    inputs = {
        "x": raw(f"{case}/x", (batch, 3, side, side)).to(dtype),
        "timesteps": torch.tensor(entry["timesteps"]),
        "tokens": tokens,
        "mask": mask,
    }
    if "sr" in entry["kind"]:
        inputs["low_res"] = raw(f"{case}/low_res", (batch, 3, side // 4, side // 4)).tanh().to(dtype)
    if "inpaint" in entry["kind"]:
        inputs["inpaint_image"] = raw(f"{case}/inpaint_image", (batch, 3, side, side)).tanh().to(dtype)
        inputs["inpaint_mask"] = (raw(f"{case}/inpaint_mask", (batch, 1, side, side)) > 0).to(dtype)
    return inputs


def check(output: Tensor, expected: dict[str, Any]) -> None:
    """Compare shape, statistics and the sampled values with the tolerance of the output's precision."""
    atol = TOLERANCE[output.dtype]
    assert list(output.shape) == expected["shape"]
    values = output.detach().double().flatten()
    assert values.mean().item() == pytest.approx(expected["mean"], rel=0, abs=atol)
    assert values.std(correction=0).item() == pytest.approx(expected["std"], rel=0, abs=atol)
    assert values.norm().item() == pytest.approx(expected["l2"], rel=0, abs=atol * math.sqrt(len(values)))
    got, want = (values[:4], "first4") if "first4" in expected else (values[expected["idx"]], "val")
    torch.testing.assert_close(got, torch.tensor(expected[want], dtype=torch.float64), rtol=0, atol=atol)
