"""All four kinds through a run's whole life: trained, saved, resumed, exported for stock GLIDE code, drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from train_kit import ARCHITECTURE, make_config, metrics, shake, train_phase

from glide_ds.commands.export import export
from glide_ds.commands.load import find_checkpoint, load_model
from glide_ds.inference.draw import draw
from glide_ds.inference.enlarge import enlarge
from glide_ds.inference.inpaint import fill
from glide_ds.model import GlideConfig, create_model
from glide_ds.types import KINDS

pytestmark = [pytest.mark.usefixtures("group"), pytest.mark.slow]
IMAGES = torch.randint(256, (2, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
KNOWN = torch.zeros(2, 16, 16, dtype=torch.uint8)
KNOWN[:, :, :8] = 1


@pytest.mark.parametrize("phase", ["base", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_trained_resumed_exported_and_drawn(tmp_path: Path, kind: str, phase: str):
    settings: dict[str, Any] = {
        "model": {"architecture": {**ARCHITECTURE, "kind": kind}},
        "checkpoint": {"every": 1},
        "validation": {"every": 2, "samples": 4, "drawn": 2},
        "log": {"samples_every": 2, "samples": 2, "sample_steps": 2},
    }
    if kind.startswith("upsample"):
        settings["data"] = {"degrade": {"share": 0.5}}
    train_phase(make_config(tmp_path, phase, train={"steps": 2}, **settings), shake)
    model = train_phase(make_config(tmp_path, phase, train={"steps": 3}, **settings))
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    measured = lines[1]["validation"]
    if kind.startswith("upsample"):
        for name in ("enlarged_clean", "enlarged_degraded"):
            assert measured[name]["count"] == 2
            assert measured[name]["psnr"] != measured[name]["psnr_bicubic"]
        assert measured["enlarged_clean"]["psnr_bicubic"] > measured["enlarged_degraded"]["psnr_bicubic"]
    else:
        assert measured["score_off"]["count"] == 2
    assert list((tmp_path / "run" / "samples").iterdir())
    export(find_checkpoint(tmp_path / "run"), tmp_path / "x.pt")
    state = torch.load(tmp_path / "x.pt", weights_only=True)
    assert any("clip" in name for name in state) == (phase == "full")
    stock = create_model(GlideConfig(**{**ARCHITECTURE, "kind": kind}))
    stock.load_state_dict({name: value for name, value in state.items() if "clip" not in name}, strict=True)
    loaded = load_model(str(tmp_path / "x.pt"), torch.device("cpu"))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    captions, low_res = ["a red circle", ""], IMAGES[:, ::4, ::4]
    drawing: dict[str, Any] = {"schedule": loaded.schedule, "steps": 2}
    if kind == "upsample":
        drawn = enlarge(loaded.model, low_res, captions, schedule=loaded.schedule)
    elif loaded.model.config.inpaints:
        if kind == "upsample-inpaint":
            drawing["low_res"] = low_res.movedim(3, 1) / 127.5 - 1
        drawn = fill(loaded.model, IMAGES, KNOWN, captions, **drawing)
        assert torch.equal(drawn[KNOWN.bool()], IMAGES[KNOWN.bool()])
    else:
        drawn = draw(loaded.model, captions, **drawing)
    assert (drawn.shape, drawn.dtype) == ((2, 16, 16, 3), torch.uint8)
