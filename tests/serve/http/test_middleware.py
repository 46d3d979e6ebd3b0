"""Keys, rates, body limits, and callers who leave."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from fastapi.testclient import TestClient

from neounify.errors import ConfigError
from neounify.runtime import MemoryReturner
from neounify.serve.http import HttpConfig, Limits, create_app, parse_keys
from neounify.serve.http.middleware import TokenBucket
from neounify.serve.service import ServiceRequest
from neounify.tasks.program import Finished, TaskEvent, TextPiece
from support.http_server import openai_client, running, wait_until
from support.scripted_service import Scripted

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello?"}]}


def slow(_: ServiceRequest, __: int) -> Sequence[TaskEvent | float]:
    """One word at once, the next after a minute."""
    return [TextPiece("One"), 60.0, TextPiece("two"), Finished("stop", 1, 2)]


def mute(_: ServiceRequest, __: int) -> Sequence[TaskEvent | float]:
    return [60.0, Finished("stop", 1, 2)]


def test_keys_are_asked_for_on_the_api_only() -> None:
    config = HttpConfig(keys={"ann": "secret-1", "bob": "secret-2"})
    client = TestClient(create_app(Scripted(), config))
    for header in ({}, {"authorization": "Basic secret-1"}, {"authorization": "Bearer "}):
        response = client.post(CHAT, json=BODY, headers=header)
        assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
        assert response.json()["error"]["code"] == "missing_api_key"
    for key in ("secret-", "secret-3", "ann", "sécret"):
        headers = {"authorization": f"Bearer {key}".encode()}
        assert client.post(CHAT, json=BODY, headers=headers).status_code == 401  # type: ignore[arg-type]
    for key in ("secret-1", "secret-2"):
        headers = {"authorization": f"Bearer {key}".encode()}
        assert client.post(CHAT, json=BODY, headers=headers).status_code == 200  # type: ignore[arg-type]
    for path in ("/health", "/metrics", "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200
    assert client.get("/v1/results/x.png").status_code == 404
    assert client.get("/v1/models").status_code == 401
    assert "secret" not in repr(config)


def test_the_openai_client_sends_its_key() -> None:
    app = create_app(Scripted(), HttpConfig(keys={"ann": "secret"}))
    with openai_client(app, "secret") as client:
        assert client.models.list().data
        with pytest.raises(openai.AuthenticationError, match="not known"):
            client.with_options(api_key="wrong").models.list()


def test_keys_from_text() -> None:
    text = "ann:one\n# bob:zero\n\n bob : two ,three\n"
    assert parse_keys(text) == {"ann": "one", "bob": "two", "key-3": "three"}
    for wrong in ("ann:", ":one", "ann:one,ann:two", "ann:one,bob:one"):
        with pytest.raises(ConfigError):
            parse_keys(wrong)


def test_a_bucket_refills() -> None:
    now = [0.0]
    bucket = TokenBucket(2, lambda: now[0])
    assert [bucket.take() for _ in range(3)] == [0, 0, 30]
    now[0] = 29
    assert bucket.take() == pytest.approx(1)
    now[0] = 30.01
    assert bucket.take() == 0


def test_requests_per_minute_are_counted_by_key() -> None:
    config = HttpConfig(keys={"ann": "1", "bob": "2"}, requests_per_minute=2)
    client = TestClient(create_app(Scripted(), config))

    def status(key: str) -> int:
        return client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code

    assert [status("1"), status("1"), status("1"), status("2")] == [200, 200, 429, 200]
    response = client.get("/v1/models", headers={"authorization": "Bearer 1"})
    assert 1 <= int(response.headers["retry-after"]) <= 30
    assert response.json()["error"]["code"] == "rate_limit_exceeded"


@pytest.mark.parametrize(
    ("config", "code"),
    [
        (HttpConfig(concurrent=1), "concurrency_limit_exceeded"),
        (HttpConfig(limits=Limits(in_flight=1)), "overloaded"),
    ],
)
def test_requests_at_a_time(config: HttpConfig, code: str) -> None:
    service = Scripted(slow)
    with openai_client(create_app(service, config)) as client:
        stream = client.chat.completions.create(model="", stream=True, messages=messages())
        next(stream)
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model="", messages=messages())
        assert refused.value.code == code
        stream.close()
        wait_until(lambda: service.open == 0)
        client.models.list()


def messages() -> Any:
    return BODY["messages"]


def test_memory_is_returned_after_small_requests_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may name large files by URL."""
    runs: list[MemoryReturner] = []
    monkeypatch.setattr(MemoryReturner, "is_due", True)
    monkeypatch.setattr(MemoryReturner, "run", lambda self: runs.append(self))
    assert TestClient(create_app(Scripted())).get("/v1/models").status_code == 200
    assert len(runs) == 1


