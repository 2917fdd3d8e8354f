"""CLIP conditioning: nothing at first, additive later, dropped by a mask, reached by gradients."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_glide import CLIP_DIM, tiny_embeddings, tiny_inputs, tiny_model
from torch import Tensor

from glide_ds.config import Config
from glide_ds.model.clip_adapter import ClipAdapter, ClipVector, unit_rms
from glide_ds.model.dual_attention import DualAttention
from glide_ds.model.glide import Glide
from glide_ds.model.tensor_files import StateFile
from glide_ds.model.unet import ClipContext, Context
from glide_ds.model.weights import load_state
from glide_ds.training.speed.flops import step_work
from glide_ds.types import GlideConfig


def clip_model(trained: bool = True, **changes) -> Glide:
    """`trained` gives all that starts at zero something to say and opens the gates."""
    model = tiny_model(clip_dim=CLIP_DIM, **changes)
    if trained:
        with torch.no_grad():
            model.clip_gate_offset.fill_(10.0)
            for name, parameter in model.named_parameters():
                if "clip_kv" in name or "clip_vector.out" in name:
                    parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("offset", [0.0, 10.0, 1e4])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e6])
def test_a_fresh_model_equals_plain_glide_bit_for_bit(offset: float, scale: float) -> None:
    plain, model = tiny_model(), clip_model(trained=False)
    loaded = model.load_state_dict(plain.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    model.clip_gate_offset.fill_(offset)
    inputs = tiny_inputs(model)
    expected = plain(**inputs)
    assert torch.equal(model(**inputs), expected)
    output = model(**inputs, clip_embedding=scale * tiny_embeddings(), clip_drop=torch.tensor([True, False]))
    assert torch.equal(output, expected)


def test_without_embedding_the_branch_is_not_run() -> None:
    model = clip_model()
    model.clip_adapter.register_forward_hook(lambda *_: pytest.fail("the adapter ran"))
    model.clip_vector.register_forward_hook(lambda *_: pytest.fail("clip_vector ran"))
    model.middle_block[1].clip_kv.register_forward_hook(lambda *_: pytest.fail("clip_kv ran"))
    inputs = tiny_inputs(model)
    plain = tiny_model()
    plain.load_state_dict({name: v for name, v in model.state_dict().items() if "clip" not in name})
    assert torch.equal(model(**inputs), plain(**inputs))


def test_the_gate_adds_a_softmax_over_clip_tokens_alone() -> None:
    torch.manual_seed(0)
    block = DualAttention(channels=64, head_channels=16, text_width=24, clip_width=20)
    for layer in (block.proj_out, block.clip_kv):
        torch.nn.init.normal_(layer.weight, std=0.2)
    x, text, clip = torch.randn(2, 64, 4, 4), torch.randn(2, 5, 24), torch.randn(2, 8, 20)
    offset = torch.tensor(9.0)
    with torch.no_grad():
        block.clip_gate.fill_(-8.0)
    q = block.qkv(block.norm(x).flatten(2).transpose(1, 2)).unflatten(-1, (4, 3, 16))[:, :, :, 0]
    k, v = block.clip_kv(clip).unflatten(-1, (4, 2, 16)).unbind(3)
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(16**-0.5).softmax(dim=-1)
    attended = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
    added = F.linear(attended, block.proj_out.weight.squeeze(-1)).transpose(1, 2).reshape(x.shape)
    expected = block(x, Context(text)) + torch.sigmoid(torch.tensor(1.0)) * added
    torch.testing.assert_close(
        block(x, Context(text, ClipContext(clip, offset))), expected, rtol=1e-4, atol=1e-5
    )


def test_gates_are_stored_closed_and_opened_by_the_offset() -> None:
    model = clip_model(trained=False)
    logits = [parameter for name, parameter in model.named_parameters() if name.endswith("clip_gate")]
    assert len(logits) == 4 + 2  # each attention block of the tiny model, the adapter's tokens, its vector
    assert all(logit.shape == (1,) and logit.item() == -10 for logit in logits)
    assert model.state_dict()["clip_gate_offset"].shape == ()
    assert model.state_dict()["clip_gate_offset"] == 0

    trained = clip_model()
    inputs = tiny_inputs(trained) | {"clip_embedding": tiny_embeddings()}
    opened = trained(**inputs)
    trained.clip_gate_offset.zero_()
    closed = trained(**inputs)
    plain = trained(**(inputs | {"clip_embedding": None}))
    assert (closed - plain).norm() < 1e-3 * (opened - plain).norm()
    assert (opened - plain).norm() > 1e-3 * plain.norm()


def test_only_the_direction_of_an_embedding_counts() -> None:
    model = clip_model()
    inputs = tiny_inputs(model)
    embedding = tiny_embeddings()
    expected = model(**inputs, clip_embedding=embedding)
    torch.testing.assert_close(model(**inputs, clip_embedding=100 * embedding), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(**inputs, clip_embedding=embedding.flip(0)), expected, atol=1e-4)
    torch.testing.assert_close(unit_rms(embedding).square().mean(dim=1), torch.ones(2))


def test_half_precision_embeddings_from_a_store_are_taken() -> None:
    model = clip_model()
    inputs = tiny_inputs(model)
    expected = model(**inputs, clip_embedding=tiny_embeddings())
    output = model(**inputs, clip_embedding=tiny_embeddings().half())
    torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-2)
    assert not unit_rms(torch.zeros(1, CLIP_DIM).half()).any()  # 0 / 0 where 1e-12 is not representable


def test_dropped_rows_forget_their_embedding_and_no_others() -> None:
    model = clip_model()
    inputs = tiny_inputs(model)
    drop = torch.tensor([True, False])
    first = model(**inputs, clip_embedding=tiny_embeddings(seed=1), clip_drop=drop)
    second = model(**inputs, clip_embedding=tiny_embeddings(seed=2), clip_drop=drop)
    assert torch.equal(first[0], second[0])
    assert not torch.allclose(first[1], second[1], atol=1e-4)
    null = model.clip_adapter.clip_null_embedding
    with torch.no_grad():
        null.copy_(unit_rms(tiny_embeddings(seed=5))[0])
    given = model(**inputs, clip_embedding=tiny_embeddings(seed=5))
    dropped = model(**inputs, clip_embedding=tiny_embeddings(seed=1), clip_drop=drop)
    torch.testing.assert_close(dropped[0], given[0], rtol=1e-4, atol=1e-5)


def test_the_adapter_is_residual_and_gated_and_sees_the_caption() -> None:
    torch.manual_seed(0)
    adapter = ClipAdapter(CLIP_DIM, width=16, tokens=4, emb_width=24)
    embedding, kept = tiny_embeddings(), torch.zeros(2, dtype=torch.bool)
    x, caption = unit_rms(embedding), torch.randn(2, 24)
    blind = adapter.proj(x) + torch.sigmoid(torch.tensor(2.0)) * adapter.mlp(adapter.norm(x))

    def tokens() -> Tensor:
        return adapter(adapter.read(embedding, kept), caption, torch.tensor(12.0))

    torch.testing.assert_close(tokens(), adapter.token_norm(adapter.to_tokens(blind).reshape(2, 4, 16)))
    torch.nn.init.normal_(adapter.from_caption.weight)
    h = blind + F.layer_norm(caption, (24,)) @ adapter.from_caption.weight.T
    torch.testing.assert_close(tokens(), adapter.token_norm(adapter.to_tokens(h).reshape(2, 4, 16)))


def test_the_vector_is_a_gated_mlp_of_embedding_and_caption_and_nothing_at_first() -> None:
    torch.manual_seed(0)
    vector = ClipVector(CLIP_DIM, emb_width=16)
    x, caption, offset = unit_rms(tiny_embeddings()), torch.randn(2, 16), torch.tensor(12.0)
    assert not vector(x, caption, offset).any()
    for layer in (vector.out, vector.from_caption):
        torch.nn.init.normal_(layer.weight)
    hidden = F.silu(vector.from_clip(x) + F.layer_norm(caption, (16,)) @ vector.from_caption.weight.T)
    expected = torch.sigmoid(torch.tensor(2.0)) * vector.out(hidden)
    torch.testing.assert_close(vector(x, caption, offset), expected)
    assert not torch.allclose(vector(x, caption.flip(0), offset), expected, atol=1e-3)


@pytest.mark.parametrize("left", ["clip_kv", "clip_vector.out"])
def test_each_way_conditions_by_itself_and_the_scale_is_over_both(left: str) -> None:
    model = clip_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ("clip_kv" in name or "clip_vector.out" in name) and left not in name:
                parameter.zero_()
    inputs = tiny_inputs(model)
    plain = model(**inputs)
    given = {**inputs, "clip_embedding": tiny_embeddings()}
    assert (model(**given) - plain).norm() > 1e-3 * plain.norm()
    assert torch.equal(model(**given, clip_scale=0.0), plain)
    moved = [(model(**given, clip_scale=scale) - plain).norm().item() for scale in (0.0, 0.1, 0.5)]
    assert moved == sorted(moved)
    assert moved[1] < 0.5 * moved[2]


@pytest.mark.parametrize("dial", ["none", "blocks"])
def test_every_clip_parameter_learns_within_three_steps(dial: str) -> None:
    """From a fresh model with open gates; the null embedding through the dropped row."""
    model = clip_model(trained=False).train()
    model.recompute(dial)
    model.clip_gate_offset.fill_(10.0)
    clip = {name: parameter for name, parameter in model.named_parameters() if "clip" in name}
    optimizer = torch.optim.AdamW(clip.values(), lr=1e-3)
    inputs = tiny_inputs(model) | {"clip_embedding": tiny_embeddings()}
    inputs["clip_drop"] = torch.tensor([True, False])
    moved: set[str] = set()
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs).square().mean().backward()
        moved |= {name for name, p in clip.items() if p.grad is not None and p.grad.any()}
        optimizer.step()
    assert moved == set(clip)


def test_a_step_without_drops_has_the_same_graph() -> None:
    """Ranks whose rows keep CLIP must still produce a (zero) gradient for the null embedding."""
    model = clip_model().train()
    model(**tiny_inputs(model), clip_embedding=tiny_embeddings()).sum().backward()
    gradient = model.clip_adapter.clip_null_embedding.grad
    assert gradient is not None
    assert not gradient.any()


def test_the_vector_costs_the_published_model_next_to_nothing() -> None:
    with torch.device("meta"):
        model = Glide(GlideConfig.published("base", clip_dim=768))
    parts = (model.clip_vector, model.clip_adapter.from_caption, model.clip_adapter.caption_norm)
    count = sum(parameter.numel() for part in parts for parameter in part.parameters())
    assert count < 2_500_000  # of 6 million allowed
    assert 2 * count < 0.001 * step_work(model.config, Config()) / 3  # one multiply-add each, per image


def test_weights_from_before_the_caption_was_seen_load_and_are_told() -> None:
    model = clip_model()
    later = ("clip_vector", "clip_adapter.from_caption", "clip_adapter.caption_norm")
    before = {name: value for name, value in model.state_dict().items() if not name.startswith(later)}
    fresh = clip_model(trained=False)
    report = load_state(fresh, StateFile(Path("before.pt"), before), source="before.pt")
    assert all(name.startswith(later) for name in report.kept)
    assert "kept initial values" in report.paragraph()
    inputs = tiny_inputs(model) | {"clip_embedding": tiny_embeddings()}
    with torch.no_grad():
        model.clip_adapter.from_caption.weight.zero_()
        model.clip_vector.out.weight.zero_()
        model.clip_vector.out.bias.zero_()
    assert torch.equal(fresh(**inputs), model(**inputs))
