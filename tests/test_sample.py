"""Drawing from exports and checkpoints: the same picture from both, with and without CLIP."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from train_kit import ARCHITECTURE

from glide_ds.cli import main
from glide_ds.commands import load
from glide_ds.commands.drawing import drawer
from glide_ds.commands.drawing.drawer import Drawer
from glide_ds.commands.drawing.sample import add_arguments, run
from glide_ds.commands.export import _moved, export
from glide_ds.commands.load import Loaded, find_checkpoint, load_model
from glide_ds.data import shapes
from glide_ds.data.pictures.decode import Cropping, DecodeOptions, decode_at
from glide_ds.errors import ConfigError, DataError, WeightsError
from glide_ds.inference.prompts import clip_prompt, read_picture
from glide_ds.model import GlideConfig, create_model
from glide_ds.model.clip import BUILTIN_WEIGHTS, FrozenClip
from glide_ds.model.tensor_files import write_sidecar, write_state

CPU = torch.device("cpu")


def draw(
    source: Path | str, out: Path, *options: str, prompts: tuple[str, ...] = ("a red circle", "a blue square")
) -> np.ndarray:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = [str(source), "--out", str(out), "--steps", "3", *(("--prompt", *prompts) if prompts else ())]
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
        ["--clip_scale", "0.5"],
        ["--clip_guidance", "1"],
        ["--clip_prompt", "a green ring"],
    ):
        assert not np.array_equal(first, draw(exported, tmp_path / "b.png", *options)), options


def test_both_draws_a_row_with_clip_and_one_without(exported: Path, tmp_path: Path):
    both = draw(exported, tmp_path / "a.png", "--clip", "both")
    on, off = (draw(exported, tmp_path / "b.png", "--clip", mode) for mode in ("on", "off"))
    assert both.shape[0] > on.shape[0]
    assert np.array_equal(both[:128], on[:128])  # the labels below say which is which
    below = both.shape[0] // 2
    assert np.array_equal(both[below : below + 128], off[:128])


@pytest.fixture
def pictures(tmp_path: Path) -> tuple[str, str]:
    """A red circle and a blue square, as files."""
    paths = tmp_path / "red circle.png", tmp_path / "blue:square.png"
    for path, index in zip(paths, (1, 2), strict=True):
        Image.fromarray(shapes.draw(index, 48)[0]).save(path)
    return str(paths[0]), str(paths[1])


def test_a_picture_is_a_prompt_with_or_without_a_caption(
    exported: Path, tmp_path: Path, pictures: tuple[str, str], capsys: pytest.CaptureFixture[str]
):
    red, blue = pictures
    alone = draw(exported, tmp_path / "a.png", "--image", red, "--n", "3", prompts=())
    assert alone.shape[1] == 3 * 132
    assert "was trained on text embeddings alone" in capsys.readouterr().out
    assert not np.array_equal(
        alone, draw(exported, tmp_path / "a.png", "--image", blue, "--n", "3", prompts=())
    )
    captioned = draw(exported, tmp_path / "a.png", "--image", red, "--n", "3", prompts=("a red circle",))
    assert not np.array_equal(alone[:128], captioned[:128])
    two = draw(exported, tmp_path / "a.png", "--image", red, "--n", "3")
    assert (two.shape[0] > captioned.shape[0], two.shape[1]) == (True, 3 * 132)  # a row per caption


def test_the_weights_of_prompts_are_shares_of_their_mean(
    exported: Path, tmp_path: Path, pictures: tuple[str, str]
):
    red, blue = pictures
    out = tmp_path / "a.png"

    def drawn(*options: str) -> np.ndarray:
        return draw(exported, out, *options, prompts=())[:128]

    alone = drawn("--image", red)
    assert np.array_equal(drawn("--image", f"{red}:2", f"{blue}:0"), alone)
    half = drawn("--image", red, blue)
    assert np.array_equal(drawn("--image", f"{red}:0.5", f"{blue}:0.5"), half)
    assert not np.array_equal(half, alone)
    assert not np.array_equal(drawn("--image", f"{red}:0.9", f"{blue}:0.1"), half)
    composed = drawn("--clip_mix", "compose", "--image", red, blue)
    assert not np.array_equal(composed, half)
    assert np.array_equal(drawn("--clip_mix", "compose", "--image", f"{red}:0.5", f"{blue}:0.5"), composed)
    mixed = drawn("--image", f"{red}:1", "--clip_prompt", "a ring: green:1")
    assert not np.array_equal(mixed, alone)


def test_a_picture_prompt_is_seen_as_training_saw_its_pictures(pictures: tuple[str, str], tmp_path: Path):
    """The same embedding as the loader, validation and `prepare clip` compute of these bytes."""
    clip = FrozenClip("builtin:tiny")
    pixels = np.pad(shapes.draw(1, 48)[0], ((6, 6), (30, 30), (0, 0)))  # a border, which trimming takes away
    Image.fromarray(pixels).save(tmp_path / "x.jpg", quality=95)
    for cropping in (Cropping(), Cropping("pad", False)):
        seen = read_picture(tmp_path / "x.jpg", 32, cropping).numpy()
        options = DecodeOptions(16, *cropping)
        assert np.array_equal(seen, decode_at((tmp_path / "x.jpg").read_bytes(), options, 16, 32)[1])
        assert clip_prompt(clip, [str(tmp_path / "x.jpg")], [], cropping).shape == (1, 64)


BAD_PROMPTS = [
    (["--image", "missing.png"], DataError, r"missing\.png can't be read"),
    (["--image", "text.png"], DataError, "no picture"),
    (["--image", "RED:0.5", "BLUE"], ConfigError, "1 weights are given for 2"),
    (["--image", "RED:0.5", "--clip_prompt", "a ring"], ConfigError, "'a ring' has none"),
    (["--image", "RED:-1"], ConfigError, "-1"),
    (["--image", "RED:0"], ConfigError, "above 0"),
    (["--image", "RED:nan"], ConfigError, "nan"),
    (["--image", "RED", "--clip", "off"], ConfigError, "would do nothing"),
    (["--clip_scale", "-1", "--image", "RED"], ConfigError, "clip_scale is -1"),
    ([], ConfigError, "nothing to draw"),
]


@pytest.mark.parametrize(("options", "kind", "part"), BAD_PROMPTS)
def test_bad_prompts_are_answered(
    exported: Path,
    tmp_path: Path,
    pictures: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    kind: type[Exception],
    part: str,
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no picture")
    given = [option.replace("RED", pictures[0]).replace("BLUE", pictures[1]) for option in options]
    with pytest.raises(kind, match=part):
        draw(exported, tmp_path / "a.png", *given, prompts=())
    assert not (tmp_path / "a.png").exists()


def test_a_model_without_an_adapter_draws_without_clip(tmp_path: Path):
    config = GlideConfig(**ARCHITECTURE)
    write_state(tmp_path / "plain.pt", create_model(config).state_dict())
    write_sidecar(tmp_path / "plain.pt", {"model": {**ARCHITECTURE}})
    loaded = load_model(str(tmp_path / "plain.pt"), CPU)
    assert loaded.clip is None
    assert not loaded.model.training
    draw(tmp_path / "plain.pt", tmp_path / "a.png")
    for asked in (["--clip", "on"], ["--image", "a.png"], ["--clip_prompt", "a"], ["--clip_scale", "0.5"]):
        with pytest.raises(ConfigError, match="no CLIP adapter"):
            draw(tmp_path / "plain.pt", tmp_path / "a.png", *asked)


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
    upsampler = drawer.load("openai", "openai", CPU).upsampler
    assert upsampler is not None
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

    def as_it_is(self: Drawer, images: torch.Tensor, *args: Any) -> torch.Tensor:
        enlarged.append(images.shape)
        return images

    monkeypatch.setattr(drawer, "load_model", counted)
    monkeypatch.setattr(Drawer, "enlarge", as_it_is)
    draw(exported, tmp_path / "a.png", "--clip", "both", "--upsampler", str(tmp_path / "up.pt"))
    assert loads == [str(exported), str(tmp_path / "up.pt")]
    assert len(enlarged) == 2


def test_steps_of_an_upsampler_are_checked_before_anything_is_loaded(tmp_path: Path):
    with pytest.raises(ConfigError, match="--upsampler_steps and no --upsampler"):
        draw("none.pt", tmp_path / "a.png", "--upsampler_steps", "10,10,0,0,0")
    with pytest.raises(ConfigError, match="'0' is not understood"):
        draw("none.pt", tmp_path / "a.png", "--upsampler", "none.pt", "--upsampler_steps", "0")


def test_an_upsampler_that_does_not_fit_is_told_before_anything_is_drawn(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(drawer, "draw", None)
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
    large = draw(
        exported, tmp_path / "a.png", "--upsampler", str(tmp_path / "up.pt"), "--upsampler_steps", "3,0"
    )
    assert large.shape == draw(exported, tmp_path / "b.png").shape
    assert load_model(str(tmp_path / "up.pt"), CPU).schedule == "linear"


def test_a_source_that_is_none_is_told(tmp_path: Path):
    with pytest.raises(WeightsError, match=r"neither a file, a folder"):
        load_model(str(tmp_path / "none.pt"), CPU)


def test_an_encoder_beside_the_export_is_moved_with_it_and_another_place_can_be_given(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    here, there, elsewhere = tmp_path / "here", tmp_path / "there", tmp_path / "elsewhere"
    for folder in (here / "encoder", elsewhere):
        folder.mkdir(parents=True)
        shutil.copy(BUILTIN_WEIGHTS, folder / "clip.safetensors")
        shutil.copy(f"{BUILTIN_WEIGHTS}.json", folder / "clip.json")
    shutil.copy(exported, here / "x.pt")
    about = json.loads(Path(f"{exported}.json").read_text())
    absolute = {"model": str(elsewhere / "clip.json"), "weights": str(elsewhere / "clip.safetensors")}
    inside = {"model": str(here / "encoder/clip.json"), "weights": str(here / "encoder/clip.safetensors")}
    relative = _moved(about["clip"] | inside, here)
    assert relative == about["clip"] | {"model": "encoder/clip.json", "weights": "encoder/clip.safetensors"}
    assert _moved(about["clip"] | absolute, here) == about["clip"] | absolute
    assert _moved(None, here) is None
    for clip, options in (
        (relative, []),
        (absolute, []),
        (absolute | {"weights": "/nowhere/clip.pt"}, ["--clip_model", absolute["weights"]]),
    ):
        (here / "x.pt.json").write_text(json.dumps(about | {"clip": about["clip"] | clip}))
        here.rename(there)
        words = ["--prompt", "x", "--steps", "2", *options, "--out", str(tmp_path / "x.png")]
        assert main(["sample", str(there / "x.pt"), *words]) == 0
        if options:
            figures = ["--captions", "0", "--samples", "1"]
            assert main(["evaluate", str(there / "x.pt"), *figures, *options]) == 0
            assert main(["evaluate", str(there / "x.pt"), *figures]) == 2
        (tmp_path / "x.png").unlink()
        there.rename(here)
    assert (
        main(["sample", str(here / "x.pt"), "--prompt", "x", "--steps", "2", "--out", str(tmp_path / "x.png")])
        == 2
    )
    assert "sample --clip_model FILE" in capsys.readouterr().err


def test_a_place_of_clip_is_refused_where_there_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plain = tmp_path / "plain.pt"
    model = create_model(GlideConfig(**ARCHITECTURE))  # type: ignore[arg-type]
    write_state(plain, model.state_dict())
    write_sidecar(plain, {"model": asdict(model.config)})
    command = [
        "sample",
        str(plain),
        "--prompt",
        "x",
        "--clip_model",
        "openai",
        "--out",
        str(tmp_path / "x.png"),
    ]
    assert main(command) == 2
    assert "has no CLIP adapter" in capsys.readouterr().err
