"""The tokenizer: text to ids and back, special tokens by name."""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from operator import index
from os import PathLike
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from neounify.errors import NeounifyError, PromptError, TokenizerError
from neounify.text.tokens import (
    CONTROL,
    END_OF_TEXT,
    IM_END,
    REQUIRED,
    SPLIT_PATTERN,
    USABLE_FOLDER,
    added_token,
    byte_level_description,
    describe,
    read_files,
    settle,
)


class Tokenizer:
    """A byte-level BPE tokenizer of Qwen2's kind. Immutable, so threads may share it.

    Load one with `from_folder`, or train one with `byte_tokenizer`.
    """

    def __init__(
        self,
        description: dict[str, Any],
        *,
        origin: str,
        files: Mapping[str, bytes] | None = None,
        required: tuple[str, ...] = REQUIRED,
    ) -> None:
        """Build from a tokenizer description (the object a tokenizer.json holds).

        Args:
            description: the tokenizer.json object.
            origin: where it came from, for error messages.
            files: the files that `save` writes; by default they are generated from the description.
            required: the tokens that it must have.

        Raises:
            TokenizerError: the description is damaged or a required token is missing.
        """
        description = settle(description, origin)
        self._library = _build_library(description, origin)
        # Setting a flag on a shared library object is not thread-safe, so plain text has an
        # separate object, built at first use.
        self._plain_library: tokenizers.Tokenizer | None = None
        added = description["added_tokens"]
        self._added = {token["id"]: token["content"].encode("utf-8") for token in added}
        self._special = frozenset(token["id"] for token in added if token["special"])
        self._vocab_size = 1 + max(description["model"]["vocab"].values(), default=-1)
        self._origin = origin
        self.require(required)
        self._files = dict(files) if files is not None else _own_files(description)

    def require(self, names: tuple[str, ...]) -> None:
        """Raise TokenizerError unless there are tokens of all these names."""
        self._required = names
        missing = [name for name in names if self.find(name) is None]
        if missing:
            raise TokenizerError(
                f"{self._origin}: the tokens {' '.join(missing)} are missing; {USABLE_FOLDER}; it "
                f"must know {' '.join(names)}"
            )

    @classmethod
    def from_folder(
        cls, path: str | PathLike[str], required: tuple[str, ...] = REQUIRED
    ) -> Tokenizer:
        """Load tokenizer.json, or vocab.json + merges.txt with the added tokens beside them.

        `required` are the tokens that it must have, by default those of SenseNova-U1's prompts.

        Raises:
            TokenizerError: the folder or a file in it is missing, damaged, too large, or lacks
                a token that a model needs.
        """
        folder = Path(path)
        files = read_files(folder)
        description, origin = describe(files, folder)
        return cls(description, origin=origin, files=files, required=required)

    @property
    def vocab_size(self) -> int:
        """The largest id plus 1; a model's embedding table may have more rows."""
        return self._vocab_size

    @property
    def added_ids(self) -> frozenset[int]:
        """The ids of added tokens, special or not: those that are no pieces of words."""
        return frozenset(self._added)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, special or not; none for an id without a token."""
        return self._bytes_of(token_id, skip_special=False)

    def all_bytes(self) -> list[bytes]:
        """The bytes of every id from 0 on; none for ids without a token."""
        return [self.token_bytes(token_id) for token_id in range(self.vocab_size)]

    def digest(self) -> str:
        """A name for the content of the tokenizer's files."""
        digest = hashlib.blake2b(digest_size=16)
        for name, data in sorted(self._files.items()):
            digest.update(f"{name} {len(data)} ".encode() + data)
        return digest.hexdigest()

    def id(self, name: str) -> int:
        """The id of the token spelled `name`.

        Raises:
            TokenizerError: there is no such token.
        """
        token_id = self.find(name)
        if token_id is None:
            raise TokenizerError(f"the tokenizer has no token {name!r}")
        return token_id

    def find(self, name: str) -> int | None:
        """The id of the token spelled `name`, None if there is no such token."""
        token_id = self._library.token_to_id(name)
        return None if token_id is None else int(token_id)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Token ids of a text; nothing is added around it.

        Args:
            text: any text without lone surrogates.
            allow_special: whether a special token spelled in the text becomes that token. Leave
                it off for text that a user wrote. (Added tokens that are not flagged special,
                `<think>` for one, are single tokens either way.)

        Raises:
            PromptError: the text holds a lone surrogate, or the library gives up on it.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the text holds a lone surrogate at character {error.start}; "
                "it must be valid Unicode"
            ) from error
        library = self._library if allow_special else self._plain()
        with _library_errors(PromptError, "the text cannot be tokenised"):
            return list(library.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of token ids; bytes that are not UTF-8 become U+FFFD, unknown ids nothing."""
        data = b"".join(self._bytes_of(token_id, skip_special) for token_id in ids)
        return data.decode("utf-8", errors="replace")

    def stream(self) -> TextStream:
        """Decoder of one token at a time, without special tokens."""
        return TextStream(self._bytes_of)

    def save(self, folder: str | PathLike[str]) -> None:
        """Write the tokenizer files into `folder`, created if needed.

        A tokenizer loaded from a folder is written back byte for byte, another one as
        tokenizer.json and tokenizer_config.json.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        for name, data in self._files.items():
            (target / name).write_bytes(data)

    def extended(self, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """A tokenizer with further merges, the most frequent ones of `texts`, and their tokens.

        Ids of this one keep their meaning. The new merges come after all others, so a text without
        new tokens has the same ids as before. Outside ASCII, a new token is one character or less.

        Args:
            texts: what to learn from; pairs that occur once are left alone.
            vocab_size: upper bound on the number of ids.
        """
        description = json.loads(self._library.to_str())
        words: Counter[tuple[str, ...]] = Counter()
        for text in texts:
            words.update(self._pieces(text))
        model = description["model"]
        merges, vocab = list(model["merges"]), dict(model["vocab"])
        for left, right in _further_merges(words, vocab, vocab_size - self._vocab_size):
            vocab[left + right] = self._vocab_size + len(merges) - len(model["merges"])
            merges.append([left, right])
        description["model"] = {**model, "merges": merges, "vocab": vocab}
        return Tokenizer(description, origin="the extended tokenizer", required=self._required)

    def _pieces(self, text: str) -> list[tuple[str, ...]]:
        """The words of a text, each as its tokens."""
        library = self._plain()
        normal = text if library.normalizer is None else library.normalizer.normalize_str(text)
        cut = library.pre_tokenizer.pre_tokenize_str(normal)
        return [tuple(t.value for t in library.model.tokenize(word)) for word, _ in cut]

    def _bytes_of(self, token_id: int, skip_special: bool = True) -> bytes:
        token_id = index(token_id)  # an element of an array or tensor would not match the tables
        if skip_special and token_id in self._special:
            return b""
        if token_id in self._added:
            return self._added[token_id]
        if not 0 <= token_id < self._vocab_size:
            return b""
        token = self._library.id_to_token(token_id)
        return b"" if token is None else _bytes_of_token(token)

    def _plain(self) -> tokenizers.Tokenizer:
        plain = self._plain_library
        if plain is None:
            # Two threads may both build one; either serves, so no lock is needed.
            plain = tokenizers.Tokenizer.from_str(self._library.to_str())
            plain.encode_special_tokens = True
            self._plain_library = plain
        return plain

    def __getstate__(self) -> dict[str, Any]:
        # A pickled library object forgets encode_special_tokens, so the copy makes its own.
        return {**self.__dict__, "_plain_library": None}


@contextmanager
def _library_errors(kind: type[NeounifyError], message: str) -> Iterator[None]:
    """Block whose exceptions of the library, of any kind, become `kind`."""
    try:
        yield
    except BaseException as error:
        # A panic in the library's Rust code is a BaseException of a class that cannot be imported.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise kind(f"{message} ({error})") from error
        raise


def _build_library(description: dict[str, Any], origin: str) -> tokenizers.Tokenizer:
    with _library_errors(TokenizerError, f"{origin}: not a usable tokenizer"):
        library = tokenizers.Tokenizer.from_str(json.dumps(description))
    for token in description["added_tokens"]:
        actual = library.token_to_id(token["content"])
        if actual != token["id"]:
            raise TokenizerError(
                f"{origin}: token {token['content']!r} cannot have the id {token['id']}, it gets "
                f"{actual}"
            )
    return library


def _own_files(description: dict[str, Any]) -> dict[str, bytes]:
    """Files of a tokenizer that was not loaded from any, readable by other tools too."""
    added = description["added_tokens"]
    names = {token["content"] for token in added}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in added
        },
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT if END_OF_TEXT in names else IM_END,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": _json_bytes(description),
        "tokenizer_config.json": _json_bytes(config),
    }


