"""Service of a model: both engines in this process, or each in a separate one."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from neounify.checkpoint import CheckpointFolder, DtypeChoice, choose_dtype
from neounify.config import ModelConfig
from neounify.engine.messages import LocalTransport
from neounify.pipeline import Pipeline, load
from neounify.pipeline.load import load_processor
from neounify.runtime.plan import plan_execution
from neounify.serve.client import EngineClient, EngineClients
from neounify.serve.engine_process import EngineProcess, ProcessSettings, Role
from neounify.serve.engines import EngineSettings, EngineThread, WatchSettings
from neounify.serve.service import EngineService, ServiceLimits
from neounify.serve.shared_memory import SharedSpace, SharedTransport, folder, free_bytes
from neounify.tasks.processor import Processor

log = logging.getLogger("neounify.serve")

Mode = Literal["colocate", "separate"]


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Settings of a service: checkpoint, processes, devices, limits.

    `threads` and `device` are those of the understanding engine, and of the generation engine
    unless `generation_threads` and `generation_device` are set; one process uses the first.
    """

    folder: Path
    mode: Mode = "colocate"
    dtype: str | DtypeChoice | None = None
    device: str = "cpu"
    generation_device: str | None = None
    threads: int | None = None
    generation_threads: int | None = None
    lora: tuple[tuple[Path, float], ...] = ()
    engines: EngineSettings = field(default_factory=EngineSettings)
    limits: ServiceLimits = field(default_factory=ServiceLimits)
    watch: WatchSettings = field(default_factory=WatchSettings)


def build_service(settings: ServeSettings) -> EngineService:
    """Service of a checkpoint, to `start`. Raises the errors of `load`."""
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
) -> EngineService:
    """Service of a loaded model, both engines in one thread of this process."""
    engine = EngineThread(pipe.model, engines or EngineSettings(), watch)
    client = EngineClient("model", engine)
    return EngineService(
        pipe.processor, EngineClients(client, client, LocalTransport()), limits or ServiceLimits()
    )


def serving_dtype(settings: ServeSettings, checkpoint: CheckpointFolder) -> DtypeChoice:
    """Dtype of both engines: one, because they hand keys and values to each other.

    Devices are not touched: that is for the engines' processes. Raises RequestError for an unknown
    dtype.
    """
    devices = (settings.device, settings.generation_device or settings.device)
    types = [device.partition(":")[0] for device in devices]
    accelerator = next((kind for kind in types if kind != "cpu"), "cpu")
    return choose_dtype(settings.dtype, checkpoint, accelerator)


def _separate(settings: ServeSettings) -> EngineService:
    checkpoint = CheckpointFolder.open(settings.folder)
    dtype = serving_dtype(settings, checkpoint)
    processor = load_processor(checkpoint, dtype.dtype)
    _check_shared_memory(processor, settings)
    space = SharedSpace()
    clients = EngineClients(
        EngineClient("understanding", _process("und", settings, dtype, space)),
        EngineClient("generation", _process("gen", settings, dtype, space)),
        SharedTransport(f"{space.prefix}front_"),
        space,
    )
    return EngineService(processor, clients, settings.limits)


def shared_memory_needed(config: ModelConfig, dtype: torch.dtype, settings: ServeSettings) -> int:
    """Shared memory in bytes when everything the limits allow is in transit at once.

    Keys and values of a full cache, and noise and result of all images, in float32.
    """
    cached = config.kv_bytes(dtype.itemsize)
    image = config.token_width * torch.float32.itemsize * 2
    plan = plan_execution(config, torch.device(settings.device), dtype)
    plan = settings.engines.understanding.adjust(plan)
    return plan.kv_blocks * plan.kv_block_size * cached + settings.limits.image_tokens * image


def _check_shared_memory(processor: Processor, settings: ServeSettings) -> None:
    needed = shared_memory_needed(processor.config, processor.dtype, settings)
    free = free_bytes()
    if free < needed:
        log.warning(
            "%s has %.0f MB free; all that the limits allow at once needs %.0f MB. Requests that "
            "find no room are answered 503. In a container: --shm-size",
            folder(),
            free / 1e6,
            needed / 1e6,
        )


def _process(
    role: Role, settings: ServeSettings, dtype: DtypeChoice, space: SharedSpace
) -> EngineProcess:
    generates = role == "gen"
    return EngineProcess(
        ProcessSettings(
            role=role,
            folder=settings.folder,
            dtype=dtype,
            device=(settings.generation_device if generates else None) or settings.device,
            threads=(settings.generation_threads if generates else None) or settings.threads,
            lora=settings.lora,
            engines=settings.engines,
            pieces=space.prefix,
        ),
        settings.watch,
    )
