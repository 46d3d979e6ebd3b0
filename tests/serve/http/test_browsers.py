"""Names that are answered, pages of other sites, and what answers say to browsers."""

from __future__ import annotations

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from neounify.errors import ConfigError
from neounify.serve.http import HttpConfig, create_app
from neounify.serve.http.config import default_hosts, parse_origin
from support.http_server import openai_client
from support.scripted_service import Scripted

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "Hello?"}]}
ORIGIN = "http://localhost:3000"


def client_of(page: Path | None = None, **config: tuple[str, ...]) -> TestClient:
    app = create_app(Scripted(), HttpConfig(**config), page=page)  # type: ignore[arg-type]
    return TestClient(app, base_url="http://localhost", raise_server_exceptions=False)


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8000",
        "localhost.",
        "app.localhost:3000",
        "127.0.0.1:8000",
        "[::1]:8000",
        "192.168.1.5",
        "example.org",
    ],
)
def test_names_that_are_answered(host: str) -> None:
    client = client_of(allowed_hosts=(*default_hosts("127.0.0.1"), "example.org"))
    assert client.post(CHAT, json=BODY, headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "attacker.example:8000",
        "localhost.attacker.example",
        "127.0.0.1.attacker.example",
        "1.2.3",
        "notlocalhost",
        "localhost:80@attacker.example",
        "localhost:port",
        "[::1]attacker.example",
        "[localhost]",
        "[::1",
        "x" * 5000,
    ],
)
def test_names_of_others_are_refused(host: str) -> None:
    client = client_of(allowed_hosts=default_hosts("127.0.0.1"))
    for path in ("/v1/models", "/", "/docs", "/metrics"):
        response = client.get(path, headers={"host": host})
        assert response.status_code == 421
        assert response.json()["error"]["code"] == "unknown_host"
        assert len(response.text) < 500
    assert client.get("/health", headers={"host": host}).status_code == 200


def test_any_name_where_the_operator_says_so() -> None:
    for hosts in ((), ("*", "localhost")):
        client = client_of(allowed_hosts=hosts)
        assert client.get("/v1/models", headers={"host": "attacker.example"}).status_code == 200


def test_pages_of_other_sites_cannot_send_forms() -> None:
    headers = {"origin": "http://attacker.example", "sec-fetch-site": "cross-site"}
    client = client_of(cors_origins=(ORIGIN,))
    response = client.post("/v1/images/edits", data={"prompt": "x"}, headers=headers)
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "origin_not_allowed"
    assert client.get("/v1/models", headers=headers).status_code == 200
    for allowed in (
        headers | {"origin": ORIGIN},
        headers | {"sec-fetch-site": "same-site"},
        headers | {"sec-fetch-site": "same-origin"},
        {"origin": "http://attacker.example"},
        headers | {"authorization": "Bearer x"},
    ):
        assert client.post(CHAT, json=BODY, headers=allowed).status_code == 200


def test_cors_is_off_by_default() -> None:
    client = client_of()
    preflight = {"origin": ORIGIN, "access-control-request-method": "POST"}
    for response in (
        client.options(CHAT, headers=preflight),
        client.post(CHAT, json=BODY, headers={"origin": ORIGIN}),
    ):
        assert not any(name.startswith("access-control") for name in response.headers)


def test_preflight_answers_and_errors_carry_cors() -> None:
    client = client_of(cors_origins=(ORIGIN,))
    preflight = {
        "origin": ORIGIN,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }
    response = client.options(CHAT, headers=preflight)
    assert response.status_code == 200
    assert "x-stainless-os" in response.headers["access-control-allow-headers"]
    assert "POST" in response.headers["access-control-allow-methods"]
    for body in (BODY, BODY | {"stream": True}, {}, BODY | {"model": "other"}):
        response = client.post(CHAT, json=body, headers={"origin": ORIGIN})
        assert response.headers["access-control-allow-origin"] == ORIGIN
    for origin in ("http://localhost:3001", "https://localhost:3000", "null"):
        response = client.post(CHAT, json=BODY, headers={"origin": origin})
        assert "access-control-allow-origin" not in response.headers


