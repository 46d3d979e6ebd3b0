"""Callers may leave at any moment: nothing dies, nothing is left behind."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import neounify
from neounify.config.presets import TINY
from neounify.errors import DeadlineExceeded
from neounify.flow.sampling import ImageSampling
from neounify.model import NeoUnify
from neounify.pipeline.results import ImagePart
from neounify.serve.build import ServeConfig, build_service, colocated
from neounify.serve.service import EngineService, ServiceRequest
from neounify.tasks.chat import make_chat_request
from neounify.tasks.image import ImageRequest
from neounify.tasks.interleave import InterleaveRequest
from neounify.text import byte_tokenizer
from support.leaving import (
    at_rest,
    calls_open,
    check_books,
    leave,
    let_it_paint,
    pieces_of,
    waits_of,
)
from support.serving import collect, same_image

IMAGE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
PREVIEWS = 2
KINDS = ("chat", "think", "several", "edit", "story")
MODES = ("colocate", "separate")


@pytest.fixture(scope="module")
def pipe() -> neounify.Pipeline:
    torch.manual_seed(0)
    model = NeoUnify(TINY).eval().requires_grad_(False)
    return let_it_paint(neounify.Pipeline(model, byte_tokenizer(), system_message="Paint well."))


@pytest.fixture(scope="module")
def requests(pipe: neounify.Pipeline) -> dict[str, ServiceRequest]:
    def image_request(**values: Any) -> ImageRequest:
        sampling = ImageSampling(steps=3).resolve(pipe.config, editing="images" in values)
        return ImageRequest(prompt="a boat", width=64, height=64, sampling=sampling, **values)

    return {
        "chat": make_chat_request("What is <image>?", [IMAGE], max_new_tokens=3),
        "think": image_request(think=True, max_think_tokens=3),
        "several": image_request(count=2),
        "edit": image_request(images=(IMAGE,)),
        "story": _story(pipe),
    }


def _story(pipe: neounify.Pipeline) -> InterleaveRequest:
    """One that generates an image: whether it does depends on the prompt."""
    for number in range(50):
        prompt = f"Tell {number}"
        options: dict[str, Any] = {"max_images": 1, "max_new_tokens": 4, "seed": 2}
        parts = pipe.interleave(prompt, [IMAGE], **options, width=64, height=64, steps=2)
        if any(isinstance(part, ImagePart) for part in parts):
            sampling = ImageSampling(steps=2).resolve(pipe.config, editing=True)
            return InterleaveRequest(
                prompt=prompt, sizes=[(64, 64)], sampling=sampling, images=[IMAGE], **options
            )
    raise AssertionError("no prompt lets the model generate an image")


@pytest.fixture(scope="module")
def services(
    pipe: neounify.Pipeline, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Callable[[], EngineService]]:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    pipe.save(folder)
    separate = ServeConfig(folder=folder, mode="separate", dtype="float32", threads=1)
    return {"colocate": lambda: colocated(pipe), "separate": lambda: build_service(separate)}


@asynccontextmanager
async def undisturbed(service: EngineService) -> AsyncIterator[EngineService]:
    """A service that has to be afterwards as it was before, none of its engines started again."""
    await service.start()
    try:
        gauges = await at_rest(service)
        yield service
        await at_rest(service, gauges)
        assert pieces_of(service) == set()
        assert service.counters()["restarts"] == 0
        assert calls_open(service) == 0
        check_books(service)
    finally:
        await service.stop()


@pytest.mark.parametrize("mode", MODES)
def test_callers_leave_at_every_await(
    requests: dict[str, ServiceRequest], services: dict[str, Callable[[], EngineService]], mode: str
) -> None:
    async def work() -> dict[str, int]:
        left = dict.fromkeys(KINDS, 0)
        async with undisturbed(services[mode]()) as service:

            def ask(kind: str) -> Any:
                return collect(service, requests[kind], previews=PREVIEWS)

            for kind in KINDS:
                before = await ask(kind)
                waits = await waits_of(ask(kind))
                for number in range(1, waits + 1):
                    left[kind] += await leave(ask(kind), number, "early")
                    left[kind] += await leave(ask(kind), number, "late")
                after = await ask(kind)
                assert after.text == before.text
                for index, pixels in before.images.items():
                    same_image(after.images[index], pixels)
        return left

    left = asyncio.run(work())
    # How many waits a request has depends on how soon the engines answer: nine at the fewest seen.
    assert min(left.values()) >= 4, left


@pytest.mark.parametrize("mode", MODES)
def test_callers_leave_at_random_moments_under_load(
    requests: dict[str, ServiceRequest], services: dict[str, Callable[[], EngineService]], mode: str
) -> None:
    chance = random.Random(0)

    async def stays(service: EngineService, kind: str) -> None:
        assert (await collect(service, requests[kind], previews=PREVIEWS)).finished is not None

    async def leaves(service: EngineService, kind: str, events: int) -> None:
        await asyncio.sleep(chance.uniform(0, 1))
        seen = 0
        async with aclosing(service.answer(requests[kind], previews=PREVIEWS)) as answer:
            async for _ in answer:
                seen += 1
                if seen > events:
                    return

    async def cancelled(service: EngineService, kind: str) -> None:
        await asyncio.sleep(chance.uniform(0, 1))
        task = asyncio.ensure_future(stays(service, kind))
        await asyncio.sleep(chance.uniform(0, 0.5))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def runs_late(service: EngineService, kind: str) -> None:
        with suppress(DeadlineExceeded):
            await collect(service, requests[kind], previews=PREVIEWS, deadline=chance.random())

    async def work() -> None:
        async with undisturbed(services[mode]()) as service:
            await asyncio.gather(
                *(stays(service, kind) for kind in KINDS),
                *(leaves(service, kind, n) for kind in KINDS for n in range(4)),
                *(cancelled(service, kind) for kind in KINDS for _ in range(6)),
                *(runs_late(service, kind) for kind in KINDS for _ in range(3)),
            )

    asyncio.run(work())
