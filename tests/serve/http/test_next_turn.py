"""Conversations continue: an answer with images is sent back as it came, and the model sees it."""

from __future__ import annotations

import functools
import re
from typing import Any

import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient
from numpy.typing import NDArray

from neounify.serve.http import create_app
from neounify.tasks.chat import ChatRequest
from neounify.tasks.interleave import InterleaveRequest
from support.http_server import data_url, openai_client, png, to_image
from support.scripted_service import Scripted

CHAT = "/v1/chat/completions"
STORY = (
    "Tell a story in two pictures. It starts with a red circle in the top left on a white "
    "background. Draw a blue star in the bottom right."
)
NEXT = (
    "Tell a story in two pictures. It starts with a green square in the top left on a black "
    "background. The square turns red."
)
"""Another request: the model has not learned conversations, and answers some with text alone."""
IMAGE_FIELDS: dict[str, Any] = {
    "modalities": ["text", "image"],
    "max_images": 1,
    "max_tokens": 40,
    "steps": 8,
    "seed": 1,
    "content_format": "parts",
}
ASK = "What colour is the circle?"


@functools.cache
def tell(client: openai.OpenAI, form: str) -> Any:
    """The story in that form: each is asked for once."""
    return (
        client.chat.completions.create(
            model="",
            messages=[{"role": "user", "content": STORY}],
            extra_body=IMAGE_FIELDS | {"content_format": form},
        )
        .choices[0]
        .message
    )


def ask(client: openai.OpenAI, answer: Any, question: str = ASK, **options: Any) -> Any:
    asked = {"role": "user", "content": question}
    turns: Any = [{"role": "user", "content": STORY}, answer, asked]
    body = {"max_tokens": 8} | options
    answered = client.chat.completions.create(model="", messages=turns, extra_body=body)
    return answered.choices[0].message.content


@functools.cache
def green_circle(client: openai.OpenAI) -> str:
    """The URL of a result."""
    answer = client.images.generate(
        prompt="a green circle", response_format="url", extra_body={"seed": 2, "steps": 16}
    )
    assert answer.data is not None
    assert answer.data[0].url is not None
    return answer.data[0].url


# OpenAI's schema has a string as content, so its objects warn of parts.
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("form", ["parts", "string", "markdown"])
def test_the_model_sees_its_own_image(bundled_client: openai.OpenAI, form: str) -> None:
    answer = tell(bundled_client, form)
    for sent in (answer, answer.model_dump()):
        assert ask(bundled_client, sent) == "red"


def test_the_model_sees_another_image_in_its_place(bundled_client: openai.OpenAI) -> None:
    name = green_circle(bundled_client).rpartition("/")[2]
    circle = bundled_client.get(f"/results/{name}", cast_to=openai.HttpxBinaryResponseContent)
    url = data_url(circle.content)
    parts = tell(bundled_client, "parts").content
    texts = [part for part in parts if part["type"] == "text"]
    other = [*texts[:1], {"type": "image_url", "image_url": {"url": url}}]
    assert ask(bundled_client, {"role": "assistant", "content": other}) == "green"
    first, second, again = (
        pixels(ask(bundled_client, {"role": "assistant", "content": content}, NEXT, **IMAGE_FIELDS))
        for content in (parts, other, parts)
    )
    # Beside other requests an image may differ by the rounding of a sum.
    assert np.abs(first - again).max() <= 2
    assert np.abs(first - second).max() > 20


def test_the_model_sees_a_result_by_its_url(bundled_client: openai.OpenAI) -> None:
    text = f"Here it is: ![a circle]({green_circle(bundled_client)})"
    answer = {"role": "assistant", "content": text}
    assert ask(bundled_client, answer) == "green"


def pixels(parts: Any) -> NDArray[np.int16]:
    """Of the only image of an answer."""
    [image] = [part for part in parts if part["type"] == "image_url"]
    return np.asarray(to_image(image["image_url"]["url"]), dtype=np.int16)


