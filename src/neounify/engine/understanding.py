"""Understanding engine: prefill and decoding of many sequences at once.

Each step prefills a bounded piece of the waiting prompts, then decodes one token of every decoding
sequence. Sequences lie in a paged cache with prefix sharing; a preempted sequence
is prefilled again later. The engine handles token ids, never text.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from neounify.attention import AttentionBackend, select_for
from neounify.cache import new_paged_cache
from neounify.config import Constraint
from neounify.decode.sampler import (
    DecodeState,
    SampledToken,
    SamplingBatch,
    SamplingState,
    compile_constraint,
)
from neounify.distributed.group import ALONE, Group
from neounify.engine.graphs import DecodingGraphs, recordable
from neounify.engine.messages import (
    Append,
    Decode,
    Decoded,
    DecodedToken,
    Export,
    Exported,
    Prefill,
    Release,
    Reply,
    SequenceName,
    StepMemory,
    Transport,
    failed,
    with_images,
)
from neounify.engine.sequences import (
    KVCacheManager,
    ModelInput,
    PagedCaches,
    PendingExport,
    PendingPrefill,
    Piece,
    ServedSequence,
    check_context,
    positions_of,
    tokens_of,
)
from neounify.errors import (
    ContextFullError,
    EngineDied,
    NeounifyError,
    PromptError,
    RequestError,
    not_finite,
)
from neounify.model.layout import Layout, to_device
from neounify.model.neo import NeoUnify
from neounify.model.parts import UND
from neounify.runtime.plan import ExecutionPlan, measured_plan


def forward_und(
    model: NeoUnify, inputs: Sequence[ModelInput], backend: AttentionBackend | None = None
) -> Float[Tensor, "b d"]:
    """Append to every sequence's cache in one packed call; the last hidden state of each.

    Only the understanding stream runs. Raises ValueError for an input without tokens.
    """
    layout = Layout(item.cache.document(*item.spans) for item in inputs)
    new = [stop - start for start, stop in layout[UND].ranges]
    if 0 in new:
        raise ValueError(f"every sequence needs at least one new token, got {new}")
    attend = (backend or select_for(model)).plan(layout, [item.cache for item in inputs])
    ids = np.array([i for item in inputs for i in item.ids], dtype=np.int64)
    images = [to_device(image, model.device) for item in inputs for image in item.images]
    x = model.embed_und(layout, to_device(ids, model.device), images)
    hidden = model.backbone(layout, {UND: x}, attend)[UND]
    for item, document in zip(inputs, layout.documents, strict=True):
        item.cache.advance(document)
    if layout.is_decode:
        return hidden
    return hidden.index_select(0, to_device(np.array(layout.last_rows()), model.device))


class UnderstandingEngine:
    """Prefill and decode loop: `submit` accepts commands, `step` runs them, `replies` collects."""

    def __init__(
        self,
        model: NeoUnify,
        transport: Transport,
        plan: ExecutionPlan | None = None,
        caches: KVCacheManager | None = None,
        group: Group = ALONE,
    ) -> None:
        """`plan` None: that of the free memory of now; `caches` None: a paged cache of its size.

        The ranks of a `group` hold shares of the model and run the same commands in the same steps.
        """
        self.model, self.transport = model, transport
        self.group, self._alone = group, group.size == 1
        self.plan = plan or measured_plan(model.config, model.device, model.compute_dtype)
        self.backend = select_for(model, self.plan.attention)
        self.caches = caches or PagedCaches(
            new_paged_cache(model, self.plan.kv_blocks, self.plan.kv_block_size),
            transport,
            headroom=self.plan.kv_headroom,
            max_passed=self.plan.max_passed,
        )
        self.replies: list[Reply] = []
        self.counters: Counter[str] = Counter()
        self._ages = itertools.count()
        self._sequences: dict[SequenceName, ServedSequence] = {}
        self._prefills: list[PendingPrefill] = []
        self._exports: list[PendingExport] = []
        self._decoding: dict[SequenceName, Decode] = {}
        self._pinned: list[ServedSequence] = []
        self._waiting = 0
        self._sampling: SamplingBatch | None = None
        recorded = self._alone and self.backend.recorded and recordable(model)
        self._graphs = DecodingGraphs(model) if recorded else None

    @property
    def busy(self) -> bool:
        return bool(self._prefills or self._exports or self._decoding or self._preempted_pins())

    @property
    def urgent(self) -> bool:
        """Whether a prompt or an export is waiting."""
        return bool(self._prefills or self._exports)

    @property
    def decoding(self) -> bool:
        """Whether text is being decoded, or will be once its prompt is prefilled.

        False for prompts of images, which are only exported.
        """
        return bool(self._decoding) or any(r.then is not None for r in self._prefills)

    def gauges(self) -> Mapping[str, float]:
        """Load of the engine: waiting, prefilling, decoding sequences; share of blocks in use."""
        return {
            "und_waiting": self._waiting,
            "und_reading": len(self._prefills),
            "und_writing": len(self._decoding),
            "und_cache_used": self.caches.used,
        }

    def submit(self, command: Prefill | Decode | Append | Export | Release) -> None:
        """Accept a command; a command that fails is answered with Failed."""
        if isinstance(command, Release):
            self._close(command.sequences)
            return
        try:
            match command:
                case Prefill():
                    self._open(command)
                case Decode():
                    self._start_decoding(command)
                case Append():
                    self._extend(command)
                case Export():
                    sequences = tuple(self._sequence(name) for name in command.sequences)
                    self._exports.append(PendingExport(command.call, sequences))
                    self._answer_exports()
        except Exception as error:  # any error concerns this command alone
            self.replies.append(failed(command.call, error, alone=self._alone))

    @torch.inference_mode()
    def step(self) -> None:
        """Prefill a piece of the waiting prompts, then decode one token of each decoding sequence.

        Raises errors that concern all sequences; an error of one command is its answer, and work
        that finds no memory fails the calls that take part in it.
        """
        self._allocate()
        self._prefill_step()
        self._answer_prefills()
        self._answer_exports()
        self._decode_step()
        self.counters["und_steps"] += 1
        self.counters["und_preempted"] = self.caches.preempted

    def check(self) -> None:
        """Check the cache's bookkeeping. Raises ValueError."""
        self.caches.check()

    # --- opening and extending ---

    def _open(self, command: Prefill) -> None:
        for name, parts in command.prompts.items():
            self._check_room(tokens_of(parts) + command.room[name])
            end, limit = positions_of(parts), self.model.config.max_positions
            if end > limit:
                raise PromptError(f"the prompt is {end} positions long, the model reads {limit}")
        # Taken at once: the caller may leave before there is room, and frees its references.
        prompts = with_images(command.prompts, self.transport)
        for name, parts in prompts.items():
            sequence = ServedSequence(name, next(self._ages), command.room[name])
            sequence.append(parts)
            self._sequences[name] = sequence
        opened = tuple(self._sequences[name] for name in prompts)
        if command.pinned:
            self._pinned += opened
        then = command.then
        # Compiled beside the steps of others, and beside the prefill of its own prompt.
        constraint = None if then is None else compile_constraint(then.sampling)
        self._prefills.append(PendingPrefill(command.call, opened, True, then, constraint))

    def _check_room(self, tokens: int) -> None:
        needed = self.caches.allocated(tokens)
        if needed > self.caches.tokens:
            raise RequestError(
                f"the request needs room for {needed} tokens, the server has {self.caches.tokens}; "
                "ask for fewer tokens"
            )

    def _extend(self, command: Append) -> None:
        taken = with_images(command.parts, self.transport)
        for name, parts in taken.items():
            sequence = self._sequence(name)
            check_context(sequence.next_t + positions_of(parts), self.model.config.max_positions)
            length = len(sequence.token_keys) + tokens_of(parts)
            if length > self.caches.tokens:
                raise ContextFullError(
                    f"{length} tokens are more than the server's cache holds, {self.caches.tokens}"
                )
        for name, parts in taken.items():
            self._sequence(name).append(parts)
        extended = tuple(self._sequence(name) for name in taken)
        self._prefills.append(PendingPrefill(command.call, extended, False))

    # --- allocation and prefill ---

    def _wanted(self) -> set[ServedSequence]:
        """Sequences with a pending call; without any, pinned ones that were preempted."""
        wanted = {self._sequences[name] for name in self._decoding}
        for pending in self._prefills:
            wanted.update(s for s in pending.sequences if not s.prefilled)
        for export in self._exports:
            wanted.update(export.left)
        return wanted or set(self._preempted_pins())

    def _preempted_pins(self) -> list[ServedSequence]:
        """Pinned sequences that are not in the cache although there is room."""
        return [s for s in self._pinned if not s.ready and self.caches.fits(s)]

    def _allocate(self) -> None:
        wanted = self._wanted()
        lacking = [s for s in wanted if s.cache is None]
        if not lacking:
            self._waiting = 0
            return
        for sequence in self.caches.enter(lacking, wanted):
            assert sequence.cache is not None
            self.counters["und_known_tokens"] += sequence.cache.length
        for sequence in lacking:
            if sequence.error is not None:
                self._fail([sequence], sequence.error)
        self._waiting = sum(s.cache is None and s.error is None for s in lacking)

    def _grow(self, sequence: ServedSequence, tokens: int, wanted: set[ServedSequence]) -> bool:
        """Whether there is room for `tokens` more; a sequence that memory lacks for fails."""
        with self._memory(f"grow the cache of a sequence by {tokens} tokens") as memory:
            return self.caches.grow(sequence, tokens, wanted)
        assert memory.error is not None
        self._fail([sequence], memory.error)
        return False

    def _prefill_step(self) -> None:
        left = self.plan.prefill_step_rows
        batch: list[tuple[ServedSequence, list[Piece]]] = []
        wanted = self._wanted()
        for sequence in sorted(wanted, key=lambda s: s.age):
            if left <= 0:
                break
            # An older sequence may have taken its blocks meanwhile.
            if sequence.cache is None or sequence.cache.length == len(sequence.token_keys):
                continue
            pieces = sequence.next_pieces(left)
            tokens = sum(piece.tokens for piece in pieces)
            if tokens > left and batch:
                continue  # an image larger than a step is prefilled alone
            if self._grow(sequence, tokens, wanted):
                batch.append((sequence, pieces))
                left -= tokens
        if not batch:
            return
        total = self.plan.prefill_step_rows - left
        with self._memory(f"prefill {total} tokens in a step") as memory:
            inputs = [s.model_input(pieces) for s, pieces in batch]
            states = forward_und(self.model, inputs, self.backend)
            finite = torch.isfinite(states).all(dim=1).tolist()
        if memory.error is not None:
            self._fail([s for s, _ in batch], memory.error)
            return
        self.counters["und_read_tokens"] += total
        for (sequence, _), state, is_finite in zip(batch, states, finite, strict=True):
            sequence.take_state(state, finite=is_finite)
            if not is_finite:
                self.caches.invalidate(sequence)

    def _answer_prefills(self) -> None:
        left: list[PendingPrefill] = []
        done: list[PendingPrefill] = []
        for pending in self._prefills:
            ready = all(s.prefilled for s in pending.sequences)
            if ready and pending.constraint is not None:
                ready = self.group.choose(partial(self._is_compiled, pending.constraint))
            (done if ready else left).append(pending)
        self._prefills = left
        for pending in done:
            if not all(s.finite for s in pending.sequences):
                self.replies.append(failed(pending.call, not_finite()))
                continue
            self.replies.append(Reply(pending.call, pending.answer, pending.then is None))
            if pending.then is not None:
                self.submit(pending.then)

    def _is_compiled(self, constraint: Future[Constraint]) -> bool:
        """Whether a grammar is compiled, after a short wait where no text waits for it."""
        if not constraint.done() and not self._decoding:
            wait([constraint], self.plan.constraint_seconds)
        return constraint.done()

    # --- decoding ---

    def _start_decoding(self, command: Decode) -> None:
        sequence = self._sequence(command.sequence)
        if sequence.text is None:
            context = [token for piece in sequence.pieces for token in piece.ids]
            sampling = SamplingState(command.sampling, context)
            sequence.text = DecodeState(sampling, command.stop_ids, command.max_new_tokens)
        sequence.text.resume()
        self._decoding[command.sequence] = command

    def _decode_step(self) -> None:
        rows = self._decodable()
        if not rows:
            return
        with self._memory(f"sample tokens of {len(rows)} sequences in a step") as memory:
            logits = self.model.logits(torch.stack([_state(s) for s in rows]))
            sampling = tuple(_text(s).sampling for s in rows)
            choices = self.group.choose(lambda: self._sample(logits, sampling))
        if memory.error is not None:
            self._fail(rows, memory.error)
            return
        continuing = [
            (sequence, token)
            for sequence, choice in zip(rows, choices, strict=True)
            if (token := self._take_token(sequence, choice)) is not None
        ]
        if not continuing:
            return
        for sequence, token in continuing:
            sequence.append_token(token)
        with self._memory(f"decode tokens of {len(continuing)} sequences in a step") as memory:
            inputs = [s.model_input([Piece(ids=[token])]) for s, token in continuing]
            states = self._decode(inputs)
        if memory.error is not None:
            self._fail([s for s, _ in continuing], memory.error)
            return
        for (sequence, _), state in zip(continuing, states, strict=True):
            sequence.take_state(state, finite=True)
            _text(sequence).pending = []

    def _decode(self, inputs: Sequence[ModelInput]) -> Float[Tensor, "b d"]:
        if self._graphs is not None and self._graphs.serves(inputs):
            return self._graphs.step(inputs)
        return forward_und(self.model, inputs, self.backend)

    def _sample(self, logits: Tensor, states: tuple[SamplingState, ...]) -> list[SampledToken]:
        """Tokens of the rows; settings are uploaded where other sequences are decoded than last."""
        if self._sampling is None or self._sampling.states != states:
            self._sampling = SamplingBatch(states, logits.shape[1], logits.device)
        return self._sampling.sample(logits)

    def _decodable(self) -> list[ServedSequence]:
        """Decoding sequences with room for another token; one that can have none is ended."""
        wanted = self._wanted()
        ready: list[ServedSequence] = []
        # The oldest first: it may preempt younger ones.
        decoding = (self._sequences[name] for name in self._decoding)
        for sequence in sorted(decoding, key=lambda s: s.age):
            text = _text(sequence)
            positions = self.model.config.max_positions - sequence.next_t
            tokens = self.caches.tokens - len(sequence.token_keys)
            if len(text.ids) >= text.max_new_tokens or min(positions, tokens) <= 0:
                text.finish_reason = "length"
                self._end_decoding(sequence.name)
                wanted.discard(sequence)
            elif sequence.ready and self._grow(sequence, 1, wanted):
                ready.append(sequence)
        return ready

    def _take_token(self, sequence: ServedSequence, choice: SampledToken) -> int | None:
        """Send a sequence's next token; returns None when the sequence ends."""
        text, name = _text(sequence), sequence.name
        call = self._decoding[name].call
        try:
            token = text.take(choice)
        except NeounifyError as error:
            del self._decoding[name]
            self.caches.invalidate(sequence)
            self.replies.append(failed(call, error))
            return None
        if token is not None:
            self.counters["und_written_tokens"] += 1
            self.replies.append(Reply(call, DecodedToken(token, choice.logprobs), False))
        if text.finish_reason is not None:
            self._end_decoding(name)
            return None
        return token

    def _end_decoding(self, name: SequenceName) -> None:
        text = self._sequences[name].text
        assert text is not None
        decoded = Decoded(text.finish_reason or "stop", text.stopped_by, tuple(text.pending))
        self.replies.append(Reply(self._decoding.pop(name).call, decoded, True))

    # --- exports and release ---

    def _answer_exports(self) -> None:
        """Export sequences that are complete in the cache."""
        for export in list(self._exports):
            try:
                for sequence in export.left:
                    if sequence.ready:
                        export.done[sequence.name] = self.caches.export(sequence)
            except Exception as error:
                self._exports.remove(export)
                export.free()
                self.replies.append(failed(export.call, error, alone=self._alone))
                continue
            if not export.left:
                self._exports.remove(export)
                prefixes = tuple(export.done[s.name] for s in export.sequences)
                self.replies.append(Reply(export.call, Exported(prefixes), True))

    def _close(self, names: Sequence[SequenceName]) -> None:
        gone = {self._sequences[name] for name in names if name in self._sequences}
        self._prefills = [r for r in self._prefills if not gone.intersection(r.sequences)]
        for export in [e for e in self._exports if gone.intersection(e.sequences)]:
            self._exports.remove(export)
            export.free()
        self._pinned = [s for s in self._pinned if s not in gone]
        for sequence in gone:
            self._decoding.pop(sequence.name, None)
            del self._sequences[sequence.name]
            self.caches.leave(sequence)

    def _fail(self, sequences: Iterable[ServedSequence], error: Exception) -> None:
        """Answer all calls that wait for the sequences with an error, and release them."""
        for sequence in sequences:
            calls = [r.call for r in self._prefills if sequence in r.sequences]
            calls += [e.call for e in self._exports if sequence in e.sequences]
            if sequence.name in self._decoding:
                calls.append(self._decoding[sequence.name].call)
            self._close((sequence.name,))
            self.replies += [failed(call, error, alone=self._alone) for call in calls]

    def _memory(self, work: str) -> StepMemory:
        return StepMemory(work, alone=self._alone)

    def _sequence(self, name: SequenceName) -> ServedSequence:
        if name not in self._sequences:
            raise EngineDied(f"the engine was started again and has no sequence {name} any more")
        return self._sequences[name]


def _text(sequence: ServedSequence) -> DecodeState:
    assert sequence.text is not None
    return sequence.text


def _state(sequence: ServedSequence) -> Tensor:
    assert sequence.hidden is not None
    return sequence.hidden
