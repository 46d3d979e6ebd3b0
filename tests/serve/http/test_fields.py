"""Names and values of other servers' APIs: read as ours on every route, or refused with ours."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from neounify.config.presets import TINY, U1_8B
from neounify.config.sampling import MAX_GUIDANCE
from neounify.image.pixels import size_of_shape
from neounify.serve.http import create_app
from neounify.serve.http.chat_schema import ChatBody
from neounify.serve.http.images import ImageBody
from neounify.serve.http.names import ALIASES, WRAPPED
from neounify.tasks.chat import ChatRequest
from neounify.tasks.image import ImageRequest
from neounify.tasks.interleave import InterleaveRequest
from support.http_server import data_url, png
from support.scripted_service import Scripted

CHAT, GENERATIONS, EDIT = "/v1/chat/completions", "/v1/images/generations", "/v1/images/edits"
DOCS = Path(__file__).parents[3] / "docs" / "serving-api.md"


class Served:
    """A client, and the requests that reached the engines."""

    def __init__(self) -> None:
        self.service = Scripted()
        self.client = TestClient(create_app(self.service))

    def chat(self, **fields: Any) -> Any:
        body = {"messages": [{"role": "user", "content": "Hello?"}]} | fields
        return self.client.post(CHAT, json=body)

    def generate(self, **fields: Any) -> Any:
        return self.client.post(GENERATIONS, json={"prompt": "a boat"} | fields)

    def edit(self, **fields: Any) -> Any:
        files = {"image": ("a.png", png())}
        return self.client.post(EDIT, data={"prompt": "redder"} | fields, files=files)

    def generated(self, **fields: Any) -> ImageRequest:
        return self.last(ImageRequest, self.generate(**fields))

    def edited(self, **fields: Any) -> ImageRequest:
        return self.last(ImageRequest, self.edit(**fields))

    def chatted(self, **fields: Any) -> ChatRequest:
        return self.last(ChatRequest, self.chat(**fields))

    def last(self, kind: Any, response: Any) -> Any:
        assert response.status_code == 200, response.text
        assert isinstance(self.service.last, kind)
        return self.service.last


@pytest.fixture
def served() -> Served:
    return Served()


@pytest.mark.parametrize(
    ("fields", "of", "value"),
    [
        ({"num_inference_steps": 2}, "sampling.steps", 2),
        ({"extra_body": {"num_steps": 3}}, "sampling.steps", 3),
        ({"guidance_scale": 2.5}, "sampling.guidance.text", 2.5),
        ({"true_cfg_scale": 2.5, "guidance": 2.5}, "sampling.guidance.text", 2.5),
        ({"timestep_shift": 2}, "sampling.shift", 2),
        ({"cfg_norm": "global"}, "sampling.guidance.norm", "global"),
        ({"think_mode": True}, "think", True),
        ({"enable_thinking": False}, "think", False),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "think", True),
        ({"width": 96, "height": 64}, "width", 96),
        ({"width": 96, "height": 64, "size": "96x64"}, "height", 64),
        ({"resolution": "96*64"}, "width", 96),
        ({"width": 96.0, "height": "64"}, "width", 96),
        ({"image_config": {"aspect_ratio": "2:1"}, "size": "auto"}, "height", 64),
        ({"negative_prompt": "blurry"}, "negative_prompt", "blurry"),
        ({"seed": 5, "watermark": False, "prompt_extend": False}, "seed", 5),
    ],
)
def test_image_routes(served: Served, fields: dict[str, Any], of: str, value: Any) -> None:
    flat = not any(isinstance(v, dict) for v in fields.values())
    edited = {"image": data_url(png())} | fields
    requests: list[Any] = [
        served.generated(**fields),
        served.last(ImageRequest, served.client.post(EDIT, json={"prompt": "x"} | edited)),
        *([served.edited(**fields)] if flat else []),  # a form holds no objects
    ]
    for actual in requests:
        for step in of.split("."):
            actual = getattr(actual, step)
        assert actual == value


def test_several_images_by_another_name(served: Served) -> None:
    for name in ("num_outputs_per_prompt", "num_images_per_prompt", "num_images"):
        assert len(served.generate(**{name: 2}).json()["data"]) == 2


def test_a_seed_of_minus_one_is_a_new_one(served: Served) -> None:
    seeds = {served.generated(seed=-1).seed for _ in range(3)} | {served.edited(seed="-1").seed}
    assert -1 not in seeds
    assert len(seeds) == 4
    assert served.generated(seed=-2).seed == -2


@pytest.mark.parametrize(
    ("fields", "of", "value"),
    [
        ({"stop": ""}, "stop", ()),
        ({"stop": ["", "x"]}, "stop", ("x",)),
        ({"top_k": -1}, "sampling.top_k", 0),
        ({"max_tokens": -1}, "max_new_tokens", 512),
        ({"max_completion_tokens": -1}, "max_new_tokens", 512),
        ({"max_new_tokens": 7}, "max_new_tokens", 7),
        ({"repeat_penalty": 1.5}, "sampling.repetition_penalty", 1.5),
        ({"enable_thinking": True}, "think", True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "think", False),
        ({"chat_template_kwargs": {"thinking": True}, "enable_thinking": True}, "think", True),
        ({"thinking": {"type": "enabled"}}, "think", True),
        ({"thinking": {"type": "disabled"}, "reasoning_effort": "low"}, "think", False),
        ({"reasoning": {"effort": "low"}}, "think", True),
        ({"reasoning": {"enabled": True, "exclude": True}}, "think", True),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}, "think", True),
        ({"ignore_eos": False, "best_of": 1, "min_tokens": 0}, "think", False),
        ({"frequency_penalty": 0.0, "presence_penalty": 0, "logprobs": False}, "think", False),
    ],
)
def test_chat(served: Served, fields: dict[str, Any], of: str, value: Any) -> None:
    actual: Any = served.chatted(**fields)
    for step in of.split("."):
        actual = getattr(actual, step)
    assert actual == value


def test_a_story_takes_the_names_of_image_fields(served: Served) -> None:
    response = served.chat(
        modalities=["text", "image"],
        num_inference_steps=3,
        guidance_scale=2,
        negative_prompt="blurry",
        image_config={"aspect_ratio": "1:2"},
    )
    assert response.status_code == 200, response.text
    request = served.service.last
    assert isinstance(request, InterleaveRequest)
    assert (request.sampling.steps, request.negative_prompt) == (3, "blurry")
    assert request.sizes[0][0] < request.sizes[0][1]


def test_a_thought_can_be_left_out(served: Served) -> None:
    for fields in ({"include_reasoning": False}, {"reasoning": {"exclude": True}}):
        message = served.chat(think=True, **fields).json()["choices"][0]["message"]
        assert (message["content"], "reasoning_content" in message) == ("You said: Hello?", False)
        streamed = served.chat(think=True, stream=True, **fields).text
        assert "reasoning_content" not in streamed
        assert "You said" in streamed


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"num_inference_steps": 2, "steps": 3}, "steps", "num_inference_steps and steps"),
        ({"guidance_scale": 2, "cfg_scale": 3}, "guidance", "give guidance alone"),
        ({"extra_body": {"steps": 2}, "steps": 3}, "steps", "'2' and '3'"),
        ({"width": 64}, "width", "both width and height"),
        (
            {"width": 64, "height": 64, "size": "96x64"},
            "size",
            "size: (size and width and height|width and height and size) are the same setting",
        ),
        ({"width": 64, "height": 64, "size": "96x64"}, "size", "'64x64' and '96x64'|'96x64' and"),
        (
            {"width": 64.5, "height": 64},
            "width",
            "whole number of pixels from 1 to 999999, got 64.5",
        ),
        ({"width": 64, "height": -64}, "height", "whole number of pixels .* got -64"),
        ({"width": True, "height": 64}, "width", "whole number of pixels .* got True"),
        ({"width": 10**30, "height": 64}, "width", "whole number of pixels .* got 1000"),
        ({"size": "big"}, "size", "size: must be WIDTHxHEIGHT in pixels, such as .*, got 'big'"),
        ({"aspect_ratio": "wide"}, "aspect_ratio", "must be WIDTH:HEIGHT, .*, got 'wide'"),
        ({"size": "64x64", "aspect_ratio": "16:9"}, "size", "has not the aspect_ratio 16:9"),
        ({"num_inference_steps": 0}, "steps", "steps must be from 1 to 1000, got 0"),
        ({"guidance": MAX_GUIDANCE + 1}, "guidance", f"from 0 to {MAX_GUIDANCE:g}"),
        ({"image_guidance": -1}, "image_guidance", f"from 0 to {MAX_GUIDANCE:g}"),
        ({"num_inference_step": 2}, "num_inference_step", "did you mean 'steps'"),
        ({"guidence": 2}, "guidence", "did you mean 'guidance'"),
        ({"prompt_extend": True}, "prompt_extend", "did you mean 'think'"),
        ({"watermark": True}, "watermark", "only false"),
        ({"extra_body": 3}, "extra_body", "an object"),
        ({"chat_template_kwargs": {"enable_thinkin": 1}}, "chat_template_kwargs.", "did you mean"),
        ({"negative_prompt": "x", "guidance": 1}, "negative_prompt", "nothing is steered away"),
        ({"negative_prompt": "an <image>"}, "negative_prompt", "holds no images"),
        ({"thinking": {"type": "much"}}, "thinking.type", "enabled, disabled or auto"),
        ({"aspect_ratio": "wide"}, "aspect_ratio", "aspect_ratio"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    served: Served, fields: dict[str, Any], param: str, says: str
) -> None:
    response = served.generate(**fields)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["param"].startswith(param)
    assert re.search(says, error["message"]), error["message"]


def test_penalties_point_to_ours(served: Served) -> None:
    response = served.chat(presence_penalty=0.1)
    assert response.status_code == 400
    assert "did you mean 'repetition_penalty'" in response.json()["error"]["message"]


def test_sizes_of_a_shape() -> None:
    assert size_of_shape(U1_8B, (16, 9)) == (2720, 1536)
    assert size_of_shape(U1_8B, (1, 1), 2048**2) == (2048, 2048)
    assert size_of_shape(U1_8B, (1, 1), 4096**2) == (2048, 2048)
    assert size_of_shape(U1_8B, (1, 1), 1024**2) == (1024, 1024)
    assert size_of_shape(U1_8B, (9, 16), 1024**2) == (768, 1344)
    small = TINY.sampling.image_size
    assert size_of_shape(TINY, small, 2048**2) == small
    trained = dataclasses.replace(TINY.sampling, trained_sizes=((64, 64), (128, 64), (128, 128)))
    config = dataclasses.replace(TINY, sampling=trained)
    assert size_of_shape(config, (16, 9)) == (128, 64)
    assert size_of_shape(config, (1, 1), 1024**2) == (128, 128)


def test_sizes_over_http(served: Served) -> None:
    default = TINY.sampling.image_size
    for size in ("1K", "2k", "4K", "auto"):
        request = served.generated(size=size)
        assert (request.width, request.height) == default
    wide = served.generated(size="2K", aspect_ratio="2:1")
    assert (wide.width, wide.height) == (160, 64)
    shaped = served.edited(size="1K")
    assert shaped.width > shaped.height


def test_every_alias_is_of_a_field_and_in_the_docs() -> None:
    fields = ImageBody.model_fields.keys() | ChatBody.model_fields.keys()
    text = DOCS.read_text(encoding="utf-8")
    for alias, field in ALIASES.items():
        assert field in fields
        assert alias not in fields
        [row] = [
            line
            for line in text.splitlines()
            if line.startswith(f"| `{field}` |") and any(f"`{name}`" in line for name in ALIASES)
        ]
        assert f"`{alias}`" in row
    for wrapper, keys in WRAPPED.items():
        for key in keys:
            assert f"`{wrapper}.{key}`" in text