def test_a_streamed_story_in_markdown_is_the_whole_one(bundled_client: openai.OpenAI) -> None:
    stream: Any = bundled_client.chat.completions.create(
        model="",
        messages=[{"role": "user", "content": STORY}],
        stream=True,
        stream_options={"include_usage": True},
        extra_body=IMAGE_FIELDS | {"content_format": "markdown"},
    )
    chunks = list(stream)
    joined = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    match = re.fullmatch(r"([^!]*)!\[image\]\(([^)]*)\)([^!]*)", joined)
    assert match is not None
    whole = tell(bundled_client, "parts").content
    texts = [text for text in (match[1], match[3]) if text]
    assert texts == [part["text"] for part in whole if part["type"] == "text"]
    streamed = np.asarray(to_image(match[2]), dtype=np.int16)
    assert np.abs(streamed - pixels(whole)).max() <= 2
    details = chunks[-1].usage.completion_tokens_details
    assert details.image_tokens == 16
    assert details.reasoning_tokens == 0


# --- without a model ---

RED, BLUE = data_url(png("red")), data_url(png("blue"))


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


class Served:
    def __init__(self) -> None:
        self.service = Scripted()
        self.client = TestClient(create_app(self.service))

    def post(self, *messages: Any, **fields: Any) -> Any:
        return self.client.post(CHAT, json={"messages": list(messages)} | fields)

    def turns(self, *messages: Any) -> tuple[list[tuple[str, list[str]]], list[Any]]:
        """(role, texts around the images) of the messages that arrived, and the colours."""
        response = self.post(*messages)
        assert response.status_code == 200, response.text
        request = self.service.last
        assert isinstance(request, ChatRequest)
        seen: list[tuple[str, list[str]]] = [
            (message.role, message.pieces) for message in request.messages
        ]
        return seen, [shown.getpixel((0, 0)) for shown in request.images]


@pytest.fixture
def served() -> Served:
    return Served()


USER: Any = {"role": "user", "content": "?"}


@pytest.mark.parametrize(
    "answer",
    [
        {"content": [{"type": "text", "text": "One"}, image(RED), image(BLUE)]},
        {
            "content": "One",
            "images": [
                {"type": "image_url", "index": 1, "image_url": {"url": BLUE}, "text_offset": 3},
                {"image_url": {"url": RED}, "text_offset": 1},
            ],
        },
        {"content": "One", "images": [image(RED), image(BLUE)]},
        {"content": f"One![image]({RED})![]( {BLUE} )"},
        {"content": [{"type": "text", "text": f"One![image]({RED})![]({BLUE})"}]},
        {"content": [{"type": "output_text", "text": "One"}, image(RED)], "images": None}
        | {"content": ["One", image(RED), {"type": "image", "image": BLUE}]},
    ],
)
def test_forms_of_an_answer(served: Served, answer: dict[str, Any]) -> None:
    seen, colours = served.turns(USER, {"role": "assistant"} | answer, USER)
    role, pieces = seen[1]
    assert (role, "".join(pieces)) == ("assistant", "One")
    assert len(pieces) == 3
    assert colours == [(255, 0, 0), (0, 0, 255)]


def test_what_looks_like_an_image_but_is_none_stays_text(served: Served) -> None:
    text = "![logo](https://example.com/a.png) and <img> and <image>"
    seen, colours = served.turns(USER, {"role": "assistant", "content": text}, USER)
    assert seen[1] == ("assistant", [text])
    assert colours == []
    written = f"![mine]({RED})"
    seen, colours = served.turns({"role": "user", "content": written})
    assert seen == [("user", [written])]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "input_text", "text": "Hello"},
        {"type": "output_text", "text": "Hello", "annotations": []},
        {"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}},
        "Hello",
    ],
)
def test_spellings_of_text(served: Served, part: Any) -> None:
    assert served.turns({"role": "user", "content": [part]}) == ([("user", ["Hello"])], [])


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": RED, "detail": "high"}},
        {"type": "image_url", "image_url": RED},
        {"type": "input_image", "image_url": RED, "detail": "auto"},
        {"type": "image", "image": RED},
        {"type": "image", "url": RED},
    ],
)
def test_spellings_of_images(served: Served, part: Any) -> None:
    seen, colours = served.turns({"role": "user", "content": [part, "What?"]})
    assert seen == [("user", ["", "\nWhat?"])]
    assert colours == [(255, 0, 0)]


