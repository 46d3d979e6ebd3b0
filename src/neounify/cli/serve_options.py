"""Options of `neounify serve`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from neounify.cli.options import (
    MODEL,
    AttentionOptions,
    ColourOptions,
    NamedModel,
    PlanCheck,
    QuantOptions,
    ResidentLayers,
    ThreadOptions,
    WeightOptions,
    option,
)
from neounify.runtime.plan import ExecutionPlan

LISTEN, ENGINES, ACCESS, SAFETY = "Listening", "Engines", "Access", "Safety"
REPLICAS = "Replicas"


@dataclass(frozen=True, kw_only=True)
class ServeModelOptions(
    QuantOptions, AttentionOptions, ColourOptions, ThreadOptions, WeightOptions, NamedModel
):
    """The served model, its engines' devices and threads."""

    mode: Annotated[
        str,
        option(
            MODEL, "colocate|separate", "Both engines in one process, or each in a separate one."
        ),
    ] = "colocate"
    generation_device: Annotated[
        str | None,
        option(
            MODEL, "NAME", "With --mode separate: where to generate images. Default: as --device."
        ),
    ] = None
    understanding_devices: Annotated[
        str | None,
        option(
            MODEL,
            "NAME,NAME",
            "Spread the understanding engine over these, one process each: some of the heads on "
            "each. Implies --mode separate.",
        ),
    ] = None
    generation_devices: Annotated[
        str | None,
        option(
            MODEL,
            "NAME,NAME",
            "Spread the generation engine over these, one process each: some of the guidance "
            "branches on each. Implies --mode separate.",
        ),
    ] = None
    sequence_parallel: Annotated[
        int,
        option(
            MODEL,
            "N",
            "With --generation-devices: so many of them share the rows of each image.",
            min=1,
        ),
    ] = 1
    generation_threads: Annotated[
        int | None,
        option(
            MODEL,
            "N",
            "With --mode separate: CPU threads of image generation. Default: as --threads.",
            min=1,
        ),
    ] = None
    memory: Annotated[
        str,
        option(
            MODEL,
            "auto|all|layers",
            "Weights kept in memory: all, or of each stream only some layers. Default: the first "
            "that fits.",
        ),
    ] = "auto"
    resident_layers: ResidentLayers = None
    plan: PlanCheck = "check"


