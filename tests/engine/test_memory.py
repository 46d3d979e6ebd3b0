"""A step that finds no memory fails the calls that take part in it; the engines continue."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import neounify
from neounify.config import TextSampling
from neounify.engine.generation import GenerationEngine
from neounify.engine.messages import (
    Answer,
    Decode,
    Decoded,
    DecodedToken,
    Failed,
    GenerateImages,
    ImageReady,
    LocalTensors,
    LocalTransport,
    Prefill,
    Prefilled,
    Prefix,
    Release,
    TextInput,
)
from neounify.engine.sequences import ContiguousCaches
from neounify.engine.understanding import UnderstandingEngine
from neounify.errors import OutOfMemory
from neounify.flow.sampling import ImageSampling
from neounify.model.layout import Grid
from neounify.runtime.plan import ExecutionPlan
from support.prefilling import pool_of

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
]


class Failing:
    """A function that raises an error in the calls for which `when` holds."""

    def __init__(self, function: Callable[..., Any], error: Exception) -> None:
        self.function, self.error = function, error
        self.when: Callable[..., bool] = lambda *args: False

    def __call__(self, *args: Any) -> Any:
        if self.when(*args):
            raise self.error
        return self.function(*args)


def failing(
    pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception
) -> Failing:
    function = Failing(getattr(pipe.model, name), error)
    monkeypatch.setattr(pipe.model, name, function)
    return function


def prefill(call: int, *, tokens: int = 20, decode: int = 6) -> Prefill:
    name = (call, "text")
    then = Decode(call, name, TextSampling(), frozenset(), decode) if decode else None
    ids = tuple(range(call, call + tokens))
    return Prefill(call, {name: (TextInput(ids),)}, {name: decode}, then)


def steps(engine: Any, count: int = 60) -> dict[int, list[Answer]]:
    """Answers by call of at most `count` steps."""
    answers: dict[int, list[Answer]] = {}
    for _ in range(count):
        if engine.busy:
            engine.step()
        for reply in engine.replies:
            answers.setdefault(reply.call, []).append(reply.answer)
        engine.replies = []
    return answers


def check_failure(answers: list[Answer], message: str) -> None:
    assert sum(isinstance(answer, Failed) for answer in answers) == 1
    last = answers[-1]
    assert isinstance(last, Failed)
    assert last.kind == "OutOfMemory"
    assert message in last.message
    assert isinstance(last.exception(), OutOfMemory)


def tokens(answers: list[Answer]) -> list[int]:
    assert isinstance(answers[-1], Decoded)
    return [answer.id for answer in answers if isinstance(answer, DecodedToken)]


@pytest.fixture(params=["paged", "contiguous"])
def understanding(request: pytest.FixtureRequest, pipe: neounify.Pipeline) -> UnderstandingEngine:
    caches = ContiguousCaches(pipe.model) if request.param == "contiguous" else None
    plan = ExecutionPlan(kv_blocks=64, kv_block_size=8)
    return UnderstandingEngine(pipe.model, LocalTransport(), plan, caches)


def check_empty(engine: UnderstandingEngine, calls: range) -> None:
    engine.submit(Release(tuple((call, "text") for call in calls)))
    engine.check()
    assert not engine.busy
    if not isinstance(engine.caches, ContiguousCaches):
        assert pool_of(engine).allocator.in_use == 0


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_prompts_without_memory_fail_and_text_continues(
    pipe: neounify.Pipeline,
    understanding: UnderstandingEngine,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    engine = understanding
    engine.submit(prefill(1))
    expected = tokens(steps(engine)[1])
    backbone = failing(pipe, monkeypatch, "backbone", error)
    engine.submit(prefill(2))
    begun = steps(engine, 2)[2]
    backbone.when = lambda layout, *rest: layout["und"].length > 10
    for call in (3, 4, 5):
        engine.submit(prefill(call))
    answers = steps(engine, 1)
    for call in (3, 4, 5):
        check_failure(answers[call], "no memory is left to prefill 60 tokens in a step")
    backbone.when = lambda *args: False
    rest = steps(engine)[2]
    assert len(tokens(begun + answers[2] + rest)) == 6
    engine.submit(Release(((1, "text"),)))
    engine.submit(prefill(1))
    assert tokens(steps(engine)[1]) == expected
    check_empty(engine, range(1, 6))


@pytest.mark.parametrize("name", ["logits", "backbone"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_text_without_memory_fails_and_prompts_continue(
    pipe: neounify.Pipeline,
    understanding: UnderstandingEngine,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    error: Exception,
) -> None:
    engine = understanding
    function = failing(pipe, monkeypatch, name, error)
    for call in (1, 2):
        engine.submit(prefill(call))
    assert {type(a) for a in steps(engine, 2)[1]} == {Prefilled, DecodedToken}
    if name == "backbone":
        function.when = lambda layout, *rest: layout.is_decode
    else:
        function.when = lambda *args: True
    engine.submit(prefill(3, decode=0))
    answers = steps(engine, 1)
    for call in (1, 2):
        check_failure(answers[call], "tokens of 2 sequences in a step")
    assert [type(answer) for answer in answers[3]] == [Prefilled]
    function.when = lambda *args: False
    engine.submit(prefill(4))
    assert len(tokens(steps(engine)[4])) == 6
    check_empty(engine, range(1, 5))


def image(pipe: neounify.Pipeline, call: int, grid: Grid) -> GenerateImages:
    config, random = pipe.config, torch.Generator().manual_seed(call)
    shape = (config.num_layers, config.num_kv_heads, 3, config.head_dim)
    keys, values = (torch.randn(shape, generator=random) for _ in range(2))
    prefix = Prefix(LocalTensors({"keys": keys, "values": values}), 3)
    noise = LocalTensors({"noise": torch.randn(2, grid.length, config.token_width)})
    sampling = ImageSampling(steps=3, guidance=1.0).resolve(config, editing=False)
    return GenerateImages(call, noise, grid, sampling, {"cond": prefix}, frozenset())


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_images_without_memory_fail_and_others_continue(
    pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    plan = ExecutionPlan(denoise_step_rows=16)
    engine = GenerationEngine(pipe.model, LocalTransport(), plan)
    layers = failing(pipe, monkeypatch, "layer_by_layer", error)
    layers.when = lambda layout, *rest: layout["gen"].grids[0].length == 36
    for call, side in ((1, 6), (2, 2), (3, 2)):
        engine.submit(image(pipe, call, Grid(side, side)))
    answers = steps(engine)
    check_failure(answers[1], "no memory is left to denoise 36 image tokens in a step")
    for call in (2, 3):
        assert [type(answer) for answer in answers[call]] == [ImageReady] * 2
    layers.when = lambda *args: True
    for call in (4, 5):
        engine.submit(image(pipe, call, Grid(2, 2)))
    answers = steps(engine)
    for call in (4, 5):
        check_failure(answers[call], "no memory is left to denoise 16 image tokens in a step")
    assert not engine.busy


def test_other_errors_of_a_step_concern_the_engine(
    pipe: neounify.Pipeline,
    understanding: UnderstandingEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = RuntimeError("CUDA error: an illegal memory access was encountered")
    failing(pipe, monkeypatch, "backbone", error).when = lambda *args: True
    understanding.submit(prefill(1))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        understanding.step()


def test_a_cache_that_cannot_be_allocated_fails_its_call_alone(
    pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = torch.empty

    def empty(shape: Any, *rest: Any, **options: Any) -> Any:
        if isinstance(shape, tuple) and len(shape) == 4 and shape[2] > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(shape, *rest, **options)

    engine = UnderstandingEngine(pipe.model, LocalTransport(), caches=ContiguousCaches(pipe.model))
    monkeypatch.setattr(torch, "empty", empty)
    engine.submit(prefill(1, tokens=60))
    engine.submit(prefill(2))
    answers = steps(engine)
    check_failure(answers[1], "no memory is left for the request")
    assert len(tokens(answers[2])) == 6
