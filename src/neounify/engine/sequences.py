"""What the understanding engine holds of a sequence, whether or not it lies in the cache now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from neounify.cache import PagedSequence, SequenceCache
from neounify.cache.prefix_hash import BlockHash, TokenKey, block_hashes, image_keys, text_keys
from neounify.decode.forward import ModelInput
from neounify.decode.loop import Writing
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
    """Text, which may be read in several steps, or an image, which is read whole."""

    ids: list[int] = field(default_factory=list)
    image: Tensor | None = None
    grid: Grid | None = None

    @property
    def tokens(self) -> int:
        return len(self.ids) if self.grid is None else self.grid.length


@dataclass(eq=False)
class ServedSequence:
    """A sequence: all it holds as `pieces` and `token_keys`, and its `cache` while it has one.

    `order` is its place among all sequences by age. `hidden` is the state after `hidden_at`
    tokens; with a cache that was given up in between it can all be read again. `known` are the
    tokens that were in the cache when it was first opened, `room` what may follow its prompt.
    """

    name: SequenceName
    order: int
    room: int
    pieces: list[Piece] = field(default_factory=list)
    token_keys: list[TokenKey] = field(default_factory=list)
    cache: PagedSequence | SequenceCache | None = None
    hidden: Tensor | None = None
    hidden_at: int = 0
    finite: bool = True
    known: int | None = None
    passed: int = 0
    text: Writing | None = None
    error: Exception | None = None
    _block_hashes: list[BlockHash] = field(default_factory=list)

    @property
    def next_t(self) -> int:
        """The position of the token that would come next."""
        return self.token_keys[-1].t + 1 if self.token_keys else 0

    @property
    def read(self) -> bool:
        """Whether the model has read all of it, be it in the cache still or not."""
        return self.hidden_at == len(self.token_keys)

    @property
    def ready(self) -> bool:
        """Whether it is read and all of it lies in the cache."""
        return self.cache is not None and self.cache.length == len(self.token_keys) and self.read

    def block_hashes(self, block_size: int) -> list[BlockHash]:
        """Hashes of all full blocks."""
        self._block_hashes = block_hashes(self.token_keys, block_size, self._block_hashes)
        return self._block_hashes

    def append(self, parts: Sequence[PromptInput]) -> None:
        """Let more follow; images lie in LocalTensors."""
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
        """Let a written token follow."""
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

    def next_pieces(self, most: int) -> list[Piece]:
        """What to read next: at most `most` tokens, or one image that alone has more."""
        assert self.cache is not None
        left, found = self.cache.length, list[Piece]()
        for piece in self.pieces:
            if left >= piece.tokens:
                left -= piece.tokens
                continue
            if piece.image is not None:
                if found and piece.tokens > most:
                    break
                found.append(piece)
            else:
                found.append(Piece(ids=piece.ids[left : left + most]))
            left = 0
            most -= found[-1].tokens
            if most <= 0:
                break
        return found

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
        """The state after all that is in the cache now."""
        assert self.cache is not None
        self.finite = self.finite and finite
        self.hidden, self.hidden_at = hidden, self.cache.length


@dataclass(eq=False)
class Reading:
    """A call that is answered when its sequences have been read."""

    call: int
    sequences: tuple[ServedSequence, ...]
    opens: bool
    then: Decode | None = None

    @property
    def answer(self) -> Prefilled | Appended:
        if not self.opens:
            return Appended()
        tokens = sum(len(s.token_keys) for s in self.sequences)
        return Prefilled(tokens, sum(s.known or 0 for s in self.sequences))


@dataclass(eq=False)
class Exporting:
    """A call for copies of sequences, of which some may have to be read again first."""

    call: int
    sequences: tuple[ServedSequence, ...]
    done: dict[SequenceName, Prefix] = field(default_factory=dict)

    @property
    def left(self) -> list[ServedSequence]:
        return [s for s in self.sequences if s.name not in self.done]

    def free(self) -> None:
        """Give back the copies that were made."""
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