@pytest.mark.parametrize(
    "roles",
    ["ssu", "uasu", "uu", "au", "ua", "u", "sau", "us", "s"],
)
def test_turns_stand_where_they_came(served: Served, roles: str) -> None:
    names = {"s": "system", "u": "user", "a": "assistant"}
    turns = [{"role": names[r], "content": f"{r}{n}"} for n, r in enumerate(roles)]
    seen, _ = served.turns(*turns)
    assert seen == [(turn["role"], [turn["content"]]) for turn in turns]


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "user", "content": ""},
        {"role": "user", "content": []},
        {"role": "user", "content": None},
        {"role": "user", "content": "Hello", "name": "bob"},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "annotations": []},
    ],
)
def test_turns_with_little_or_more_in_them(served: Served, turn: dict[str, Any]) -> None:
    seen, _ = served.turns(turn, USER)
    assert seen[0] == (turn["role"], [turn["content"] or ""])


@pytest.mark.parametrize(
    ("messages", "fields", "param", "says"),
    [
        ([{"role": "system", "content": [image(RED)]}, USER], {}, "messages.0.content", "system"),
        ([{"role": "developer", "content": [image(RED)]}], {}, "messages.0.content", "developer"),
        ([USER | {"images": [image(RED)]}], {}, "messages.0.images", "into its content"),
        (
            [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}],
            {},
            "messages.0.content.0",
            "keeps no files",
        ),
        ([USER, {"role": "assistant", "content": f"![]({RED[:80]})"}], {}, "messages.1", "image"),
        (
            [USER, {"role": "assistant", "content": "It"}],
            {"modalities": ["text", "image"]},
            "m",
            "last",
        ),
    ],
)
def test_what_is_out_of_place(
    served: Served, messages: list[Any], fields: dict[str, Any], param: str, says: str
) -> None:
    response = served.post(*messages, **fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"].startswith(param)
    assert says in error["message"]


def test_images_of_answers_count_towards_the_limit(served: Served) -> None:
    answer = {"role": "assistant", "content": f"![]({RED})" * 17}
    response = served.post(USER, answer, USER)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages")


def test_a_story_with_a_history(served: Served) -> None:
    turns = [
        {"role": "system", "content": "Rhyme."},
        {"role": "user", "content": [image(BLUE), "Tell"]},
        {"role": "assistant", "content": ["Once", image(RED), " more"]},
        {"role": "user", "content": [image(data_url(png((0, 255, 0), (64, 32)))), "Go on"]},
    ]
    response = served.post(*turns, modalities=["text", "image"])
    assert response.status_code == 200, response.text
    request = served.service.last
    assert isinstance(request, InterleaveRequest)
    assert (request.system, request.prompt) == ("Rhyme.", "<image>\nGo on")
    assert [m.pieces for m in request.history] == [["", "\nTell"], ["Once", " more"]]
    colours = [shown.getpixel((0, 0)) for shown in request.images]
    assert colours == [(0, 0, 255), (255, 0, 0), (0, 255, 0)]
    assert request.prompt_images == 1
    assert request.sizes[0][0] > request.sizes[0][1]


def test_markdown_is_searched_in_linear_time(served: Served) -> None:
    for text in ("![" * 40_000, "![](" * 24_000, "![](data:image/" * 6_000):
        seen, _ = served.turns(USER, {"role": "assistant", "content": text}, USER)
        assert seen[1] == ("assistant", [text])


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_the_clients_own_objects_go_back() -> None:
    service = Scripted()
    with openai_client(create_app(service)) as client:
        fields = {"modalities": ["text", "image"], "size": "64x32", "seed": 2}
        for form in ("parts", "string", "markdown"):
            answer = client.chat.completions.create(
                model="",
                messages=[USER],
                extra_body=fields | {"content_format": form},
            )
            message: Any = answer.choices[0].message
            for sent in (message, message.model_dump(), message.to_dict()):
                client.chat.completions.create(model="", messages=[USER, sent, USER])
                request = service.last
                assert isinstance(request, ChatRequest)
                assert request.messages[1].pieces == ["Once upon a time", " and then", ""]
                assert len(request.images) == 2
