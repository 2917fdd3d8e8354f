"""What `glide-ds evaluate` measures: judged drawings and the conditioning gain."""

import numpy as np
import pytest
import torch

from glide_ds.commands import evaluate
from glide_ds.commands.load import Loaded
from glide_ds.config import ClipConfig
from glide_ds.data import shapes
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
    return FrozenClip("builtin:tiny", source="text")


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
        if "clip_kv" in name or "clip_vector.mlp.2" in name:
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
def test_pictures_are_judged_against_their_own_captions(monkeypatch, tmp_path, shift, right):
    def real_pictures(_model, captions, **_):
        drawn = [shapes.draw(shapes.HELD_OUT + i + shift, 32)[0] for i in range(len(captions))]
        return torch.from_numpy(np.stack(drawn))

    monkeypatch.setattr(evaluate, "draw", real_pictures)
    score = evaluate.draw_and_judge(fresh(), None, 16, 1, 3.0, tmp_path / "grid.png")
    assert score.count == 16
    assert (score.colour >= 0.98 and score.shape >= 0.98) is right
    assert (tmp_path / "grid.png").stat().st_size > 1000
