"""Ray deployment of replicas: the cluster, and a server's service and app in each replica."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import ray
import torch
from prometheus_client import CollectorRegistry, Gauge
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from neounify.runtime import freeze_objects, keep_freed_memory, switch_threads_often
from neounify.serve.build import build_service
from neounify.serve.replicas import ReplicaConfig, ReplicaError, replica_http
from neounify.serve.run import RunConfig, build_app
from neounify.serve.safety.hooks import Hooks

HEADER = "x-neounify-replica"
"""Header with the name of the replica that answered."""


class Unready(RuntimeError):
    """The engines do not answer; after three in a row Ray replaces the replica."""


@serve.ingress()
class Replica:
    """Ray Serve deployment class; the names of the methods are Ray's."""

    def __init__(self, config: RunConfig, make_hooks: Callable[[], Hooks] | None) -> None:
        keep_freed_memory()
        switch_threads_often()
        if config.serve.threads is not None:
            torch.set_num_threads(config.serve.threads)
        self._config = replace(config, http=replica_http(config.http))
        self._hooks = make_hooks() if make_hooks else None
        self._service = build_service(config.serve)

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        await self._service.start()
        name = serve.get_replica_context().replica_tag
        registry = CollectorRegistry()
        process = Gauge(
            "neounify_replica", "The replica that answers.", ("name", "pid"), registry=registry
        )
        process.labels(name, str(os.getpid())).set(1)
        app = build_app(self._service, self._config, self._hooks, registry)
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


# --- cluster and deployment ---

NAME = "neounify"
OBJECT_STORE_BYTES = 128 * 2**20
"""Size of Ray's object store, which requests do not pass through."""
SPARE_REQUESTS = 64
"""Ongoing requests beyond `in_flight`: of health and metrics, and those that a replica refuses."""
ATTEMPTS = 2
HEALTH_SECONDS = 2.0


@contextmanager
def connected(replicas: ReplicaConfig, log_level: str) -> Iterator[None]:
    """Context of a connection to Ray: the named cluster, or one for this context.

    Raises ReplicaError.
    """
    is_local, level = replicas.address is None, logging.getLevelName(log_level.upper())
    try:
        if is_local:
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                logging_level=level,
            )
            _check_room(replicas)
        else:
            ray.init(address=replicas.address, logging_level=level)
        yield
    except ConnectionError as error:
        raise ReplicaError(f"no Ray cluster answers at {replicas.address}: {error}") from error
    finally:
        if is_local and ray.is_initialized():
            serve.shutdown()
        ray.shutdown()


@contextmanager
def deployed(
    config: RunConfig,
    replicas: ReplicaConfig,
    make_hooks: Callable[[], Hooks] | None,
) -> Iterator[None]:
    """Context of running replicas; its end waits for requests in flight. Raises ReplicaError."""
    logs = LoggingConfig(
        log_level=config.log_level.upper(), enable_access_log=config.log_level == "info"
    )
    application = _deployment(config, replicas).bind(config, make_hooks)
    try:
        serve.start(
            http_options=HTTPOptions(host=config.host, port=config.port),
            logging_config=logs,
        )
    except RuntimeError as error:
        raise ReplicaError(f"Ray Serve did not start: {error}") from error
    try:
        _start(application, logs)
        yield
    finally:
        serve.delete(NAME)


def _start(application: serve.Application, logs: LoggingConfig) -> None:
    try:
        serve.run(application, name=NAME, logging_config=logs)
    except RuntimeError as error:
        raise ReplicaError(f"the replicas did not start: {error}") from error


def _deployment(config: RunConfig, replicas: ReplicaConfig) -> serve.Deployment:
    in_flight = config.http.limits.in_flight
    return serve.deployment(
        name="replica",
        num_replicas=replicas.count,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        # Beyond `in_flight` a replica itself answers 429, so it must receive the request.
        max_ongoing_requests=in_flight + SPARE_REQUESTS,
        max_queued_requests=in_flight,
        graceful_shutdown_timeout_s=config.drain_seconds,
        graceful_shutdown_wait_loop_s=0.2,
        health_check_period_s=HEALTH_SECONDS,
        max_constructor_retry_count=ATTEMPTS,
    )(Replica)


def _check_room(replicas: ReplicaConfig) -> None:
    """Raises ReplicaError for resources that the cluster lacks; Ray would wait for them forever."""
    resources = ray.cluster_resources()
    for name, each in (("CPU", replicas.cpus), ("GPU", replicas.gpus)):
        needed, available = replicas.count * each, resources.get(name, 0.0)
        if needed > available:
            raise ReplicaError(
                f"{replicas.count} replicas with {each:g} {name} each need {needed:g}; this "
                f"machine has {available:g}. Less than 1 each is possible, such as 0.5"
            )
