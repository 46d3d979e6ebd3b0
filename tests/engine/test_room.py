"""Room in the paged cache: who holds it, who waits for it, and that results do not depend on it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import neounify
from neounify.engine.understanding import UnderstandingEngine
from neounify.flow.sampling import ImageSampling
from neounify.serve.build import colocated
from neounify.serve.engines import EngineConfig, EngineThread
from neounify.serve.service import EngineService, ServiceRequest
from neounify.tasks.chat import make_chat_request
from neounify.tasks.image import ImageRequest
from neounify.tasks.interleave import InterleaveRequest
from support.scripted_sampler import script_sampler
from support.serving import collect, same_image, serve

RNG = np.random.default_rng(0)
IMAGE = PIL.Image.fromarray(RNG.integers(0, 255, (96, 128, 3), dtype=np.uint8))


def room_of(tokens: int) -> EngineConfig:
    return EngineConfig(
        limits={"kv_blocks": tokens // 8, "kv_block_size": 8, "prefill_step_rows": 64}
    )


def engine_of(service: EngineService) -> UnderstandingEngine:
    engine = service.clients.understanding.engine
    assert isinstance(engine, EngineThread)
    assert engine.understanding is not None
    return engine.understanding


async def until_generating(service: EngineService, tasks: Sequence[asyncio.Task[Any]]) -> None:
    while service.gauges().get("gen_images", 0) < len(tasks):
        for task in tasks:
            if task.done():
                task.result()
        await asyncio.sleep(0.01)


def test_text_does_not_wait_for_the_room_of_images(pipe: neounify.Pipeline) -> None:
    """Two edits fill the cache with their prompts; a chat begins and ends while they run."""
    sampling = ImageSampling(steps=600, guidance=3, image_guidance=2).resolve(
        pipe.config, editing=True
    )
    edits = [
        ImageRequest(
            prompt="x" * 60, width=64, height=64, sampling=sampling, images=(IMAGE,), seed=seed
        )
        for seed in range(2)
    ]

    request = make_chat_request("y" * 350, [], max_new_tokens=40)

    async def work(service: EngineService) -> Any:
        generating = [asyncio.ensure_future(collect(service, edit)) for edit in edits]
        await until_generating(service, generating)
        chat = await collect(service, request)
        still = [task for task in generating if not task.done()]
        for task in generating:
            task.cancel()
        await asyncio.gather(*generating, return_exceptions=True)
        return chat, len(still)

    chat, still = serve(colocated(pipe, room_of(512)), work)
    assert still == 2
    alone = serve(colocated(pipe), lambda service: collect(service, request))
    assert (chat.text, chat.thought) == (alone.text, alone.thought)


def test_answers_do_not_depend_on_room(
    pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stories with their default number of images, edits and chats, all at once."""
    # An untrained model opens no image of itself: make it, wherever its likeliest token is even.
    opens = pipe.processor.token("<img>")

    def opens_images(logits: torch.Tensor) -> int:
        best = int(logits[:200].argmax())
        return opens if best % 16 == 0 else best

    script_sampler(monkeypatch, opens_images)
    sampling = ImageSampling(steps=2).resolve(pipe.config, editing=True)
    requests: list[ServiceRequest] = [
        InterleaveRequest(
            prompt=f"Tell {n}", sizes=[(128, 96)], sampling=sampling, max_new_tokens=40, seed=n
        )
        for n in range(3)
    ]
    requests += [
        ImageRequest(prompt="x" * 30, width=64, height=64, sampling=sampling, images=(IMAGE,))
    ]
    requests += [make_chat_request("y" * (40 * n), [], max_new_tokens=60) for n in range(1, 5)]
    assert all(r.max_images == 10 for r in requests if isinstance(r, InterleaveRequest))

    async def work(service: EngineService) -> tuple[list[Any], float]:
        answers = await asyncio.gather(*(collect(service, r) for r in requests))
        await asyncio.sleep(1.1)
        engine_of(service).check()
        return answers, service.counters()["und_preempted"]

    scarce, preempted = serve(colocated(pipe, room_of(400)), work)
    roomy, never = serve(colocated(pipe), work)
    assert preempted > 0 == never
    assert max(len(a.images) for a in roomy) > 1
    for one, other in zip(scarce, roomy, strict=True):
        assert (one.text, one.thought) == (other.text, other.thought)
        assert one.finished is not None
        assert other.finished is not None
        assert one.finished.finish_reason == other.finished.finish_reason
        assert one.finished.completion_tokens == other.finished.completion_tokens
        for index, pixels in other.images.items():
            same_image(one.images[index], pixels)


def test_a_story_that_outgrows_the_cache_ends_there(
    pipe: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    script_sampler(monkeypatch, lambda logits: pipe.processor.token("<img>"))
    sampling = ImageSampling(steps=2).resolve(pipe.config, editing=True)
    story = InterleaveRequest(
        prompt="Tell", sizes=[(256, 256)], sampling=sampling, max_new_tokens=16
    )
    answer = serve(colocated(pipe, room_of(288)), lambda service: collect(service, story))
    assert answer.finished is not None
    assert answer.finished.finish_reason == "length"
    assert len(answer.images) == 4  # three of 64 tokens are read back, the fourth is not
