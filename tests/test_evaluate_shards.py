"""glide-ds evaluate --shards: on one rank and on two, resumed, several models and scales, and what it refuses."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks, Warm

from glide_ds import cli
from glide_ds.commands.load import Loaded
from glide_ds.commands.results.heldout import check_models
from glide_ds.errors import ConfigError
from glide_ds.model import GlideConfig, create_model

SHARDS = ["--shards", "builtin:shapes-heldout"]
DRAWN = [*SHARDS, "--features", "builtin:tiny", "--steps", "2", "--samples", "8", "--count", "24"]


def on_a_rank(cache: str, words: list[str]) -> int:
    """`glide-ds evaluate`, with a cache of its own."""
    os.environ["GLIDE_DS_CACHE"] = cache
    return cli.main(["evaluate", *words])


def numbers(values: Any) -> dict[str, float]:
    found = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= {f"{key}/{name}": one for name, one in numbers(value).items()}
        elif isinstance(value, int | float):
            found[key] = float(value)
    return found


@pytest.mark.slow
def test_two_ranks_and_a_resumed_one_measure_what_one_does(warm: Warm, trained: Path, tmp_path: Path):
    models = [str(trained / "run" / "phase3" / f"step-0000000{step}") for step in (4, 5)]
    ranks = Ranks(warm, tmp_path)

    def evaluated(name: str, count: int, *words: str) -> dict[str, float]:
        out = tmp_path / f"{name}.json"
        told = [*models, *DRAWN, "--guidance", "1", "3", "--out", str(out), *words]
        ranks.start(count, f"{__name__}:on_a_rank", str(tmp_path / name), told)
        assert ranks.wait() == [0] * count, ranks.said()
        return numbers(json.loads(out.read_text()))

    one = evaluated("one", 1)
    assert {f"models/{models[1]}/guidance/{scale}/frechet_distance" for scale in (1, 3)} <= one.keys()
    assert f"models/{models[0]}/held_out/gain_with_caption/over_shuffled" in one
    assert f"differences/{models[0]} → {models[1]}/3/coverage/exceeds_its_error" in one
    pictures = tmp_path / "pictures"
    assert evaluated("two", 2, "--out_dir", str(pictures)) == pytest.approx(one, abs=1e-6)
    folders = sorted(pictures.iterdir())
    assert [len(list(folder.iterdir())) for folder in folders] == [24] * 4
    before = {path: path.stat().st_mtime_ns for path in pictures.rglob("*.png")}
    (folders[0] / "000003.png").unlink()
    (folders[1] / "000020.png").write_bytes(b"half")
    assert evaluated("again", 1, "--out_dir", str(pictures)) == pytest.approx(one, abs=1e-6)
    again = {path for path, when in before.items() if path.stat().st_mtime_ns != when}
    assert {path.name for path in again if path.parent == folders[0]} == {f"{n:06d}.png" for n in range(16)}
    assert {path.name for path in again if path.parent == folders[1]} == {f"{n:06d}.png" for n in range(16, 24)}
    assert len(again) == 24
    models, lengths = [str(trained / "run")], ("0.05", "0.1")
    swept = evaluated("swept", 1, "--ema_length", *lengths)
    losses = {swept[f"models/{models[0]} (EMA {length})/held_out/loss"] for length in lengths}
    assert len(losses) == 2
    assert f"differences/{models[0]} (EMA 0.05) → {models[0]} (EMA 0.1)/1/kid/error" in swept


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["a.pt", "b.pt"], "2 models without --shards"),
        (["a.pt", "--guidance", "1", "2"], "2 scales in --guidance without --shards"),
        (["a.pt", "--features", "ViT-L/14"], "--features without --shards"),
        (["a.pt", "--ema_length", "0.05"], "--ema_length without --shards"),
        (["a.pt", *SHARDS, "--count", "5"], "--count 5 is less than 20"),
        (["a.pt", "a.pt", *SHARDS], "a.pt is given twice"),
    ],
)
def test_what_can_be_told_is_told_before_anything_is_loaded(words: list[str], told: str, capsys: Any):
    assert cli.main(["evaluate", *words]) == 2
    assert told in capsys.readouterr().err


def test_without_torchmetrics_it_says_so_before_anything_is_loaded(capsys: Any, monkeypatch: Any):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    assert cli.main(["evaluate", "a.pt", *SHARDS]) == 2
    assert "bash launch/env.sh --extras evaluate" in capsys.readouterr().err


def loaded(**changes: Any) -> Loaded:
    small: dict[str, Any] = {"image_size": 16, "text_ctx": 12, "xf_width": 32, "xf_layers": 1, "xf_heads": 1}
    small |= {
        "model_channels": 32,
        "num_head_channels": 32,
        "num_res_blocks": 1,
        "channel_mult": (1,),
        "attention_ds": (1,),
    }
    return Loaded(create_model(GlideConfig(**small | changes)), "squaredcos_cap_v2", None)


@pytest.mark.parametrize(
    ("second", "given", "told"),
    [
        (loaded(kind="upsample"), {}, "b is of kind upsample"),
        (loaded(image_size=32), {}, r"different side \(16 and 32\)"),
        (loaded()._replace(pictures=loaded().pictures._replace(trim=False)), {}, "different cropping"),
        (loaded(), {"clip_scale": 0.5}, "none of the models has a CLIP adapter"),
        (loaded(), {"clip_guidance": 1.5}, "without a CLIP embedding"),
    ],
)
def test_models_that_can_not_be_judged_alike_are_refused(second: Loaded, given: dict[str, Any], told: str):
    args = argparse.Namespace(**{"clip_scale": 1.0, "clip_guidance": None} | given)
    with pytest.raises(ConfigError, match=told):
        check_models({"a": loaded(), "b": second}, args)
