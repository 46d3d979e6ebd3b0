"""A service from a model: both engines in this process, or each in one of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from neounify.pipeline import Pipeline, load
from neounify.pipeline.load import load_front
from neounify.serve.hosts import (
    EngineSettings,
    ProcessHost,
    ProcessSettings,
    Role,
    ThreadHost,
    WatchSettings,
)
from neounify.serve.link import EngineLink
from neounify.serve.service import Service, ServiceLimits
from neounify.serve.session import Links
from neounify.serve.shared_memory import SharedSpace
from neounify.serve.transport import LocalTransport, SharedTransport

Mode = Literal["colocate", "separate"]


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What to serve and how.

    `threads` and `device` are those of the understanding engine, and of the generation engine
    where that has none of its own; in one process both share the first.
    """

    folder: Path
    mode: Mode = "colocate"
    dtype: str | None = None
    device: str = "cpu"
    generation_device: str | None = None
    threads: int | None = None
    generation_threads: int | None = None
    lora: tuple[tuple[Path, float], ...] = ()
    engines: EngineSettings = field(default_factory=EngineSettings)
    limits: ServiceLimits = field(default_factory=ServiceLimits)
    watch: WatchSettings = field(default_factory=WatchSettings)


def build_service(settings: ServeSettings) -> Service:
    """A service to `start`. Raises the errors of `load`."""
    if settings.mode == "separate":
        return _separate(settings)
    pipe = load(
        settings.folder,
        dtype=settings.dtype,
        device=settings.device,
        lora=settings.lora or None,
    )
    return colocated(pipe, settings.engines, settings.limits, settings.watch)


def colocated(
    pipe: Pipeline,
    engines: EngineSettings | None = None,
    limits: ServiceLimits | None = None,
    watch: WatchSettings | None = None,
) -> Service:
    """A service around a loaded model, both engines in one thread of this process."""
    host = ThreadHost(pipe.model, engines or EngineSettings(), watch)
    link = EngineLink("model", host)
    return Service(pipe.engine, Links(link, link, LocalTransport()), limits or ServiceLimits())


def _separate(settings: ServeSettings) -> Service:
    front = load_front(settings.folder, settings.dtype)
    space = SharedSpace()
    links = Links(
        EngineLink("understanding", _process("und", settings, space)),
        EngineLink("generation", _process("gen", settings, space)),
        SharedTransport(f"{space.prefix}front_"),
        space,
    )
    return Service(front, links, settings.limits)


def _process(role: Role, settings: ServeSettings, space: SharedSpace) -> ProcessHost:
    paints = role == "gen"
    return ProcessHost(
        ProcessSettings(
            role=role,
            folder=settings.folder,
            dtype=settings.dtype,
            device=(settings.generation_device if paints else None) or settings.device,
            threads=(settings.generation_threads if paints else None) or settings.threads,
            lora=settings.lora,
            engines=settings.engines,
            pieces=space.prefix,
        ),
        settings.watch,
    )
