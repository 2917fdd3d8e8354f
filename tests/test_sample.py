"""Drawing from exports and checkpoints: the same picture from both, with and without CLIP."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from train_kit import ARCHITECTURE

from glide_ds.commands import load, sample
from glide_ds.commands.export import export
from glide_ds.commands.load import Loaded, find_checkpoint, load_model
from glide_ds.commands.sample import add_arguments, load_upsampler, run
from glide_ds.errors import ConfigError, WeightsError
from glide_ds.model import GlideConfig, create_model
from glide_ds.model.tensor_files import write_sidecar, write_state

CPU = torch.device("cpu")


def draw(source: Path | str, out: Path, *options: str) -> np.ndarray:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = [str(source), "--prompt", "a red circle", "a blue square", "--out", str(out), "--steps", "3"]
    run(parser.parse_args([*arguments, *options]))
    return np.asarray(Image.open(out))


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "x.safetensors"
    export(find_checkpoint(trained / "run"), path)
    return path


def test_an_export_and_its_checkpoint_draw_the_same_picture(trained: Path, exported: Path, tmp_path: Path):
    of_file = draw(exported, tmp_path / "deeper" / "a.png")
    of_folder = draw(find_checkpoint(trained / "run").path, tmp_path / "b.png")
    of_run = draw(trained / "run", tmp_path / "c.png")
    assert np.array_equal(of_file, of_folder)
    assert np.array_equal(of_file, of_run)
    assert np.unique(of_file).size > 20


def test_the_options_change_the_picture(exported: Path, tmp_path: Path):
    first = draw(exported, tmp_path / "a.png")
    assert np.array_equal(first, draw(exported, tmp_path / "a.png"))
    for options in (
        ["--seed", "1"],
        ["--guidance", "1"],
        ["--sampler", "ddim"],
        ["--steps", "4"],
        ["--clip", "off"],
    ):
        assert not np.array_equal(first, draw(exported, tmp_path / "b.png", *options)), options


def test_both_draws_a_row_with_clip_and_one_without(exported: Path, tmp_path: Path):
    both = draw(exported, tmp_path / "a.png", "--clip", "both")
    on, off = (draw(exported, tmp_path / "b.png", "--clip", mode) for mode in ("on", "off"))
    assert both.shape[0] > on.shape[0]
    assert np.array_equal(both[:128], on[:128])  # the labels below say which is which
    below = both.shape[0] // 2
    assert np.array_equal(both[below : below + 128], off[:128])


def test_a_model_without_an_adapter_draws_without_clip(tmp_path: Path):
    config = GlideConfig(**ARCHITECTURE)
    write_state(tmp_path / "plain.pt", create_model(config).state_dict())
    write_sidecar(tmp_path / "plain.pt", {"model": {**ARCHITECTURE}})
    loaded = load_model(str(tmp_path / "plain.pt"), CPU)
    assert loaded.clip is None
    assert not loaded.model.training
    draw(tmp_path / "plain.pt", tmp_path / "a.png")
    with pytest.raises(ConfigError, match="no CLIP adapter"):
        draw(tmp_path / "plain.pt", tmp_path / "a.png", "--clip", "on")


def test_the_schedule_of_the_export_is_used(exported: Path, trained: Path):
    for source in (exported, trained / "run"):
        loaded = load_model(str(source), CPU)
        assert loaded.schedule == "squaredcos_cap_v2"
        assert loaded.clip is not None
        assert loaded.clip.model == "builtin:tiny"


UPSAMPLER = {
    **ARCHITECTURE,
    "kind": "upsample",
    "image_size": 64,
    "num_head_channels": 32,
    "channel_mult": [1, 1],
}


def test_openai_is_the_published_model_of_the_kind_asked_for(monkeypatch: pytest.MonkeyPatch):
    sizes = {"base": GlideConfig(**ARCHITECTURE), "upsample": GlideConfig(**UPSAMPLER)}
    monkeypatch.setattr(GlideConfig, "published", staticmethod(sizes.__getitem__))
    fetched = []
    monkeypatch.setattr(load, "load_weights", lambda model, source: fetched.append((source, model.config.kind)))
    assert load_model("openai", CPU).model.config == sizes["base"]
    upsampler = load_upsampler("openai", load_model("openai", CPU), CPU)
    assert (upsampler.model.config, upsampler.schedule) == (sizes["upsample"], "linear")
    assert fetched == [("openai", "base"), ("openai", "base"), ("openai", "upsample")]


def test_the_upsampler_is_loaded_once_for_both_rows(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_state(tmp_path / "up.pt", create_model(GlideConfig(**UPSAMPLER)).state_dict())
    write_sidecar(tmp_path / "up.pt", {"model": UPSAMPLER})
    loads, enlarged = [], []

    def counted(source: str, *args: Any, **options: Any) -> Loaded:
        loads.append(source)
        return load_model(source, *args, **options)

    def as_it_is(images: torch.Tensor, *args: Any) -> torch.Tensor:
        enlarged.append(images.shape)
        return images

    monkeypatch.setattr(sample, "load_model", counted)
    monkeypatch.setattr(sample, "enlarge", as_it_is)
    draw(exported, tmp_path / "a.png", "--clip", "both", "--upsampler", str(tmp_path / "up.pt"))
    assert loads == [str(exported), str(tmp_path / "up.pt")]
    assert len(enlarged) == 2


def test_an_upsampler_that_does_not_fit_is_told_before_anything_is_drawn(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sample, "draw", None)
    with pytest.raises(ConfigError, match="reads 4 px"):
        draw(exported, tmp_path / "a.png", "--upsampler", str(exported))


def test_paths_below_the_home_folder(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A shell expands the ~ of a word of its own only."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for file in (exported, exported.with_name(exported.name + ".json")):
        (tmp_path / file.name).symlink_to(file)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args([f"~/{exported.name}", "--prompt", "x", "--out=~/new/a.png", "--steps=2"]))
    assert (tmp_path / "new" / "a.png").exists()


@pytest.mark.slow
def test_an_upsampler_enlarges_four_times(exported: Path, tmp_path: Path):
    write_state(tmp_path / "up.pt", create_model(GlideConfig(**UPSAMPLER)).state_dict())
    write_sidecar(tmp_path / "up.pt", {"model": UPSAMPLER, "schedule": "linear"})
    large = draw(exported, tmp_path / "a.png", "--upsampler", str(tmp_path / "up.pt"))
    assert large.shape == draw(exported, tmp_path / "b.png").shape
    assert load_model(str(tmp_path / "up.pt"), CPU).schedule == "linear"


def test_a_source_that_is_none_is_told(tmp_path: Path):
    with pytest.raises(WeightsError, match=r"neither a file, a folder"):
        load_model(str(tmp_path / "none.pt"), CPU)
