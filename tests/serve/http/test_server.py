"""Health, metrics, the API's description, the page."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, Counter

from neounify.errors import ConfigError
from neounify.serve.http import HttpConfig, Limits, create_app
from support.http_server import data_url, png
from support.scripted_service import Scripted


def test_health() -> None:
    ready = [True]
    client = TestClient(create_app(Scripted(), ready=lambda: ready[0]))
    for path in ("/health", "/health/ready", "/health/live"):
        assert client.get(path).status_code == 200
    ready[0] = False
    assert client.get("/health").json() == {"live": True, "ready": False}
    assert [client.get(f"/health/{p}").status_code for p in ("ready", "live")] == [503, 200]


def test_metrics() -> None:
    registry = CollectorRegistry()
    Counter("engine_steps", "Of an engine.", registry=registry).inc(3)
    client = TestClient(create_app(Scripted(), registry=registry))
    body = {"messages": [{"role": "user", "content": "x"}]}
    client.post("/v1/chat/completions", json=body)
    client.post("/v1/chat/completions", json={})
    client.post("/v1/images/edits", json={"prompt": "x"})
    client.get("/somewhere/else")
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    requests = "neounify_http_requests_total"
    for line in (
        f'{requests}{{method="POST",route="/v1/chat/completions",status="200"}} 1.0',
        f'{requests}{{method="POST",route="/v1/chat/completions",status="400"}} 1.0',
        f'{requests}{{method="POST",route="/v1/images/edits",status="400"}} 1.0',
        f'{requests}{{method="GET",route="other",status="404"}} 1.0',
        'neounify_time_to_first_token_seconds_count{task="chat"} 1.0',
        'neounify_http_request_seconds_count{route="/v1/chat/completions"} 2.0',
        "neounify_http_in_flight 1.0",
        "engine_steps_total 3.0",
    ):
        assert line in response.text


def test_the_description_and_its_page() -> None:
    client = TestClient(create_app(Scripted()))
    api = client.get("/openapi.json").json()
    assert api["openapi"].startswith("3.")
    assert "422" not in str(api)
    chat = api["components"]["schemas"]["ChatBody"]
    assert {"messages", "top_k", "modalities"} <= chat["properties"].keys()
    edits = api["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]
    assert "image" in edits["multipart/form-data"]["schema"]["required"]
    page = client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "guidance_interval" in page.text
    assert "/v1/images/edits" in page.text
    assert "src=" not in page.text
    assert "http" not in page.text


def test_a_page_of_static_files_leaves_the_api_alone(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<p>Hello")
    (tmp_path / "app.js").write_text("1")
    client = TestClient(create_app(Scripted(), page=tmp_path))
    assert client.get("/").text == "<p>Hello"
    assert client.get("/app.js").text == "1"
    assert client.get("/../settings.py").status_code == 404
    assert client.get("/v1/models").status_code == 200
    assert client.get("/v1/chat/completions").status_code == 405
    missing = client.get("/nothing.html")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert client.post("/").status_code == 405


@pytest.mark.parametrize(
    ("asked", "status", "code"),
    [
        ("bytes=0-3", 206, None),
        ("pages=1-2", 400, "invalid_range"),
        ("bytes=x-y", 400, "invalid_range"),
        ("bytes=100-", 416, "range_not_satisfiable"),
    ],
)
def test_ranges_of_the_pages_files(tmp_path: Path, asked: str, status: int, code: Any) -> None:
    (tmp_path / "index.html").write_text("<p>Hello")
    client = TestClient(create_app(Scripted(), page=tmp_path))
    response = client.get("/", headers={"range": asked})
    assert response.status_code == status
    if code is None:
        assert response.text == "<p>H"
    else:
        assert response.json()["error"]["code"] == code
    if status == 416:
        assert response.headers["content-range"] == "bytes */8"


def test_the_decoders_thread_ends_with_the_server() -> None:
    def decoding() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]

    before = decoding()
    app = create_app(Scripted())
    parts = [{"type": "image_url", "image_url": {"url": data_url(png())}}]
    body = {"messages": [{"role": "user", "content": parts}]}
    for _ in range(2):  # an app may be started again
        with TestClient(app) as client:
            assert client.post("/v1/chat/completions", json=body).status_code == 200
            [thread] = [thread for thread in decoding() if thread not in before]
        thread.join(20)
        assert not thread.is_alive()


def test_settings_are_checked() -> None:
    for wrong in ({"in_flight": 0}, {"deadline": float("nan")}):
        with pytest.raises(ConfigError):
            Limits(**wrong)
    for config in ({"model_name": ""}, {"result_seconds": 0}, {"keys": {"ann": ""}}):
        with pytest.raises(ConfigError):
            HttpConfig(**config)
