"""Small tokenizers for models made here: tests, demos and toy training runs."""

import json
from collections.abc import Sequence

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from neounify.text.byte_level import byte_of_character
from neounify.text.files import SPLIT_PATTERN, added_token, byte_level_description
from neounify.text.special import CONTROL, END_OF_TEXT, REQUIRED
from neounify.text.tokenizer import Tokenizer

_ADDED = (END_OF_TEXT, *REQUIRED)

BYTE_VOCAB_SIZE = 256 + len(_ADDED)
"""Ids of a tokenizer without merges: one per byte, then the special tokens."""


def byte_tokenizer(merges_from: Sequence[str] = (), vocab_size: int = BYTE_VOCAB_SIZE) -> Tokenizer:
    """Build a byte-level BPE tokenizer with every required token and `<|endoftext|>`.

    Ids are contiguous: the 256 bytes, the merges, the special tokens.

    Args:
        merges_from: texts to learn merges from; without any, a token is a byte.
        vocab_size: upper bound on the number of ids, at least BYTE_VOCAB_SIZE; fewer where
            the texts hold fewer pairs.

    Raises:
        ValueError: `vocab_size` is below BYTE_VOCAB_SIZE.
    """
    if vocab_size < BYTE_VOCAB_SIZE:
        raise ValueError(f"vocab_size must be at least {BYTE_VOCAB_SIZE}, got {vocab_size}")
    merges = _learn_merges(merges_from, vocab_size - BYTE_VOCAB_SIZE)
    tokens = [*sorted(byte_of_character()), *("".join(pair) for pair in merges)]
    added = [
        added_token(name, len(tokens) + place, special=name in CONTROL)
        for place, name in enumerate(_ADDED)
    ]
    vocab = {token: place for place, token in enumerate(tokens)}
    description = byte_level_description(vocab, merges, added)
    return Tokenizer(description, origin="a byte tokenizer")


def _learn_merges(texts: Sequence[str], limit: int) -> list[list[str]]:
    """Learn at most `limit` merges; texts are cut into words as the tokenizer will cut them."""
    if limit == 0 or not texts:
        return []
    library = tokenizers.Tokenizer(models.BPE())
    library.normalizer = normalizers.NFC()
    library.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=256 + limit,
        initial_alphabet=list(byte_of_character()),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return [list(pair) for pair in json.loads(library.to_str())["model"]["merges"]]
