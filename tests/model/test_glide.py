"""The whole model: names and sizes of the published files, inputs, gradients, precision."""

from collections.abc import Iterator

import pytest
import torch
from tiny_glide import CLIP_DIM, tiny_config, tiny_embeddings, tiny_inputs, tiny_model

from glide_ds.errors import ConfigError, GlideError
from glide_ds.model import GlideConfig, create_model
from glide_ds.tokenizer import N_VOCAB, encode

PUBLISHED = {  # kind: state_dict entries, parameters
    "base": (783, 385_030_726),
    "base-inpaint": (783, 385_037_638),
    "upsample": (797, 398_361_286),
    "upsample-inpaint": (797, 398_368_198),
}


def parameter_pair(*names: str) -> list[str]:
    return [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]


def res_block(prefix: str, changes_width: bool) -> list[str]:
    parts = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3"]
    return parameter_pair(*(f"{prefix}.{part}" for part in parts + ["skip_connection"] * changes_width))


def attention(prefix: str) -> list[str]:
    return parameter_pair(*(f"{prefix}.{part}" for part in ("norm", "qkv", "encoder_kv", "proj_out")))


def text_names(layers: int) -> list[str]:
    parts = ["attn.c_qkv", "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2"]
    blocks = [f"transformer.resblocks.{layer}.{part}" for layer in range(layers) for part in parts]
    embeddings = ["token_embedding.weight", "positional_embedding", "padding_embedding"]
    return parameter_pair(*blocks, "final_ln", "transformer_proj") + embeddings


def unet_names(
    attention_inputs: list[int], attention_outputs: list[int], blocks: int, mults: tuple[int, ...]
) -> Iterator[str]:
    """The grammar of the published files, written out by block number instead of built by level."""
    yield from parameter_pair("time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2")
    for place in (0, 2):
        yield from res_block(f"middle_block.{place}", changes_width=False)
    yield from attention("middle_block.1")
    for number in range(1, len(mults) * (blocks + 1)):
        level, place = divmod(number - 1, blocks + 1)
        changes_width = place == 0 and level > 0 and mults[level] != mults[level - 1]
        yield from res_block(f"input_blocks.{number}.0", changes_width)  # place == blocks: the down-ResBlock
        if number in attention_inputs:
            yield from attention(f"input_blocks.{number}.1")
    for number in range(len(mults) * (blocks + 1)):
        yield from res_block(f"output_blocks.{number}.0", changes_width=True)  # a skip is concatenated
        if number in attention_outputs:
            yield from attention(f"output_blocks.{number}.1")
        if number % (blocks + 1) == blocks and number < len(mults) * (blocks + 1) - 1:
            place = 2 if number in attention_outputs else 1
            yield from res_block(f"output_blocks.{number}.{place}", changes_width=False)