def test_large_bodies_are_refused_before_and_while_they_are_read() -> None:
    service = Scripted()
    app = create_app(service, HttpConfig(limits=Limits(body_bytes=1000)))
    with running(app) as url:
        for chunked in (False, True):
            connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
            body: Any = iter([b" " * 400] * 5) if chunked else b" " * 2000
            connection.request(
                "POST",
                CHAT,
                body,
                {"content-type": "application/json"},
                encode_chunked=chunked,
            )
            response = connection.getresponse()
            assert response.status == 413
            assert json.loads(response.read())["error"]["code"] == "request_too_large"
            connection.close()
    assert not service.requests


def connected(url: str) -> socket.socket:
    """A bare connection to the server."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return socket.create_connection((parts.hostname, parts.port))


def test_a_body_that_does_not_come_is_given_up() -> None:
    app = create_app(Scripted(), HttpConfig(limits=Limits(body_seconds=1.0)))
    with running(app) as url, connected(url) as caller:
        caller.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n")
        caller.sendall(b"content-type: application/json\r\ncontent-length: 9\r\n\r\n{")
        caller.settimeout(20)
        assert b" 408 " in caller.recv(1000)


@pytest.mark.parametrize(
    ("path", "body", "requests"),
    [
        (CHAT, BODY | {"stream": True}, 1),
        (CHAT, BODY, 1),
        ("/v1/completions", {"prompt": ["a", "b", "c"]}, 3),
        ("/v1/images/generations", {"prompt": "a boat", "n": 3}, 1),
    ],
)
def test_a_caller_who_leaves_frees_the_work(path: str, body: dict[str, Any], requests: int) -> None:
    service = Scripted(slow if body.get("stream") else mute)
    with running(create_app(service)) as url:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
        connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        if body.get("stream"):
            response = connection.getresponse()
            assert b"assistant" in response.readline()
            response.close()
        wait_until(lambda: service.open == requests)
        connection.close()
        wait_until(lambda: service.open == 0)
        metrics = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
        metrics.request("GET", "/metrics")
        text = metrics.getresponse().read().decode()
        assert f'route="{path}",status="{200 if body.get("stream") else 499}"' in text
        metrics.close()


def test_a_caller_who_does_not_read_frees_the_work_when_he_leaves() -> None:
    """The answer is stuck in the sending, not in the engine, when the connection ends."""

    def chatty(_: ServiceRequest, __: int) -> Iterator[TaskEvent | float]:
        while True:
            yield TextPiece("x" * 100_000)

    service = Scripted(chatty)
    with running(create_app(service)) as url:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
        body = json.dumps(BODY | {"stream": True})
        connection.request("POST", CHAT, body, {"content-type": "application/json"})
        connection.getresponse().readline()
        wait_until(lambda: service.open == 1)
        time.sleep(0.3)
        assert connection.sock is not None
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        wait_until(lambda: service.open == 0)


def test_many_callers_at_once() -> None:
    service = Scripted(lambda _, __: [0.3, TextPiece("x"), Finished("stop", 1, 1)])
    with openai_client(create_app(service)) as client:
        threads = [
            threading.Thread(
                target=lambda: client.chat.completions.create(model="", messages=messages())
            )
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert service.most_open > 1
    assert service.open == 0


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (CHAT, "application/json"),
        ("/v1/images/edits", "application/json"),
        ("/v1/images/edits", "multipart/form-data; boundary=b"),
    ],
)
def test_a_caller_who_leaves_in_the_middle_of_a_body_is_no_failure(
    path: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    with running(create_app(Scripted())) as url:
        with connected(url) as caller:
            caller.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\n".encode())
            caller.sendall(b"content-length: 99\r\n\r\n--b\r\n")
            time.sleep(0.2)
        metrics = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)

        def counted() -> bool:
            metrics.request("GET", "/metrics")
            return f'route="{path}",status="499"' in metrics.getresponse().read().decode()

        wait_until(counted)
        metrics.close()
    assert not [record for record in caplog.records if record.exc_info]
