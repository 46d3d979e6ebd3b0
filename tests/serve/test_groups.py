"""Engines of several ranks: the answers of one process; a rank that dies costs its engine alone."""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import neounify
from neounify.bundled import bundled_model
from neounify.config.presets import TINY
from neounify.errors import ConfigError, EngineDied
from neounify.flow.sampling import ImageSampling
from neounify.model import NeoUnify
from neounify.serve.build import ServeConfig, build_service, colocated
from neounify.serve.client import EngineClient
from neounify.serve.engine_process import EngineProcess
from neounify.serve.engines import WatchConfig
from neounify.serve.service import EngineService, ServiceRequest
from neounify.tasks.chat import make_chat_request
from neounify.tasks.image import ImageRequest
from neounify.tasks.interleave import InterleaveRequest
from neounify.text import byte_tokenizer
from support.leaving import at_rest, calls_open, pieces_of
from support.serving import Collected, collect, serve

STORY = (
    "Tell a story in two pictures. It starts with a red circle in the top left on a white "
    "background. Draw a blue star in the bottom right."
)
CPUS = ("cpu", "cpu", "cpu", "cpu")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained model with four key heads."""
    torch.manual_seed(0)
    config = TINY.replace(num_heads=8, num_kv_heads=4)
    model = NeoUnify(config).eval().requires_grad_(False)
    path = tmp_path_factory.mktemp("model") / "four"
    neounify.Pipeline(model, byte_tokenizer(), system_message="Paint well.").save(path)
    return path


def picture(seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(values)


def image(pipe: neounify.Pipeline, prompt: str, steps: int, **more: Any) -> ImageRequest:
    knobs = {name: more.pop(name) for name in ("guidance", "image_guidance") if name in more}
    editing = "images" in more
    sampling = ImageSampling(steps=steps, **knobs).resolve(pipe.config, editing=editing)
    return ImageRequest(prompt=prompt, width=64, height=64, sampling=sampling, **more)


def requests_for(pipe: neounify.Pipeline) -> list[ServiceRequest]:
    """Text, drawn text, text about an image, images with a thought, three branches, several."""
    return [
        make_chat_request("Hello", [], max_new_tokens=12),
        make_chat_request("Hello", [], max_new_tokens=12, temperature=1.0, seed=5),
        make_chat_request("What is it?", [picture(1)], max_new_tokens=8, temperature=0.7, seed=6),
        image(pipe, "a boat", 4, guidance=3.0, think=True, max_think_tokens=8),
        image(pipe, "more red", 5, images=(picture(2),), guidance=2.0, image_guidance=1.5),
        image(pipe, "a house", 3, guidance=1.0, count=2),
    ]


def stories_for(pipe: neounify.Pipeline) -> list[ServiceRequest]:
    sampling = ImageSampling(steps=6).resolve(pipe.config, editing=True)
    story = InterleaveRequest(
        prompt=STORY, sizes=[(64, 64)], sampling=sampling, max_images=2, max_new_tokens=60, seed=3
    )
    return [story, image(pipe, "a red circle", 6, guidance=2.0)]


async def all_at_once(service: EngineService, requests: list[ServiceRequest]) -> list[Collected]:
    """All of them together, then the last one alone."""
    together = await asyncio.gather(*(collect(service, request) for request in requests))
    alone = await collect(service, requests[-1])
    await at_rest(service)
    assert calls_open(service) == 0
    assert not any("free" not in name for name in pieces_of(service))
    return [*together, alone]


def same(actual: list[Collected], expected: list[Collected], bound: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert (one.text, one.thought) == (other.text, other.thought)
        assert one.images.keys() == other.images.keys()
        for index, pixels in other.images.items():
            torch.testing.assert_close(one.images[index], pixels, rtol=0, atol=bound)


def grouped(folder: Path, und: int, gen: int, sequence: int = 1, **more: Any) -> EngineService:
    return build_service(
        ServeConfig(
            folder=folder,
            mode="separate",
            dtype="float32",
            understanding_devices=CPUS[:und],
            generation_devices=CPUS[:gen],
            sequence_parallel=sequence,
            threads=1,
            **more,
        )
    )


SLOW = [
    pytest.param(und, gen, sequence, marks=pytest.mark.slow)
    for und in (1, 2, 4)
    for gen in (1, 2, 4)
    for sequence in (1, 2, 4)
    if gen % sequence == 0 and (und, gen) != (1, 1) and (und, gen, sequence) != (2, 2, 1)
]


@pytest.fixture(scope="module")
def pipe(four: Path) -> neounify.Pipeline:
    return neounify.load(four, dtype="float32")


@pytest.fixture(scope="module")
def answers(pipe: neounify.Pipeline) -> list[Collected]:
    """What one process answers."""
    return serve(colocated(pipe), partial(all_at_once, requests=requests_for(pipe)))


@pytest.mark.usefixtures("quick_starts")
@pytest.mark.parametrize(("und", "gen", "sequence"), [(2, 2, 1), *SLOW])
def test_groups_answer_as_one_process(
    *,
    four: Path,
    pipe: neounify.Pipeline,
    answers: list[Collected],
    und: int,
    gen: int,
    sequence: int,
) -> None:
    service = grouped(four, und, gen, sequence)
    actual = serve(service, partial(all_at_once, requests=requests_for(pipe)))
    # Text, then images: those that have no thought are whole.
    assert [len(one.images) for one in actual] == [0, 0, 0, 1, 1, 2, 2]
    same(actual, answers, 1e-5)


@pytest.mark.slow
def test_groups_tell_the_stories_of_one_process() -> None:
    pipe = neounify.load(bundled_model(), dtype="float32")
    work = partial(all_at_once, requests=stories_for(pipe))
    expected = serve(colocated(pipe), work)
    assert len(expected[0].images) == 2
    for gen, sequence in ((2, 1), (2, 2)):
        same(serve(grouped(bundled_model(), 2, gen, sequence), work), expected, 1e-5)


# --- ranks that die or stop ---


def pids(client: EngineClient) -> tuple[int, ...]:
    assert isinstance(client.engine, EngineProcess)
    return tuple(pid for pid in client.engine.pids if pid is not None)


async def until_ready(service: EngineService) -> None:
    while not service.ready:
        await asyncio.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("victim", ["gen", "und"])
def test_a_killed_rank_costs_its_engine_alone(four: Path, victim: str, rank: int) -> None:
    pipe = neounify.load(four, dtype="float32")

    async def work(service: EngineService) -> Collected:
        painting = asyncio.ensure_future(collect(service, image(pipe, "a boat", 400)))
        tokens = 600 if victim == "gen" else 4000
        text = make_chat_request("Hello", [], max_new_tokens=tokens)
        chatting = asyncio.ensure_future(collect(service, text))
        while not service.gauges().get("gen_images") or not service.gauges().get("und_writing"):
            await asyncio.sleep(0.02)
        clients = service.clients
        client = clients.generation if victim == "gen" else clients.understanding
        before = pids(client)
        os.kill(before[rank], signal.SIGKILL)
        died, goes_on = (painting, chatting) if victim == "gen" else (chatting, painting)
        with pytest.raises(EngineDied, match="ended while it worked on the request"):
            await died
        assert (await goes_on).finished is not None
        await until_ready(service)
        # The whole group was started again, and nothing of the earlier one is left.
        assert not set(before) & set(pids(client))
        for pid in before:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        assert service.counters()["restarts"] == 1
        answer = await collect(service, image(pipe, "a boat", 3))
        await at_rest(service)
        assert not any("free" not in name for name in pieces_of(service))
        return answer

    (pixels,) = serve(grouped(four, 2, 2), work).images.values()
    expected = pipe.generate("a boat", width=64, height=64, steps=3).pixels[0]
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["gen", "und"])
def test_a_rank_that_is_stopped_for_twenty_seconds_parts_from_nobody(
    four: Path, victim: str
) -> None:
    """The others wait for it, and the answers are those of one process."""
    pipe = neounify.load(four, dtype="float32")
    requests: list[ServiceRequest] = [
        image(pipe, "a boat", 60, guidance=3.0),
        make_chat_request("Hello", [], max_new_tokens=200, temperature=1.0, seed=5),
    ]

    async def answers(service: EngineService, stop: bool) -> list[Collected]:
        if stop:
            clients = service.clients
            pid = pids(clients.generation if victim == "gen" else clients.understanding)[1]
            os.kill(pid, signal.SIGSTOP)
        work = [asyncio.ensure_future(collect(service, request)) for request in requests]
        if stop:
            await asyncio.sleep(20)
            assert not work[0 if victim == "gen" else 1].done()
            os.kill(pid, signal.SIGCONT)
        results = await asyncio.gather(*work)
        assert service.counters()["restarts"] == 0
        return results

    expected = serve(colocated(pipe), partial(answers, stop=False))
    service = grouped(four, 2, 2, watch=WatchConfig(silence=60))
    same(serve(service, partial(answers, stop=True)), expected, 1e-5)


@pytest.mark.slow
def test_a_rank_that_stays_stopped_is_started_again(four: Path) -> None:
    pipe = neounify.load(four, dtype="float32")

    async def work(service: EngineService) -> None:
        os.kill(pids(service.clients.generation)[1], signal.SIGSTOP)
        with pytest.raises(EngineDied):
            await asyncio.wait_for(collect(service, image(pipe, "a boat", 3)), 60)
        await until_ready(service)
        assert (await collect(service, image(pipe, "a boat", 2))).images

    serve(grouped(four, 1, 2, watch=WatchConfig(silence=8)), work)


# --- groups that do not fit ---


def test_groups_that_do_not_fit_are_refused_before_anything_is_started(four: Path) -> None:
    with pytest.raises(ConfigError, match=r"understanding on 3 devices: the model's 4 key heads"):
        grouped(four, 3, 1)
    with pytest.raises(ConfigError, match=r"sequence parallel 2 on 3 devices"):
        grouped(four, 1, 3, 2)
