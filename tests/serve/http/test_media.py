"""Images by URL, never from the operator's own network; results kept behind URLs."""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from fastapi.testclient import TestClient

from neounify.errors import ImageError, RequestError
from neounify.serve.http import HttpConfig, create_app, media
from neounify.serve.http.errors import ApiError
from neounify.serve.http.media import MediaFetcher, ResultStore, is_public
from neounify.serve.http.uploads import UploadBytes
from neounify.tasks.chat import ChatRequest
from support.http_server import png
from support.scripted_service import Scripted

HOST = "images.test"


class _Handler(BaseHTTPRequestHandler):
    """Answers by path; remembers whom it was asked for."""

    asked: list[tuple[str, str]]

    def do_GET(self) -> None:
        self.asked.append((self.headers["Host"], self.path))
        answer: Callable[[], None] = {
            "/image.png": lambda: self._send(200, png("blue")),
            "/away": lambda: self._redirect("http://elsewhere.test/image.png"),
            "/near": lambda: self._redirect("/image.png"),
            "/loop": lambda: self._redirect("/loop"),
            "/large": lambda: self._send(200, bytes(5000)),
            "/drip": self._drip,
            "/rude": lambda: self.connection.close(),
        }.get(self.path, lambda: self._send(404, b""))
        answer()

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _redirect(self, location: str) -> None:
        self._send(302, b"", Location=location)

    def _drip(self) -> None:
        for _ in range(100):
            try:
                self.wfile.write(b"H")
            except OSError:
                return
            time.sleep(0.1)

    def log_message(self, *_: object) -> None:
        """Tests need no log."""


@contextmanager
def neighbour() -> Iterator[tuple[int, list[tuple[str, str]]]]:
    """(port of a server on loopback, what it was asked)."""
    asked: list[tuple[str, str]] = []
    handler = type("Handler", (_Handler,), {"asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_address[1], asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


async def to_loopback(host: str, port: int) -> list[str]:
    return ["127.0.0.1"]


async def fetched(fetcher: MediaFetcher, url: str) -> bytes:
    async with fetcher.fetched(url) as data:
        return data


def fetcher_for(port: int, *, seconds: float = 10.0, uploads: int = 4000) -> MediaFetcher:
    """One that may fetch from HOST, which is on loopback, and is let."""
    return MediaFetcher(
        [f"{HOST}:{port}"],
        max_bytes=4000,
        seconds=seconds,
        uploads=UploadBytes(uploads),
        resolve=to_loopback,
        allowed=lambda _: True,
    )


def test_a_image_of_a_named_host_is_fetched() -> None:
    with neighbour() as (port, asked):
        for path in ("image.png", "near"):
            url = f"http://{HOST.upper()}:{port}/{path}"
            assert asyncio.run(fetched(fetcher_for(port), url)) == png("blue")
    assert asked[0] == (f"{HOST}:{port}", "/image.png")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("away", "not on this server's list"),
        ("loop", "redirects more than"),
        ("large", "more than 4000 bytes"),
        ("missing", "status 404"),
        ("rude", "could not be fetched"),
    ],
)
def test_what_cannot_be_had(path: str, message: str) -> None:
    with neighbour() as (port, _), pytest.raises(ImageError, match=message):
        asyncio.run(fetched(fetcher_for(port), f"http://{HOST}:{port}/{path}"))


def test_fetched_bytes_count_while_they_are_used() -> None:
    async def work(port: int) -> None:
        url = f"http://{HOST}:{port}/image.png"
        size = len(png("blue"))
        fetcher = fetcher_for(port, uploads=size)
        async with fetcher.fetched(url):
            with pytest.raises(ApiError, match=f"together exceed {size} bytes") as refused:
                await fetched(fetcher, url)
            assert refused.value.status_code == 429
        assert await fetched(fetcher, url) == png("blue")

    with neighbour() as (port, _):
        asyncio.run(work(port))


def test_a_slow_server_is_given_up() -> None:
    with neighbour() as (port, _):
        started = time.monotonic()
        with pytest.raises(ImageError, match=r"more than 0\.5 seconds; send the image as a data"):
            asyncio.run(fetched(fetcher_for(port, seconds=0.5), f"http://{HOST}:{port}/drip"))
        assert time.monotonic() - started < 5


def test_certificates_are_read_once_and_off_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: list[threading.Thread] = []
    create = ssl.create_default_context

    def counted() -> ssl.SSLContext:
        threads.append(threading.current_thread())
        return create()

    monkeypatch.setattr(ssl, "create_default_context", counted)
    media._tls_context.cache_clear()
    with neighbour() as (port, _):
        for _ in range(2):
            with pytest.raises(ImageError, match="could not be fetched"):
                asyncio.run(fetched(fetcher_for(port), f"https://{HOST}:{port}/image.png"))
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


@pytest.mark.parametrize(
    "url",
    [
        "http://other.test:{port}/image.png",
        "http://127.0.0.1:{port}/image.png",
        "http://images.test/image.png",
        "https://images.test/image.png",
        "http://me:secret@images.test:{port}/image.png",
        "http://other.test:{port}#@images.test:{port}/",
        "gopher://images.test:{port}/",
        "http://images.test:{port}/a b\r\nHost: x",
        "http:///image.png",
    ],
)
def test_urls_that_are_not_followed(url: str) -> None:
    with neighbour() as (port, asked):
        with pytest.raises(ImageError):
            asyncio.run(fetched(fetcher_for(port), url.format(port=port)))
        assert not asked


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("::1", False),
        ("fe80::1", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::7f00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_public_addresses(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) == public


def test_private_addresses_of_named_hosts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def mixed(host: str, port: int) -> list[str]:
        return ["93.184.216.34", "127.0.0.1"]

    with neighbour() as (port, asked):
        for resolve in (to_loopback, mixed):
            fetcher = MediaFetcher(
                [f"{HOST}:{port}"],
                max_bytes=1,
                seconds=9,
                uploads=UploadBytes(1),
                resolve=resolve,
            )
            with pytest.raises(ImageError, match="not public"):
                asyncio.run(fetched(fetcher, f"http://{HOST}:{port}/image.png"))
        assert not asked


def test_the_server_fetches_from_allowed_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MediaFetcher, "_address", lambda *_: to_address())
    service = Scripted()
    with neighbour() as (port, _):
        url = f"http://{HOST}:{port}/image.png"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "?"}]
        body = {"messages": [{"role": "user", "content": content}]}
        off = TestClient(create_app(service)).post("/v1/chat/completions", json=body)
        assert off.status_code == 400
        assert "fetches no image URLs" in off.json()["error"]["message"]
        app = create_app(service, HttpConfig(remote_hosts=(f"{HOST}:{port}",)))
        assert TestClient(app).post("/v1/chat/completions", json=body).status_code == 200
    assert isinstance(service.last, ChatRequest)
    assert service.last.images[0].getpixel((0, 0)) == (0, 0, 255)


async def to_address() -> str:
    return "127.0.0.1"


# --- stored results ---


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
    config = HttpConfig(public_url="https://paint.example/api/", keys={"ann": "1"})
    client = TestClient(create_app(Scripted(), config))
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
