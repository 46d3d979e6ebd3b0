"""The understanding engine: reads prompts and writes text for many requests at once.

Each step reads a bounded piece of the prompts that wait, then writes one token of every sequence
that writes. Sequences lie in a paged cache, where one that begins as an earlier one did goes on
from there. The engine speaks ids.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from neounify.cache import PagedPool, PagedSequence
from neounify.cache.content import Row, image_rows, text_rows
from neounify.decode.feed import Feed, feed
from neounify.decode.loop import Generation, choose_tokens
from neounify.decode.sampler import Choice
from neounify.decode.sampling import SamplingState
from neounify.errors import NeounifyError, PromptError, RequestError, not_finite
from neounify.model.layout import Image, Text
from neounify.model.neo import NeoUnify
from neounify.pipeline.engine import check_context
from neounify.serve.events import EngineDied
from neounify.serve.messages import (
    Close,
    Export,
    Exported,
    Extend,
    Extended,
    Open,
    Opened,
    PicturePart,
    Prefix,
    PromptPart,
    Reply,
    SequenceName,
    Token,
    Write,
    Written,
    failed,
)
from neounify.serve.transport import LocalParcel, Transport, free

Prompts = Mapping[SequenceName, tuple[PromptPart, ...]]


@dataclass(frozen=True, kw_only=True)
class UnderstandingSettings:
    """`cache_tokens`: room for all sequences together; `prefill_tokens`: read per step at most."""

    cache_tokens: int = 32_768
    block_size: int = 16
    prefill_tokens: int = 512


@dataclass
class _Piece:
    """A part still to be read. Text may be read in several steps, an image only whole."""

    ids: tuple[int, ...] = ()
    image: Tensor | None = None
    grid: tuple[int, int] = (0, 0)

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] if self.image is not None else len(self.ids)


@dataclass(eq=False)
class _Sequence:
    cache: PagedSequence
    pieces: deque[_Piece]
    context: list[int]
    hidden: Tensor | None = None
    text: Generation | None = None


@dataclass(eq=False)
class _Reading:
    """A call that is answered when its sequences have been read."""

    names: tuple[SequenceName, ...]
    reply: Reply
    then: Write | None = None


class UnderstandingEngine:
    """Takes orders with `submit`, does a step's work with `step`, leaves `replies`."""

    def __init__(
        self, model: NeoUnify, settings: UnderstandingSettings, transport: Transport
    ) -> None:
        self.model, self.settings, self.transport = model, settings, transport
        self.pool = PagedPool(
            model.config,
            max(1, settings.cache_tokens // settings.block_size),
            settings.block_size,
            dtype=model.dtype,
            device=model.device,
        )
        self.replies: list[Reply] = []
        self.counters: Counter[str] = Counter()
        self._sequences: dict[SequenceName, _Sequence] = {}
        self._waiting: deque[Open] = deque()
        self._reading: list[_Reading] = []
        self._writing: dict[SequenceName, Write] = {}

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._reading or self._writing)

    @property
    def urgent(self) -> bool:
        """Whether somebody waits for a first token."""
        return bool(self._waiting or self._reading)

    @property
    def writes(self) -> bool:
        """Whether text is being written, or will be once its prompt is read.

        Not so for prompts that are only painted behind.
        """
        thens = [*(o.then for o in self._waiting), *(r.then for r in self._reading)]
        return bool(self._writing) or any(then is not None for then in thens)

    def gauges(self) -> Mapping[str, float]:
        """How full the engine is: sequences that wait, read and write, and blocks in use."""
        return {
            "und_waiting": len(self._waiting),
            "und_reading": len(self._reading),
            "und_writing": len(self._writing),
            "und_cache_used": self.pool.book.in_use / self.pool.book.count,
        }

    def submit(self, order: Open | Write | Extend | Export | Close) -> None:
        """Take an order. What cannot be done is answered with Failed."""
        if isinstance(order, Close):
            self._close(order.sequences)
            return
        try:
            match order:
                case Open():
                    self._check_room(order)
                    # Taken at once: the caller may leave before there is room, and frees what lies
                    # in parcels then.
                    self._waiting.append(replace(order, prompts=self._taken(order.prompts)))
                case Write():
                    self._start_writing(order)
                case Extend():
                    self._start_extending(order)
                case Export():
                    self._export(order)
        except Exception as error:  # whatever it is, it concerns this order alone
            self.replies.append(failed(order.call, error))

    @torch.inference_mode()
    def step(self) -> None:
        """Read a piece of what waits, then write one token of each sequence that writes.

        Raises what concerns all sequences; an error of one order is that order's answer.
        """
        self._admit_waiting()
        self._read_some()
        self._answer_readers()
        self._write_one_token()

    def check(self) -> None:
        """Whether the cache's books are right. Raises ValueError."""
        self.pool.check()

    # --- opening ---

    def _check_room(self, order: Open) -> None:
        blocks = sum(
            self.pool.blocks_for(_tokens(parts) + order.room[name])
            for name, parts in order.prompts.items()
        )
        if blocks > self.pool.book.count:
            raise RequestError(
                f"the request needs room for {blocks * self.pool.block_size} tokens, the server "
                f"has {self.pool.book.count * self.pool.block_size}; ask for fewer tokens"
            )
        for parts in order.prompts.values():
            end, limit = _positions(parts), self.model.config.max_positions
            if end > limit:
                raise PromptError(f"the prompt is {end} positions long, the model reads {limit}")

    def _admit_waiting(self) -> None:
        """Open what there is room for, in the order in which it came."""
        while self._waiting:
            order = self._waiting[0]
            try:
                if not self._admit(order):
                    return
                self._waiting.popleft()
            except Exception as error:
                self._close(tuple(order.prompts))
                self.replies.append(failed(order.call, error))

    def _taken(self, prompts: Prompts) -> Prompts:
        """The prompts with their images out of shared memory. Raises ParcelGone."""
        return {
            name: tuple(
                replace(part, pixels=LocalParcel(dict(self.transport.take(part.pixels))))
                if isinstance(part, PicturePart)
                else part
                for part in parts
            )
            for name, parts in prompts.items()
        }

    def _admit(self, order: Open) -> bool:
        """Open all sequences of an order, if the cache has room for them now."""
        rows = {name: _rows(parts, 0) for name, parts in order.prompts.items()}
        needed = sum(self.pool.blocks_for(len(r) + order.room[n]) for n, r in rows.items())
        if needed > self.pool.book.available:
            return False
        cached = 0
        for name, parts in order.prompts.items():
            ids = [i for part in parts if not isinstance(part, PicturePart) for i in part.ids]
            cache = self.pool.open(rows[name], order.room[name])
            # From here on closing the sequence gives its room back.
            self._sequences[name] = sequence = _Sequence(cache, deque(), ids)
            cached += cache.length
            self.counters["und_known_tokens"] += cache.length
            cache.expect(rows[name][cache.length :])
            sequence.pieces = self._pieces(parts, cache.length)
        opened = Opened(sum(map(len, rows.values())), cached)
        self._reading.append(_Reading(tuple(rows), Reply(order.call, opened, True), order.then))
        return True

    def _pieces(self, parts: Sequence[PromptPart], known: int = 0) -> deque[_Piece]:
        """What is left to read of some parts, of which `known` tokens are there already."""
        pieces: deque[_Piece] = deque()
        for part in parts:
            count = part.tokens if isinstance(part, PicturePart) else len(part.ids)
            skipped = min(known, count)
            known -= skipped
            if skipped == count:
                continue
            if isinstance(part, PicturePart):
                assert isinstance(part.pixels, LocalParcel)
                pieces.append(_Piece(image=part.pixels.tensors["pixels"], grid=part.grid))
            else:
                pieces.append(_Piece(ids=part.ids[skipped:]))
        return pieces

    def _start_extending(self, order: Extend) -> None:
        for name, parts in self._taken(order.parts).items():
            sequence = self._sequence(name)
            rows = _rows(parts, sequence.cache.next_t)
            end = sequence.cache.next_t + _positions(parts)
            check_context(end, self.model.config.max_positions)
            sequence.cache.reserve(len(rows))
            sequence.cache.expect(rows)
            sequence.pieces += self._pieces(parts)
        self._reading.append(_Reading(tuple(order.parts), Reply(order.call, Extended(), True)))

    # --- reading ---

    def _read_some(self) -> None:
        left = self.settings.prefill_tokens
        found: list[tuple[_Sequence, list[_Piece]]] = []
        for reading in self._reading:
            for name in reading.names:
                sequence = self._sequences[name]
                if sequence.pieces and left > 0:
                    pieces, left = _take(sequence.pieces, left)
                    if pieces:
                        found.append((sequence, pieces))
        if not found:
            return
        self.counters["und_read_tokens"] += self.settings.prefill_tokens - left
        states = feed(self.model, [_feed(s.cache, pieces) for s, pieces in found])
        finite = torch.isfinite(states).all(dim=1).tolist()
        for (sequence, _), state, fine in zip(found, states, finite, strict=True):
            sequence.hidden = state if fine else None
            if not fine:
                self.pool.distrust(sequence.cache)

    def _answer_readers(self) -> None:
        left: list[_Reading] = []
        for reading in self._reading:
            sequences = [self._sequences[name] for name in reading.names]
            if any(s.pieces for s in sequences):
                left.append(reading)
            elif any(s.hidden is None for s in sequences):
                self.replies.append(failed(reading.reply.call, not_finite()))
            else:
                self.replies.append(reading.reply)
                if reading.then is not None:
                    self.submit(reading.then)
        self._reading = left

    # --- writing ---

    def _start_writing(self, order: Write) -> None:
        sequence = self._sequence(order.sequence)
        if sequence.text is None:
            sequence.text = Generation(
                sequence.cache,
                SamplingState(order.sampling, sequence.context),
                order.stop_ids,
                order.max_new_tokens,
            )
        sequence.text.resume()
        self._writing[order.sequence] = order

    def _write_one_token(self) -> None:
        sequences = {name: self._sequences[name] for name in self._writing}
        for name, sequence in sequences.items():
            text = sequence.text
            assert text is not None
            room = self.model.config.max_positions - sequence.cache.next_t
            if len(text.ids) >= text.max_new_tokens or room <= 0:
                text.finish_reason = "length"
                self._end_writing(name)
        rows = [(n, s) for n, s in sequences.items() if n in self._writing]
        if not rows:
            return
        logits = self.model.logits(torch.stack([_state(s) for _, s in rows]))
        choices = choose_tokens(logits, [_text(s) for _, s in rows])
        going_on = [
            (sequence, token)
            for (name, sequence), choice in zip(rows, choices, strict=True)
            if (token := self._take_token(name, sequence, choice)) is not None
        ]
        if not going_on:
            return
        for sequence, token in going_on:
            sequence.cache.expect(text_rows((token,), sequence.cache.next_t))
        states = feed(self.model, [Feed(s.cache, (Text(1),), (t,)) for s, t in going_on])
        for (sequence, _), state in zip(going_on, states, strict=True):
            sequence.hidden = state
            assert sequence.text is not None
            sequence.text.pending = []

    def _take_token(self, name: SequenceName, sequence: _Sequence, choice: Choice) -> int | None:
        """Send a sequence's next token; None when it ends with it."""
        text, call = _text(sequence), self._writing[name].call
        try:
            token = text.take(choice)
        except NeounifyError as error:
            del self._writing[name]
            self.pool.distrust(sequence.cache)
            self.replies.append(failed(call, error))
            return None
        if token is not None:
            self.counters["und_written_tokens"] += 1
            self.replies.append(Reply(call, Token(token, choice.logprobs), False))
        if text.finish_reason is not None:
            self._end_writing(name)
            return None
        return token

    def _end_writing(self, name: SequenceName) -> None:
        text = self._sequences[name].text
        assert text is not None
        written = Written(text.finish_reason or "stop", text.stopped_by, tuple(text.pending))
        self.replies.append(Reply(self._writing.pop(name).call, written, True))

    # --- the rest ---

    def _export(self, order: Export) -> None:
        prefixes: list[Prefix] = []
        try:
            for name in order.sequences:
                cache = self._sequence(name).cache
                keys, values = cache.gather()
                parcel = self.transport.pack({"keys": keys, "values": values})
                prefixes.append(Prefix(parcel, cache.next_t))
        except BaseException:
            for prefix in prefixes:
                free(prefix.parcel)
            raise
        self.replies.append(Reply(order.call, Exported(tuple(prefixes)), True))

    def _close(self, names: Sequence[SequenceName]) -> None:
        gone = set(names)
        self._waiting = deque(o for o in self._waiting if not gone & set(o.prompts))
        self._reading = [r for r in self._reading if not gone & set(r.names)]
        for name in names:
            self._writing.pop(name, None)
            sequence = self._sequences.pop(name, None)
            if sequence is not None:
                self.pool.close(sequence.cache)

    def _sequence(self, name: SequenceName) -> _Sequence:
        if name not in self._sequences:
            raise EngineDied(f"the engine was started again and has no sequence {name} any more")
        return self._sequences[name]


