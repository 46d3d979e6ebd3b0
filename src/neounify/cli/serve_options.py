"""Options of `neounify serve`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from neounify.cli.options import MODEL, ColourOptions, NamedModel, ThreadOptions, WeightOptions
from neounify.runtime.plan import ExecutionPlan

LISTEN, ENGINES, ACCESS, SAFETY = "Listening", "Engines", "Access", "Safety"
REPLICAS = "Replicas"


@dataclass(frozen=True, kw_only=True)
class ServeModelOptions(ColourOptions, ThreadOptions, WeightOptions, NamedModel):
    """Which model is served, and where it runs."""

    mode: Annotated[
        str,
        typer.Option(
            metavar="colocate|separate",
            help="Both engines in one process, or each in a separate one.",
            rich_help_panel=MODEL,
        ),
    ] = "colocate"
    generation_device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --mode separate: where to generate images. Default: as --device.",
            rich_help_panel=MODEL,
        ),
    ] = None
    generation_threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="With --mode separate: CPU threads of image generation. Default: as --threads.",
            rich_help_panel=MODEL,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ListenOptions:
    """Where the server listens."""

    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Address to bind to. 0.0.0.0 accepts other machines; use --api-keys then.",
            rich_help_panel=LISTEN,
        ),
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="N", rich_help_panel=LISTEN)] = 8000
    page: Annotated[
        bool,
        typer.Option("--page/--no-page", help="The web UI at /.", rich_help_panel=LISTEN),
    ] = True
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Name of the model in the API. Default: its folder's name.",
            rich_help_panel=LISTEN,
        ),
    ] = None
    public_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Base of result URLs, behind a proxy.",
            rich_help_panel=LISTEN,
        ),
    ] = None
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Host name of this server, besides localhost, the machine's name and IP "
            "addresses. May be repeated, * is any. Requests to other names get 421. Default "
            "with --api-keys: any.",
            rich_help_panel=LISTEN,
        ),
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Origin whose pages may use the API, such as http://localhost:3000. May be "
            "repeated, * is any. Default: none.",
            rich_help_panel=LISTEN,
        ),
    ] = None
    drain_seconds: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="S",
            help="Time for running requests to finish after SIGTERM.",
            rich_help_panel=LISTEN,
        ),
    ] = 60


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Capacity and time limits of the engines."""

    cache_tokens: Annotated[
        int | None,
        typer.Option(
            min=64,
            metavar="N",
            help="Size of the KV cache, in tokens of all requests together. Default: "
            f"{ExecutionPlan.kv_blocks * ExecutionPlan.kv_block_size:,}.",
            rich_help_panel=ENGINES,
        ),
    ] = None
    prefill_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Maximum number of prompt tokens per prefill step. Default: "
            f"{ExecutionPlan.prefill_step_rows}.",
            rich_help_panel=ENGINES,
        ),
    ] = None
    step_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Maximum number of image tokens per denoising step; fewer lower the latency of "
            f"text. Default: {ExecutionPlan.denoise_step_rows}.",
            rich_help_panel=ENGINES,
        ),
    ] = None
    requests: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Maximum number of concurrent requests; further requests get 429.",
            rich_help_panel=ENGINES,
        ),
    ] = 128
    image_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Maximum number of tokens of all images in progress; further requests get 429.",
            rich_help_panel=ENGINES,
        ),
    ] = 65_536
    max_image_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Maximum number of tokens of one image. Default: four times those of the "
            "model's default size, at least 1024.",
            rich_help_panel=ENGINES,
        ),
    ] = None
    step_seconds: Annotated[
        float,
        typer.Option(
            min=1,
            metavar="S",
            help="An engine is restarted when one step takes longer.",
            rich_help_panel=ENGINES,
        ),
    ] = 600.0
    silence_seconds: Annotated[
        float,
        typer.Option(
            min=2,
            metavar="S",
            help="With --mode separate: an engine process without a heartbeat for this long is "
            "restarted.",
            rich_help_panel=ENGINES,
        ),
    ] = 20.0


@dataclass(frozen=True, kw_only=True)
class AccessOptions:
    """API keys and limits of requests."""

    api_keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File with one name:key per line; other requests get 401. Alternatively, the "
            "entries in NEOUNIFY_API_KEYS.",
            rich_help_panel=ACCESS,
        ),
    ] = None
    requests_per_minute: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Rate limit of each key.", rich_help_panel=ACCESS),
    ] = None
    concurrent: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Concurrent requests of each key.", rich_help_panel=ACCESS
        ),
    ] = None
    deadline: Annotated[
        float,
        typer.Option(min=1, metavar="S", help="Time limit of a request.", rich_help_panel=ACCESS),
    ] = 600.0
    max_steps: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Maximum denoising steps of an image.", rich_help_panel=ACCESS
        ),
    ] = 200
    max_body_mb: Annotated[
        int,
        typer.Option(
            min=1, metavar="MIB", help="Maximum size of a request body.", rich_help_panel=ACCESS
        ),
    ] = 64
    allow_images_from: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST[:PORT]",
            help="Fetch image URLs from this host. May be repeated. Default: data URLs only.",
            rich_help_panel=ACCESS,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SafetyOptions:
    """Checks of prompts and images, and what images carry."""

    word_list: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Refuse prompts that contain these words or phrases, one per line.",
            rich_help_panel=SAFETY,
        ),
    ] = None
    hook: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE:NAME",
            help="Custom check of prompts and images. May be repeated.",
            rich_help_panel=SAFETY,
        ),
    ] = None
    watermark: Annotated[
        bool,
        typer.Option(
            "--watermark", help="Add an invisible watermark to every image.", rich_help_panel=SAFETY
        ),
    ] = False
    metadata_prompts: Annotated[
        bool,
        typer.Option(
            "--metadata-prompts",
            help="Write prompts and negative prompts into the metadata of images.",
            rich_help_panel=SAFETY,
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class ReplicaOptions:
    """Replicas of the server, by Ray Serve."""

    replicas: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Replicas of the server behind one address, by Ray Serve.",
            rich_help_panel=REPLICAS,
        ),
    ] = 1
    replica_cpus: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="X",
            help="CPU cores reserved for each replica. Default: as --threads, else 1.",
            rich_help_panel=REPLICAS,
        ),
    ] = None
    replica_gpus: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="X",
            help="GPUs reserved for each replica. Default: one per device it uses.",
            rich_help_panel=REPLICAS,
        ),
    ] = None
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="auto|HOST:PORT",
            help="Ray cluster to run on. Default: this machine.",
            rich_help_panel=REPLICAS,
        ),
    ] = None
