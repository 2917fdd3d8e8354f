"""The text transformer's semantics that the golden numbers show only in sum."""

import torch
from tiny_glide import tiny_model

from glide_ds.model.text import TextEncoding
from glide_ds.tokenizer import encode


def encode_caption(caption: str) -> tuple[torch.Tensor, torch.Tensor]:
    return encode([caption], context_length=12)


def test_padding_is_replaced_by_its_own_embedding() -> None:
    """What stands under a False mask does not matter."""
    model = tiny_model()
    tokens, mask = encode_caption("a red circle")
    other = torch.where(mask, tokens, 17)
    expected, changed = model.encode_text(tokens, mask), model.encode_text(other, mask)
    assert torch.equal(expected.tokens, changed.tokens)
    with torch.no_grad():
        model.padding_embedding += 1
    assert not torch.equal(model.encode_text(tokens, mask).tokens, expected.tokens)


def test_every_place_reads_every_other() -> None:
    """Bidirectional, padding included: a change of the last place reaches the first and the reverse."""
    model = tiny_model()
    tokens, mask = encode_caption("a red circle")
    embeddings = model.encode_text(tokens, mask).tokens
    mask[0, -1] = True
    assert not torch.equal(model.encode_text(tokens, mask).tokens[0, 0], embeddings[0, 0])
    tokens[0, 0] += 1
    assert not torch.equal(model.encode_text(tokens, mask).tokens[0, -1], embeddings[0, -1])


def test_the_last_place_is_the_pooled_one() -> None:
    model = tiny_model()
    text = model.encode_text(*encode_caption("a red circle"))
    assert isinstance(text, TextEncoding)
    assert text.tokens.shape == (1, 12, 32)
    torch.testing.assert_close(text.pooled, model.transformer_proj(text.tokens[:, -1]))
