"""Image generation and editing through OpenAI's client."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient

from neounify.config.presets import TINY
from neounify.provenance.metadata import read_provenance
from neounify.serve.http import HttpConfig, create_app
from neounify.serve.service import ServiceRequest
from neounify.tasks.image import ImageRequest
from support.http_server import openai_client, png, to_image
from support.scripted_service import Scripted, colour_of, plain

STEPS = TINY.sampling.steps


@pytest.fixture(scope="module")
def service() -> Scripted:
    return Scripted()


@pytest.fixture(scope="module")
def client(service: Scripted) -> Iterator[openai.OpenAI]:
    with openai_client(create_app(service)) as client:
        yield client


def generated(service: Scripted, number: int = -1) -> ImageRequest:
    request = service.requests[number]
    assert isinstance(request, ImageRequest)
    return request


def test_images_of_one_prompt_have_seeds_in_turn(client: openai.OpenAI, service: Scripted) -> None:
    answer = client.images.generate(
        prompt="a boat",
        n=3,
        size="64x32",
        extra_body={"seed": 7},
    )
    assert answer.data is not None
    assert [entry.seed for entry in answer.data] == [7, 8, 9]  # type: ignore[attr-defined]
    for entry in answer.data:
        assert entry.b64_json is not None
        image = to_image(entry.b64_json)
        assert (image.format, image.size) == ("PNG", (64, 32))
        assert image.getpixel((0, 0)) == colour_of(entry.seed)  # type: ignore[attr-defined]
    request = generated(service)
    assert (request.prompt, request.count, request.seeds) == ("a boat", 3, (7, 8, 9))
    files = [base64.b64decode(entry.b64_json or "") for entry in answer.data]
    written = [read_provenance(file) for file in files]
    # Each is the first image of its own seed, with which it can be generated again.
    assert [(one["seed"], one["index"]) for one in written] == [(7, 0), (8, 0), (9, 0)]
    assert answer.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (20, 48)


@pytest.mark.parametrize(
    ("asked", "steps"),
    [
        ({}, STEPS),
        ({"quality": "low"}, STEPS // 4),
        ({"quality": "medium"}, STEPS // 2),
        ({"quality": "high"}, STEPS),
        ({"quality": "low", "steps": 5}, 5),
    ],
)
def test_quality_is_a_share_of_the_steps(
    client: openai.OpenAI, service: Scripted, asked: dict[str, Any], steps: int
) -> None:
    client.images.generate(prompt="a boat", extra_body=asked)
    assert generated(service).sampling.steps == steps


def test_every_extension_arrives(client: openai.OpenAI, service: Scripted) -> None:
    client.images.generate(
        prompt="a boat",
        size="auto",
        extra_body={
            "guidance": 3.5,
            "image_guidance": 1.5,
            "shift": 2.0,
            "guidance_norm": "global",
            "guidance_interval": [0.1, 0.9],
            "solver": "ab2",
            "t_eps": 0.01,
            "think": True,
        },
    )
    request = generated(service)
    guidance = request.sampling.guidance
    assert (guidance.text, guidance.image, guidance.norm) == (3.5, 1.5, "global")
    assert guidance.interval == (0.1, 0.9)
    assert (request.sampling.shift, request.sampling.solver) == (2.0, "ab2")
    assert request.sampling.t_eps == 0.01
    assert not guidance.published_interval
    assert request.think
    assert (request.width, request.height) == TINY.sampling.image_size


def test_a_thought_is_given_back(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a boat", extra_body={"think": True})
    assert answer.data is not None
    assert answer.data[0].reasoning_content == "A plan."  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_other_formats_behind_a_url(client: openai.OpenAI, kind: Any) -> None:
    answer = client.images.generate(prompt="a boat", response_format="url", output_format=kind)
    assert answer.data is not None
    url = answer.data[0].url
    assert url is not None
    name = url.rpartition("/")[2]
    assert url == f"{client.base_url}results/{name}"
    assert len(name) > 40
    response = client.get(f"/results/{name}", cast_to=openai.HttpxBinaryResponseContent)
    assert response.response.headers["content-type"] == f"image/{kind}"
    assert to_image(response.content).format == kind.upper()


def test_partial_images_are_streamed(client: openai.OpenAI) -> None:
    stream = client.images.generate(
        prompt="a boat", stream=True, partial_images=2, size="64x64", extra_body={"seed": 1}
    )
    events: list[Any] = list(stream)
    partial, completed = "image_generation.partial_image", "image_generation.completed"
    assert [e.type for e in events] == [partial, partial, completed]
    assert [e.partial_image_index for e in events[:2]] == [0, 1]
    assert all(to_image(e.b64_json).size == (64, 64) for e in events)
    assert to_image(events[-1].b64_json).getpixel((0, 0)) == colour_of(1)
    assert (events[-1].size, events[-1].quality) == ("64x64", "auto")
    assert events[-1].usage.output_tokens == 16


def test_without_a_stream_no_previews_are_generated() -> None:
    asked: list[int] = []

    def script(request: ServiceRequest, previews: int) -> list[Any]:
        asked.append(previews)
        return plain(request, previews)

    client = TestClient(create_app(Scripted(script)))
    for stream in (False, True):
        body = {"prompt": "a boat", "partial_images": 3, "stream": stream}
        assert client.post("/v1/images/generations", json=body).status_code == 200
    assert asked == [0, 3]


def test_several_images_are_streamed_side_by_side(client: openai.OpenAI) -> None:
    stream = client.images.generate(
        prompt="a boat", n=3, stream=True, partial_images=1, extra_body={"seed": 1}
    )
    events: list[Any] = list(stream)
    completed = [e for e in events if e.type == "image_generation.completed"]
    assert sorted(e.index for e in completed) == [0, 1, 2]
    for event in completed:
        assert event.seed == 1 + event.index
        assert to_image(event.b64_json).getpixel((0, 0)) == colour_of(event.seed)


def test_the_last_seed_is_followed_by_the_first(client: openai.OpenAI) -> None:
    """As in chat: docs/serving-api.md names the rule once for both."""
    answer = client.images.generate(prompt="a boat", n=3, extra_body={"seed": 2**64 - 2})
    assert answer.data is not None
    seeds = [image.seed for image in answer.data]  # type: ignore[attr-defined]
    assert seeds == [2**64 - 2, 2**64 - 1, 0]


def test_an_edit(client: openai.OpenAI, service: Scripted) -> None:
    answer = client.images.edit(
        prompt="Make it blue.",
        image=("in.png", png("red", (64, 32))),
        extra_body={
            "image_guidance": 1.5,
            "guidance_interval": [0.0, 0.5],
            "published_interval": True,
            "seed": 4,
        },
    )
    request = generated(service)
    assert [i.getpixel((0, 0)) for i in request.images] == [(255, 0, 0)]
    assert request.sampling.guidance.editing
    assert request.sampling.guidance.image == 1.5
    assert request.sampling.guidance.interval == (0.0, 0.5)
    assert request.sampling.guidance.published_interval
    assert request.width > request.height
    assert answer.data is not None
    assert answer.data[0].b64_json is not None
    assert to_image(answer.data[0].b64_json).getpixel((0, 0)) == colour_of(4)


def test_an_edit_of_several_images_is_streamed(client: openai.OpenAI, service: Scripted) -> None:
    files = [("a.png", png("red")), ("b.jpg", png("blue", kind="jpeg"))]
    stream = client.images.edit(
        prompt="Both.",
        image=files,
        size="32x32",
        stream=True,
        partial_images=1,
    )
    events: list[Any] = list(stream)
    assert [e.type for e in events] == ["image_edit.partial_image", "image_edit.completed"]
    assert base64.b64decode(events[-1].b64_json)
    reds = [i.getpixel((0, 0)) for i in generated(service).images]
    assert len(reds) == 2
    assert reds[0] == (255, 0, 0)


def test_a_seed_is_reported_where_none_was_given(client: openai.OpenAI, service: Scripted) -> None:
    answer = client.images.generate(prompt="a boat")
    assert answer.data is not None
    assert answer.data[0].seed == generated(service).seed  # type: ignore[attr-defined]


@pytest.mark.parametrize("are_written", [False, True])
@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_prompts_are_metadata_only_where_the_operator_wants_them(
    are_written: bool, kind: str
) -> None:
    client = TestClient(create_app(Scripted(), HttpConfig(metadata_prompts=are_written)))
    long = '"<&☃>' * 1000
    for negative, text in (("blurry", "blurry"), (long, long[:4000])):
        body = {"prompt": long, "negative_prompt": negative, "output_format": kind, "seed": 3}
        answer = client.post("/v1/images/generations", json=body)
        assert answer.status_code == 200, answer.text
        file = base64.b64decode(answer.json()["data"][0]["b64_json"])
        metadata = read_provenance(file)
        assert metadata["seed"] == 3
        assert metadata.get("prompt") == (long[:4000] if are_written else None)
        assert metadata["negative_prompt"] == (text if are_written else "given")
    answer = client.post("/v1/images/generations", json={"prompt": "x"})
    assert "negative_prompt" not in read_provenance(
        base64.b64decode(answer.json()["data"][0]["b64_json"])
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_size_the_model_was_not_trained_at_is_a_header(stream: bool) -> None:
    sampling = dataclasses.replace(TINY.sampling, trained_sizes=((64, 64),))
    service = Scripted(config=TINY.replace(sampling=sampling))
    with openai_client(create_app(service)) as client:
        raw = client.images.with_raw_response
        fine = raw.generate(prompt="a boat", size="64x64")
        assert "neounify-warning" not in fine.headers
        odd = raw.generate(prompt="a boat", size="96x64", extra_body={"stream": stream})
        assert "the model was trained at 64x64 only" in odd.headers["neounify-warning"]
        known = client.models.list().data[0].neounify  # type: ignore[attr-defined]
        assert known["trained_sizes"] == ["64x64"]
        assert known["trained_pixels"] is None


def test_fewer_steps_by_name(client: openai.OpenAI, service: Scripted) -> None:
    for fast, steps in (("half", STEPS / 2), ("third", round(0.3 * STEPS))):
        client.images.generate(prompt="x", extra_body={"fast": fast})
        assert generated(service).sampling.steps == steps
    for beside in ({"steps": 4}, {"quality": "low"}):
        with pytest.raises(openai.BadRequestError, match="sets the number of steps") as refused:
            client.images.generate(prompt="x", extra_body={"fast": "half"} | beside)
        assert refused.value.param == "fast"


def test_answers_and_files_say_what_was_spent(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="x")
    assert answer.data is not None
    [image] = answer.data
    assert image.model_extra is not None
    assert image.model_extra["evaluations"] == 16
    assert read_provenance(base64.b64decode(image.b64_json or ""))["evaluations"] == "16"
