"""Sequences of the understanding engine, in the cache or preempted, and their pending calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from neounify.cache import PagedSequence, SequenceCache
from neounify.cache.key_values import BlockHash, TokenKey, block_hashes, image_keys, text_keys
from neounify.decode.forward import ModelInput
from neounify.decode.loop import DecodeState
from neounify.engine.messages import (
    Appended,
    Decode,
    ImageInput,
    Prefilled,
    Prefix,
    PromptInput,
    SequenceName,
)
from neounify.engine.tensors import LocalTensors
from neounify.errors import ContextFullError
from neounify.model.layout import Grid, Image, Text


@dataclass
class Piece:
    """Text, which may be prefilled in several steps, or an image, which is prefilled whole."""

    ids: list[int] = field(default_factory=list)
    image: Tensor | None = None
    grid: Grid | None = None

    @property
    def tokens(self) -> int:
        return len(self.ids) if self.grid is None else self.grid.length


@dataclass(eq=False)
class ServedSequence:
    """A sequence: its content as `pieces` and `token_keys`, and its `cache` while it has one.

    `age` is its rank among all sequences, the oldest first. `hidden` is the state after `hidden_at`
    tokens; after preemption, all is prefilled again. `cached` are the tokens found in the cache
    when it was first opened, `room` the maximum number of tokens behind its prompt.
    """

    name: SequenceName
    age: int
    room: int
    pieces: list[Piece] = field(default_factory=list)
    token_keys: list[TokenKey] = field(default_factory=list)
    cache: PagedSequence | SequenceCache | None = None
    hidden: Tensor | None = None
    hidden_at: int = 0
    finite: bool = True
    cached: int | None = None
    passed: int = 0
    text: DecodeState | None = None
    error: Exception | None = None
    _block_hashes: list[BlockHash] = field(default_factory=list)

    @property
    def next_t(self) -> int:
        """Position of the next token."""
        return self.token_keys[-1].t + 1 if self.token_keys else 0

    @property
    def prefilled(self) -> bool:
        """Whether all of it has been prefilled, whether or not it is still in the cache."""
        return self.hidden_at == len(self.token_keys)

    @property
    def ready(self) -> bool:
        """Whether it is prefilled and all of it lies in the cache."""
        return (
            self.cache is not None and self.cache.length == len(self.token_keys) and self.prefilled
        )

    def block_hashes(self, block_size: int) -> list[BlockHash]:
        """Hashes of all full blocks."""
        self._block_hashes = block_hashes(self.token_keys, block_size, self._block_hashes)
        return self._block_hashes

    def append(self, parts: Sequence[PromptInput]) -> None:
        """Append text and images; images lie in LocalTensors."""
        keys = token_keys_of(parts, self.next_t)
        self.token_keys += keys
        self._expect(keys)
        for part in parts:
            if isinstance(part, ImageInput):
                assert isinstance(part.pixels, LocalTensors)
                self.pieces.append(Piece(image=part.pixels.tensors["pixels"], grid=part.grid))
            elif part.ids:
                self._append_text(part.ids)

    def append_token(self, token: int) -> None:
        """Append a decoded token."""
        keys = text_keys((token,), self.next_t)
        self.token_keys += keys
        self._expect(keys)
        self._append_text((token,))

    def _expect(self, keys: Sequence[TokenKey]) -> None:
        if isinstance(self.cache, PagedSequence):
            self.cache.expect(keys)

    def _append_text(self, ids: Sequence[int]) -> None:
        if not self.pieces or self.pieces[-1].image is not None:
            self.pieces.append(Piece())
        self.pieces[-1].ids += ids

    def next_pieces(self, max_tokens: int) -> list[Piece]:
        """Pieces to prefill next: at most `max_tokens` tokens, or one image that alone has more."""
        assert self.cache is not None
        left, batch = self.cache.length, list[Piece]()
        for piece in self.pieces:
            if left >= piece.tokens:
                left -= piece.tokens
                continue
            if piece.image is not None:
                if batch and piece.tokens > max_tokens:
                    break
                batch.append(piece)
            else:
                batch.append(Piece(ids=piece.ids[left : left + max_tokens]))
            left = 0
            max_tokens -= batch[-1].tokens
            if max_tokens <= 0:
                break
        return batch

    def model_input(self, pieces: Sequence[Piece]) -> ModelInput:
        """Pieces as the model's input."""
        assert self.cache is not None
        return ModelInput(
            self.cache,
            tuple(Text(len(p.ids)) if p.grid is None else Image.of(p.grid) for p in pieces),
            [token for piece in pieces for token in piece.ids],
            [piece.image for piece in pieces if piece.image is not None],
        )

    def take_state(self, hidden: Tensor, *, finite: bool) -> None:
        """Store the hidden state [hidden_size] after the last token in the cache."""
        assert self.cache is not None
        self.finite = self.finite and finite
        self.hidden, self.hidden_at = hidden, self.cache.length


@dataclass(eq=False)
class PendingPrefill:
    """A Prefill or Append call, answered once its sequences are prefilled."""

    call: int
    sequences: tuple[ServedSequence, ...]
    opens: bool
    then: Decode | None = None

    @property
    def answer(self) -> Prefilled | Appended:
        if not self.opens:
            return Appended()
        tokens = sum(len(s.token_keys) for s in self.sequences)
        return Prefilled(tokens, sum(s.cached or 0 for s in self.sequences))


@dataclass(eq=False)
class PendingExport:
    """An Export call; preempted sequences are prefilled again first."""

    call: int
    sequences: tuple[ServedSequence, ...]
    done: dict[SequenceName, Prefix] = field(default_factory=dict)

    @property
    def left(self) -> list[ServedSequence]:
        return [s for s in self.sequences if s.name not in self.done]

    def free(self) -> None:
        """Free the copies made so far."""
        for prefix in self.done.values():
            prefix.ref.free()


def token_keys_of(parts: Sequence[PromptInput], t: int) -> list[TokenKey]:
    """Keys of parts that begin at position `t`."""
    keys: list[TokenKey] = []
    for part in parts:
        if isinstance(part, ImageInput):
            keys += image_keys(part.digest, part.tokens, t)
            t += 1
        else:
            keys += text_keys(part.ids, t)
            t += part.tokens
    return keys


def tokens_of(parts: Sequence[PromptInput]) -> int:
    """Tokens of the understanding stream."""
    return sum(part.tokens for part in parts)


def positions_of(parts: Sequence[PromptInput]) -> int:
    """Positions that parts take; an image takes one."""
    return sum(1 if isinstance(part, ImageInput) else part.tokens for part in parts)


def check_context(end: int, limit: int) -> None:
    """ContextFullError unless a sequence that ends at position `end` fits the context."""
    if end > limit:
        raise ContextFullError(
            f"the sequence would be {end} positions long, the model reads {limit}"
        )
