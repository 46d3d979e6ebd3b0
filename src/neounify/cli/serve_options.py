"""The options of `neounify serve`, in groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from neounify.cli.options import MODEL, ColourOptions, NamedModel, ThreadOptions, WeightOptions

LISTEN, ENGINES, ACCESS, SAFETY = "Listening", "Engines", "Access", "Safety"
REPLICAS = "Replicas"


@dataclass(frozen=True, kw_only=True)
class ServeModelOptions(ColourOptions, ThreadOptions, WeightOptions, NamedModel):
    """Which model is served, and where it runs."""

    mode: Annotated[
        str,
        typer.Option(
            metavar="colocate|separate",
            help="Both engines in one process, or each in one of its own.",
            rich_help_panel=MODEL,
        ),
    ] = "colocate"
    generation_device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --mode separate: where to paint. Default: as --device.",
            rich_help_panel=MODEL,
        ),
    ] = None
    generation_threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="With --mode separate: CPU threads that paint. Default: as --threads.",
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
            help="0.0.0.0 lets other machines in; then ask for keys.",
            rich_help_panel=LISTEN,
        ),
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="N", rich_help_panel=LISTEN)] = 8000
    page: Annotated[
        bool,
        typer.Option("--page/--no-page", help="The page at /.", rich_help_panel=LISTEN),
    ] = True
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The model's name in the API. Default: that of its folder.",
            rich_help_panel=LISTEN,
        ),
    ] = None
    public_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="What URLs of results begin with, behind a proxy.",
            rich_help_panel=LISTEN,
        ),
    ] = None
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A name this server is reached by, besides localhost, this machine's own and IP "
            "addresses; may be repeated, * is any. Requests for other names get 421. Default "
            "with --api-keys: any.",
            rich_help_panel=LISTEN,
        ),
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="Let pages of this origin, such as http://localhost:3000, use the API; may be "
            "repeated, * is any. Default: none.",
            rich_help_panel=LISTEN,
        ),
    ] = None
    drain_seconds: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="S",
            help="On SIGTERM, how long requests under way may go on.",
            rich_help_panel=LISTEN,
        ),
    ] = 60


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How much the engines do at once."""

    cache_tokens: Annotated[
        int,
        typer.Option(
            min=64,
            metavar="N",
            help="Room of the key-value cache, in tokens of all requests together.",
            rich_help_panel=ENGINES,
        ),
    ] = 32_768
    prefill_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens of prompts that are read per step.",
            rich_help_panel=ENGINES,
        ),
    ] = 512
    step_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Image tokens that share a denoising step; less lets text through sooner.",
            rich_help_panel=ENGINES,
        ),
    ] = 1024
    requests: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Requests under way at once; more are told to come back (429).",
            rich_help_panel=ENGINES,
        ),
    ] = 128
    image_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens of all images under way at once; more are told to come back.",
            rich_help_panel=ENGINES,
        ),
    ] = 65_536
    max_image_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens of one image. Default: four times those of the model's default size, "
            "at least 1024.",
            rich_help_panel=ENGINES,
        ),
    ] = None
    step_seconds: Annotated[
        float,
        typer.Option(
            min=1,
            metavar="S",
            help="An engine that is longer in one step is started again.",
            rich_help_panel=ENGINES,
        ),
    ] = 600.0
    silence_seconds: Annotated[
        float,
        typer.Option(
            min=2,
            metavar="S",
            help="With --mode separate: a process that gives no sign for so long is started again.",
            rich_help_panel=ENGINES,
        ),
    ] = 20.0


@dataclass(frozen=True, kw_only=True)
class AccessOptions:
    """Who may ask, and for how much."""

    api_keys: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Lines of name:key; only they are answered. Also: NEOUNIFY_API_KEYS with the "
            "entries themselves.",
            rich_help_panel=ACCESS,
        ),
    ] = None
    requests_per_minute: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Of each key.", rich_help_panel=ACCESS),
    ] = None
    concurrent: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="Requests at once of each key.", rich_help_panel=ACCESS
        ),
    ] = None
    deadline: Annotated[
        float,
        typer.Option(
            min=1, metavar="S", help="Seconds a request may take.", rich_help_panel=ACCESS
        ),
    ] = 600.0
    max_steps: Annotated[
        int, typer.Option(min=1, metavar="N", help="Of one image.", rich_help_panel=ACCESS)
    ] = 200
    max_body_mb: Annotated[
        int,
        typer.Option(min=1, metavar="MIB", help="Of one request.", rich_help_panel=ACCESS),
    ] = 64
    allow_images_from: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST[:PORT]",
            help="Fetch image URLs from this host; may be repeated. Default: data URLs only.",
            rich_help_panel=ACCESS,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class SafetyOptions:
    """What is refused, and how pictures are marked."""

    word_list: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Refuse prompts with these words or phrases, one a line.",
            rich_help_panel=SAFETY,
        ),
    ] = None
    hook: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE:NAME",
            help="Your own check of prompts and images; may be repeated.",
            rich_help_panel=SAFETY,
        ),
    ] = None
    watermark: Annotated[
        bool,
        typer.Option(
            "--watermark", help="An invisible mark in every picture.", rich_help_panel=SAFETY
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
    """How many copies of the server answer, and where."""

    replicas: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Copies of the model behind one address, by Ray Serve.",
            rich_help_panel=REPLICAS,
        ),
    ] = 1
    replica_cpus: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="X",
            help="Cores set aside for each. Default: as --threads, else 1.",
            rich_help_panel=REPLICAS,
        ),
    ] = None
    replica_gpus: Annotated[
        float | None,
        typer.Option(
            min=0,
            metavar="X",
            help="GPUs set aside for each. Default: as many as its devices.",
            rich_help_panel=REPLICAS,
        ),
    ] = None
    ray_address: Annotated[
        str | None,
        typer.Option(
            metavar="auto|HOST:PORT",
            help="Run them on this Ray cluster. Default: on this machine.",
            rich_help_panel=REPLICAS,
        ),
    ] = None
