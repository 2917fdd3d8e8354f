"""GLIDE's token ids, from the golden numbers."""

import json
import zlib
from pathlib import Path

import pytest
import torch

from glide_ds.tokenizer import END_TOKEN, N_VOCAB, encode

GOLDEN = json.loads((Path(__file__).parent / "golden_public.json").read_text())["tokenizer"]


def test_ids_equal_the_published_tokenizer() -> None:
    for item in GOLDEN["items"]:
        tokens, mask = encode([item["text"]], context_length=4096)
        assert mask.sum() == item["n"], item["text"]
        assert tokens[0, : min(item["n"], 160)].tolist() == item["ids"], item["text"]


def test_padded_rows_equal_the_published_ones() -> None:
    texts = [item["text"] for item in GOLDEN["items"]]
    tokens, mask = encode(texts)
    assert tokens.shape == mask.shape == (len(texts), GOLDEN["ctx"])
    assert (tokens.dtype, mask.dtype) == (torch.int64, torch.bool)
    crcs = [zlib.crc32(row.numpy().astype("<i4").tobytes()) for row in tokens]
    assert crcs == [item["padded_crc32"] for item in GOLDEN["items"]]
    assert mask.sum(dim=1).tolist() == [item["mask_sum"] for item in GOLDEN["items"]]


def test_constants_are_the_published_ones() -> None:
    assert GOLDEN["n_vocab"] == N_VOCAB
    assert GOLDEN["end_token"] == END_TOKEN


def test_end_of_text_in_a_caption_stays_text() -> None:
    tokens, mask = encode(["<|endoftext|>"])
    assert mask.sum() > 1
    assert END_TOKEN not in tokens[mask]


def test_a_lone_surrogate_does_not_stop_the_run() -> None:
    assert encode(["broken \ud83d emoji"])[1].sum() > 2


def test_no_captions_give_no_rows() -> None:
    assert encode([])[0].shape == (0, 128)


def test_a_bare_string_is_refused() -> None:
    with pytest.raises(TypeError, match="in a list"):
        encode("a corgi")
