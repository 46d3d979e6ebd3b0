"""Small caches give the same answers in any order of events, and no request starves."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import neounify
from neounify.cache import PagedKVCache
from neounify.config import TextSampling
from neounify.engine.messages import (
    Append,
    Appended,
    Decode,
    Decoded,
    DecodedToken,
    Export,
    Exported,
    Failed,
    ImageInput,
    LocalTensors,
    LocalTransport,
    Prefill,
    Prefilled,
    PromptInput,
    Release,
    Reply,
    TextInput,
)
from neounify.engine.sequences import PagedCaches, ServedSequence
from neounify.engine.understanding import UnderstandingEngine
from neounify.model.layout import Grid
from neounify.runtime.plan import ExecutionPlan
from support.prefilling import pool_of

BLOCK = 4
SMALL, LARGE = 96, 4096


def engine_with(pipe: neounify.Pipeline, tokens: int) -> UnderstandingEngine:
    plan = ExecutionPlan(kv_blocks=tokens // BLOCK, kv_block_size=BLOCK, prefill_step_rows=24)
    engine = UnderstandingEngine(pipe.model, LocalTransport(), plan)
    pool = pool_of(engine)
    for memory in (pool.keys, pool.values):
        memory[:, : pool.zero_slot] = float("nan")
    return engine


def image(seed: int, rows: int, columns: int) -> ImageInput:
    """32 pixels a token, as the miniature reads them."""
    pixels = torch.randn(3, 32 * rows, 32 * columns, generator=torch.Generator().manual_seed(seed))
    parcel = LocalTensors({"pixels": pixels})
    return ImageInput(parcel, b"%d %d %d" % (seed, rows, columns), Grid(rows, columns))


def text(rng: random.Random, most: int) -> TextInput:
    return TextInput(tuple(rng.randrange(200) for _ in range(rng.randint(1, most))))


@dataclass
class Life:
    """One request: reads two sequences, writes, is extended, exported, writes again, leaves.

    `left` are the orders it still sends, each when the one before was answered.
    """

    number: int
    seed: int
    calls: itertools.count[int]
    said: list[int] = field(default_factory=list)
    copies: list[torch.Tensor] = field(default_factory=list)
    left: list[str] = field(default_factory=lambda: ["open", "write", "extend", "export", "write"])
    call: int = 0
    done: bool = False

    def next_order(self) -> Any:
        """None when it has ended; the same for the same seed."""
        kind = self.left.pop(0) if self.left else "close"
        rng = random.Random(f"{self.seed} {len(self.left)}")
        cond, other = (self.number, "cond"), (self.number, "image")
        self.call = next(self.calls)
        if kind == "open":
            parts: tuple[PromptInput, ...] = (text(rng, 18),)
            if rng.random() < 0.5:
                parts = (*parts, image(self.seed % 3, 2, 3), text(rng, 5))
            return Prefill(self.call, {cond: parts, other: (text(rng, 9),)}, {cond: 40, other: 12})
        if kind == "write":
            sampling = TextSampling(
                temperature=rng.choice([0.0, 1.0]), seed=self.seed, repetition_penalty=1.2
            )
            most = 12 if self.left else 20
            return Decode(self.call, cond, sampling, frozenset((self.seed % 7,)), most)
        if kind == "extend":
            more = image(self.seed % 5, 1, 2)
            again = image(self.seed % 5, 1, 2)
            return Append(self.call, {cond: (more, text(rng, 4)), other: (again,)})
        if kind == "export":
            return Export(self.call, (cond, other))
        self.done = True
        return Release((cond, other))

    def hear(self, reply: Reply) -> bool:
        """Take a reply in; whether the call has been answered."""
        assert reply.call == self.call
        match reply.answer:
            case DecodedToken():
                self.said.append(reply.answer.id)
                return False
            case Decoded():
                self.said.append(-1 - (reply.answer.stopped_by or 0))
            case Exported():
                for prefix in reply.answer.prefixes:
                    assert isinstance(prefix.ref, LocalTensors)
                    self.copies += prefix.ref.tensors.values()
            case Failed():
                raise AssertionError(reply.answer.message)
            case _:
                assert isinstance(reply.answer, Prefilled | Appended)
        return True


def live(
    engine: UnderstandingEngine, seeds: list[int], rng: random.Random, most_steps: int = 4000
) -> list[Life]:
    """All requests to their ends, in an order drawn by `rng`."""
    calls = itertools.count(1)
    lives = [Life(n, seed, calls) for n, seed in enumerate(seeds)]
    coming, idle = list(lives), list[Life]()
    by_call: dict[int, Life] = {}
    for _ in range(most_steps):
        if coming and rng.random() < 0.4:
            idle.append(coming.pop(0))
        for one in [x for x in idle if rng.random() < 0.5]:
            idle.remove(one)
            engine.submit(one.next_order())
            by_call[one.call] = one
        engine.step()
        engine.check()
        for reply in engine.replies:
            if by_call[reply.call].hear(reply):
                idle.append(by_call.pop(reply.call))
        engine.replies = []
        if all(one.done for one in lives):
            break
    assert all(one.done for one in lives)
    assert pool_of(engine).allocator.in_use == 0
    assert not engine.busy
    return lives


@cache
def alone(pipe: neounify.Pipeline, seed: int) -> Life:
    """A request alone with the whole cache: the same in every example."""
    return live(engine_with(pipe, LARGE), [seed], random.Random(1))[0]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=2, max_size=9), st.integers(0, 10_000))
def test_any_order_with_little_room_gives_what_much_room_gives(
    pipe: neounify.Pipeline, seeds: list[int], order: int
) -> None:
    scarce = live(engine_with(pipe, SMALL), seeds, random.Random(order))
    for one, other in zip(scarce, [alone(pipe, seed) for seed in seeds], strict=True):
        assert one.said == other.said
        for a, b in zip(one.copies, other.copies, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_room_was_really_scarce(pipe: neounify.Pipeline) -> None:
    engine = engine_with(pipe, SMALL)
    live(engine, list(range(12)), random.Random(3))
    assert engine.counters["und_preempted"] > 5


def served(order: int, tokens: int, room: int = 0) -> ServedSequence:
    sequence = ServedSequence((order, "cond"), order, room)
    sequence.append([TextInput(tuple((order * 1000 + n) for n in range(tokens)))])
    return sequence


def test_a_large_one_is_passed_by_small_ones_but_not_for_ever(pipe: neounify.Pipeline) -> None:
    pool = PagedKVCache(pipe.config, 20, BLOCK, dtype=torch.float32, device=torch.device("cpu"))
    caches = PagedCaches(pool, LocalTransport())
    inside = [served(n, 5 * BLOCK) for n in range(2)]
    wanted = set(inside)
    assert caches.enter(inside, wanted) == inside
    large = served(2, 16 * BLOCK)
    passed = 0
    for order in itertools.count(3):
        small = served(order, BLOCK)
        wanted = {*inside, large, small}
        entered = caches.enter([small, large], wanted)
        if not entered:
            break
        assert entered == [small]
        passed += 1
        caches.leave(small)
    assert passed == ExecutionPlan.max_passed
    caches.leave(inside[0])
    assert caches.enter([small, large], {inside[1], large, small}) == [small, large][:0]
    caches.leave(inside[1])
    assert caches.enter([small, large], {large, small}) == [large, small]


def test_idle_ones_give_way_first_then_the_youngest(pipe: neounify.Pipeline) -> None:
    pool = PagedKVCache(pipe.config, 8, BLOCK, dtype=torch.float32, device=torch.device("cpu"))
    caches = PagedCaches(pool, LocalTransport())
    oldest, idle, younger, youngest = (served(n, 2 * BLOCK) for n in range(4))
    wanted: set[ServedSequence] = {oldest, younger, youngest}
    assert caches.enter([oldest, idle, younger, youngest], wanted | {idle})
    for sequence in (oldest, younger, youngest):
        assert sequence.cache is not None
        sequence.cache.length = 2 * BLOCK
    assert not caches.grow(youngest, 8 * BLOCK, wanted)
    assert (idle.cache, youngest.cache is None) == (None, False)
    assert caches.grow(younger, 3 * BLOCK, wanted)
    assert youngest.cache is None
    assert caches.grow(oldest, 6 * BLOCK, wanted)
    assert younger.cache is None
    assert pool.allocator.in_use == 8
    assert caches.preempted == 3


def test_what_grows_beyond_the_cache_ends(pipe: neounify.Pipeline) -> None:
    engine = engine_with(pipe, 48)
    name = (1, "cond")
    prompts: Mapping[Any, Any] = {name: (TextInput((1, 2, 3)),)}
    engine.submit(Prefill(1, prompts, {name: 10}))
    engine.step()
    engine.submit(Append(2, {name: (TextInput((1,) * 46),)}))
    assert isinstance(engine.replies[-1].answer, Failed)
    assert engine.replies[-1].answer.kind == "ContextFullError"
    engine.submit(Decode(3, name, TextSampling(), frozenset(), 1000))
    for _ in range(60):
        engine.step()
    written = engine.replies[-1].answer
    assert isinstance(written, Decoded)
    assert written.finish_reason == "length"
    assert sum(isinstance(r.answer, DecodedToken) for r in engine.replies) == 45
    engine.check()


@pytest.mark.parametrize("where", ["first", "last"])
def test_what_can_never_fit_is_refused_with_numbers(pipe: neounify.Pipeline, where: str) -> None:
    engine = engine_with(pipe, 48)
    prompts: dict[Any, Any] = {(1, "a"): (TextInput((1,)),), (1, "b"): (TextInput((1,)),)}
    rooms = {(1, "a"): 60 if where == "first" else 1, (1, "b"): 1 if where == "first" else 60}
    engine.submit(Prefill(1, prompts, rooms))
    answer = engine.replies[-1].answer
    assert isinstance(answer, Failed)
    assert "needs room for 64 tokens, the server has 48" in answer.message
    assert not engine.busy


def steps_to_idle(engine: UnderstandingEngine) -> int:
    for steps in range(50):
        if not engine.busy:
            return steps
        engine.step()
    raise AssertionError("it is never idle")


def test_a_pinned_sequence_is_prefilled_again_when_there_is_room(pipe: neounify.Pipeline) -> None:
    engine = engine_with(pipe, 48)
    shared, pinned = TextInput(tuple(range(20))), (0, "shared")
    engine.submit(Prefill(0, {pinned: (shared,)}, {pinned: 0}, pinned=True))
    large, waiting = (1, "large"), (2, "waiting")
    engine.submit(Prefill(1, {large: (TextInput(tuple(range(100, 141))),)}, {large: 7}))
    assert steps_to_idle(engine) == 3, "there is no room to prefill the pinned one again"
    assert engine.caches.preempted == 1
    assert pool_of(engine).allocator.in_use == 11, "the large one's alone"
    engine.submit(Prefill(2, {waiting: (TextInput((1, 2)),)}, {waiting: 0}))
    engine.submit(Release((large, waiting)))
    assert steps_to_idle(engine) == 1
    assert pool_of(engine).allocator.in_use == 5
    engine.replies.clear()
    engine.submit(Prefill(3, {(3, "cond"): (shared, TextInput((7,)))}, {(3, "cond"): 0}))
    steps_to_idle(engine)
    assert engine.replies[-1].answer == Prefilled(21, 20)
    engine.submit(Release((pinned, (3, "cond"))))
    engine.check()
    assert steps_to_idle(engine) == 0
    assert pool_of(engine).allocator.in_use == 0
