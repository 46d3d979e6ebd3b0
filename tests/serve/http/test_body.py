"""JSON bodies: their content type, their encoding, and how much they may hold."""

from __future__ import annotations

import json
import time
from typing import Any

import openai
import pytest
from fastapi.testclient import TestClient

from neounify.serve.http import HttpConfig, Limits, create_app
from neounify.serve.http.connections import parse_body
from neounify.tasks.program import Finished, TextPiece
from support.http_server import openai_client, wait_until
from support.scripted_service import Scripted

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello?"}]}
TEXT = json.dumps(BODY).encode()
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(create_app(Scripted()), raise_server_exceptions=False)


@pytest.mark.parametrize(
    "kind", ["application/json", "application/json; charset=utf-8", "APPLICATION/vnd.x+json", None]
)
def test_content_types_of_json(client: TestClient, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    assert client.post(CHAT, content=TEXT, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "kind", ["application/x-www-form-urlencoded", "text/plain", "multipart/form-data", "x" * 5000]
)
def test_other_content_types_name_the_right_one(client: TestClient, kind: str) -> None:
    response = client.post(CHAT, content=TEXT, headers={"content-type": kind})
    assert response.status_code == 415
    assert "send Content-Type: application/json" in response.json()["error"]["message"]
    assert len(response.text) < 500


def test_a_byte_order_mark_is_passed_over(client: TestClient) -> None:
    response = client.post(CHAT, content=b"\xef\xbb\xbf" + TEXT, headers=JSON)
    assert response.status_code == 200


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        (b"{", "not JSON"),
        (b"{'messages': []}", "not JSON"),
        (TEXT + b"x", "not JSON"),
        (b"[1]", "valid dictionary"),
        (b'"text"', "valid dictionary"),
        (b'{"messages": NaN}', "not JSON"),
        (b'{"seed": 1' + b"0" * 100_000 + b"}", "not JSON"),
        (b'{"messages": "\\ud83d"}', "half of a surrogate pair"),
        (b'{"messages": "\xff"}', "not UTF-8"),
        (TEXT.decode().encode("utf-16"), "not JSON"),
        (b"[" * 100_000, "deep"),
        (b'{"a":' * 70 + b"1" + b"}" * 70, "deep"),
        (b"[" + b"0," * 70_000 + b"0]", "more than 20000 values"),
        (b"[" + b"{}," * 400_000 + b"0]", "more than 20000 values"),
        (b"[" + b"," * 400_000 + b"]", "more than 20000 values"),
    ],
    ids=lambda value: str(value[:24]),
)
def test_bodies_that_are_refused(client: TestClient, body: bytes, message: str) -> None:
    response = client.post(CHAT, content=body, headers=JSON)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert len(response.text) < 1500


@pytest.mark.parametrize(
    "field",
    [
        b'"seed": 1e400',
        b'"temperature": 1e400',
        b'"temperature": ' + b"9" * 4000,
        b'"stop": "' + b"x" * 5000 + b'"',
        b'"' + b"k" * 100_000 + b'": 1',
        b'"model": "' + b"m" * 100_000 + b'"',
    ],
    ids=lambda value: str(value[:24]),
)
def test_values_out_of_range_are_refused_in_few_words(client: TestClient, field: bytes) -> None:
    response = client.post(CHAT, content=TEXT[:-1] + b", " + field + b"}", headers=JSON)
    assert response.status_code in (400, 404)
    assert len(response.text) < 1500


def test_harmless_oddities(client: TestClient) -> None:
    for body in (
        b'{"messages": 1, ' + TEXT[1:],  # the last of two equal keys counts
        TEXT.replace(b"Hello?", b"\\ud83d\\ude00"),
        TEXT[:-1] + b', "metadata": {"a": ' + b"[" * 50 + b"]" * 50 + b"}}",
    ):
        assert client.post(CHAT, content=body, headers=JSON).status_code == 200


def test_as_many_values_as_allowed_are_read() -> None:
    limits = Limits(json_values=1000, json_depth=3)
    assert parse_body([b"[", b"1," * 998 + b"1]"], limits) == [1] * 999
    assert parse_body([b'{"a": [1]}'], limits) == {"a": [1]}


@pytest.mark.parametrize("character", ["\\ud83d\\ude00", "\U0001f600", "\\u0041", '\\"'])
def test_long_strings_are_ascii_without_escapes(client: TestClient, character: str) -> None:
    """One emoji would make each of their characters take four bytes."""
    body = TEXT[:-1] + b', "user": "' + b"x" * 9 * 2**20
    assert client.post(CHAT, content=body + b'"}', headers=JSON).status_code == 200
    body += character.encode() + b"x" * 9 * 2**20 + b'"}'
    response = client.post(CHAT, content=body, headers=JSON)
    assert response.status_code == 400
    assert "only data URLs" in response.json()["error"]["message"]


def test_a_million_keys_cost_no_time(client: TestClient) -> None:
    body = b"{" + b",".join(b'"k%d":1' % n for n in range(1_000_000)) + b"," + TEXT[1:]
    before = time.process_time()
    response = client.post(CHAT, content=body, headers=JSON)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "request_too_complex"
    assert time.process_time() - before < 2


def test_bodies_of_all_requests_together_are_bounded() -> None:
    """They count until their request has been answered."""
    limits = Limits(body_bytes=1000, uploads_bytes=1500)
    service = Scripted(lambda _, __: [TextPiece("One"), 60.0, Finished("stop", 1, 2)])
    padding = {"metadata": {"x": "y" * 800}}
    app = create_app(service, HttpConfig(limits=limits))
    with openai_client(app) as client:

        def stream() -> Any:
            return client.chat.completions.create(
                model="", stream=True, messages=BODY["messages"], extra_body=padding
            )

        for _ in range(3):
            first = stream()
            next(first)
            with pytest.raises(openai.RateLimitError, match="all requests together"):
                stream()
            first.close()
            wait_until(lambda: service.open == 0)
