"""Errors of one command fail that call alone; the engines continue."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import neounify
from neounify.config import TextSampling
from neounify.engine.generation import GenerationEngine
from neounify.engine.messages import (
    Answer,
    Append,
    Appended,
    Decode,
    Decoded,
    DecodedToken,
    Export,
    Exported,
    Failed,
    GenerateImages,
    ImageInput,
    ImageReady,
    LocalTransport,
    Prefill,
    Prefilled,
    Prefix,
    Release,
    TensorRef,
    TextInput,
    refs_of,
)
from neounify.engine.shared_memory import SharedTransport, folder
from neounify.engine.understanding import UnderstandingEngine
from neounify.errors import OutOfMemory, RequestError
from neounify.flow.sampling import ImageSampling
from neounify.model.layout import Grid
from neounify.runtime.plan import ExecutionPlan
from support.prefilling import pool_of

GRID = Grid(2, 2)


class Failing(LocalTransport):
    """Fails the packing and taking whose numbers it is given, with what a real one may raise."""

    def __init__(self, **fails: Mapping[int, Exception]) -> None:
        self.fails, self.done = fails, {"pack": 0, "take": 0}

    def pack(self, tensors: Mapping[str, Tensor]) -> TensorRef:
        self._count("pack")
        return super().pack(tensors)

    def take(self, parcel: TensorRef) -> Mapping[str, Tensor]:
        self._count("take")
        return super().take(parcel)

    def _count(self, what: str) -> None:
        self.done[what] += 1
        error = self.fails.get(what, {}).get(self.done[what])
        if error is not None:
            raise error


ERRORS = [
    OutOfMemory("/dev/shm has no room left"),
    OSError(5, "Input/output error"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
]


def kind_of(error: Exception) -> str:
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return "OutOfMemory" if memory else type(error).__name__


def understanding(pipe: neounify.Pipeline, transport: Any, **options: Any) -> UnderstandingEngine:
    return UnderstandingEngine(pipe.model, transport, ExecutionPlan(**options))


def looking(call: int, transport: Any) -> Prefill:
    """An order whose prompt holds an image."""
    pixels = transport.pack({"pixels": torch.zeros(3, 64, 64)})
    parts = (TextInput((1, 2)), ImageInput(pixels, b"%d" % call, GRID), TextInput((3,)))
    return Prefill(call, {(call, "cond"): parts}, {(call, "cond"): 4})


def answers(engine: Any) -> dict[int, list[Answer]]:
    """By call, of all that the engine has to do."""
    for _ in range(50):
        if not engine.busy:
            break
        engine.step()
    by_call: dict[int, list[Answer]] = {}
    for reply in engine.replies:
        by_call.setdefault(reply.call, []).append(reply.answer)
    engine.replies = []
    return by_call


def failure(answers: list[Answer]) -> str:
    assert isinstance(answers[-1], Failed)
    return answers[-1].kind


def test_an_image_freed_before_there_is_room_disturbs_no_other(pipe: neounify.Pipeline) -> None:
    """Callers who disconnect free what they sent, whether or not the engine has read it."""
    transport = SharedTransport()
    engine = understanding(pipe, transport, kv_blocks=2)
    first, waiting, gone = (looking(n, transport) for n in (1, 2, 3))
    part = gone.prompts[(3, "cond")][1]
    assert isinstance(part, ImageInput)
    part.pixels.free()
    for order in (first, waiting, gone):
        engine.submit(order)
    part = waiting.prompts[(2, "cond")][1]
    assert isinstance(part, ImageInput)
    part.pixels.free()
    for _ in range(3):
        engine.step()
    engine.submit(Release(((1, "cond"),)))
    replies = answers(engine)
    assert isinstance(replies[1][0], Prefilled)
    assert isinstance(replies[2][0], Prefilled)
    assert failure(replies[3]) == "TensorsGone"
    engine.submit(Release(((2, "cond"),)))
    engine.check()
    assert pool_of(engine).allocator.in_use == 0
    assert not list(folder().glob(f"{transport.prefix}[!.]*"))


@pytest.mark.parametrize("error", ERRORS, ids=kind_of)
def test_one_order_to_the_understanding_engine_fails_alone(
    pipe: neounify.Pipeline, error: Exception
) -> None:
    transport = Failing(take={2: error})
    engine = understanding(pipe, transport)
    for number in (1, 2, 3):
        engine.submit(looking(number, transport))
    replies = answers(engine)
    assert failure(replies[2]) == kind_of(error)
    assert isinstance(replies[1][0], Prefilled)
    assert isinstance(replies[3][0], Prefilled)
    names = tuple((n, "cond") for n in (1, 3))
    transport.fails = {"pack": {transport.done["pack"] + 2: error}}
    engine.submit(Export(4, names))
    engine.submit(Export(5, names))
    engine.submit(Append(6, {names[0]: (TextInput((5,)),), (9, "cond"): (TextInput((5,)),)}))
    engine.submit(Append(7, {names[0]: (TextInput((5,)),)}))
    replies = answers(engine)
    assert failure(replies[4]) == kind_of(error)
    assert isinstance(replies[5][0], Exported)
    assert failure(replies[6]) == "EngineDied"  # it has no such sequence: that of an earlier life
    assert isinstance(replies[7][0], Appended)
    engine.submit(Release(names))
    engine.check()
    assert pool_of(engine).allocator.in_use == 0


def test_an_order_that_cannot_be_admitted_fails_alone(
    pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = LocalTransport()
    engine = understanding(pipe, transport)
    opens = pool_of(engine).open

    def fails(rows: Any, *rest: Any) -> Any:
        if any(row.key.endswith(b" 2") for row in rows):
            raise RuntimeError("no kernel image is available")
        return opens(rows, *rest)

    monkeypatch.setattr(pool_of(engine), "open", fails)
    for number in (1, 2, 3):
        engine.submit(looking(number, transport))
    replies = answers(engine)
    assert failure(replies[2]) == "RuntimeError"
    assert isinstance(replies[1][0], Prefilled)
    assert isinstance(replies[3][0], Prefilled)
    engine.submit(Release(tuple((n, "cond") for n in (1, 3))))
    engine.check()
    assert pool_of(engine).allocator.in_use == 0


def image_command(
    pipe: neounify.Pipeline,
    call: int,
    transport: Any,
    noise: Tensor,
    previews: frozenset[int] = frozenset(),
) -> GenerateImages:
    config = pipe.config
    shape = (config.num_layers, config.num_kv_heads, 3, config.head_dim)
    prefix = transport.pack({"keys": torch.zeros(shape), "values": torch.zeros(shape)})
    sampling = ImageSampling(steps=2, guidance=1.0).resolve(config, editing=False)
    parcel = transport.pack({"noise": noise})
    return GenerateImages(call, parcel, GRID, sampling, {"cond": Prefix(prefix, 3)}, previews)


def noise_of(pipe: neounify.Pipeline, count: int) -> Tensor:
    return torch.randn(count, GRID.length, pipe.config.token_width)


@pytest.mark.parametrize("broken", [(0,), (1,), (0, 1), (0, 1, 2)])
def test_images_that_are_not_finite_fail_their_call_alone(
    pipe: neounify.Pipeline, broken: tuple[int, ...]
) -> None:
    transport = SharedTransport()
    engine = GenerationEngine(pipe.model, transport)
    noise = noise_of(pipe, 3)
    noise[list(broken)] = float("nan")
    engine.submit(image_command(pipe, 1, transport, noise))
    engine.submit(image_command(pipe, 2, transport, noise_of(pipe, 2)))
    replies = answers(engine)
    assert failure(replies[1]) == "CheckpointError"
    assert [type(a) for a in replies[2]] == [ImageReady, ImageReady]
    assert engine.gauges()["gen_images"] == 0
    for answer in (*replies[1], *replies[2]):
        for parcel in refs_of(answer):
            parcel.free()
    assert not list(folder().glob(f"{transport.prefix}[!.]*"))


@pytest.mark.parametrize("error", ERRORS, ids=kind_of)
@pytest.mark.parametrize(("what", "number"), [("take", 3), ("pack", 5), ("pack", 7)])
def test_one_order_to_the_generation_engine_fails_alone(
    pipe: neounify.Pipeline, what: str, number: int, error: Exception
) -> None:
    """Its prefix cannot be taken; its preview, or its result, cannot be packed."""
    transport = Failing(**{what: {number: error}})
    engine = GenerationEngine(pipe.model, transport)
    for call in (1, 2):
        engine.submit(
            image_command(pipe, call, transport, noise_of(pipe, 1), previews=frozenset((1,)))
        )
    by_call = answers(engine)
    failing = [call for call, replies in by_call.items() if isinstance(replies[-1], Failed)]
    assert len(failing) == 1
    assert failure(by_call[failing[0]]) == kind_of(error)
    assert isinstance(by_call[3 - failing[0]][-1], ImageReady)
    assert engine.gauges()["gen_images"] == 0


def test_a_prefix_that_is_not_there_yet_is_no_fault_of_the_caller(pipe: neounify.Pipeline) -> None:
    transport = LocalTransport()
    engine = GenerationEngine(pipe.model, transport)
    order = image_command(pipe, 1, transport, noise_of(pipe, 1))
    sampling = ImageSampling(steps=2).resolve(pipe.config, editing=False)
    early = GenerateImages(
        1, order.noise, GRID, sampling, {**order.prefixes, "uncond": "uncond"}, frozenset()
    )
    engine.submit(early)
    assert failure(answers(engine)[1]) == "EngineDied"


class SlowConstraint:
    """Takes until it is released to start, and allows the token 9 alone."""

    def __init__(self, error: Exception | None = None) -> None:
        self.released, self.error = threading.Event(), error

    def start(self) -> SlowConstraint:
        assert self.released.wait(20)
        if self.error is not None:
            raise self.error
        return self

    def mask(self) -> Tensor:
        return torch.arange(264) == 9

    def accept(self, token: int) -> None:
        assert token == 9


@pytest.mark.parametrize("error", [None, RequestError("the schema cannot be followed")])
def test_text_does_not_wait_for_the_grammar_of_others(
    pipe: neounify.Pipeline, error: Exception | None
) -> None:
    engine = understanding(pipe, LocalTransport())
    constraint = SlowConstraint(error)
    for call, grammar in ((1, constraint), (2, None)):
        name = (call, "cond")
        then = Decode(call, name, TextSampling(constraint=grammar), frozenset(), 3)
        engine.submit(Prefill(call, {name: (TextInput((1, 2)),)}, {name: 3}, then))
    for _ in range(6):
        engine.step()
    first = [reply for reply in engine.replies if reply.call == 1]
    other = [reply.answer for reply in engine.replies if reply.call == 2]
    assert not first
    assert [type(answer) for answer in other] == [Prefilled, *[DecodedToken] * 3, Decoded]
    constraint.released.set()
    engine.replies.clear()
    deadline = time.monotonic() + 20
    while engine.busy and time.monotonic() < deadline:
        engine.step()
    answers = [reply.answer for reply in engine.replies]
    if error is not None:
        assert isinstance(answers[-1], Failed)
        assert answers[-1].message == "the schema cannot be followed"
    else:
        assert [a.id for a in answers if isinstance(a, DecodedToken)] == [9, 9, 9]
    engine.submit(Release(((1, "cond"), (2, "cond"))))
    engine.check()
    assert pool_of(engine).allocator.in_use == 0
