"""Engines: the worker, a thread that dies or is stuck, processes that are killed or stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import neounify
from neounify.config import TextSampling
from neounify.engine.generation import GenerationEngine
from neounify.engine.messages import (
    Command,
    Decode,
    EngineReport,
    LocalTransport,
    Prefill,
    Reply,
    TextInput,
)
from neounify.engine.understanding import UnderstandingEngine
from neounify.errors import EngineDied
from neounify.flow.sampling import ImageSampling
from neounify.serve.build import ServeConfig, build_service, colocated
from neounify.serve.client import EngineClient
from neounify.serve.engine_process import EngineProcess, ProcessConfig
from neounify.serve.engines import EngineConfig, WatchConfig, Worker
from neounify.serve.http.errors import to_api_error
from neounify.serve.service import EngineService
from neounify.tasks.chat import make_chat_request
from neounify.tasks.image import ImageRequest
from support.leaving import at_rest, calls_open, pieces_of
from support.serving import collect, same_image, serve


def image_request(pipe: neounify.Pipeline, steps: int, side: int = 64) -> ImageRequest:
    sampling = ImageSampling(steps=steps).resolve(pipe.config, editing=False)
    return ImageRequest(prompt="a boat", width=side, height=side, sampling=sampling)


def chatting(tokens: int) -> Any:
    return make_chat_request("Hello", [], max_new_tokens=tokens)


def engine_threads() -> int:
    return sum(thread.name.startswith("engines") for thread in threading.enumerate())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.02)


async def ready(service: EngineService) -> None:
    await until(lambda: service.ready)


async def unavailable(request: Awaitable[Any]) -> None:
    """It has to end with 503 and Retry-After."""
    with pytest.raises(EngineDied) as raised:
        await request
    answer = to_api_error(raised.value)
    assert answer.status_code == 503
    assert answer.response().headers["Retry-After"] == "2"


@pytest.mark.parametrize("engine", [UnderstandingEngine, GenerationEngine])
def test_a_thread_that_dies_is_started_again_and_leaves_none_behind(
    pipe: neounify.Pipeline, engine: type[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = engine.step
    deaths = [0]

    def dies(self: Any, **how: bool) -> None:
        if deaths[0]:
            deaths[0] -= 1
            raise SystemExit("whatever it is")
        step(self, **how)

    async def work(service: EngineService) -> None:
        threads, gauges = engine_threads(), await at_rest(service)
        for _ in range(3):
            deaths[0] = 1
            requests = [collect(service, image_request(pipe, 50)), collect(service, chatting(400))]
            await asyncio.gather(*map(unavailable, requests))
            await unavailable(collect(service, chatting(4)))
            await ready(service)
        answer = await collect(service, image_request(pipe, 3))
        same_image(
            answer.images[0], pipe.generate("a boat", width=64, height=64, steps=3).pixels[0]
        )
        await at_rest(service, gauges)
        await until(lambda: engine_threads() == threads)
        assert calls_open(service) == 0

    monkeypatch.setattr(engine, "step", dies)
    serve(colocated(pipe), work)


def test_a_step_without_end_in_a_thread_is_reported_and_survived(
    pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, stuck, pending = GenerationEngine.step, threading.Event(), [True]

    def sticks(self: GenerationEngine, **how: bool) -> None:
        if pending.pop() if pending else False:
            stuck.wait(60)
        step(self, **how)

    async def work(service: EngineService) -> None:
        threads = engine_threads()
        await unavailable(collect(service, image_request(pipe, 3)))
        await until(lambda: service.counters()["restarts"] > 1)  # it cannot begin beside the other
        assert not service.ready
        assert engine_threads() <= threads
        await unavailable(collect(service, chatting(4)))
        stuck.set()
        await ready(service)
        assert (await collect(service, image_request(pipe, 3))).finished is not None
        await until(lambda: engine_threads() == threads)

    monkeypatch.setattr(GenerationEngine, "step", sticks)
    watch = WatchConfig(step=5.0, end=0.1)
    serve(colocated(pipe, EngineConfig(), watch=watch), work)


def process_of(client: EngineClient) -> int:
    assert isinstance(client.engine, EngineProcess)
    assert client.engine.pids[0] is not None
    return client.engine.pids[0]


def test_a_process_that_does_not_come_up_in_time_is_killed(folder: Path) -> None:
    settings = ProcessConfig(
        role="gen", folder=folder, dtype=torch.float32, devices=("cpu",), threads=1
    )
    engine = EngineProcess(settings, WatchConfig(start_silence=0.01))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="gen process"):
            engine.start(lambda replies, report: None, lambda: None)
        with pytest.raises(ProcessLookupError):
            os.kill(engine.pids[0] or 0, 0)
    engine.stop()
    with pytest.raises(RuntimeError, match="ending"):
        engine.start(lambda replies, report: None, lambda: None)


@pytest.mark.parametrize("refused", [1, 2])
def test_a_machine_without_threads_leaves_no_process(
    folder: Path, refused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the two threads of a process it is that cannot be started."""
    start, count = threading.Thread.start, [0]

    def refuses(self: threading.Thread) -> None:
        count[0] += 1
        if count[0] == refused:
            raise RuntimeError("can't start new thread")
        start(self)

    settings = ProcessConfig(
        role="gen", folder=folder, dtype=torch.float32, devices=("cpu",), threads=1
    )
    engine = EngineProcess(settings)
    threads = threading.active_count()
    monkeypatch.setattr(threading.Thread, "start", refuses)
    with pytest.raises(RuntimeError, match="can't start"):
        engine.start(lambda replies, report: None, lambda: None)
    with pytest.raises(ProcessLookupError):
        os.kill(engine.pids[0] or 0, 0)
    engine.start(lambda replies, report: None, lambda: None)
    engine.stop()
    assert threading.active_count() <= threads


