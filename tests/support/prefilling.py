"""Prompts read by an understanding engine, for tests of what a model does behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor

import neounify
from neounify.cache import PagedKVCache, SequenceCache
from neounify.engine import understanding
from neounify.engine.messages import (
    ImageInput,
    LocalTensors,
    LocalTransport,
    Prefill,
    Reply,
    SequenceName,
    new_number,
)
from neounify.engine.sequences import (
    ContiguousCaches,
    ModelInput,
    PagedCaches,
    ServedSequence,
)
from neounify.engine.understanding import UnderstandingEngine, forward_und
from neounify.model import NeoUnify
from neounify.model.layout import Grid
from neounify.runtime.plan import ExecutionPlan
from neounify.tasks.program import prompt_inputs
from neounify.text import Prompt


def contiguous_engine(pipe: neounify.Pipeline) -> UnderstandingEngine:
    """An engine whose sequences have separate caches, as in a pipeline."""
    plan = ExecutionPlan(prefill_step_rows=32_768)
    return UnderstandingEngine(pipe.model, LocalTransport(), plan, ContiguousCaches(pipe.model))


def prefilled(
    engine: UnderstandingEngine, prompts: Sequence[Prompt], images: Sequence[Sequence[Tensor]]
) -> list[ServedSequence]:
    """The sequences of prompts, read; `images` are each prompt's prepared ones."""
    names: list[SequenceName] = [(new_number(), "cond") for _ in prompts]
    side = engine.model.config.token_size
    inputs = {}
    for name, prompt, of_prompt in zip(names, prompts, images, strict=True):
        packed = [
            ImageInput(
                LocalTensors({"pixels": x}), b"", Grid.of_pixels(x.shape[1], x.shape[2], side)
            )
            for x in of_prompt
        ]
        inputs[name] = prompt_inputs(prompt, packed)
    engine.submit(Prefill(new_number(), inputs, dict.fromkeys(names, 0)))
    while engine.busy:
        engine.step()
    replies: list[Reply] = engine.replies
    assert replies[-1].final
    return [engine._sequences[name] for name in names]


def as_cache(sequence: ServedSequence) -> SequenceCache:
    assert isinstance(sequence.cache, SequenceCache)
    return sequence.cache


def watch_prefills(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """The ids of the prompts of every prefill call from now on, call by call."""
    calls: list[list[list[int]]] = []

    def forward(model: NeoUnify, inputs: Sequence[ModelInput], *rest: Any) -> Tensor:
        if any(item.cache.length == 0 for item in inputs):
            calls.append([list(item.ids) for item in inputs])
        return forward_und(model, inputs, *rest)

    monkeypatch.setattr(understanding, "forward_und", forward)
    return calls


def pool_of(engine: UnderstandingEngine) -> PagedKVCache:
    assert isinstance(engine.caches, PagedCaches)
    return engine.caches.pool
