"""Filling in a part of a picture by `glide-ds sample`: what is known stays, what does not fit is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from train_kit import ARCHITECTURE

from glide_ds.cli import main
from glide_ds.commands.drawing.drawer import load
from glide_ds.errors import DataError
from glide_ds.inference import enlarge
from glide_ds.inference.canvas import read_canvas
from glide_ds.model import GlideConfig, create_model
from glide_ds.model.tensor_files import write_sidecar, write_state

SIDE = ARCHITECTURE["image_size"]


def model_of(folder: Path, **changes: object) -> Path:
    architecture = {**ARCHITECTURE, **changes}
    path = folder / f"{architecture.get('kind', 'base')}.pt"
    write_state(path, create_model(GlideConfig(**architecture)).state_dict())
    write_sidecar(path, {"model": architecture})
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """Four times the model's side, its left half to be drawn anew."""
    pixels = np.random.default_rng(0).integers(256, size=(4 * SIDE, 4 * SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    mask = np.zeros((4 * SIDE, 4 * SIDE), np.uint8)
    mask[:, : 2 * SIDE] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path / "picture.png"


def sample(model: Path, *words: object) -> int:
    return main([str(word) for word in ("sample", model, "--steps", 2, *words)])


def kept(path: Path, side: int, picture: Path) -> bool:
    canvas = read_canvas([(str(picture), str(picture.parent / "mask.png"))], side)
    assert canvas is not None
    drawn, known = np.asarray(Image.open(path).convert("RGB"))[:side, :side], canvas.known[0].bool().numpy()
    assert known[:, side // 2 + 2 :].all()  # a reduced pixel beside the line may hold some of what is hidden
    assert not known[:, : side // 2].any()
    assert (drawn[~known] != canvas.images[0].numpy()[~known]).mean() > 0.9
    return np.array_equal(drawn[known], canvas.images[0].numpy()[known])


def test_known_pixels_stay_in_a_grid_in_files_and_beside_prompts_without_a_mask(tmp_path: Path, picture: Path):
    model, mask = model_of(tmp_path, kind="base-inpaint"), tmp_path / "mask.png"
    assert sample(model, "--inpaint", picture, "--mask", mask, "--out", tmp_path / "grid.png") == 0
    assert np.unique(np.asarray(Image.open(tmp_path / "grid.png"))).size > 20
    lines = [{"prompt": "a", "image": "picture.png", "mask": "mask.png"}, {"prompt": "b"}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert sample(model, "--prompts", tmp_path / "p.jsonl", "--out_dir", tmp_path / "out") == 0
    assert kept(tmp_path / "out" / "000001.png", SIDE, picture)
    assert not kept(tmp_path / "out" / "000002.png", SIDE, picture)
    told = json.loads((tmp_path / "out" / "index.jsonl").read_text().splitlines()[0])
    assert told["inpaint"] == [str(picture), str(mask)]
    assert told["image"] == []


@pytest.mark.parametrize("kind", ["upsample", "upsample-inpaint"])
def test_enlarged_pictures_keep_what_is_known_at_their_own_side(
    tmp_path: Path, picture: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(enlarge, "STEPS", 2)
    upsampler = model_of(tmp_path, kind=kind, image_size=4 * SIDE)
    drawer = load(str(model_of(tmp_path, kind="base-inpaint")), str(upsampler), "cpu")
    given = (str(picture), str(tmp_path / "mask.png"))
    small = drawer.draw_small(["a"], [0], steps=2, files=[given])
    large = drawer.enlarge(small, ["a"], [0], files=[given])
    Image.fromarray(large[0].numpy()).save(tmp_path / "large.png")
    assert kept(tmp_path / "large.png", 4 * SIDE, picture)


def test_what_does_not_fit_is_refused_before_anything_is_drawn(
    tmp_path: Path, picture: Path, capsys: pytest.CaptureFixture[str]
):
    model, mask = model_of(tmp_path, kind="base-inpaint"), tmp_path / "mask.png"
    Image.new("L", (8, 8), 255).save(tmp_path / "small.png")
    Image.new("L", Image.open(picture).size).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("no picture")
    plain = model_of(tmp_path)
    for source, words, told in (
        (model, ["--inpaint", picture], "--mask"),
        (model, ["--mask", mask, "--prompt", "a"], "--inpaint"),
        (model, ["--inpaint", picture, "--mask", tmp_path / "small.png"], "8 × 8 pixels"),
        (model, ["--inpaint", picture, "--mask", tmp_path / "black.png"], "white nowhere"),
        (model, ["--inpaint", picture, "--mask", tmp_path / "text.png"], "is no picture"),
        (model, ["--inpaint", tmp_path / "no.png", "--mask", mask], "can't be read"),
        (plain, ["--inpaint", picture, "--mask", mask], "base-inpaint"),
    ):
        assert sample(source, *words, "--out", tmp_path / "a.png") == 2
        assert told in capsys.readouterr().err
        assert not (tmp_path / "a.png").exists()
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "mask": "mask.png"}\n')
    assert sample(model, "--prompts", tmp_path / "p.jsonl", "--out_dir", tmp_path / "out") == 2
    assert "line 2: mask beside 0 images" in capsys.readouterr().err


def test_a_turned_picture_and_a_rectangle_are_cut_with_their_mask(tmp_path: Path):
    """EXIF turns the picture; of a rectangle the middle is taken, of both."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn: 20 × 40 pixels when upright
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    mask = np.zeros((40, 20), np.uint8)
    mask[10:20] = 255  # of the square in the middle, rows 10 to 30, the upper half
    Image.fromarray(mask).save(tmp_path / "m.png")
    canvas = read_canvas([(str(tmp_path / "a.png"), str(tmp_path / "m.png")), None], 10)
    assert canvas is not None
    assert canvas.known[0, 6:].all()
    assert not canvas.known[0, :5].any()
    assert not canvas.known[1].any()
    Image.fromarray(mask.T).save(tmp_path / "n.png")
    with pytest.raises(DataError, match="40 × 20"):
        read_canvas([(str(tmp_path / "a.png"), str(tmp_path / "n.png"))], 10)