def test_refusals_at_the_gate_and_failures_carry_cors() -> None:
    config = HttpConfig(keys={"ann": "secret"}, cors_origins=("*",))

    def fails(*_: object) -> list[Exception]:
        return [ValueError("a bug at /home/ann/secret.py")]

    client = TestClient(create_app(Scripted(fails), config), raise_server_exceptions=False)
    for headers, status in (({}, 401), ({"authorization": "Bearer secret"}, 500)):
        response = client.post(CHAT, json=BODY, headers={"origin": ORIGIN} | headers)
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == "*"
        assert "secret" not in response.text


def test_origins_are_checked() -> None:
    assert parse_origin("http://Localhost:3000/") == ORIGIN
    assert parse_origin("https://[::1]:1") == "https://[::1]:1"
    assert parse_origin("*") == "*"
    for wrong in (
        "localhost:3000",
        "localhost",
        "ftp://x",
        "http://x/y",
        "http://a@b",
        "http://x:y",
    ):
        with pytest.raises(ConfigError, match="origin"):
            parse_origin(wrong)


def test_every_answer_says_how_browsers_treat_it(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<p>Hello")
    client = client_of(tmp_path)
    for path in ("/", "/docs", "/openapi.json", "/v1/models", "/v1/nothing", "/nothing", "/health"):
        headers = client.get(path).headers
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        assert headers["referrer-policy"] == "no-referrer"
        policy = headers["content-security-policy"]
        assert "frame-ancestors 'none'" in policy
        assert ("default-src 'self'" if path == "/" else "default-src 'none'") in policy
        assert "unsafe" not in policy


def test_head_is_answered_wherever_get_is(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<p>Hello")
    client = client_of(tmp_path)
    for path in ("/", "/docs", "/openapi.json", "/v1/models", "/health", "/metrics", "/nothing"):
        head, get = client.head(path), client.get(path)
        assert head.status_code == get.status_code
        assert head.content == b""
        if path != "/metrics":
            assert head.headers["content-length"] == str(len(get.content))
    assert client.head(CHAT).status_code == 405


def test_options_name_the_methods() -> None:
    client = client_of()
    response = client.options(CHAT)
    assert (response.status_code, response.headers["allow"]) == (204, "OPTIONS, POST")
    assert client.options("/v1/models").headers["allow"] == "GET, HEAD, OPTIONS"
    assert client.options("/v1/nothing").status_code == 404


def test_paths_that_do_not_exist_list_those_that_do() -> None:
    client = client_of()
    for path in ("/v1/responses", "/v1/", "/v1", "/v1/v1/chat/completions"):
        error = client.post(path, json={}).json()["error"]
        assert error["code"] == "not_found"
        assert "POST /v1/chat/completions" in error["message"]
    assert len(client.get("/v1/" + "a" * 9000).text) < 1500


def test_a_slash_at_the_end_changes_nothing() -> None:
    client = client_of()
    assert client.post(f"{CHAT}/", json=BODY).status_code == 200
    assert client.get("/v1/models/").json()["object"] == "list"


def test_methods_in_metrics_are_known_ones() -> None:
    client = client_of()
    for method in ("HEAD", "PROPFIND", "ABCxyz123", "ABCxyz124"):
        client.request(method, "/v1/models")
        client.request(method, f"/{method}")
    text = client.get("/metrics").text
    assert 'method="HEAD",route="/v1/models"' in text
    assert 'method="other"' in text
    for word in ("PROPFIND", "ABCxyz"):
        assert word not in text


def test_openai_streams_with_cors() -> None:
    app = create_app(Scripted(), HttpConfig(cors_origins=(ORIGIN,)))
    with openai_client(app) as client:
        stream = client.chat.completions.with_raw_response.create(
            model="",
            stream=True,
            messages=BODY["messages"],  # type: ignore[arg-type]
            extra_headers={"Origin": ORIGIN},
        )
        assert stream.headers["access-control-allow-origin"] == ORIGIN
        assert list(stream.parse())
