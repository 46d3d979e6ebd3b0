"""The second family behind the HTTP API: chat over images, images, and one sentence of refusal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

import neounify
from neounify.serve.build import colocated
from neounify.serve.http import create_app
from support.http_server import data_url, openai_client, png, serving
from support.pixelumm import saved
from support.scripted_service import Scripted

RED, BLUE = png("red"), png("blue")
ABLE = "; it can answer questions about text and images, generate images, generate videos"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> neounify.Pipeline:
    return neounify.load(saved(tmp_path_factory.mktemp("pixelumm") / "model"))


@pytest.fixture(scope="module")
def client(pipe: neounify.Pipeline) -> Iterator[openai.OpenAI]:
    with serving(colocated(pipe)) as started:
        yield started


def _question(text: str, *images: bytes) -> list[Any]:
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": data_url(i)}} for i in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_chat_about_two_images(client: openai.OpenAI, pipe: neounify.Pipeline) -> None:
    answer = client.chat.completions.create(
        model="neounify",
        messages=_question("Which is darker?", RED, BLUE),
        max_tokens=5,
        temperature=0,
    )
    wanted = pipe.chat("Which is darker?", [RED, BLUE], max_new_tokens=5)
    assert answer.choices[0].message.content == wanted.text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == wanted.prompt_tokens


def test_the_model_list_says_what_it_can(client: openai.OpenAI) -> None:
    facts: Any = client.models.retrieve("neounify")
    assert facts.neounify["capabilities"] == ["chat", "generate", "generate_video", "chat_video"]
    assert facts.neounify["solver"] == "dpm2m"
    assert facts.neounify["video"] == {
        "tube_frames": 4,
        "size": "64x48",
        "frames": 8,
        "fps": 24.0,
        "steps": 3,
        "guidance": 6.0,
        "shift": 10.0,
        "solver": "unipc",
    }
    assert facts.neounify["limits"]["output_frames"] == 240
    with openai_client(create_app(Scripted())) as other:
        plain: Any = other.models.retrieve("neounify")
    assert plain.neounify["video"] is None
    assert "generate_video" not in plain.neounify["capabilities"]


def test_images_are_generated(client: openai.OpenAI) -> None:
    result = client.images.generate(model="neounify", prompt="a fox", size="64x48")
    assert result.data
    assert result.data[0].b64_json


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_is_refused(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="neounify", messages=_question("Why?"), stream=stream, extra_body={"think": True}
        )
    assert "this PixelUMM model was not trained to think before answering" in str(refused.value)
    assert ABLE in str(refused.value)


def test_edits_and_interleaved_answers_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=f"not trained to edit images{ABLE}"):
        client.images.edit(
            model="neounify", prompt="make it blue", image=("a.png", RED), size="64x48"
        )
    with pytest.raises(openai.BadRequestError, match="not trained to write answers of text and im"):
        client.chat.completions.create(
            model="neounify",
            messages=_question("A story."),
            modalities=["text", "image"],  # type: ignore[list-item]
        )
