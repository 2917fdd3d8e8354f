"""What `glide-ds evaluate` measures: judged drawings and the conditioning gain."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

from glide_ds.commands import evaluate
from glide_ds.commands.load import Loaded
from glide_ds.config import ClipConfig
from glide_ds.data import shapes
from glide_ds.inference import judged
from glide_ds.model import GlideConfig, create_model
from glide_ds.model.clip import FrozenClip

SMALL = GlideConfig(
    image_size=32,
    text_ctx=24,
    xf_width=32,
    xf_layers=1,
    xf_heads=1,
    model_channels=32,
    num_res_blocks=1,
    channel_mult=(1, 1),
    attention_ds=(2,),
    num_head_channels=32,
    clip_dim=64,
)


@pytest.fixture(scope="module")
def clip():
    return FrozenClip("builtin:tiny", source="both")


def fresh() -> Loaded:
    torch.manual_seed(0)
    model = create_model(SMALL).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("proj_out.weight", "out.2.weight")):  # zero in a fresh model: nothing would show
            torch.nn.init.normal_(parameter, std=0.05)
    return Loaded(model, "squaredcos_cap_v2", ClipConfig(model="builtin:tiny"))


def test_an_adapter_that_learned_nothing_gains_nothing(clip):
    loaded = fresh()
    figures = evaluate.held_out_shapes(loaded, clip, 8).measure(loaded.model)
    assert figures.gain_without_caption == evaluate.Gain(over_shuffled=0, over_off=0)
    assert figures.loss == figures.loss_clip_off


def test_an_adapter_that_reads_the_embedding_is_told_from_a_shuffled_one(clip):
    loaded = fresh()
    held_out = evaluate.held_out_shapes(loaded, clip, 8)
    before = held_out.loss_clip_off(loaded.model)
    for name, parameter in loaded.model.named_parameters():
        if "clip_kv" in name or "clip_vector.out" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    loaded.model.clip_gate_offset.fill_(10.0)
    figures = held_out.measure(loaded.model)
    gain = figures.gain_with_caption
    assert gain is not None
    assert gain.over_shuffled != 0
    assert gain.over_off != 0
    assert figures.gain_without_caption != gain
    assert figures.loss != before
    assert figures.loss_clip_off == before  # with CLIP off the adapter changes nothing


@pytest.mark.parametrize(("shift", "right"), [(0, True), (1, False)])
def test_pictures_are_judged_against_their_own_captions(shift, right):
    drawn, captions = zip(*(shapes.draw(shapes.HELD_OUT + i, 32) for i in range(17)), strict=True)
    score = judged.judged(torch.from_numpy(np.stack(drawn[shift : shift + 16])), list(captions[:16]))
    assert score.count == 16
    assert (score.colour >= 0.98 and score.shape >= 0.98) is right


def test_each_way_is_drawn_with_what_it_says_and_without_the_rest(clip, monkeypatch, tmp_path):
    asked = []

    def scenes(_model, captions, *, clip_embedding, **options):
        asked.append((captions, clip_embedding, options))
        return torch.zeros(len(captions), 32, 32, 3, dtype=torch.uint8)

    monkeypatch.setattr(judged, "draw", scenes)
    drawing = judged.Drawing("linear", 2, clip_scale=0.5, clip_guidance=2.0)
    found = evaluate.evaluate(fresh(), clip, 4, drawing, 8, tmp_path / "grid.png")
    captions = [shapes.caption(shapes.scene(shapes.HELD_OUT + i)) for i in range(4)]
    pictures = np.stack([shapes.draw(shapes.HELD_OUT + i, 32)[0] for i in range(4)])
    text, image = clip.encode_text(captions), clip.encode_image(torch.from_numpy(pictures))
    wanted = [(captions, text), (captions, None), ([""] * 4, text), ([""] * 4, image), ([""] * 4, None)]
    for (told, embedding, options), (caption, right) in zip(asked, wanted, strict=True):
        assert told == caption
        assert (embedding is None) == (right is None)
        assert options["clip_guidance"] == (None if right is None else 2.0)
        if right is not None:
            torch.testing.assert_close(embedding, right)
    assert all(options["clip_scale"] == 0.5 for _, _, options in asked)
    for name in ("score", "score_caption_only", "score_clip_text", "score_clip_image", "score_off"):
        assert asdict(found)[name].keys() == {"count", "colour", "shape", "position"}
    assert Image.open(tmp_path / "grid.png").height > 5 * 128


def test_a_model_without_adapter_has_no_figures_of_clip(monkeypatch):
    loaded = fresh()._replace(clip=None)
    monkeypatch.setattr(judged, "draw", lambda _, captions, **__: torch.zeros(len(captions), 32, 32, 3).byte())
    found = evaluate.evaluate(loaded, None, 4, judged.Drawing("linear", 2), 8)
    assert found.score == found.score_caption_only
    assert found.score_off is not None
    assert (found.score_clip_text, found.score_clip_image, found.gain_of_pictures) == (None, None, None)
