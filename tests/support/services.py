"""Services that answer as a test says."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def service(answer: Callable[[Any, int], None]) -> Iterator[tuple[str, list[float]]]:
    """A server whose requests `answer(handler, number)` answers; its URL, and when they came."""
    times: list[float] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            times.append(time.monotonic())
            self.body = self.rfile.read(int(self.headers["Content-Length"]))
            answer(self, len(times) - 1)

        def log_message(self, *_: Any) -> None:
            """Keep the output of tests clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", times
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def say(handler: Any, status: int, body: bytes = b"{}", **headers: str) -> None:
    """Answer with a body; `headers` have _ for -."""
    handler.send_response(status)
    for name, value in ({"Content_Length": str(len(body))} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)
