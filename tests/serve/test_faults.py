"""Limits, deadlines, clients that go away, engines that die: no other request is affected."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

import pytest

import neounify
from neounify.engine.generation import GenerationEngine
from neounify.engine.understanding import UnderstandingEngine
from neounify.errors import (
    DeadlineExceeded,
    Draining,
    EngineDied,
    ImageError,
    Overloaded,
    PromptError,
    RequestError,
)
from neounify.flow.sampling import ImageSampling
from neounify.serve.build import colocated
from neounify.serve.client import EngineClient
from neounify.serve.engines import EngineConfig, EngineThread
from neounify.serve.service import AdmissionConfig, EngineService, RequestContext
from neounify.tasks.chat import CompletionRequest, make_chat_request
from neounify.tasks.image import ImageRequest
from neounify.tasks.interleave import InterleaveRequest
from neounify.tasks.program import Compute, Program
from support.serving import collect, same_image, serve


def image_request(pipe: neounify.Pipeline, steps: int, **values: Any) -> ImageRequest:
    sampling = ImageSampling(steps=steps).resolve(pipe.config, editing=False)
    options: dict[str, Any] = {"prompt": "a boat", "width": 64, "height": 64, "sampling": sampling}
    return ImageRequest(**(options | values))


def chatting(text: str = "Hello", tokens: int = 8) -> Any:
    return make_chat_request(text, [], max_new_tokens=tokens)


def engine_of(service: EngineService) -> UnderstandingEngine:
    engine = service.clients.understanding.engine
    assert isinstance(engine, EngineThread)
    assert engine.understanding is not None
    return engine.understanding


def ready(service: EngineService) -> bool:
    return service.ready


async def settled(service: EngineService) -> dict[str, float]:
    """The gauges once the engines have nothing left to do."""
    for _ in range(200):
        await asyncio.sleep(0.02)
        gauges = dict(service.gauges())
        if not any(gauges.get(name) for name in ("requests", "und_writing", "gen_images")):
            return gauges
    raise AssertionError(f"the engines never became idle: {gauges}")


def test_over_the_limit_is_refused_and_the_rest_finishes(pipe: neounify.Pipeline) -> None:
    admitted: list[int] = []

    async def one(service: EngineService, number: int) -> Any:
        return await collect(service, chatting(), admitted=lambda: admitted.append(number))

    async def work(service: EngineService) -> tuple[list[Any], Any]:
        tasks = [asyncio.ensure_future(one(service, number)) for number in range(6)]
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        return answers, await collect(service, chatting())

    answers, later = serve(colocated(pipe, admission=AdmissionConfig(requests=4)), work)
    refused = [a for a in answers if isinstance(a, Overloaded)]
    assert len(refused) == 2
    assert all(a.retry_after >= 1 for a in refused)
    assert admitted == [n for n, a in enumerate(answers) if not isinstance(a, Overloaded)]
    assert all(a.text == later.text for a in answers if not isinstance(a, Overloaded))


def test_too_many_image_tokens_are_refused(pipe: neounify.Pipeline) -> None:
    async def work(service: EngineService) -> list[Any]:
        requests = [image_request(pipe, 3, count=3), image_request(pipe, 3)]
        return await asyncio.gather(
            *(collect(service, r) for r in requests), return_exceptions=True
        )

    first, second = serve(colocated(pipe, admission=AdmissionConfig(image_tokens=12)), work)
    assert len(first.images) == 3
    assert isinstance(second, Overloaded)


@pytest.mark.parametrize(
    ("size", "limits", "message"),
    [
        ((1056, 1024), AdmissionConfig(), r"1,056 tokens, this server generates 1,024 at most"),
        (
            (96, 96),
            AdmissionConfig(max_image_tokens=8),
            "9 tokens, this server generates 8 at most",
        ),
        (
            (96, 96),
            AdmissionConfig(image_tokens=17),
            "images have 18 tokens, this server generates at most 17",
        ),
    ],
)
def test_images_that_are_too_large_are_an_error_at_once(
    pipe: neounify.Pipeline, size: tuple[int, int], limits: AdmissionConfig, message: str
) -> None:
    request = image_request(pipe, 3, count=2, width=size[0], height=size[1])
    story = InterleaveRequest(prompt="Tell", sizes=[(64, 64), size], sampling=request.sampling)

    async def work(service: EngineService) -> dict[str, float]:
        with pytest.raises((ImageError, RequestError), match=message):
            await collect(service, request)
        if "images have" not in message:
            with pytest.raises(ImageError, match=message):
                await collect(service, story)
        return await settled(service)

    gauges = serve(colocated(pipe, admission=limits), work)
    assert gauges["image_tokens"] == gauges["requests"] == 0


def test_more_sequences_than_the_cache_holds_take_turns(pipe: neounify.Pipeline) -> None:
    small = EngineConfig(limits={"kv_blocks": 16, "kv_block_size": 8})

    async def work(service: EngineService) -> Any:
        answers = await asyncio.gather(*(collect(service, chatting()) for _ in range(9)))
        await settled(service)
        engine_of(service).check()
        return answers

    answers = serve(colocated(pipe, small), work)
    assert {a.text for a in answers} == {pipe.chat("Hello", max_new_tokens=8).text}


def test_what_can_never_fit_is_an_error_at_once(pipe: neounify.Pipeline) -> None:
    small = EngineConfig(limits={"kv_blocks": 16, "kv_block_size": 8})
    with pytest.raises(RequestError, match=r"needs room for .* tokens, the server has 128"):
        serve(colocated(pipe, small), lambda s: collect(s, chatting(tokens=200)))
    with pytest.raises(PromptError, match="the model reads 8192"):
        serve(colocated(pipe), lambda s: collect(s, chatting("x" * 9000)))


@pytest.mark.parametrize("kind", ["chat", "image"])
def test_a_client_that_goes_away_frees_its_work(pipe: neounify.Pipeline, kind: str) -> None:
    request = chatting(tokens=4000) if kind == "chat" else image_request(pipe, 900)

    async def work(service: EngineService) -> dict[str, float]:
        events = service.answer(request)
        if kind == "chat":
            await anext(events)
        else:
            task = asyncio.ensure_future(anext(events))
            while not service.gauges().get("gen_images"):
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await events.aclose()
        gauges = await settled(service)
        engine_of(service).check()
        return gauges

    gauges = serve(colocated(pipe), work)
    assert gauges["requests"] == gauges["image_tokens"] == 0
    pinned = 1 / 2048 * 2
    assert gauges["und_cache_used"] <= pinned


def test_a_deadline_ends_a_request(pipe: neounify.Pipeline) -> None:
    async def work(service: EngineService) -> None:
        for request in (chatting(tokens=4000), image_request(pipe, 900)):
            with pytest.raises(DeadlineExceeded):
                await collect(service, request, deadline=0.3)
        await settled(service)

    serve(colocated(pipe), work)


def test_a_deadline_ends_a_request_whose_preparation_takes_long(pipe: neounify.Pipeline) -> None:
    prepared = threading.Event()

    def program() -> Program[None]:
        yield Compute(lambda: prepared.wait(60))

    async def work(service: EngineService) -> None:
        context = RequestContext(service.clients, 0.2)
        try:
            with pytest.raises(DeadlineExceeded, match=r"not finished after 0\.2 s"):
                await context.result(program())
        finally:
            prepared.set()
            context.close()

    serve(colocated(pipe), work)


def test_closed_doors_let_what_was_begun_finish(pipe: neounify.Pipeline) -> None:
    async def work(service: EngineService) -> Any:
        task = asyncio.ensure_future(collect(service, image_request(pipe, 12)))
        await asyncio.sleep(0.05)
        service.close_doors()
        with pytest.raises(Draining):
            await collect(service, chatting())
        return await task

    assert 0 in serve(colocated(pipe), work).images


def test_known_beginnings_are_not_read_again(pipe: neounify.Pipeline) -> None:
    question = "What do you see in this long and winding question of mine?"

    async def work(service: EngineService) -> tuple[Any, Any, Any]:
        first = await collect(service, chatting(question))
        turn = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": "And then?"},
        ]
        second = await collect(service, make_chat_request(turn, [], max_new_tokens=4))
        image = await collect(service, image_request(pipe, 2))
        engine_of(service).check()
        return first, second, image

    first, second, image = serve(colocated(pipe), work)
    assert first.finished.cached_tokens == 0
    assert second.finished.cached_tokens >= len(question) // 2
    # The system message was read when the service started.
    assert image.finished.cached_tokens >= 16


def test_texts_need_no_generation_engine(pipe: neounify.Pipeline) -> None:
    async def work(service: EngineService) -> None:
        clients = service.clients
        service.clients = replace(
            clients, generation=EngineClient("generation", clients.generation.engine)
        )
        try:
            assert not service.ready
            for text in (chatting(), CompletionRequest(prompt="Hello", max_new_tokens=4)):
                assert (await collect(service, text)).finished is not None
            with pytest.raises(EngineDied, match="generation engine"):
                await collect(service, image_request(pipe, 2))
        finally:
            service.clients = clients

    serve(colocated(pipe), work)


def test_an_engine_that_fails_is_started_again(
    pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = GenerationEngine.step
    broken = {"left": 1}

    def fails_once(self: GenerationEngine, **how: bool) -> None:
        if broken["left"]:
            broken["left"] = 0
            raise RuntimeError("the memory of the device is gone")
        step(self, **how)

    monkeypatch.setattr(GenerationEngine, "step", fails_once)

    async def work(service: EngineService) -> Any:
        with pytest.raises(EngineDied):
            await collect(service, image_request(pipe, 3))
        for _ in range(100):
            if service.ready:
                break
            await asyncio.sleep(0.02)
        assert service.counters()["restarts"] == 1
        return await collect(service, image_request(pipe, 3))

    answer = serve(colocated(pipe), work)
    same_image(answer.images[0], pipe.generate("a boat", width=64, height=64, steps=3).pixels[0])
