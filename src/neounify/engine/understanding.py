"""Understanding engine: prefill and decoding of many sequences at once.

Each step reads a bounded piece of the prompts that wait, then writes one token of every sequence
that writes. Sequences lie in a paged cache, where one that begins as an earlier one did goes on
from there; what one has to give up when room gets scarce (`room.py`) is read again later. The
engine speaks ids.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from neounify.attention import select_for
from neounify.cache import PagedKVCache
from neounify.decode.forward import forward_und
from neounify.decode.loop import Writing, choose_tokens
from neounify.decode.sampler import Choice
from neounify.decode.sampling import SamplingState
from neounify.engine.messages import (
    Append,
    Decode,
    Decoded,
    Export,
    Exported,
    ImageInput,
    Prefill,
    PromptInput,
    Release,
    Reply,
    SequenceName,
    Token,
    failed,
)
from neounify.engine.room import PagedRoom, Room
from neounify.engine.sequences import (
    Exporting,
    Piece,
    Reading,
    ServedSequence,
    check_context,
    positions_of,
    tokens_of,
)
from neounify.engine.tensors import LocalTensors, Transport
from neounify.errors import (
    ContextFullError,
    EngineDied,
    NeounifyError,
    PromptError,
    RequestError,
    not_finite,
)
from neounify.model.neo import NeoUnify
from neounify.runtime.plan import ExecutionPlan, plan_execution

Prompts = Mapping[SequenceName, tuple[PromptInput, ...]]


@dataclass(frozen=True, kw_only=True)
class UnderstandingSettings:
    """Size of the KV cache of all sequences, and prompt tokens per step; None: the plan's."""

    cache_tokens: int | None = None
    block_size: int | None = None
    prefill_tokens: int | None = None

    def adjust(self, plan: ExecutionPlan) -> ExecutionPlan:
        """The plan with the limits that are set here."""
        size = self.block_size or plan.kv_block_size
        tokens = self.cache_tokens or plan.kv_blocks * plan.kv_block_size
        return replace(
            plan,
            kv_blocks=max(1, tokens // size),
            kv_block_size=size,
            prefill_step_rows=self.prefill_tokens or plan.prefill_step_rows,
        )


def _paged_cache(model: NeoUnify, plan: ExecutionPlan) -> PagedKVCache:
    return PagedKVCache(
        model.config,
        plan.kv_blocks,
        plan.kv_block_size,
        dtype=model.compute_dtype,
        device=model.device,
    )


class UnderstandingEngine:
    """Takes orders with `submit`, does a step's work with `step`, leaves `replies`."""

    def __init__(
        self,
        model: NeoUnify,
        settings: UnderstandingSettings,
        transport: Transport,
        room: Room | None = None,
    ) -> None:
        """`room` is where caches lie; None is a paged cache of the settings' size."""
        self.model, self.settings, self.transport = model, settings, transport
        self.plan = settings.adjust(plan_execution(model.config, model.device, model.compute_dtype))
        self.backend = select_for(model, self.plan.attention)
        self.room = room or PagedRoom(_paged_cache(model, self.plan), transport)
        self.replies: list[Reply] = []
        self.counters: Counter[str] = Counter()
        self._ages = itertools.count()
        self._sequences: dict[SequenceName, ServedSequence] = {}
        self._reading: list[Reading] = []
        self._exporting: list[Exporting] = []
        self._writing: dict[SequenceName, Decode] = {}
        self._waiting = 0

    @property
    def busy(self) -> bool:
        return bool(self._reading or self._exporting or self._writing)

    @property
    def urgent(self) -> bool:
        """Whether somebody waits for a first token."""
        return bool(self._reading or self._exporting)

    @property
    def writes(self) -> bool:
        """Whether text is being written, or will be once its prompt is read.

        Not so for prompts that are only painted behind.
        """
        return bool(self._writing) or any(r.then is not None for r in self._reading)

    def gauges(self) -> Mapping[str, float]:
        """How full the engine is: sequences that wait, read and write, and blocks in use."""
        return {
            "und_waiting": self._waiting,
            "und_reading": len(self._reading),
            "und_writing": len(self._writing),
            "und_cache_used": self.room.used,
        }

    def submit(self, order: Prefill | Decode | Append | Export | Release) -> None:
        """Take an order. What cannot be done is answered with Failed."""
        if isinstance(order, Release):
            self._close(order.sequences)
            return
        try:
            match order:
                case Prefill():
                    self._open(order)
                case Decode():
                    self._start_writing(order)
                case Append():
                    self._extend(order)
                case Export():
                    sequences = tuple(self._sequence(name) for name in order.sequences)
                    self._exporting.append(Exporting(order.call, sequences))
                    self._answer_exports()
        except Exception as error:  # whatever it is, it concerns this order alone
            self.replies.append(failed(order.call, error))

    @torch.inference_mode()
    def step(self) -> None:
        """Read a piece of what waits, then write one token of each sequence that writes.

        Raises what concerns all sequences; an error of one order is that order's answer.
        """
        self._give_room()
        self._read_some()
        self._answer_readers()
        self._answer_exports()
        self._write_one_token()
        self.counters["und_steps"] += 1
        self.counters["und_preempted"] = self.room.preempted

    def check(self) -> None:
        """Whether the cache's books are right. Raises ValueError."""
        self.room.check()

    # --- opening and extending ---

    def _open(self, order: Prefill) -> None:
        for name, parts in order.prompts.items():
            self._check_room(tokens_of(parts) + order.room[name])
            end, limit = positions_of(parts), self.model.config.max_positions
            if end > limit:
                raise PromptError(f"the prompt is {end} positions long, the model reads {limit}")
        # Taken at once: the caller may leave before there is room, and frees what lies in parcels.
        prompts = self._taken(order.prompts)
        for name, parts in prompts.items():
            sequence = ServedSequence(name, next(self._ages), order.room[name])
            sequence.append(parts)
            self._sequences[name] = sequence
        opened = tuple(self._sequences[name] for name in prompts)
        self._reading.append(Reading(order.call, opened, True, order.then))

    def _check_room(self, tokens: int) -> None:
        needed = self.room.allocated(tokens)
        if needed > self.room.tokens:
            raise RequestError(
                f"the request needs room for {needed} tokens, the server has {self.room.tokens}; "
                "ask for fewer tokens"
            )

    def _taken(self, prompts: Prompts) -> Prompts:
        """The prompts with their images out of their references. Raises TensorsGone.

        The prompts of guidance branches share the references of their images.
        """
        taken: dict[int, LocalTensors] = {}

        def take(part: PromptInput) -> PromptInput:
            if not isinstance(part, ImageInput):
                return part
            if id(part.pixels) not in taken:
                taken[id(part.pixels)] = LocalTensors(dict(self.transport.take(part.pixels)))
            return replace(part, pixels=taken[id(part.pixels)])

        return {name: tuple(map(take, parts)) for name, parts in prompts.items()}

    def _extend(self, order: Append) -> None:
        taken = self._taken(order.parts)
        for name, parts in taken.items():
            sequence = self._sequence(name)
            check_context(sequence.next_t + positions_of(parts), self.model.config.max_positions)
            length = len(sequence.token_keys) + tokens_of(parts)
            if length > self.room.tokens:
                raise ContextFullError(
                    f"{length} tokens are more than the server's cache holds, {self.room.tokens}"
                )
        for name, parts in taken.items():
            self._sequence(name).append(parts)
        extended = tuple(self._sequence(name) for name in taken)
        self._reading.append(Reading(order.call, extended, False))

    # --- room and reading ---

    def _wanted(self) -> set[ServedSequence]:
        """The sequences that somebody waits for."""
        wanted = {self._sequences[name] for name in self._writing}
        for reading in self._reading:
            wanted.update(s for s in reading.sequences if not s.read)
        for exporting in self._exporting:
            wanted.update(exporting.left)
        return wanted

    def _give_room(self) -> None:
        wanted = self._wanted()
        lacking = [s for s in wanted if s.cache is None]
        if not lacking:
            self._waiting = 0
            return
        for sequence in self.room.enter(lacking, wanted):
            assert sequence.cache is not None
            self.counters["und_known_tokens"] += sequence.cache.length
        for sequence in [s for s in lacking if s.error is not None]:
            self._fail(sequence)
        self._waiting = sum(s.cache is None and s.error is None for s in lacking)

    def _read_some(self) -> None:
        left = self.plan.prefill_step_rows
        found: list[tuple[ServedSequence, list[Piece]]] = []
        wanted = self._wanted()
        for sequence in sorted(wanted, key=lambda s: s.order):
            if left <= 0:
                break
            # Whoever is older may have taken its room meanwhile.
            if sequence.cache is None or sequence.cache.length == len(sequence.token_keys):
                continue
            pieces = sequence.next_pieces(left)
            tokens = sum(piece.tokens for piece in pieces)
            if tokens > left and found:
                continue  # an image larger than a step goes alone
            if self.room.grow(sequence, tokens, wanted):
                found.append((sequence, pieces))
                left -= tokens
        if not found:
            return
        self.counters["und_read_tokens"] += self.plan.prefill_step_rows - left
        inputs = [s.model_input(pieces) for s, pieces in found]
        states = forward_und(self.model, inputs, self.backend)
        finite = torch.isfinite(states).all(dim=1).tolist()
        for (sequence, _), state, fine in zip(found, states, finite, strict=True):
            sequence.take_state(state, finite=fine)
            if not fine:
                self.room.invalidate(sequence)

    def _answer_readers(self) -> None:
        left: list[Reading] = []
        done: list[Reading] = []
        for reading in self._reading:
            (done if all(s.read for s in reading.sequences) else left).append(reading)
        self._reading = left
        for reading in done:
            if not all(s.finite for s in reading.sequences):
                self.replies.append(failed(reading.call, not_finite()))
                continue
            self.replies.append(Reply(reading.call, reading.answer, reading.then is None))
            if reading.then is not None:
                self.submit(reading.then)

    # --- writing ---

    def _start_writing(self, order: Decode) -> None:
        sequence = self._sequence(order.sequence)
        if sequence.text is None:
            context = [token for piece in sequence.pieces for token in piece.ids]
            sampling = SamplingState(order.sampling, context)
            sequence.text = Writing(sampling, order.stop_ids, order.max_new_tokens)
        sequence.text.resume()
        self._writing[order.sequence] = order

    def _write_one_token(self) -> None:
        rows = self._that_can_write()
        if not rows:
            return
        logits = self.model.logits(torch.stack([_state(s) for s in rows]))
        choices = choose_tokens(logits, [_text(s) for s in rows])
        going_on = [
            (sequence, token)
            for sequence, choice in zip(rows, choices, strict=True)
            if (token := self._take_token(sequence, choice)) is not None
        ]
        if not going_on:
            return
        for sequence, token in going_on:
            sequence.append_token(token)
        inputs = [s.model_input([Piece(ids=[token])]) for s, token in going_on]
        states = forward_und(self.model, inputs, self.backend)
        for (sequence, _), state in zip(going_on, states, strict=True):
            sequence.take_state(state, finite=True)
            _text(sequence).pending = []

    def _that_can_write(self) -> list[ServedSequence]:
        """Those that write and have room for another token; one that can have none ends."""
        wanted = self._wanted()
        able: list[ServedSequence] = []
        # The oldest first: it may take the room of younger ones, which then have to wait.
        writing = (self._sequences[name] for name in self._writing)
        for sequence in sorted(writing, key=lambda s: s.order):
            text = _text(sequence)
            positions = self.model.config.max_positions - sequence.next_t
            tokens = self.room.tokens - len(sequence.token_keys)
            if len(text.ids) >= text.max_new_tokens or min(positions, tokens) <= 0:
                text.finish_reason = "length"
                self._end_writing(sequence.name)
                wanted.discard(sequence)
            elif sequence.ready and self.room.grow(sequence, 1, wanted):
                able.append(sequence)
        return able

    def _take_token(self, sequence: ServedSequence, choice: Choice) -> int | None:
        """Send a sequence's next token; None when it ends with it."""
        text, name = _text(sequence), sequence.name
        call = self._writing[name].call
        try:
            token = text.take(choice)
        except NeounifyError as error:
            del self._writing[name]
            self.room.invalidate(sequence)
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
        written = Decoded(text.finish_reason or "stop", text.stopped_by, tuple(text.pending))
        self.replies.append(Reply(self._writing.pop(name).call, written, True))

    # --- the rest ---

    def _answer_exports(self) -> None:
        """Copy sequences that are to be exported as soon as they lie in the cache."""
        for exporting in list(self._exporting):
            try:
                for sequence in exporting.left:
                    if sequence.ready:
                        exporting.done[sequence.name] = self.room.export(sequence)
            except Exception as error:
                self._exporting.remove(exporting)
                exporting.free()
                self.replies.append(failed(exporting.call, error))
                continue
            if not exporting.left:
                self._exporting.remove(exporting)
                prefixes = tuple(exporting.done[s.name] for s in exporting.sequences)
                self.replies.append(Reply(exporting.call, Exported(prefixes), True))

    def _close(self, names: Sequence[SequenceName]) -> None:
        gone = {self._sequences[name] for name in names if name in self._sequences}
        self._reading = [r for r in self._reading if not gone.intersection(r.sequences)]
        for exporting in [e for e in self._exporting if gone.intersection(e.sequences)]:
            self._exporting.remove(exporting)
            exporting.free()
        for sequence in gone:
            self._writing.pop(sequence.name, None)
            del self._sequences[sequence.name]
            self.room.leave(sequence)

    def _fail(self, sequence: ServedSequence) -> None:
        """Answer all calls that wait for a sequence with its error, and give it up."""
        assert sequence.error is not None
        calls = [r.call for r in self._reading if sequence in r.sequences]
        calls += [e.call for e in self._exporting if sequence in e.sequences]
        if sequence.name in self._writing:
            calls.append(self._writing[sequence.name].call)
        self._close((sequence.name,))
        self.replies += [failed(call, sequence.error) for call in calls]

    def _sequence(self, name: SequenceName) -> ServedSequence:
        if name not in self._sequences:
            raise EngineDied(f"the engine was started again and has no sequence {name} any more")
        return self._sequences[name]


def _text(sequence: ServedSequence) -> Writing:
    assert sequence.text is not None
    return sequence.text


def _state(sequence: ServedSequence) -> Tensor:
    assert sequence.hidden is not None
    return sequence.hidden
