"""Answers are as the API's description says."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import BaseModel

from neounify.serve.http import create_app
from neounify.serve.http.app import Health, ModelCard, ModelList
from neounify.serve.http.chat_schema import ChatCompletion
from neounify.serve.http.images import Images
from support.scripted_service import Scripted

CHAT, GENERATIONS = "/v1/chat/completions", "/v1/images/generations"
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
STORY = HELLO | {"modalities": ["text", "image"], "size": "64x64"}
STAR = {"prompt": "a star", "size": "64x64"}


@pytest.fixture
def client() -> TestClient:
    return TestClient(create_app(Scripted()))


@pytest.mark.parametrize(
    ("path", "body", "schema"),
    [
        (CHAT, HELLO, ChatCompletion),
        (CHAT, HELLO | {"think": True}, ChatCompletion),
        (CHAT, STORY | {"content_format": "parts"}, ChatCompletion),
        (CHAT, STORY | {"content_format": "string"}, ChatCompletion),
        (GENERATIONS, STAR | {"n": 2}, Images),
        (GENERATIONS, STAR | {"think": True, "response_format": "url"}, Images),
    ],
)
def test_posts(
    client: TestClient, path: str, body: dict[str, Any], schema: type[BaseModel]
) -> None:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    schema.model_validate(response.json())


@pytest.mark.parametrize(
    ("path", "schema"),
    [("/v1/models", ModelList), ("/v1/models/neounify", ModelCard), ("/health", Health)],
)
def test_gets(client: TestClient, path: str, schema: type[BaseModel]) -> None:
    response = client.get(path)
    assert response.status_code == 200, response.text
    schema.model_validate(response.json())


def test_every_route_says_what_it_gives(client: TestClient) -> None:
    api = client.get("/openapi.json").json()
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            content = operation["responses"]["200"].get("content")
            assert content, f"{method} {path}"
            schema = content.get("application/json", {"schema": {"$ref": ""}})["schema"]
            assert schema, f"{method} {path}"
