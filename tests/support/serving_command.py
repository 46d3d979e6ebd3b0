"""`neounify serve` in a separate process."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

START_SECONDS = 120
PORTS = range(20_000, 32_768)
"""Below those that systems give to outgoing connections, of which other tests make many."""


def free_port() -> int:
    """A free port, for a server that is started in a moment."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


@contextmanager
def served(*arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A server process that is ready, and its address."""
    port = free_port()
    command = [sys.executable, "-m", "neounify", "serve", "--port", str(port), *arguments]
    address = f"http://127.0.0.1:{port}"
    # A file, as a pipe that is not read stops the server when its log fills it.
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(process, address, log)
            yield process, address
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], address: str, log: IO[bytes]) -> None:
    for _ in range(START_SECONDS * 10):
        if process.poll() is not None:
            log.seek(0)
            raise AssertionError(log.read().decode())
        try:
            fetch(f"{address}/health")
            return
        except OSError:  # not listening yet, or 503
            time.sleep(0.1)
    raise AssertionError("the server did not become ready")


def fetch(url: str) -> str:
    """OSError unless the answer is 200."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())
