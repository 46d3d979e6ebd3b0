"""Service of a model: both engines in this process, or each in a separate one."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from neounify.checkpoint import CheckpointFolder, DtypeChoice, choose_dtype
from neounify.config import ModelConfig
from neounify.distributed.tensor import check_degree
from neounify.engine.messages import LocalTransport
from neounify.engine.shared_memory import SharedSpace, SharedTransport, folder, free_bytes
from neounify.engine.spread import check_sequence
from neounify.model.parts import GEN, UND, StreamName
from neounify.pipeline import Pipeline, load
from neounify.pipeline.loading import load_processor
from neounify.runtime.plan import plan_execution
from neounify.serve.client import EngineClient, EngineClients
from neounify.serve.engine_process import EngineProcess, ProcessConfig
from neounify.serve.engines import EngineConfig, EngineThread, WatchConfig
from neounify.serve.memory import EngineMemory
from neounify.serve.service import AdmissionConfig, EngineService
from neounify.tasks.program import Processor

log = logging.getLogger("neounify.serve")

Mode = Literal["colocate", "separate"]


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Config of a service: checkpoint, processes, devices, limits.

    `folder` and `config` are the checkpoint, `quantise` and `backend` what is done with its
    weights, as in `neounify.load`.
    `threads` and `device` are those of the understanding engine, and of the generation engine
    unless `generation_threads` and `generation_device` are set; one process uses the first.
    `understanding_devices` and `generation_devices` spread an engine over several, in place of one;
    `sequence_parallel` of the latter share the rows of an image.
    """

    folder: Path
    config: Path | None = None
    mode: Mode = "colocate"
    dtype: str | DtypeChoice | None = None
    device: str = "cpu"
    generation_device: str | None = None
    understanding_devices: tuple[str, ...] = ()
    generation_devices: tuple[str, ...] = ()
    sequence_parallel: int = 1
    threads: int | None = None
    generation_threads: int | None = None
    lora: tuple[tuple[Path, float], ...] = ()
    quantise: str | None = None
    backend: str = "auto"
    memory: EngineMemory = field(default_factory=EngineMemory)
    engines: EngineConfig = field(default_factory=EngineConfig)
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    def devices_of(self, role: StreamName) -> tuple[str, ...]:
        """The devices of an engine, one or several."""
        if role == UND:
            return self.understanding_devices or (self.device,)
        return self.generation_devices or (self.generation_device or self.device,)


def build_service(config: ServeConfig) -> EngineService:
    """Service of a checkpoint, to `start`. Raises the errors of `load`."""
    if config.mode == "separate":
        return _separate(config)
    place = (config.folder, config.config, config.dtype, config.device)
    weights = config.memory.of_load(
        *place,
        lora=config.lora,
        quantise=config.quantise,
        backend=config.backend,
        attention=config.engines.attention,
    )
    pipe = load(
        config.folder,
        config=config.config,
        dtype=config.dtype,
        device=config.device,
        lora=config.lora or None,
        attention=config.engines.attention,
        quantise=config.quantise,
        backend=config.backend,
        **weights,
    )
    return colocated(pipe, config.engines, config.admission, config.watch)


def colocated(
    pipe: Pipeline,
    engines: EngineConfig | None = None,
    admission: AdmissionConfig | None = None,
    watch: WatchConfig | None = None,
) -> EngineService:
    """Service of a loaded model, both engines in one thread of this process."""
    engine = EngineThread(pipe.model, engines or EngineConfig(), watch, pipe.residency)
    client = EngineClient("model", engine)
    clients = EngineClients(client, client, LocalTransport())
    return EngineService(pipe.processor, clients, admission or AdmissionConfig())


def serving_dtype(config: ServeConfig, checkpoint: CheckpointFolder) -> DtypeChoice:
    """Dtype of both engines: one, because they hand keys and values to each other.

    Devices are not touched: that is for the engines' processes. Raises RequestError for an unknown
    dtype.
    """
    devices = config.devices_of(UND) + config.devices_of(GEN)
    types = [device.partition(":")[0] for device in devices]
    accelerator = next((kind for kind in types if kind != "cpu"), "cpu")
    return choose_dtype(config.dtype, checkpoint, accelerator)


def _separate(config: ServeConfig) -> EngineService:
    checkpoint = CheckpointFolder.open(config.folder, config.config)
    check_degree(checkpoint.config, len(config.devices_of(UND)))
    check_sequence(len(config.devices_of(GEN)), config.sequence_parallel)
    dtype = serving_dtype(config, checkpoint)
    processor = load_processor(checkpoint, dtype.dtype)
    _check_shared_memory(processor, config)
    space = SharedSpace()
    clients = EngineClients(
        EngineClient("understanding", _process(UND, config, dtype, space)),
        EngineClient("generation", _process(GEN, config, dtype, space)),
        SharedTransport(f"{space.prefix}front_"),
        space,
    )
    return EngineService(processor, clients, config.admission)


def shared_memory_needed(model: ModelConfig, dtype: torch.dtype, config: ServeConfig) -> int:
    """Shared memory in bytes when everything the limits allow is in transit at once.

    Keys and values of a full cache, and noise and result of all images and clips, in float32.
    """
    cached = model.kv_bytes(dtype.itemsize)
    image = max(model.token_width, model.tube_width) * torch.float32.itemsize * 2
    plan = plan_execution(model, torch.device(config.devices_of(UND)[0]), dtype)
    plan = replace(plan, **config.engines.limits)
    return plan.kv_blocks * plan.kv_block_size * cached + config.admission.image_tokens * image


def _check_shared_memory(processor: Processor, config: ServeConfig) -> None:
    needed = shared_memory_needed(processor.config, processor.dtype, config)
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
    role: StreamName, config: ServeConfig, dtype: DtypeChoice, space: SharedSpace
) -> EngineProcess:
    generates = role == GEN
    devices = config.devices_of(role)
    threads = (config.generation_threads if generates else None) or config.threads
    if threads is None and len(devices) > 1:
        threads = max(1, torch.get_num_threads() // len(devices))
    return EngineProcess(
        ProcessConfig(
            role=role,
            folder=config.folder,
            config=config.config,
            dtype=dtype,
            devices=devices,
            sequence=config.sequence_parallel if generates else 1,
            threads=threads,
            lora=config.lora,
            quantise=config.quantise,
            backend=config.backend,
            memory=config.memory,
            engines=config.engines,
            pieces=space.prefix,
        ),
        config.watch,
    )
