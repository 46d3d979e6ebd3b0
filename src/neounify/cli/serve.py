"""`neounify serve`: the HTTP server, its engines and its replicas."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from neounify.cli.command import CliError, UsageError
from neounify.cli.display import Display
from neounify.cli.models import default_device, parse_devices, parse_loras, resolve_model
from neounify.cli.options import ReportOptions
from neounify.cli.serve_options import (
    AccessOptions,
    EngineOptions,
    ListenOptions,
    ReplicaOptions,
    SafetyOptions,
    ServeModelOptions,
)
from neounify.errors import missing_extra
from neounify.files import read_text
from neounify.runtime import keep_freed_memory, lasting_imports, share_one_arena

if TYPE_CHECKING:  # the libraries of the extra `serve` may be missing
    from neounify.serve.build import ServeConfig
    from neounify.serve.http import HttpConfig
    from neounify.serve.run import RunConfig
    from neounify.serve.safety.hooks import Hooks

KEYS_VARIABLE = "NEOUNIFY_API_KEYS"
MAX_KEYS_BYTES = 2**20


def serve(
    *,
    model: ServeModelOptions,
    listen: ListenOptions,
    engines: EngineOptions,
    access: AccessOptions,
    safety: SafetyOptions,
    replicas: ReplicaOptions,
    report: ReportOptions,
) -> None:
    """Serve a model behind an OpenAI-compatible API, with a web UI.

    Requests are batched continuously; image generation never blocks text. Without --model the
    bundled model is served.

    \b
      neounify serve
      neounify serve --model FOLDER --mode separate --port 8080 --api-keys keys.txt
    """
    resolve_model(model.model)
    with lasting_imports():
        from neounify.cli.checks import check_device, check_devices, check_model, check_threads

    try:
        with lasting_imports():
            import neounify.serve.run as running
            from neounify.serve.build import serving_dtype
    except ImportError as error:
        raise CliError(missing_extra("servers", "serve", error)) from error
    checkpoint = check_model(model)
    check_device(model.generation_device)
    check_devices(model.understanding_devices, "--understanding-devices")
    check_devices(model.generation_devices, "--generation-devices")
    if replicas.ray_address is None:  # machines of a cluster may have more cores than this one
        check_threads(model.threads)
        check_threads(model.generation_threads, "--generation-threads")
    hooks = _make_hooks(safety)
    config = running.RunConfig(
        serve=_serve_config(model, engines),
        http=_http_config(model, listen, access, safety),
        host=listen.host,
        port=listen.port,
        page=listen.page,
        drain_seconds=listen.drain_seconds,
        log_level="warning" if report.quiet else "info",
    )
    display = Display(quiet=report.quiet, json=report.json)
    share_one_arena()
    keep_freed_memory()
    if listen.host not in ("127.0.0.1", "localhost", "::1") and not config.http.keys:
        display.note(f"{listen.host}:{listen.port} accepts requests of any client: no --api-keys")
    choice = serving_dtype(config.serve, checkpoint)
    display.note(f"loading {config.serve.folder.resolve().name} in {choice}")
    address = f"http://{listen.host}:{listen.port}"
    started = partial(_announce, display, address, listen.page)
    if replicas.replicas == 1 and replicas.ray_address is None:
        chosen = replace(config, serve=replace(config.serve, dtype=choice))
        running.run(chosen, hooks, started)
    else:
        del hooks  # each replica builds its own
        _run_replicas(config, replicas, partial(_make_hooks, safety), started)


def _run_replicas(
    config: RunConfig,
    options: ReplicaOptions,
    make_hooks: Callable[[], Hooks],
    started: Callable[[], None],
) -> None:
    from neounify.serve import replicas

    serve = config.serve
    devices = {*serve.devices_of("und"), *serve.devices_of("gen")}
    gpus = sum(device.startswith("cuda") for device in devices)
    wanted = replicas.ReplicaConfig(
        count=options.replicas,
        cpus=_given(options.replica_cpus, serve.threads or 1),
        gpus=_given(options.replica_gpus, gpus),
        address=options.ray_address,
    )
    try:
        replicas.run_replicas(config, wanted, make_hooks, started)
    except ImportError as error:
        raise CliError(missing_extra("replicas", "ray", error)) from error


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _make_hooks(safety: SafetyOptions) -> Hooks:
    from neounify.provenance.watermark import Marker
    from neounify.serve.safety.hooks import make_hooks

    marker = Marker() if safety.watermark else None
    return make_hooks(safety.word_list, safety.hook or [], marker)


def _announce(display: Display, address: str, page: bool) -> None:
    if page:
        display.say(f"web UI {address}, API {address}/v1, API documentation {address}/docs")
    else:
        display.say(f"API {address}/v1, API documentation {address}/docs")


def _serve_config(model: ServeModelOptions, engines: EngineOptions) -> ServeConfig:
    import torch

    from neounify.runtime.plan import ExecutionPlan
    from neounify.serve.build import Mode, ServeConfig
    from neounify.serve.engines import EngineConfig, WatchConfig
    from neounify.serve.memory import EngineMemory
    from neounify.serve.service import AdmissionConfig

    if model.mode not in get_args(Mode):
        raise UsageError(f"--mode {model.mode} is unknown; known: {', '.join(get_args(Mode))}")
    understanding = parse_devices(model.understanding_devices, "--understanding-devices")
    generation = parse_devices(model.generation_devices, "--generation-devices")
    if generation and model.generation_device is not None:
        raise UsageError("give --generation-device for one or --generation-devices for several")
    if model.sequence_parallel > 1 and len(generation) < 2:
        raise UsageError(
            f"--sequence-parallel {model.sequence_parallel} shares the rows of an image between "
            "several devices: name them with --generation-devices"
        )
    if model.memory == "layers" and max(len(understanding), len(generation)) > 1:
        raise UsageError(
            "--memory layers is for engines on one device each; one that is spread over several "
            "keeps its share of the weights there"
        )
    mode = "separate" if understanding or generation else model.mode
    if model.quantise is not None and max(len(understanding), len(generation)) > 1:
        raise UsageError(
            "--quantise is for engines of one device; for several, serve a model that is written "
            "by `neounify quantise`"
        )
    if mode == "colocate":
        if model.generation_device is not None or model.generation_threads is not None:
            raise UsageError("--generation-device and --generation-threads need --mode separate")
        torch.set_num_threads(model.threads or _engine_threads())
    blocks = engines.cache_tokens and max(1, engines.cache_tokens // ExecutionPlan.kv_block_size)
    limits = {
        "kv_blocks": blocks,
        "prefill_step_rows": engines.prefill_tokens,
        "denoise_step_rows": engines.step_tokens,
        "attention": None if model.attention == "auto" else model.attention,
    }
    return ServeConfig(
        folder=resolve_model(model.model),
        config=model.config,
        mode=mode,  # type: ignore[arg-type]
        dtype=model.dtype,
        device=model.device or default_device(),
        generation_device=model.generation_device,
        understanding_devices=understanding,
        generation_devices=generation,
        sequence_parallel=model.sequence_parallel,
        threads=model.threads,
        generation_threads=model.generation_threads,
        lora=tuple(parse_loras(model.lora)),
        quantise=model.quantise,
        backend=model.backend,
        memory=EngineMemory(
            memory=model.memory,  # type: ignore[arg-type]
            resident_layers=model.resident_layers,
            plan=model.plan,  # type: ignore[arg-type]
        ),
        engines=EngineConfig(limits={k: v for k, v in limits.items() if v is not None}),
        admission=AdmissionConfig(
            requests=engines.requests,
            image_tokens=engines.image_tokens,
            max_image_tokens=engines.max_image_tokens,
        ),
        watch=WatchConfig(step=engines.step_seconds, silence=engines.silence_seconds),
    )


def _engine_threads() -> int:
    """All cores but one, which is left to HTTP."""
    return max(1, (os.cpu_count() or 1) - 1)


def _http_config(
    model: ServeModelOptions, listen: ListenOptions, access: AccessOptions, safety: SafetyOptions
) -> HttpConfig:
    from neounify.serve.http.config import (
        MEBIBYTE,
        HttpConfig,
        Limits,
        default_hosts,
        parse_origin,
    )

    keys = _read_keys(access.api_keys)
    hosts = tuple(listen.allowed_host or ())
    if hosts or not keys:
        hosts += default_hosts(listen.host)
    return HttpConfig(
        model_name=listen.name or resolve_model(model.model).resolve().name,
        keys=keys,
        requests_per_minute=access.requests_per_minute,
        concurrent=access.concurrent,
        limits=Limits(
            deadline=access.deadline,
            steps=access.max_steps,
            output_frames=access.max_frames,
            video_frames=access.max_input_frames,
            body_bytes=access.max_body_mb * MEBIBYTE,
        ),
        remote_hosts=tuple(access.allow_images_from or ()),
        public_url=listen.public_url,
        colour_profiles=model.colour_profiles,
        metadata_prompts=safety.metadata_prompts,
        allowed_hosts=hosts,
        cors_origins=tuple(map(parse_origin, listen.cors_origin or ())),
    )


def _read_keys(file: Path | None) -> dict[str, str]:
    from neounify.serve.http.config import parse_keys

    text = os.environ.get(KEYS_VARIABLE, "")
    if file is not None:
        if not file.is_file():
            raise CliError(
                f"--api-keys {file}: {'not a file' if file.exists() else 'no such file'}"
            )
        text = read_text(file, MAX_KEYS_BYTES, CliError)
        if not parse_keys(text):
            raise CliError(f"--api-keys {file} holds no key; write one name:key per line")
    return parse_keys(text)
