"""Room in the paged cache: who holds it, who waits for it, and that results do not depend on it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image

import neounify
from neounify.pipeline.chatting import make_chat_request
from neounify.pipeline.request import PaintRequest, make_sampling
from neounify.serve.build import colocated
from neounify.serve.hosts import EngineSettings, ThreadHost
from neounify.serve.service import Service
from neounify.serve.understanding import UnderstandingEngine, UnderstandingSettings
from serving import collect, serve

RNG = np.random.default_rng(0)
PICTURE = PIL.Image.fromarray(RNG.integers(0, 255, (96, 128, 3), dtype=np.uint8))


def room_of(tokens: int) -> EngineSettings:
    return EngineSettings(
        understanding=UnderstandingSettings(cache_tokens=tokens, block_size=8, prefill_tokens=64)
    )


def engine_of(service: Service) -> UnderstandingEngine:
    host = service.links.understanding.host
    assert isinstance(host, ThreadHost)
    assert host.understanding is not None
    return host.understanding


async def until_painting(service: Service, tasks: Sequence[asyncio.Task[Any]]) -> None:
    while service.gauges().get("gen_images", 0) < len(tasks):
        for task in tasks:
            if task.done():
                task.result()
        await asyncio.sleep(0.01)


def test_text_does_not_wait_for_the_room_of_what_is_painted(pipe: neounify.Pipeline) -> None:
    """Two edits fill the cache with their prompts; a chat begins and ends while they paint."""
    sampling = make_sampling(pipe.config, editing=True, steps=600, guidance=3, image_guidance=2)
    edits = [
        PaintRequest(
            prompt="x" * 60, width=64, height=64, sampling=sampling, images=(PICTURE,), seed=seed
        )
        for seed in range(2)
    ]

    request = make_chat_request("y" * 350, [], max_new_tokens=40)

    async def work(service: Service) -> Any:
        painting = [asyncio.ensure_future(collect(service, edit)) for edit in edits]
        await until_painting(service, painting)
        chat = await collect(service, request)
        still = [task for task in painting if not task.done()]
        for task in painting:
            task.cancel()
        await asyncio.gather(*painting, return_exceptions=True)
        return chat, len(still)

    chat, still = serve(colocated(pipe, room_of(512)), work)
    assert still == 2
    alone = serve(colocated(pipe), lambda service: collect(service, request))
    assert (chat.text, chat.thought) == (alone.text, alone.thought)