def test_a_machine_without_threads_starts_the_engines_later(
    pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, start = GenerationEngine.step, threading.Thread.start
    failing = {"step": 1, "engines": 2}

    def dies(self: GenerationEngine, **how: bool) -> None:
        if failing["step"]:
            failing["step"] = 0
            raise RuntimeError("the memory of the device is gone")
        step(self, **how)

    def refuses(self: threading.Thread) -> None:
        if not failing["step"] and self.name == "engines" and failing["engines"]:
            failing["engines"] -= 1
            raise RuntimeError("can't start new thread")
        start(self)

    async def work(service: EngineService) -> None:
        await unavailable(collect(service, image_request(pipe, 3)))
        await ready(service)
        assert service.counters()["restarts"] == 3
        assert (await collect(service, image_request(pipe, 3))).finished is not None

    monkeypatch.setattr(GenerationEngine, "step", dies)
    monkeypatch.setattr(threading.Thread, "start", refuses)
    serve(colocated(pipe), work)


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["understanding", "generation"])
def test_killed_and_stopped_processes_cost_only_their_own_requests(
    pipe: neounify.Pipeline, folder: Path, victim: str
) -> None:
    """SIGKILL and SIGSTOP in turn, each with requests of every kind under way."""
    kills = (signal.SIGKILL, signal.SIGSTOP, signal.SIGKILL)

    async def work(service: EngineService) -> None:
        generates = victim == "generation"
        client = getattr(service.clients, victim)
        gauges = await at_rest(service)
        files = threads = 0
        for number, kill in enumerate(kills):
            hit = asyncio.ensure_future(
                collect(
                    service, image_request(pipe, 1000) if generates else chatting(7000), previews=50
                )
            )
            others = chatting(600) if generates else image_request(pipe, 300)
            goes_on = asyncio.ensure_future(collect(service, others))
            gauge, other = ("gen_images", "und_writing")[:: 1 if generates else -1]
            while not service.gauges().get(gauge) or not (
                goes_on.done() or service.gauges().get(other)
            ):
                await asyncio.sleep(0.02)
            old = process_of(client)
            os.kill(old, kill)
            await unavailable(hit)
            assert not service.ready
            meanwhile = [collect(service, image_request(pipe, 3))]
            if generates:
                assert (await collect(service, chatting(4))).finished is not None
            else:
                meanwhile.append(collect(service, chatting(4)))
            await asyncio.gather(*map(unavailable, meanwhile))
            assert (await goes_on).finished is not None
            await ready(service)
            assert process_of(client) != old
            with pytest.raises(ProcessLookupError):
                os.kill(old, 0)
            if number == 0:
                files, threads = open_files(), threading.active_count()
        answer = await collect(service, image_request(pipe, 3))
        same_image(
            answer.images[0], pipe.generate("a boat", width=64, height=64, steps=3).pixels[0]
        )
        text = (await collect(service, chatting(8))).text
        assert text == pipe.chat("Hello", max_new_tokens=8).text
        # Nothing beside those: no death of the other engine, no descriptors, threads or pieces.
        assert service.counters()["restarts"] == client.restarts == len(kills)
        await at_rest(service, gauges)
        assert pieces_of(service) == set()
        assert calls_open(service) == 0
        assert open_files() <= files + 2
        assert threading.active_count() <= threads + 2

    settings = ServeConfig(
        folder=folder,
        mode="separate",
        dtype="float32",
        threads=1,
        watch=WatchConfig(silence=6.0),
    )
    serve(build_service(settings), work)