def published_names(kind: str) -> list[str]:
    if kind.startswith("upsample"):
        unet = unet_names([10, 11, 13, 14, 16, 17], list(range(9)), 2, (1, 1, 2, 2, 4, 4))
    else:
        unet = unet_names([5, 6, 7, 9, 10, 11, 13, 14, 15], list(range(12)), 3, (1, 2, 3, 4))
    return [*unet, *text_names(16)]


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models without memory. normal_ there imports half of torch (5 s of CPU) to do nothing."""
    monkeypatch.setattr(torch.nn.init, "normal_", lambda tensor, **_: tensor)
    with torch.device("meta"):
        yield


@pytest.mark.usefixtures("meta")
@pytest.mark.parametrize("kind", list(PUBLISHED))
def test_names_and_sizes_are_the_published_ones(kind: str) -> None:
    entries, parameters = PUBLISHED[kind]
    state = create_model(GlideConfig.published(kind)).state_dict()
    names = published_names(kind)
    assert len(names) == len(set(names)) == entries
    assert set(state) == set(names)
    assert sum(value.numel() for value in state.values()) == parameters


@pytest.mark.usefixtures("meta")
def test_shapes_are_the_published_ones() -> None:
    state = create_model(GlideConfig()).state_dict()
    assert {
        "input_blocks.5.1.qkv.weight": (3 * 384, 384, 1),
        "input_blocks.5.1.encoder_kv.weight": (2 * 384, 512, 1),
        "input_blocks.5.1.proj_out.weight": (384, 384, 1),
        "input_blocks.5.0.skip_connection.weight": (384, 192, 1, 1),
        "input_blocks.5.0.emb_layers.1.weight": (2 * 384, 768),
        "token_embedding.weight": (N_VOCAB, 512),
        "padding_embedding": (128, 512),
        "transformer_proj.weight": (768, 512),
        "out.2.weight": (6, 192, 3, 3),
    }.items() <= {name: tuple(value.shape) for name, value in state.items()}.items()


def test_clip_adds_only_names_with_clip_in_them() -> None:
    plain = create_model(tiny_config()).state_dict()
    with_clip = create_model(tiny_config(clip_dim=CLIP_DIM)).state_dict()
    assert set(plain) <= set(with_clip)
    added = set(with_clip) - set(plain)
    assert all("clip" in name for name in added)
    assert {"clip_gate_offset", "middle_block.1.clip_gate", "clip_adapter.clip_null_embedding"} <= added
    assert "middle_block.1.clip_kv.weight" in added


def test_a_fresh_model_predicts_zero() -> None:
    model = create_model(tiny_config()).eval()
    assert not model(**tiny_inputs(model)).any()
    assert not model.middle_block[0].out_layers[3].weight.any()
    assert not model.middle_block[1].proj_out.weight.any()
    assert 0.005 < model.positional_embedding.std() < 0.02
    assert 0.005 < model.padding_embedding.std() < 0.02


def test_an_encoded_caption_can_be_used_again() -> None:
    model = tiny_model()
    inputs = tiny_inputs(model)
    expected = model(**inputs)
    text = model.encode_text(inputs["tokens"], inputs["mask"])
    assert torch.equal(model(inputs["x"], inputs["timesteps"], text=text), expected)


@pytest.mark.parametrize("clip_dim", [None, CLIP_DIM])
@pytest.mark.parametrize("dial", ["attention", "blocks"])
def test_recomputing_changes_no_gradient(clip_dim: int | None, dial: str) -> None:
    """Bit for bit, dropout included: its random numbers are drawn again in the backward pass."""
    model = tiny_model(clip_dim=clip_dim, dropout=0.5).train()
    inputs = tiny_inputs(model)
    if clip_dim is not None:
        inputs["clip_embedding"] = tiny_embeddings()

    def gradients(dial: str) -> list[torch.Tensor]:
        model.recompute(dial)
        torch.manual_seed(1)
        return list(
            torch.autograd.grad(model(**inputs).square().mean(), list(model.parameters()), allow_unused=True)
        )

    off, again, on = gradients("none"), gradients("none"), gradients(dial)
    assert all(torch.equal(a, b) for a, b in zip(off, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(off, on, strict=True))


def count_saved_bytes(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    return sum(saved.values())


def test_recomputing_saves_memory_in_training_only() -> None:
    model = tiny_model()
    inputs = tiny_inputs(model)
    plain = count_saved_bytes(model.train(), inputs)
    model.recompute("attention")
    some = count_saved_bytes(model, inputs)
    assert some < plain
    model.recompute("blocks")
    assert count_saved_bytes(model.eval(), inputs) > 0.9 * plain
    assert count_saved_bytes(model.train(), inputs) < min(some, 0.6 * plain)


def test_dropout_acts_in_training_only() -> None:
    model = tiny_model(dropout=0.5)
    inputs = tiny_inputs(model)
    assert torch.equal(model(**inputs), model(**inputs))
    model.train()
    assert not torch.equal(model(**inputs), model(**inputs))


def test_bfloat16_follows_float32() -> None:
    model = tiny_model(clip_dim=CLIP_DIM)
    inputs = tiny_inputs(model) | {"clip_embedding": tiny_embeddings()}
    expected = model(**inputs)
    output = model.bfloat16()(**inputs)
    assert output.dtype == torch.float32  # the dtype of x
    assert (output - expected).norm() < 0.03 * expected.norm()


def test_channels_last_gives_the_same_picture() -> None:
    model = tiny_model(clip_dim=CLIP_DIM)
    inputs = tiny_inputs(model) | {"clip_embedding": tiny_embeddings()}
    expected = model(**inputs)
    model.to(memory_format=torch.channels_last)
    inputs["x"] = inputs["x"].contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(**inputs), expected, rtol=1e-4, atol=1e-5)


def test_nothing_known_equals_an_empty_inpainting_mask() -> None:
    model = tiny_model(kind="base-inpaint")
    inputs = tiny_inputs(model)
    empty = {"inpaint_image": torch.ones_like(inputs["x"]), "inpaint_mask": torch.zeros(2, 1, 16, 16)}
    assert torch.equal(model(**inputs), model(**inputs, **empty))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("base", {"tokens": None}, "without a caption"),
        ("base", {"mask": None}, "without a caption"),
        ("base", dict(zip(("tokens", "mask"), encode(["a", "b"]), strict=True)), "context_length=12"),
        ("base", {"low_res": torch.zeros(2, 3, 4, 4)}, "no use for low_res"),
        ("upsample", {"low_res": None}, "needs low_res"),
        ("base", {"clip_embedding": tiny_embeddings()}, f"clip_dim={CLIP_DIM}"),
        (
            "base",
            {"inpaint_image": torch.zeros(2, 3, 16, 16), "inpaint_mask": torch.zeros(2, 1, 16, 16)},
            "base-inpaint",
        ),
        ("base-inpaint", {"inpaint_image": torch.zeros(2, 3, 16, 16)}, "go together"),
    ],
)
def test_inputs_that_do_not_fit_are_named(kind: str, changes: dict, message: str) -> None:
    model = tiny_model(kind=kind)
    with pytest.raises(GlideError, match=message):
        model(**(tiny_inputs(model) | changes))


def test_an_embedding_of_another_width_is_named() -> None:
    model = tiny_model(clip_dim=CLIP_DIM)
    with pytest.raises(GlideError, match="12 wide, the adapter reads 24"):
        model(**tiny_inputs(model), clip_embedding=torch.randn(2, 12))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_channels": 48}, "32 groups"),
        ({"num_head_channels": 24}, "num_head_channels=24"),
        ({"xf_heads": 3}, "xf_heads=3"),
    ],
)
def test_sizes_that_do_not_fit_together_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model(tiny_config(**changes))
