"""Images beside other requests against the same images alone, with the trained model.

float32 rounds differently when products have other numbers of rows, bfloat16 more so: there the
keys and values of a written thought are what differs, since it is decoded beside other texts.
"""

from __future__ import annotations

import asyncio
from functools import partial

import pytest
import torch

import neounify
from neounify.bundled import bundled_model
from neounify.flow.sampling import ImageSampling
from neounify.serve.build import colocated
from neounify.serve.service import EngineService, ServiceRequest
from neounify.tasks.chat import make_chat_request
from neounify.tasks.image import ImageRequest
from neounify.tasks.interleave import InterleaveRequest
from support.serving import Collected, collect, serve

STORY = (
    "Tell a story in two pictures. It starts with a red circle in the top left on a white "
    "background. Draw a blue star in the bottom right."
)
BOUNDS = {"float32": 1e-5, "bfloat16": 0.06}
"""Largest difference of a value in [-1, 1]; measured 7e-6 and 0.027 (3.5 of 255 levels)."""


def _image(pipe: neounify.Pipeline, prompt: str, seed: int, *, think: bool = False) -> ImageRequest:
    sampling = ImageSampling(steps=10 + seed).resolve(pipe.config, editing=False)
    return ImageRequest(
        prompt=prompt, width=64, height=64, sampling=sampling, seed=seed, think=think
    )


def _story(pipe: neounify.Pipeline) -> InterleaveRequest:
    sampling = ImageSampling(steps=10).resolve(pipe.config, editing=True)
    return InterleaveRequest(
        prompt=STORY, sizes=[(64, 64)], sampling=sampling, max_images=2, max_new_tokens=60, seed=3
    )


@pytest.mark.parametrize("dtype", BOUNDS)
def test_images_beside_other_requests_are_those_alone(dtype: str) -> None:
    pipe = neounify.load(bundled_model(), dtype=dtype)
    targets: list[ServiceRequest] = [
        _image(pipe, "a red circle", 0),
        _image(pipe, "a green star left of a red square", 4, think=True),
        _story(pipe),
    ]
    others: list[ServiceRequest] = [
        *(make_chat_request(f"What is {n}? Tell me.", [], max_new_tokens=25 + n) for n in range(6)),
        *(_image(pipe, f"a {c} square", n) for n, c in enumerate(("red", "blue", "green"))),
        *(_image(pipe, f"two {c} stars", n, think=True) for n, c in enumerate(("red", "blue"))),
    ]
    alone = [serve(colocated(pipe), partial(collect, request=request)) for request in targets]

    async def crowd(service: EngineService) -> list[Collected]:
        return await asyncio.gather(*(collect(service, r) for r in [*targets, *others]))

    beside = serve(colocated(pipe), crowd)[: len(targets)]
    for one, other in zip(alone, beside, strict=True):
        assert (one.text, one.thought) == (other.text, other.thought)
        assert one.images.keys() == other.images.keys()
        for index, pixels in one.images.items():
            torch.testing.assert_close(other.images[index], pixels, rtol=0, atol=BOUNDS[dtype])
    assert [len(one.images) for one in alone] == [1, 1, 2]
