"""Edits: a form with files or JSON with URLs, and URLs of images in every spelling."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, quote_from_bytes

import openai
import pytest
from fastapi.testclient import TestClient

from neounify.serve.http import HttpConfig, create_app
from neounify.tasks.chat import ChatRequest
from neounify.tasks.image import ImageRequest
from support.http_server import data_url, openai_client, png
from support.scripted_service import Scripted

EDIT, CHAT = "/v1/images/edits", "/v1/chat/completions"
RED, BLUE = png("red"), png("blue")
CODE = base64.b64encode(RED).decode()


@pytest.fixture
def service() -> Scripted:
    return Scripted()


@pytest.fixture
def client(service: Scripted) -> TestClient:
    return TestClient(create_app(service))


def colours(service: Scripted) -> list[Any]:
    assert isinstance(service.last, ImageRequest | ChatRequest)
    return [image.getpixel((0, 0)) for image in service.last.images]


@pytest.mark.parametrize(
    "images",
    [
        {"images": [{"image_url": data_url(RED)}, {"image_url": data_url(BLUE)}]},
        {"images": [data_url(RED), {"image_url": {"url": data_url(BLUE)}}]},
        {"image": [data_url(RED), data_url(BLUE)]},
        {"image_urls": [data_url(RED), {"url": data_url(BLUE)}]},
    ],
)
def test_json(client: TestClient, service: Scripted, images: dict[str, Any]) -> None:
    response = client.post(EDIT, json={"prompt": "Both.", "num_inference_steps": 2} | images)
    assert response.status_code == 200, response.text
    assert colours(service) == [(255, 0, 0), (0, 0, 255)]
    assert isinstance(service.last, ImageRequest)
    assert service.last.sampling.steps == 2
    assert service.last.sampling.guidance.editing


@pytest.mark.parametrize("name", ["image", "image_url", "images"])
def test_one_image_in_json(client: TestClient, service: Scripted, name: str) -> None:
    for value in (data_url(RED), {"image_url": data_url(RED)}):
        assert client.post(EDIT, json={"prompt": "x", name: value}).status_code == 200
        assert colours(service) == [(255, 0, 0)]


def test_json_is_streamed_too(client: TestClient) -> None:
    body = {"prompt": "x", "image": data_url(RED), "stream": True, "partial_images": 1}
    text = client.post(EDIT, json=body).text
    assert "event: image_edit.partial_image" in text
    assert "event: image_edit.completed" in text


def test_a_form_may_hold_urls(client: TestClient, service: Scripted) -> None:
    response = client.post(
        EDIT, data={"prompt": "x", "image": data_url(RED)}, files={"image[]": ("b.png", BLUE)}
    )
    assert response.status_code == 200, response.text
    assert colours(service) == [(255, 0, 0), (0, 0, 255)]


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"images": [{"image_url": data_url(RED)}, {"file_id": "f"}]}, "images.1", "file_id"),
        ({"image": data_url(RED), "images": [data_url(RED)]}, "images", "one of them"),
        ({"images": [data_url(b"no image")]}, "images.0", "not a picture|not an image"),
        ({}, "image", '"images"'),
        ({"image": data_url(RED), "mask": {"image_url": data_url(RED)}}, "mask", "not supported"),
        ({"image": data_url(RED), "size": "33x32"}, "size", "33x32"),
        ({"image": [data_url(RED)] * 17}, "image", "17 images"),
    ],
)
def test_bad_json(client: TestClient, body: dict[str, Any], param: str, says: str) -> None:
    response = client.post(EDIT, json={"prompt": "x"} | body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert any(one in error["message"] for one in says.split("|")), error["message"]


def test_another_content_type_gets_both_in_the_error(client: TestClient) -> None:
    response = client.post(EDIT, content=b"x", headers={"content-type": "text/plain"})
    message = response.json()["error"]["message"]
    assert response.status_code == 415
    assert "multipart/form-data" in message
    assert "application/json" in message


SPELLINGS = {
    "plain": data_url(RED),
    "no padding": data_url(RED).rstrip("="),
    "url-safe": data_url(RED).replace("+", "-").replace("/", "_").replace("image_png", "image/png"),
    "lines": "data:image/png;base64,\n" + "\r\n".join(CODE[n : n + 76] for n in range(0, 999, 76)),
    "spaces": f"  data:image/png;base64, {CODE} ",
    "no type": f"data:;base64,{CODE}",
    "no type at all": f"data:base64,{CODE}",
    "upper case": f"DATA:IMAGE/PNG;BASE64,{CODE}",
    "percent signs": f"data:image/png;base64,{quote(CODE, safe='')}",
    "parameters": f"data:image/png;charset=utf-8;base64,{CODE}",
    "octets": f"data:application/octet-stream;base64,{CODE}",
    "not marked": f"data:image/png,{CODE}",
    "not base64": f"data:image/png,{quote_from_bytes(RED)}",
    "another type": data_url(RED, "image/jpeg"),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_data_urls(client: TestClient, service: Scripted, name: str) -> None:
    url = SPELLINGS[name]
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
    response = client.post(CHAT, json={"messages": [{"role": "user", "content": content}]})
    assert response.status_code == 200, response.text
    assert colours(service) == [(255, 0, 0)]
    assert client.post(EDIT, json={"prompt": "x", "image": url}).status_code == 200
    assert colours(service) == [(255, 0, 0)]


def test_a_cut_off_data_url_says_so(client: TestClient) -> None:
    for url, says in ((data_url(RED)[:-3], "cut off"), (f"data:;base64,{CODE}é", "'é'")):
        response = client.post(EDIT, json={"prompt": "x", "image": url})
        assert response.status_code == 400
        assert says in response.json()["error"]["message"] or "damaged" in response.text


def test_a_result_of_the_server_is_an_image_of_the_next_request(
    client: TestClient, service: Scripted
) -> None:
    body = {"prompt": "x", "seed": 4, "response_format": "url"}
    url = client.post("/v1/images/generations", json=body).json()["data"][0]["url"]
    generated = client.get(url).content
    for image in (
        url,
        url.replace("testserver", "elsewhere.example"),
        url[len("http://testserver") :],
    ):
        assert client.post(EDIT, json={"prompt": "x", "image": image}).status_code == 200
        client.post(EDIT, json={"prompt": "x", "image": data_url(generated)})
        once, again = service.requests[-2:]
        assert isinstance(once, ImageRequest)
        assert isinstance(again, ImageRequest)
        assert once.images[0].tobytes() == again.images[0].tobytes()
    gone = client.post(EDIT, json={"prompt": "x", "image": url[:-10] + "aaaaaa.png"})
    assert gone.status_code == 400
    assert "no longer kept" in gone.json()["error"]["message"]


def test_results_of_others_are_fetched_only_from_allowed_hosts() -> None:
    app = create_app(Scripted(), HttpConfig(remote_hosts=("images.example",)))
    url = "http://127.0.0.1:9/v1/results/" + "a" * 43 + ".png"
    response = TestClient(app).post(EDIT, json={"prompt": "x", "image": url})
    assert response.status_code == 400
    assert "no longer kept" not in response.json()["error"]["message"]


@pytest.fixture(scope="module")
def openai_sdk() -> Iterator[openai.OpenAI]:
    with openai_client(create_app(Scripted())) as client:
        yield client


def test_usage_is_whole(openai_sdk: openai.OpenAI) -> None:
    generated = openai_sdk.images.generate(prompt="x", n=2, size="64x64").usage
    edited = openai_sdk.images.edit(prompt="x", image=("a.png", RED)).usage
    assert generated is not None
    assert edited is not None
    for usage, shown, images in ((generated, 0, 2), (edited, 12, 1)):
        assert usage.input_tokens_details.image_tokens == shown
        assert usage.input_tokens_details.text_tokens == usage.input_tokens - shown == 20
        assert usage.output_tokens == 16 * images
        assert usage.output_tokens_details is not None
        assert usage.output_tokens_details.image_tokens == 16 * images
        assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    stream = openai_sdk.images.edit(prompt="x", image=("a.png", RED), stream=True)
    *_, last = stream
    assert last.type == "image_edit.completed"
    assert last.usage.input_tokens_details.image_tokens == 12
