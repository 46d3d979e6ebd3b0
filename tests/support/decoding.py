"""Text decoded by an understanding engine whose sequences have separate caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from neounify.config import TextSampling
from neounify.engine.messages import (
    Decode,
    Decoded,
    DecodedToken,
    Failed,
    ImageInput,
    LocalTensors,
    LocalTransport,
    Prefill,
    PromptInput,
    SequenceName,
    TextInput,
    new_number,
)
from neounify.engine.sequences import ContiguousCaches, ModelInput, ServedSequence
from neounify.engine.understanding import UnderstandingEngine
from neounify.model import NeoUnify, Text
from neounify.runtime.plan import ExecutionPlan


@dataclass
class Written:
    """What came of one sequence; `sequence` is the engine's."""

    name: SequenceName
    sequence: ServedSequence
    tokens: list[DecodedToken] = field(default_factory=list)
    end: Decoded | Failed | None = None

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        assert self.sequence.cache is not None
        return self.sequence.cache.length

    @property
    def decoded(self) -> Decoded:
        assert isinstance(self.end, Decoded)
        return self.end


class Decoder:
    """Starts sequences and runs the engine until all of them ended."""

    def __init__(self, model: NeoUnify) -> None:
        plan = ExecutionPlan(prefill_step_rows=32_768)
        self.engine = UnderstandingEngine(model, LocalTransport(), plan, ContiguousCaches(model))
        self._calls: dict[int, Written] = {}

    def start(
        self,
        prompt: Sequence[int] | tuple[PromptInput, ...],
        limit: int,
        stop: Sequence[int] = (),
        sampling: TextSampling | None = None,
    ) -> Written:
        """Decode behind a prompt of ids, or of parts."""
        parts = tuple(part for part in prompt if isinstance(part, TextInput | ImageInput))
        ids = tuple(token for token in prompt if isinstance(token, int))
        call, name = new_number(), (new_number(), "cond")
        decode = Decode(call, name, sampling or TextSampling(), frozenset(stop), limit)
        self.engine.submit(Prefill(call, {name: parts or (TextInput(ids),)}, {name: limit}, decode))
        self._calls[call] = Written(name, self.engine._sequences[name])
        return self._calls[call]

    def resume(self, written: Written, limit: int, stop: Sequence[int] = ()) -> None:
        """Decode on behind a sequence that ended."""
        call = new_number()
        self._calls[call] = written
        self.engine.submit(Decode(call, written.name, TextSampling(), frozenset(stop), limit))

    def step(self) -> int:
        """One step of the engine; the tokens that came of it."""
        self.engine.step()
        tokens = 0
        for reply in self.engine.replies:
            written = self._calls.get(reply.call)
            if written is None:
                continue
            if isinstance(reply.answer, DecodedToken):
                written.tokens.append(reply.answer)
                tokens += 1
            elif isinstance(reply.answer, Decoded | Failed):
                written.end = reply.answer
        self.engine.replies = []
        return tokens

    def run(self) -> list[int]:
        """All sequences to their ends; the tokens of each step that wrote some."""
        steps = []
        while self.engine.busy:
            steps.append(self.step())
        return [tokens for tokens in steps if tokens]


def parts_of(model: NeoUnify, item: ModelInput) -> tuple[PromptInput, ...]:
    """A prompt for the engine, of spans, ids and images."""
    ids, images = iter(item.ids), iter(item.images)
    parts: list[PromptInput] = []
    for span in item.spans:
        if isinstance(span, Text):
            parts.append(TextInput(tuple(next(ids) for _ in range(span.length))))
        else:
            image = next(images)
            parts.append(ImageInput(LocalTensors({"pixels": image}), b"", model.token_grid(image)))
    return tuple(parts)