def _rows(parts: Sequence[PromptPart], t: int) -> list[Row]:
    rows: list[Row] = []
    for part in parts:
        if isinstance(part, PicturePart):
            rows += image_rows(part.digest, part.tokens, t)
            t += 1
        else:
            rows += text_rows(part.ids, t)
            t += len(part.ids)
    return rows


def _tokens(parts: Sequence[PromptPart]) -> int:
    return sum(p.tokens if isinstance(p, PicturePart) else len(p.ids) for p in parts)


def _positions(parts: Sequence[PromptPart]) -> int:
    return sum(1 if isinstance(p, PicturePart) else len(p.ids) for p in parts)


def _take(pieces: deque[_Piece], most: int) -> tuple[list[_Piece], int]:
    """Pieces of at most `most` tokens from the front, a larger image alone; what is left of it."""
    taken: list[_Piece] = []
    while pieces and most > 0:
        first = pieces[0]
        if first.tokens <= most or (first.image is not None and not taken):
            taken.append(pieces.popleft())
            most -= first.tokens
        elif first.image is not None:
            break
        else:
            taken.append(_Piece(ids=first.ids[:most]))
            first.ids = first.ids[most:]
            most = 0
    return taken, most


def _feed(cache: PagedSequence, pieces: Sequence[_Piece]) -> Feed:
    return Feed(
        cache,
        tuple(Text(len(p.ids)) if p.image is None else Image(*p.grid) for p in pieces),
        [token for piece in pieces for token in piece.ids],
        [piece.image for piece in pieces if piece.image is not None],
    )


def _text(sequence: _Sequence) -> Generation:
    assert sequence.text is not None
    return sequence.text


def _state(sequence: _Sequence) -> Tensor:
    assert sequence.hidden is not None
    return sequence.hidden
