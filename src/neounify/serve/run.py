"""Server process: bind the address, start the engines, serve until a signal, drain."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp

from neounify.errors import NeounifyError
from neounify.runtime import freeze_objects, switch_threads_often
from neounify.serve.build import ServeConfig, build_service
from neounify.serve.http import HttpConfig, create_app
from neounify.serve.http.connections import server_config
from neounify.serve.safety.hooks import Hooks
from neounify.serve.service import EngineService


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Config of a server and its address; `drain_seconds` bounds draining at the end."""

    serve: ServeConfig
    http: HttpConfig = field(default_factory=HttpConfig)
    host: str = "127.0.0.1"
    port: int = 8000
    page: bool = True
    drain_seconds: int = 60
    log_level: str = "info"


def run(
    config: RunConfig,
    hooks: Hooks | None = None,
    started: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Raises what keeps the engines from starting.

    The address is bound first, so that AddressError comes before a model is loaded in vain.
    """
    with bound(config.host, config.port) as sockets:
        service = build_service(config.serve)
        server = server_config(
            build_app(service, config, hooks, CollectorRegistry()),
            config.http,
            host=config.host,
            port=config.port,
            log_level=config.log_level,
            timeout_graceful_shutdown=config.drain_seconds,
        )
        switch_threads_often()
        asyncio.run(_serve(_Server(server, service, started), sockets))


def build_app(
    service: EngineService, config: RunConfig, hooks: Hooks | None, registry: CollectorRegistry
) -> ASGIApp:
    """App of a service, with the web UI if wanted; `registry` gets its metrics."""
    registry.register(EngineCollector(service))
    page = Path(str(resources.files("neounify.serve") / "page"))
    return create_app(
        service,
        config.http,
        hooks=hooks,
        registry=registry,
        ready=lambda: service.ready,
        states=lambda: service.states,
        page=page if config.page else None,
    )


async def _serve(server: _Server, sockets: list[socket.socket]) -> None:
    # uvicorn raises the signal that ended it once more; by then all is done.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    try:
        await server.service.start()
        await server.serve(sockets)
    finally:
        await server.service.stop()


class _Server(uvicorn.Server):
    """Refuses requests from the first signal on; calls `started` once it listens."""

    def __init__(
        self, config: uvicorn.Config, service: EngineService, started: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self.service, self._on_started = service, started

    async def startup(self, *args: object, **options: object) -> None:
        await super().startup(*args, **options)  # type: ignore[arg-type]
        if self.started:
            freeze_objects()
            self._on_started()

    async def shutdown(self, *args: object, **options: object) -> None:
        self.service.close_doors()
        await super().shutdown(*args, **options)  # type: ignore[arg-type]


# --- addresses ---


class AddressError(NeounifyError, OSError):
    """The server cannot listen at an address."""


@contextmanager
def bound(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Sockets at every address of a host, bound but not listening yet. Raises AddressError.

    Clients cannot connect before the server listens, and no other server can take the port.
    """
    with ExitStack() as stack:
        yield [stack.enter_context(sock) for sock in _bind_all(host, port)]


def _bind_all(host: str, port: int) -> Iterator[socket.socket]:
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise AddressError(f"{host!r} is no address of this machine: {error}") from error
    for family, kind, protocol, _, address in dict.fromkeys(addresses):
        yield _bind(socket.socket(family, kind, protocol), address)


def _bind(sock: socket.socket, address: tuple[object, ...]) -> socket.socket:
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        where = f"{address[0]} port {address[1]}"
        if error.errno == errno.EADDRINUSE:
            raise AddressError(
                f"{where} is in use, perhaps by another server; choose another with --port"
            ) from error
        raise AddressError(f"cannot listen at {where}: {error.strerror}") from error
    return sock


# --- metrics ---

GAUGES = {
    "requests": "Requests in progress.",
    "image_tokens": "Tokens of the images of all requests in progress.",
    "und_waiting": "Sequences that wait for room in the KV cache.",
    "und_reading": "Calls in prefill.",
    "und_writing": "Sequences in decode.",
    "und_cache_used": "Share of the KV cache in use, 0 to 1.",
    "gen_images": "Images in progress in the generation engine.",
    "gen_batch": "Images in the last denoising step.",
}
COUNTERS = {
    "restarts": "Restarts of engines.",
    "und_steps": "Steps of the understanding engine.",
    "und_step_seconds": "Seconds in steps of the understanding engine.",
    "und_read_tokens": "Prompt tokens computed.",
    "und_known_tokens": "Prompt tokens found in the prefix cache.",
    "und_written_tokens": "Tokens generated.",
    "und_preempted": "Sequences preempted: their room in the KV cache was given to others.",
    "gen_steps": "Denoising steps of the generation engine.",
    "gen_step_seconds": "Seconds in denoising steps.",
    "gen_image_steps": "Steps of single images: divided by gen_steps, the mean batch.",
}


class EngineCollector(Collector):
    """Prometheus collector of the metrics of a service and its engines.

    Those without a value, as while an engine starts, are left out.
    """

    def __init__(self, service: EngineService) -> None:
        self._service = service

    def collect(self) -> Iterable[Metric]:
        gauges, counters = self._service.gauges(), self._service.counters()
        for name, help_text in GAUGES.items():
            if name in gauges:
                yield GaugeMetricFamily(f"neounify_{name}", help_text, value=gauges[name])
        for name, help_text in COUNTERS.items():
            if name in counters:
                yield CounterMetricFamily(f"neounify_{name}", help_text, value=counters[name])
