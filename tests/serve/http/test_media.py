"""The store of finished images."""

from __future__ import annotations

import pytest
from fastapi.testclient import TestClient

from neounify.errors import RequestError
from neounify.serve.http import HttpConfig, create_app
from neounify.serve.http.media import ResultStore
from support.scripted_service import Scripted


def test_results_expire() -> None:
    now = [0.0]
    store = ResultStore(100, 60, lambda: now[0])
    name = store.put(b"abc", "image/png", "png")
    result = store.get(name)
    assert result is not None
    assert (result.data, store.seconds_left(result)) == (b"abc", 60)
    now[0] = 60
    assert store.get(name) is None


def test_the_oldest_make_room() -> None:
    store = ResultStore(10, 60)
    names = [store.put(bytes(4), "image/png", "png") for _ in range(3)]
    assert [store.get(name) is not None for name in names] == [False, True, True]
    assert len(set(names)) == 3
    with pytest.raises(RequestError, match="b64_json"):
        store.put(bytes(11), "image/png", "png")


def test_urls_begin_as_the_operator_says() -> None:
    settings = HttpConfig(public_url="https://paint.example/api/", keys={"ann": "1"})
    client = TestClient(create_app(Scripted(), settings))
    body = {"prompt": "a boat", "response_format": "url"}
    answer = client.post("/v1/images/generations", json=body, headers={"authorization": "Bearer 1"})
    url = answer.json()["data"][0]["url"]
    assert url.startswith("https://paint.example/api/v1/results/")
    fetched = client.get(url.removeprefix("https://paint.example/api"))
    assert fetched.status_code == 200
    assert fetched.headers["x-content-type-options"] == "nosniff"
    assert fetched.headers["cache-control"].startswith("private, max-age=")


def test_a_server_without_results_says_so_before_it_generates() -> None:
    service = Scripted()
    client = TestClient(create_app(service, HttpConfig(result_urls=False)))
    body = {"prompt": "a boat", "response_format": "url"}
    answer = client.post("/v1/images/generations", json=body)
    assert answer.status_code == 400
    assert "ask for b64_json" in answer.json()["error"]["message"]
    assert not service.requests
