"""The second family behind the HTTP API: images and videos in and out, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

import neounify
from neounify.serve.build import colocated
from neounify.serve.http import create_app
from support.clips import assert_shows, clip_bytes, numbered
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


def test_numbered_marks_are_refused_beside_parts(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="are marked by <image> without a number"):
        client.chat.completions.create(
            model="neounify", messages=_question("Is <image 2> like <image 1>?", RED, BLUE)
        )


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
    with pytest.raises(openai.BadRequestError, match="a <video> mark without a clip"):
        client.images.generate(model="neounify", prompt="a <video>", size="64x48")


def test_chat_about_a_video(client: openai.OpenAI, pipe: neounify.Pipeline) -> None:
    """Three frames, each an image behind its time."""
    clip = clip_bytes(numbered(25))
    part = {"type": "video_url", "video_url": {"url": data_url(clip, "video/mp4")}}
    text = {"type": "text", "text": "What moves?"}
    messages: Any = [{"role": "user", "content": [part, text]}]
    answer = client.chat.completions.create(
        model="neounify", messages=messages, max_tokens=5, temperature=0
    )
    wanted = pipe.chat("What moves?", video=clip, max_new_tokens=5)
    assert wanted.text != pipe.chat("What moves?", max_new_tokens=5).text
    assert answer.choices[0].message.content == wanted.text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == wanted.prompt_tokens


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_a_video_is_that_of_the_pipeline(client: openai.OpenAI, pipe: neounify.Pipeline) -> None:
    fields: Any = {"frames": 8, "fps": 16, "seed": 5, "negative_prompt": "blur"}
    size: Any = "64x48"
    video = client.videos.create_and_poll(
        prompt="a fox", size=size, extra_body=fields, poll_interval_ms=20
    )
    assert video.status == "completed", video.error
    file = client.videos.download_content(video.id).read()
    [wanted] = pipe.generate("a fox", width=64, height=48, **fields).videos
    assert_shows(file, wanted.frames.numpy())


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
