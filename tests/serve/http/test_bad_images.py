"""Invalid and damaged image files: status 400, never 500."""

from __future__ import annotations

import base64
import random
import struct
import zlib
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from neounify.serve.http import create_app
from support.http_server import data_url, png
from support.scripted_service import Scripted

PNG = png(size=(64, 64))
JPEG = png(size=(64, 64), kind="jpeg")


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(create_app(Scripted()), raise_server_exceptions=False)


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def header_of(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds a single byte."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return PNG[:8] + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0"))


BROKEN = {
    "nothing": b"",
    "text": b"an image of a boat",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    "cut off": PNG[:60],
    "only its start": PNG[:8],
    "zeros": PNG[:8] + bytes(500),
    "cut off jpeg": JPEG[:200],
    "huge": header_of(100_000, 100_000),
    "large": header_of(10_000, 10_000),
    "no pixels": header_of(0, 5),
    "hardly any data": header_of(500, 500),
    "sliver": png(size=(4000, 1)),
}


@pytest.mark.parametrize("name", sorted(BROKEN.keys() - {"sliver"}))
def test_broken_images_are_refused(client: TestClient, name: str) -> None:
    response = client.post(
        "/v1/images/edits", data={"prompt": "x"}, files={"image": ("a.png", BROKEN[name])}
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "image"
    assert response.json()["error"]["code"] == "invalid_image"
    content = [{"type": "image_url", "image_url": {"url": data_url(BROKEN[name])}}]
    response = client.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]}
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages.0.content"


def test_a_sliver_has_no_size_for_an_answer(client: TestClient) -> None:
    response = client.post(
        "/v1/images/edits", data={"prompt": "x"}, files={"image": ("a.png", BROKEN["sliver"])}
    )
    assert response.status_code == 400
    assert "narrow" in response.json()["error"]["message"]


def damaged(data: bytes, count: int) -> Iterator[bytes]:
    rng = random.Random(0)
    for _ in range(count):
        broken = bytearray(data[: rng.randrange(len(data) // 2, len(data) + 1)])
        for _ in range(rng.randrange(1, 12)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        yield bytes(broken)


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "bmp", "tiff", "ppm"])
def test_damaged_files_never_break_the_server(client: TestClient, kind: str) -> None:
    for data in damaged(png(size=(24, 24), kind=kind), 12):
        response = client.post(
            "/v1/images/edits",
            data={"prompt": "x", "size": "32x32"},
            files={"image": ("a", data)},
        )
        assert response.status_code in (200, 400)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "data:",
        "data:image/png;base64",
        "data:image/png,raw",
        "data:text/html;base64,PGI+",
        "data:image/png;base64,###",
        "data:image/png;base64,aGk",
        "file:///etc/passwd",
        "/etc/passwd",
        "ftp://example.com/a.png",
        "http://example.com/a.png",
        "https://[::1]:x/",
        base64.b64encode(PNG).decode(),
    ],
)
def test_urls_that_hold_no_image(client: TestClient, url: str) -> None:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    response = client.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": content}]}
    )
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_image"


def test_forms_without_a_image(client: TestClient) -> None:
    route = "/v1/images/edits"
    for response in (
        client.post(route, json={"prompt": "x"}),
        client.post(route, data={"prompt": "x"}),
        client.post(route, json={"prompt": "x", "images": []}),
        client.post(route, json={"prompt": "x", "images": [{"file_id": "f"}]}),
        client.post(route, json={"prompt": "x", "images": [3]}),
        client.post(route, json={"prompt": "x", "image": "text"}),
        client.post(route, json={"images": [data_url(PNG)]}),
        client.post(route, json=[data_url(PNG)]),
        client.post(route, data={"prompt": "x", "image": "text"}, files={"other": ("a", PNG)}),
        client.post(route, files={"image": ("a", PNG)}),
        client.post(route, data={"prompt": "x"}, files={"image": ("a", PNG), "mask": ("m", PNG)}),
        client.post(
            route, content=b"--", headers={"content-type": "multipart/form-data; boundary=x"}
        ),
        client.post(route, content=b"--", headers={"content-type": "multipart/form-data"}),
    ):
        assert response.status_code in (400, 415)
        assert response.json()["error"]["message"]
