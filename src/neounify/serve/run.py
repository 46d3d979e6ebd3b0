"""Server process: start the engines, serve until a signal, drain."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import uvicorn
from prometheus_client import CollectorRegistry

from neounify.runtime import freeze_objects, switch_threads_often
from neounify.serve.address import bound
from neounify.serve.build import ServeSettings, build_service
from neounify.serve.collector import EngineCollector
from neounify.serve.http import HttpSettings, create_app
from neounify.serve.http.connections import server_config
from neounify.serve.http.media import HttpHooks
from neounify.serve.service import EngineService


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Address and settings of a server; `drain_seconds` bounds draining at the end."""

    serve: ServeSettings
    http: HttpSettings = field(default_factory=HttpSettings)
    host: str = "127.0.0.1"
    port: int = 8000
    page: bool = True
    drain_seconds: int = 60
    log_level: str = "info"


def run(
    settings: RunSettings,
    hooks: HttpHooks | None = None,
    started: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Raises what keeps the engines from starting.

    The address is bound first, so that AddressError comes before a model is loaded in vain.
    """
    with bound(settings.host, settings.port) as sockets:
        _run(settings, hooks, started, sockets)


def _run(
    settings: RunSettings,
    hooks: HttpHooks | None,
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
