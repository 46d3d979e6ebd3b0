"""A tiny server that plays the public API from a script and remembers what it was asked."""

from __future__ import annotations

import base64
import io
import itertools
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from PIL import Image, ImageDraw

PAGE = files("neounify.serve") / "page"
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
STEPS = 20
PAUSE = 0.15
"""Seconds between the pieces of an answer: what comes in between can be seen."""

KEY = "a-key-for-tests"
CAPABILITIES = ["chat", "generate", "edit", "interleave", "think"]


@dataclass
class Script:
    """What happened so far, and how the server is to behave."""

    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    broken_off: threading.Event = field(default_factory=threading.Event)
    wants_key: bool = False

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for asked, body in self.asked if asked == path]


@contextmanager
def scripted_server() -> Iterator[tuple[str, Script]]:
    """(URL, script) of a server on a free port of this machine."""
    script = Script()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(script))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", script
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(script: Script) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        pass

    Handler.script = script
    return Handler


class _Handler(BaseHTTPRequestHandler):
    script: Script

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            if self._allowed():
                details = {"image_size": "64x64", "steps": STEPS, "guidance": 2.0, "shift": 3.0}
                details |= {"trained_sizes": ["64x64", "96x64"], "trained_pixels": None}
                details |= {"capabilities": CAPABILITIES, "solver": "euler", "video": None}
                details |= {"limits": {"steps": 200, "n": 10, "answer_images": 10, "tokens": 4096}}
                model = {"id": "scenes", "object": "model", "neounify": details}
                self._json(200, {"object": "list", "data": [model]})
            return
        name = self.path.split("?")[0].lstrip("/") or "index.html"
        path = PAGE.joinpath(name)
        if ".." in name or not path.is_file():
            self._error(404, "no such page")
            return
        kind = TYPES.get(name.rsplit(".", 1)[-1], "image/png")
        self._bytes(200, path.read_bytes(), kind)

    def do_POST(self) -> None:
        body = self._read()
        if not self._allowed():
            return
        self.script.asked.append((self.path, body))
        prompt = body.get("prompt") or _last_text(body["messages"])
        if prompt == "busy":
            self._error(429, "Too many requests at once.", {"Retry-After": "2"})
        elif prompt == "down":
            self._error(503, "The engine starts again.", {"Retry-After": "2"})
        elif body.get("size") == "63x63":
            self._error(400, "size: 63 is not a multiple of 32")
        else:
            self._stream(self._events(body, prompt))

    def _events(self, body: dict[str, Any], prompt: str) -> Iterator[bytes]:
        if prompt == "silence":
            return itertools.repeat(b": nothing yet\n\n")
        if prompt == "cut at once":
            return iter(())
        if prompt == "cut":
            return itertools.islice(self._answer(body, prompt), 2)
        return self._answer(body, prompt)

    def _answer(self, body: dict[str, Any], prompt: str) -> Iterator[bytes]:
        if self.path == "/v1/images/generations":
            return _images("image_generation", body, prompt)
        if self.path == "/v1/images/edits":
            return _images("image_edit", body, prompt)
        return _chat(body, prompt)

    def _stream(self, events: Iterator[bytes]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for event in events:
                self.wfile.write(event)
                self.wfile.flush()
                time.sleep(PAUSE)
        except OSError:
            self.script.broken_off.set()

    def _allowed(self) -> bool:
        if not self.script.wants_key or self.headers["Authorization"] == f"Bearer {KEY}":
            return True
        self._error(401, "no valid API key")
        return False

    def _read(self) -> dict[str, Any]:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        kind = self.headers["Content-Type"]
        return json.loads(data) if kind == "application/json" else _form(data, kind)

    def _error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        self._json(status, {"error": error}, headers)

    def _json(self, status: int, body: object, headers: dict[str, str] | None = None) -> None:
        self._bytes(status, json.dumps(body).encode(), "application/json", headers)

    def _bytes(
        self, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def _form(data: bytes, kind: str) -> dict[str, Any]:
    """The fields of a multipart form; files are counted under their name."""
    head = f"Content-Type: {kind}\r\n\r\n".encode()
    message = BytesParser(policy=HTTP).parsebytes(head + data)
    fields: dict[str, Any] = {}
    for part in message.iter_parts():
        assert isinstance(part, EmailMessage)
        name = part.get_param("name", header="content-disposition")
        content = part.get_payload(decode=True)
        assert isinstance(name, str)
        assert isinstance(content, bytes)
        if part.get_filename():
            Image.open(io.BytesIO(content)).verify()
            fields[name] = fields.get(name, 0) + 1
        else:
            fields[name] = content.decode()
    return fields


def _last_text(messages: list[dict[str, Any]]) -> str:
    content = messages[-1]["content"]
    return next((part["text"] for part in content if part["type"] == "text"), "")


def _sse(data: object, event: str | None = None) -> bytes:
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {json.dumps(data)}\n\n".encode()


def _chat(body: dict[str, Any], prompt: str) -> Iterator[bytes]:
    with_images = "image" in body.get("modalities", [])
    if body.get("think"):
        yield from map(
            _delta, _words("The question is about what can be seen.", "reasoning_content")
        )
    for index in range(2 if with_images else 0):
        yield from map(_delta, _words(f"Image {index + 1}: a circle on white. "))
        yield from map(_delta, _painted(index, int(body["seed"]), body.get("partial_images", 0)))
    said = "The end." if with_images else "There are two shapes: <b>a triangle</b> and a square."
    said = "word " * 400 if prompt == "Go on for long." else said
    yield from map(_delta, _words(said))
    if prompt == "fail":
        yield _sse({"error": {"message": "The engine stopped; try again.", "code": None}}, "error")
        return
    yield b"data: [DONE]\n\n"


def _words(text: str, name: str = "content") -> Iterator[dict[str, Any]]:
    for word in text.split():
        yield {name: f"{word} "}


def _painted(index: int, seed: int, previews: int) -> Iterator[dict[str, Any]]:
    for step in (5, 10, 15)[:previews]:
        url = f"data:image/png;base64,{_image(seed + index, step / STEPS)}"
        preview = {"index": index, "image_url": {"url": url}, "step": step, "steps": STEPS}
        yield {"image_preview": preview}
    url = f"data:image/png;base64,{_image(seed + index, 1.0)}"
    yield {"images": [{"index": index, "image_url": {"url": url}}]}


def _delta(delta: dict[str, Any]) -> bytes:
    return _sse({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})


def _images(kind: str, body: dict[str, Any], prompt: str) -> Iterator[bytes]:
    """All images side by side, as an engine generates them; each event has its index."""
    count, seed = int(body.get("n", 1)), int(body["seed"])
    thought = {"reasoning_content": f"A plan for {prompt}."} if body.get("think") else {}
    for step in (5, 10, 15, STEPS):
        name = f"{kind}.completed" if step == STEPS else f"{kind}.partial_image"
        for index in range(count):
            event = {
                "type": name,
                "b64_json": _image(seed + index, step / STEPS),
                "output_format": "png",
                "index": index,
                "seed": seed + index,
                **thought,
            }
            partial = {"partial_image_index": step // 5 - 1, "step": step, "steps": STEPS}
            yield _sse(event | (partial if step < STEPS else {}), name)


def _image(seed: int, clear: float) -> str:
    """A shape whose colour and place follow from the seed, in as much noise as is left."""
    image = Image.new("RGB", (256, 256), "white")
    draw = ImageDraw.Draw(image)
    colours = ((214, 39, 40), (44, 160, 44), (31, 99, 210), (250, 210, 40))
    x, y = (16, 136)[seed % 2], (16, 136)[seed // 2 % 2]
    draw.ellipse((x, y, x + 100, y + 100), fill=colours[seed // 4 % 4])
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    file = io.BytesIO()
    Image.blend(noise, image.resize((64, 64)), clear).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()
