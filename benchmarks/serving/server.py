"""`neounify serve` as a separate process, for the duration of a block."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import h11
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.serving.processes import tree
from benchmarks.serving.wire import HOST, get_text

START_SECONDS, STOP_SECONDS = 600.0, 120.0
POLL_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How the server is started; `more` are further options of `neounify serve`."""

    model: Path | None = None
    mode: str = "colocate"
    dtype: str = "float32"
    threads: int | None = None
    more: tuple[str, ...] = ()

    def command(self, port: int) -> list[str]:
        """The command line."""
        options = ["--mode", self.mode, "--dtype", self.dtype, "--port", str(port), "--quiet"]
        if self.model is not None:
            options += ["--model", str(self.model)]
        if self.threads is not None:
            options += ["--threads", str(self.threads)]
        return [sys.executable, "-m", "neounify", "serve", *options, *self.more]

    def to_json(self) -> dict[str, object]:
        """For a report: the model by the name of its folder only."""
        model = "the package's own" if self.model is None else self.model.resolve().name
        return asdict(self) | {"model": model}


class Server:
    """A running server."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process, self.port = process, port

    @property
    def pid(self) -> int:
        return self.process.pid

    async def ready(self) -> bool:
        """Whether it says that it takes requests."""
        with suppress(OSError, h11.RemoteProtocolError):
            return (await get_text(self.port, "/health"))[0] == 200
        return False

    async def metrics(self) -> dict[str, float]:
        """The gauges and counters that have no labels, without `neounify_` before their names."""
        _, text = await get_text(self.port, "/metrics")
        return {
            sample.name.removeprefix("neounify_"): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if not sample.labels
        }

    async def wait_ready(self, seconds: float = START_SECONDS) -> float:
        """Wait until it takes requests; the seconds that took. Raises RuntimeError."""
        start = time.monotonic()
        if not await until(self.ready, seconds, gave_up=self.ended):
            raise RuntimeError("neounify serve did not become ready; see its log")
        return time.monotonic() - start

    def ended(self) -> bool:
        return self.process.poll() is not None

    async def terminate(self) -> int:
        """SIGTERM, then wait; the exit code. Raises subprocess.TimeoutExpired."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        return await asyncio.to_thread(self.process.wait, STOP_SECONDS)


async def until(
    condition: Callable[[], Awaitable[bool]],
    seconds: float,
    gave_up: Callable[[], bool] = lambda: False,
) -> bool:
    """Ask again and again; whether the condition came true in time."""
    end = time.monotonic() + seconds
    while not await condition():
        if gave_up() or time.monotonic() > end:
            return False
        await asyncio.sleep(POLL_SECONDS)
    return True


@asynccontextmanager
async def running_server(options: ServerOptions, log: Path) -> AsyncGenerator[Server]:
    """A server that takes requests, on loopback at a free port; nothing of it is left behind."""
    log.parent.mkdir(parents=True, exist_ok=True)
    port = _free_port()
    with log.open("ab") as file:
        process = subprocess.Popen(options.command(port), stdout=file, stderr=file)
    server = Server(process, port)
    try:
        await server.wait_ready()
        yield server
        if not server.ended():
            await server.terminate()
    finally:
        for pid in reversed(tree(process.pid)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
