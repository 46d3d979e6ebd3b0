"""Server process: start the engines, serve until a signal, drain."""

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

from neounify.errors import NeounifyError
from neounify.runtime import freeze_objects, switch_threads_often
from neounify.serve.build import ServeSettings, build_service
from neounify.serve.http import HttpConfig, create_app
from neounify.serve.http.connections import server_config
from neounify.serve.safety.hooks import Hooks
from neounify.serve.service import EngineService


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Address and settings of a server; `drain_seconds` bounds draining at the end."""

    serve: ServeSettings
    http: HttpConfig = field(default_factory=HttpConfig)
    host: str = "127.0.0.1"
    port: int = 8000
    page: bool = True
    drain_seconds: int = 60
    log_level: str = "info"


def run(
    settings: RunSettings,
    hooks: Hooks | None = None,
    started: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Raises what keeps the engines from starting.

    The address is bound first, so that AddressError comes before a model is loaded in vain.
    """
    with bound(settings.host, settings.port) as sockets:
        _run(settings, hooks, started, sockets)


def _run(
    settings: RunSettings,
    hooks: Hooks | None,
    started: Callable[[], None],
    sockets: list[socket.socket],
) -> None:
    service = build_service(settings.serve)
    registry = CollectorRegistry()
    registry.register(EngineCollector(service))
    app = create_app(
        service,
        settings.http,
        hooks=hooks,
        registry=registry,
        ready=lambda: service.ready,
        states=lambda: service.states,
        page=page_folder() if settings.page else None,
    )
    config = server_config(
        app,
        settings.http,
        host=settings.host,
        port=settings.port,
        log_level=settings.log_level,
        timeout_graceful_shutdown=settings.drain_seconds,
    )
    switch_threads_often()
    asyncio.run(_serve(_Server(config, service, started), service, sockets))


def page_folder() -> Path:
    """The static page's files."""
    return Path(str(resources.files("neounify.serve") / "page"))


async def _serve(server: _Server, service: EngineService, sockets: list[socket.socket]) -> None:
    # uvicorn raises the signal that ended it once more; by then all is done.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    try:
        await service.start()
        await server.serve(sockets)
    finally:
        await service.stop()


class _Server(uvicorn.Server):
    """Refuses requests from the first signal on; calls `started` once it listens."""

    def __init__(
        self, config: uvicorn.Config, service: EngineService, started: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._service, self._on_started = service, started

    async def startup(self, *args: object, **options: object) -> None:
        await super().startup(*args, **options)  # type: ignore[arg-type]
        if self.started:
            freeze_objects()
            self._on_started()

    async def shutdown(self, *args: object, **options: object) -> None:
        self._service.close_doors()
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
        yield [stack.enter_context(one) for one in _bind_all(host, port)]


def _bind_all(host: str, port: int) -> Iterator[socket.socket]:
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise AddressError(f"{host!r} is no address of this machine: {error}") from error
    for family, kind, protocol, _, address in dict.fromkeys(addresses):
        yield _bind(socket.socket(family, kind, protocol), address)


def _bind(one: socket.socket, address: tuple[object, ...]) -> socket.socket:
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if one.family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind(address)
    except OSError as error:
        one.close()
        where = f"{address[0]} port {address[1]}"
        if error.errno == errno.EADDRINUSE:
            raise AddressError(
                f"{where} is in use, perhaps by another server; choose another with --port"
            ) from error
        raise AddressError(f"cannot listen at {where}: {error.strerror}") from error
    return one


# --- metrics ---

GAUGES = {
    "requests": "Requests under way.",
    "image_tokens": "Tokens of the images of all requests under way.",
    "und_waiting": "Sequences that wait for room in the cache.",
    "und_reading": "Calls whose prompts are being read.",
    "und_writing": "Sequences that are being written.",
    "und_cache_used": "Share of the key-value cache that sequences use, 0 to 1.",
    "gen_images": "Images under way in the generation engine.",
    "gen_batch": "Images that took part in the last denoising step.",
}
COUNTERS = {
    "restarts": "Engines started again after they died.",
    "und_steps": "Steps of the understanding engine.",
    "und_step_seconds": "Time spent in them, seconds.",
    "und_read_tokens": "Tokens of prompts that were read.",
    "und_known_tokens": "Tokens of prompts that were known from earlier requests.",
    "und_written_tokens": "Tokens that were written.",
    "und_preempted": "Sequences that had to give up their room in the cache for others.",
    "gen_steps": "Denoising steps of the generation engine.",
    "gen_step_seconds": "Time spent in them, seconds.",
    "gen_image_steps": "Steps of single images: divided by gen_steps, the mean batch.",
}


class EngineCollector(Collector):
    """Reads a service whenever Prometheus asks; names without a value are left out."""

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
