"""Two replicas behind one address: same answers, streams, and one that is killed comes back."""

from __future__ import annotations

import base64
import http.client
import importlib.util
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

import neounify
from support.http_server import wait_until
from support.serving_command import free_port

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None,
    reason="Ray is not installed: pip install 'neounify[ray]'",
)
START_SECONDS = 300.0
"""To be ready. On two cores with other work 33 to 147 seconds were seen."""
HEADER = "x-neounify-replica"


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @contextmanager
    def asked(self, path: str, body: object = None) -> Iterator[http.client.HTTPResponse]:
        """The answer to a request on a separate connection, which ends with this."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            method, data = ("GET", None) if body is None else ("POST", json.dumps(body))
            connection.request(method, path, data, {"Content-Type": "application/json"})
            yield connection.getresponse()
        finally:
            connection.close()

    def metrics(self) -> tuple[str, str]:
        """The name of a replica, and what it counted."""
        with self.asked("/metrics") as answer:
            assert answer.status == 200
            return answer.headers[HEADER], answer.read().decode()

    def replicas(self) -> dict[str, int]:
        """Process ids by name, of those that answered twenty times."""
        texts = dict(self.metrics() for _ in range(20))
        return {
            name: int(match.group(1))
            for name, text in texts.items()
            if (match := re.search(r'neounify_replica\{name="\w+",pid="(\d+)"\}', text))
        }

    def ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            with self.asked("/health") as answer:
                return answer.status == 200 and HEADER in answer.headers
        except OSError:
            return False


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port = free_port()
    options = ["--model", str(folder), "--device", "cpu", "--threads", "1", "--no-page"]
    replicas = ["--replicas", "2", "--replica-cpus", "0.5"]
    command = [sys.executable, "-m", "neounify", "serve", *options, *replicas]
    log = tmp_path_factory.mktemp("replicas") / "log"
    with log.open("wb") as file:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=file, stderr=file)
    server = Server(process, port, log)
    try:
        wait_until(lambda: server.ready() and len(server.replicas()) == 2, START_SECONDS, pause=0.5)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()


def chat(tokens: int) -> dict[str, object]:
    message = {"role": "user", "content": "Hello"}
    return {"messages": [message], "max_tokens": tokens, "stream": True}


def counted(text: str, name: str) -> float:
    match = re.search(rf"^neounify_{name} ([\d.e+]+)$", text, re.MULTILINE)
    return float(match.group(1)) if match else 0.0


def test_two_processes_answer(server: Server) -> None:
    replicas = server.replicas()
    assert len(replicas) == 2
    assert len({*replicas.values(), server.process.pid}) == 3


def test_an_image_is_the_pipelines_from_any_replica(
    server: Server, pipe: neounify.Pipeline
) -> None:
    body = {"prompt": "a boat", "size": "128x96", "seed": 3, "steps": 4}
    pixels: dict[str, np.ndarray] = {}
    for _ in range(20):
        with server.asked("/v1/images/generations", body) as answer:
            file = base64.b64decode(json.load(answer)["data"][0]["b64_json"])
            # Not the files: they say when they were made.
            pixels[answer.headers[HEADER]] = np.asarray(PIL.Image.open(io.BytesIO(file)), dtype=int)
        if len(pixels) == 2:
            break
    one, other = pixels.values()
    alone = pipe.generate("a boat", width=128, height=96, seed=3, steps=4).images[0]
    assert np.array_equal(one, other)
    assert np.abs(one - np.asarray(alone, dtype=int)).max() <= 1


def test_a_stream_arrives_in_pieces(server: Server) -> None:
    with server.asked("/v1/chat/completions", chat(40)) as answer:
        pieces = list(iter(lambda: answer.read1(), b""))
    assert len(pieces) > 2
    assert b"[DONE]" not in pieces[0]
    assert b"".join(pieces).endswith(b"data: [DONE]\n\n")


def test_work_ends_when_its_caller_leaves(server: Server) -> None:
    before = dict(server.metrics() for _ in range(20))
    with server.asked("/v1/chat/completions", chat(4000)) as answer:
        name = answer.headers[HEADER]
        assert answer.read1()
    texts: dict[str, str] = {}

    def ended() -> bool:
        texts.update([server.metrics()])
        return name in texts and counted(texts[name], "requests") == 0

    wait_until(ended, 20, pause=0.5)
    written = [counted(text, "und_written_tokens_total") for text in (before[name], texts[name])]
    assert written[1] - written[0] < 2000


def test_urls_of_results_are_refused(server: Server) -> None:
    body = {"prompt": "a boat", "size": "64x64", "steps": 1, "response_format": "url"}
    with server.asked("/v1/images/generations", body) as answer:
        assert answer.status == 400
        assert "b64_json" in json.load(answer)["error"]["message"]


def test_videos_are_refused(server: Server) -> None:
    for path, body in (("/v1/videos", {"prompt": "a boat"}), ("/v1/videos/video_x", None)):
        with server.asked(path, body) as answer:
            assert answer.status == 501
            assert "one of several replicas" in json.load(answer)["error"]["message"]


def test_a_killed_replica_comes_back_while_the_other_answers(server: Server) -> None:
    before = server.replicas()
    killed, left = before
    os.kill(before[killed], signal.SIGKILL)
    time.sleep(1)
    for _ in range(10):
        with server.asked("/health") as answer:
            assert answer.status == 200
            assert answer.headers[HEADER] == left
    after: dict[str, int] = {}

    def back() -> bool:
        after.clear()
        after.update(server.replicas())
        return len(after) == 2

    wait_until(back, START_SECONDS, pause=0.5)
    assert left in after
    assert killed not in after


def test_a_signal_lets_a_stream_end(server: Server) -> None:
    with server.asked("/v1/chat/completions", chat(100)) as answer:
        assert answer.read1()
        server.process.terminate()
        rest = answer.read()
    assert rest.endswith(b"data: [DONE]\n\n")
    assert server.process.wait(90) == 0