def _json_bytes(value: object) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8")


class TextStream:
    """Turns ids into text one at a time; all pieces together equal one decode of all ids.

    A character may be spread over several byte-level tokens: its bytes are held back
    until it is complete. Special tokens and unknown ids give no text. The library's own
    stream is not used: it never gives back an incomplete tail, and holds whole words back
    behind a byte that no later token can complete.
    """

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        """`bytes_of` gives the raw bytes of an id (empty: no text)."""
        self._bytes_of = bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def put(self, token_id: int) -> str:
        """Add one id; returns the text that is complete now, often a word, sometimes ''."""
        return self._decoder.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        """End the text; returns U+FFFD for an incomplete character, normally ''."""
        return self._decoder.decode(b"", final=True)


# --- byte-level vocabularies ---


@cache
def byte_of_character() -> dict[str, int]:
    """Alphabet of vocabularies: 256 characters, each with its byte (0..255).

    Printable Latin-1 bytes stand for themselves; the others, in rising order, are
    spelled with the characters from U+0100 on, so that no token holds a space or a
    control character.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in sorted(printable)}
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return table


def _bytes_of_token(token: str) -> bytes:
    """Raw bytes of a vocabulary token; one outside the alphabet is plain text."""
    table = byte_of_character()
    try:
        return bytes(table[character] for character in token)
    except KeyError:
        return token.encode("utf-8")


def _further_merges(
    words: Mapping[tuple[str, ...], int], known: Collection[str], limit: int
) -> Iterator[tuple[str, str]]:
    """At most `limit` merges of tokens, the most frequent first, each into a new token."""
    counts = dict(words)
    tokens = set(known)
    for _ in range(limit):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, number in counts.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += number
        new = {
            pair: n
            for pair, n in pairs.items()
            if n > 1 and "".join(pair) not in tokens and _may_be_token("".join(pair))
        }
        if not new:
            return
        best = max(new, key=lambda pair: (new[pair], pair))
        tokens.add("".join(best))
        merged: Counter[tuple[str, ...]] = Counter()
        for word, number in counts.items():
            merged[_merged(word, best)] += number
        counts = dict(merged)
        yield best


def _may_be_token(token: str) -> bool:
    """Whether a token's bytes are ASCII, or one character's first bytes.

    Scripts without spaces stay cut into characters: longer tokens would join words of all kinds.
    """
    spelt = _bytes_of_token(token)
    return spelt.isascii() or (spelt[0] >= 0xC0 and all(0x80 <= byte < 0xC0 for byte in spelt[1:]))


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """A word whose neighbouring tokens of a pair are one token."""
    joined: list[str] = []
    for token in word:
        if joined and (joined[-1], token) == pair:
            joined[-1] += token
        else:
            joined.append(token)
    return tuple(joined)


BYTE_VOCAB_SIZE = 256 + 1 + len(REQUIRED)
"""Ids of a tokenizer without merges: one per byte, then the special tokens."""


def byte_tokenizer(
    merges_from: Sequence[str] = (),
    vocab_size: int = BYTE_VOCAB_SIZE,
    required: tuple[str, ...] = REQUIRED,
) -> Tokenizer:
    """Byte-level BPE tokenizer with every required token and `<|endoftext|>`.

    Ids are contiguous: the 256 bytes, the merges, the special tokens.

    Args:
        merges_from: texts to learn merges from; without any, a token is a byte.
        vocab_size: upper bound on the number of ids, at least 257 and the required tokens; fewer
            where the texts hold fewer pairs.
        required: the tokens that the prompts of a model need, by default SenseNova-U1's.

    Raises:
        ValueError: `vocab_size` is too small.
    """
    names = (END_OF_TEXT, *required)
    least = 256 + len(names)
    if vocab_size < least:
        raise ValueError(f"vocab_size must be at least {least}, got {vocab_size}")
    merges = _learn_merges(merges_from, vocab_size - least)
    tokens = [*sorted(byte_of_character()), *("".join(pair) for pair in merges)]
    added = [
        added_token(name, len(tokens) + number, special=name in CONTROL)
        for number, name in enumerate(names)
    ]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    description = byte_level_description(vocab, merges, added)
    return Tokenizer(description, origin="a byte tokenizer", required=required)


def _learn_merges(texts: Sequence[str], limit: int) -> list[list[str]]:
    """At most `limit` merges, learned; texts are cut into words as the tokenizer will cut them."""
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
