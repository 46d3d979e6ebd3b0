"""Replica: service and app in a process that Ray starts, checks and replaces."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import torch
from prometheus_client import CollectorRegistry, Gauge
from ray import serve
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from neounify.runtime import freeze_objects, keep_freed_memory, switch_threads_often
from neounify.serve.build import build_service
from neounify.serve.collector import EngineCollector
from neounify.serve.http import create_app
from neounify.serve.http.media import HttpHooks
from neounify.serve.run import RunSettings, page_folder

HEADER = "x-neounify-replica"
"""The header with the name of the replica that answered."""


class Unready(RuntimeError):
    """The engines do not answer; after three in a row Ray replaces the replica."""


@serve.ingress()
class Replica:
    """Ray Serve deployment class; the names of the methods are Ray's."""

    def __init__(self, settings: RunSettings, make_hooks: Callable[[], HttpHooks] | None) -> None:
        keep_freed_memory()
        switch_threads_often()
        if settings.serve.threads is not None:
            torch.set_num_threads(settings.serve.threads)
        self._settings = settings
        self._hooks = make_hooks() if make_hooks else None
        self._service = build_service(settings.serve)

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        await self._service.start()
        name = serve.get_replica_context().replica_tag
        registry = CollectorRegistry()
        registry.register(EngineCollector(self._service))
        process = Gauge(
            "neounify_replica", "The replica that answers.", ("name", "pid"), registry=registry
        )
        process.labels(name, str(os.getpid())).set(1)
        app = create_app(
            self._service,
            # A result's URL could be requested from a replica that does not have it.
            replace(self._settings.http, result_urls=False),
            hooks=self._hooks,
            registry=registry,
            ready=lambda: self._service.ready,
            states=lambda: self._service.states,
            page=page_folder() if self._settings.page else None,
        )
        freeze_objects()
        return Signed(app, name)

    async def check_health(self) -> None:
        """Raises Unready."""
        if not self._service.ready:
            raise Unready("the engines do not answer")

    async def __del__(self) -> None:
        await self._service.stop()


class Signed:
    """ASGI middleware that adds the replica's name to every answer."""

    def __init__(self, app: ASGIApp, name: str) -> None:
        self._app = app
        self._header = (HEADER.encode(), name.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sign(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), self._header]}
            await send(message)

        await self._app(scope, receive, sign)
