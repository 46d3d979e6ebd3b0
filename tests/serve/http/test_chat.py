"""Chat completions as OpenAI's own client sees them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from neounify.serve.http import create_app
from neounify.tasks.chat import ChatRequest
from neounify.tasks.interleave import InterleaveRequest
from support.http_server import data_url, openai_client, png, to_image
from support.scripted_service import Scripted, colour_of

MODEL = "neounify"


@pytest.fixture(scope="module")
def service() -> Scripted:
    return Scripted()


@pytest.fixture(scope="module")
def client(service: Scripted) -> Iterator[openai.OpenAI]:
    with openai_client(create_app(service)) as client:
        yield client


def user(*content: Any) -> Any:
    return [{"role": "user", "content": content[0] if len(content) == 1 else list(content)}]


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def image(data: bytes) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data)}}


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError, match="not served"):
        client.models.retrieve("gpt-4")


def test_a_text_answer(client: openai.OpenAI, service: Scripted) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=user("Hello?"))
    [choice] = answer.choices
    assert choice.message.content == "You said: Hello?"
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (11, 5)
    assert answer.usage.total_tokens == 16
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3
    assert service.deadlines[-1] == pytest.approx(600, abs=30)


def test_every_sampling_field_arrives(client: openai.OpenAI, service: Scripted) -> None:
    client.chat.completions.create(
        model=MODEL,
        messages=user("Hello?"),
        temperature=0.7,
        top_p=0.9,
        seed=3,
        max_tokens=17,
        stop=["a", "b"],
        user="somebody",
        extra_body={"top_k": 5, "repetition_penalty": 1.5, "deadline": 2.5},
    )
    request = service.last
    assert isinstance(request, ChatRequest)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.7, 0.9, 5)
    assert (sampling.repetition_penalty, sampling.seed) == (1.5, 3)
    assert (request.max_new_tokens, request.stop) == (17, ("a", "b"))
    deadline = service.deadlines[-1]
    assert deadline is not None
    assert 0 < deadline <= 2.5
    client.chat.completions.create(
        model=MODEL, messages=user("Hello?"), max_completion_tokens=9, stop="c"
    )
    request = service.last
    assert isinstance(request, ChatRequest)
    assert (request.max_new_tokens, request.stop) == (9, ("c",))


def test_images_and_earlier_turns_arrive_in_order(client: openai.OpenAI, service: Scripted) -> None:
    turns: Any = [
        {"role": "developer", "content": "Be brief."},
        *user(text("What is "), image(png("red")), text("?")),
        {"role": "assistant", "content": "Red.", "refusal": None, "tool_calls": None},
        *user(image(png("blue")), image(png((0, 255, 0))), text("And these?")),
    ]
    client.chat.completions.create(model=MODEL, messages=turns)
    request = service.last
    assert isinstance(request, ChatRequest)
    assert [(m.role, m.text) for m in request.messages] == [
        ("system", "Be brief."),
        ("user", "What is <image>?"),
        ("assistant", "Red."),
        ("user", "<image>\n<image>\nAnd these?"),
    ]
    colours = [to_image.getpixel((0, 0)) for to_image in request.images]
    assert colours == [(255, 0, 0), (0, 0, 255), (0, 255, 0)]


def test_a_streamed_answer(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=user("Hello?"),
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    deltas = [c.choices[0].delta for c in chunks if c.choices]
    assert deltas[0].role == "assistant"
    assert "".join(d.content or "" for d in deltas) == "You said: Hello?"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 16
    assert all(c.usage is None for c in chunks[:-1])


@pytest.mark.parametrize("asked", [{"think": True}, {"reasoning_effort": "low"}])
def test_thoughts_stand_apart(client: openai.OpenAI, asked: dict[str, Any]) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=user("Hi"), extra_body=asked)
    message: Any = answer.choices[0].message
    assert (message.content, message.reasoning_content) == ("You said: Hi", "Hm, yes.")
    stream = client.chat.completions.create(
        model=MODEL, messages=user("Hi"), extra_body=asked, stream=True
    )
    deltas: list[Any] = [chunk.choices[0].delta for chunk in stream]
    thought = "".join(getattr(d, "reasoning_content", None) or "" for d in deltas)
    assert thought == "Hm, yes."
    assert "".join(d.content or "" for d in deltas) == "You said: Hi"


def test_no_thought_unless_asked(client: openai.OpenAI, service: Scripted) -> None:
    client.chat.completions.create(model=MODEL, messages=user("Hi"), reasoning_effort="minimal")
    assert isinstance(service.last, ChatRequest)
    assert not service.last.think


STORY: dict[str, Any] = {"modalities": ["text", "image"], "size": "64x32", "seed": 2}


def test_an_answer_with_images_as_parts(client: openai.OpenAI, service: Scripted) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "system", "content": "Rhyme."}, *user(text("Go "), image(png()))],
        extra_body=STORY
        | {
            "max_images": 4,
            "steps": 3,
            "guidance": 2.5,
            "max_tokens": 50,
            "content_format": "parts",
        },
    )
    parts: Any = answer.choices[0].message.content
    assert [p["type"] for p in parts] == ["text", "image_url", "text", "image_url"]
    assert [p["text"] for p in parts[::2]] == ["Once upon a time", " and then"]
    generated = to_image(parts[1]["image_url"]["url"])
    assert generated.size == (64, 32)
    assert generated.getpixel((5, 5)) == colour_of(2)
    request = service.last
    assert isinstance(request, InterleaveRequest)
    assert (request.prompt, request.system, len(request.images)) == ("Go <image>", "Rhyme.", 1)
    assert (request.max_images, request.max_new_tokens, request.seed) == (4, 50, 2)
    assert (request.sampling.steps, request.sampling.guidance.text) == (3, 2.5)
    assert list(request.sizes) == [(64, 32)]


def test_an_answer_with_images_beside_a_string(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=user("Go"),
        extra_body=STORY | {"output_format": "jpeg"},
    )
    message: Any = answer.choices[0].message
    assert message.content == "Once upon a time and then"
    assert [i["text_offset"] for i in message.images] == [16, 25]
    assert message.images[0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert to_image(message.images[0]["image_url"]["url"]).format == "JPEG"


def test_a_streamed_answer_with_images(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=user("Go"), stream=True, extra_body=STORY | {"partial_images": 2}
    )
    deltas: list[Any] = [chunk.choices[0].delta for chunk in stream]
    previews = [d.image_preview for d in deltas if hasattr(d, "image_preview")]
    images = [i for d in deltas if hasattr(d, "images") for i in d.images]
    assert [(p["index"], p["step"], p["steps"]) for p in previews] == [
        (0, 1, 8),
        (0, 2, 8),
        (1, 1, 8),
        (1, 2, 8),
    ]
    assert to_image(previews[0]["image_url"]["url"]).size == (64, 32)
    assert [i["index"] for i in images] == [0, 1]
    assert to_image(images[1]["image_url"]["url"]).getpixel((0, 0)) == colour_of(2)
    assert "".join(d.content or "" for d in deltas) == "Once upon a time and then"