@dataclass(frozen=True, kw_only=True)
class ListenOptions:
    """Address and names of the server."""

    host: Annotated[
        str,
        option(
            LISTEN,
            "ADDRESS",
            "Address to bind to. 0.0.0.0 accepts other machines; use --api-keys then.",
        ),
    ] = "127.0.0.1"
    port: Annotated[int, option(LISTEN, "N", "", min=1, max=65535)] = 8000
    page: Annotated[
        bool,
        option(LISTEN, None, "The web UI at /.", "--page/--no-page"),
    ] = True
    name: Annotated[
        str | None,
        option(LISTEN, "NAME", "Name of the model in the API. Default: its folder's name."),
    ] = None
    public_url: Annotated[
        str | None,
        option(LISTEN, "URL", "Base of result URLs, behind a proxy."),
    ] = None
    allowed_host: Annotated[
        list[str] | None,
        option(
            LISTEN,
            "NAME",
            "Host name of this server, besides localhost, the machine's name and IP "
            "addresses. May be repeated, * is any. Requests to other names get 421. Default "
            "with --api-keys: any.",
        ),
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        option(
            LISTEN,
            "ORIGIN",
            "Origin whose pages may use the API, such as http://localhost:3000. May be "
            "repeated, * is any. Default: none.",
        ),
    ] = None
    drain_seconds: Annotated[
        int,
        option(LISTEN, "S", "Time for running requests to finish after SIGTERM.", min=1),
    ] = 60


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Capacity and time limits of the engines."""

    cache_tokens: Annotated[
        int | None,
        option(
            ENGINES,
            "N",
            "Size of the KV cache, in tokens of all requests together. Default: "
            f"{ExecutionPlan.kv_blocks * ExecutionPlan.kv_block_size:,}, or what fits into half "
            "of the free memory.",
            min=64,
        ),
    ] = None
    prefill_tokens: Annotated[
        int | None,
        option(
            ENGINES,
            "N",
            "Maximum number of prompt tokens per prefill step. Default: "
            f"{ExecutionPlan.prefill_step_rows}.",
            min=1,
        ),
    ] = None
    step_tokens: Annotated[
        int | None,
        option(
            ENGINES,
            "N",
            "Maximum number of image tokens per denoising step; fewer lower the latency of "
            f"text. Default: {ExecutionPlan.denoise_step_rows}.",
            min=1,
        ),
    ] = None
    requests: Annotated[
        int,
        option(
            ENGINES, "N", "Maximum number of concurrent requests; further requests get 429.", min=1
        ),
    ] = 128
    image_tokens: Annotated[
        int,
        option(
            ENGINES,
            "N",
            "Maximum number of tokens of all images in progress; further requests get 429.",
            min=1,
        ),
    ] = 65_536
    max_image_tokens: Annotated[
        int | None,
        option(
            ENGINES,
            "N",
            "Maximum number of tokens of one image. Default: four times those of the "
            "model's default size, at least 1024.",
            min=1,
        ),
    ] = None
    step_seconds: Annotated[
        float,
        option(ENGINES, "S", "An engine is restarted when one step takes longer.", min=1),
    ] = 600.0
    silence_seconds: Annotated[
        float,
        option(
            ENGINES,
            "S",
            "With --mode separate: an engine process without a heartbeat for this long is "
            "restarted.",
            min=2,
        ),
    ] = 20.0


@dataclass(frozen=True, kw_only=True)
class AccessOptions:
    """API keys and limits of requests."""

    api_keys: Annotated[
        Path | None,
        option(
            ACCESS,
            "FILE",
            "File with one name:key per line; other requests get 401. Alternatively, the "
            "entries in NEOUNIFY_API_KEYS.",
        ),
    ] = None
    requests_per_minute: Annotated[
        int | None,
        option(ACCESS, "N", "Rate limit of each key.", min=1),
    ] = None
    concurrent: Annotated[
        int | None,
        option(ACCESS, "N", "Concurrent requests of each key.", min=1),
    ] = None
    deadline: Annotated[
        float,
        option(ACCESS, "S", "Time limit of a request.", min=1),
    ] = 600.0
    max_steps: Annotated[
        int,
        option(ACCESS, "N", "Maximum denoising steps of an image.", min=1),
    ] = 200
    max_frames: Annotated[
        int,
        option(ACCESS, "N", "Maximum frames of a generated video.", min=1),
    ] = 240
    max_input_frames: Annotated[
        int,
        option(ACCESS, "N", "Maximum frames that are seen of a request's input videos.", min=1),
    ] = 96
    max_body_mb: Annotated[
        int,
        option(ACCESS, "MIB", "Maximum size of a request body.", min=1),
    ] = 64
    allow_images_from: Annotated[
        list[str] | None,
        option(
            ACCESS,
            "HOST[:PORT]",
            "Fetch URLs of images and videos from this host. May be repeated. Default: data URLs "
            "only.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SafetyOptions:
    """Checks of prompts and images, and what images carry."""

    word_list: Annotated[
        Path | None,
        option(SAFETY, "FILE", "Refuse prompts that contain these words or phrases, one per line."),
    ] = None
    hook: Annotated[
        list[str] | None,
        option(SAFETY, "MODULE:NAME", "Custom check of prompts and images. May be repeated."),
    ] = None
    watermark: Annotated[
        bool,
        option(SAFETY, None, "Add an invisible watermark to every image.", "--watermark"),
    ] = False
    metadata_prompts: Annotated[
        bool,
        option(
            SAFETY,
            None,
            "Write prompts and negative prompts into the metadata of images.",
            "--metadata-prompts",
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """Replicas of the server, by Ray Serve."""

    replicas: Annotated[
        int,
        option(REPLICAS, "N", "Replicas of the server behind one address, by Ray Serve.", min=1),
    ] = 1
    replica_cpus: Annotated[
        float | None,
        option(
            REPLICAS,
            "X",
            "CPU cores reserved for each replica. Default: as --threads, else 1.",
            min=0,
        ),
    ] = None
    replica_gpus: Annotated[
        float | None,
        option(
            REPLICAS, "X", "GPUs reserved for each replica. Default: one per device it uses.", min=0
        ),
    ] = None
    ray_address: Annotated[
        str | None,
        option(REPLICAS, "auto|HOST:PORT", "Ray cluster to run on. Default: this machine."),
    ] = None