@pytest.mark.slow
def test_a_step_without_end_in_a_process_is_noticed(pipe: neounify.Pipeline, folder: Path) -> None:
    """Its heartbeat continues, and reports how long the step has been taking."""

    async def work(service: EngineService) -> None:
        # 1000 steps at 64 pixels take less than the second between two heartbeats.
        await unavailable(collect(service, image_request(pipe, 1000, side=256)))
        await ready(service)
        assert service.clients.generation.restarts >= 1
        assert (await collect(service, image_request(pipe, 1))).finished is not None

    settings = ServeConfig(
        folder=folder,
        mode="separate",
        dtype="float32",
        threads=1,
        # No step is as short as that, but few are under way at a heartbeat.
        watch=WatchConfig(step=1e-9),
    )
    serve(build_service(settings), work)


# --- the worker ---


NAME = (1, "cond")


class Script:
    """A channel that gives one list of commands and hangs up when nothing is left to do."""

    def __init__(self, commands: list[Command]) -> None:
        self.commands: list[list[Command]] = [commands]

    def receive(self, *, wait: bool) -> list[Command] | None:
        if self.commands:
            return self.commands.pop()
        return None if wait else []

    def send(self, replies: Sequence[Reply], report: EngineReport | None) -> None:
        pass


class CountingSteps(GenerationEngine):
    """Has images for some steps, and notes which of the steps were to be short."""

    def __init__(self, pipe: neounify.Pipeline, steps: int) -> None:
        super().__init__(pipe.model, LocalTransport())
        self.left, self.short = steps, list[bool]()

    @property
    def busy(self) -> bool:
        return self.left > 0

    def step(self, *, beside_text: bool = False) -> None:
        self.left -= 1
        self.short.append(beside_text)


def steps_beside(pipe: neounify.Pipeline, then: Decode | None) -> list[bool]:
    command = Prefill(1, {NAME: (TextInput((1, 2, 3)),)}, {NAME: 8}, then)
    understanding = UnderstandingEngine(pipe.model, LocalTransport())
    generation = CountingSteps(pipe, 4)
    Worker(Script([command]), understanding, generation).run()
    return generation.short


def test_denoising_steps_are_short_beside_text(pipe: neounify.Pipeline) -> None:
    then = Decode(1, NAME, TextSampling(), frozenset(), 2)
    assert steps_beside(pipe, then) == [True] * 4


def test_prompts_of_images_are_no_text(pipe: neounify.Pipeline) -> None:
    """Else images that arrive would keep those under way from sharing their steps."""
    assert steps_beside(pipe, None) == [False] * 4
