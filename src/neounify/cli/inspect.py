"""`neounify inspect`: a checkpoint as tables or JSON, or the record of a generated PNG or MP4."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from neounify.cli.display import Display, human_bytes, is_narrow
from neounify.cli.models import resolve_model
from neounify.cli.options import ConfigFolder, ReportOptions
from neounify.errors import CheckpointError, RequestError
from neounify.files import WEIGHT_FILES
from neounify.runtime import lasting_imports

if TYPE_CHECKING:
    import torch

    from neounify.checkpoint import CheckpointFolder, Summary, SummaryRow
    from neounify.config import MlpConfig, ModelConfig
    from neounify.quant.stored import StoredCodes

STREAMS = {
    "und": "understanding",
    "gen": "generation",
    "shared": "shared",
    "unknown": "unknown",
    "all": "total",
}
DECODED_WEIGHTS = "decoded"
"""What is shown for quantised weights that become plain ones when they are read."""
WIDTH = 100
"""Columns of tables that do not go to a terminal."""


def inspect(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="MODEL",
            envvar="NEOUNIFY_MODEL",
            help="Checkpoint, a folder or one file of weights, or a PNG or MP4 of neounify.",
        ),
    ] = None,
    *,
    config: ConfigFolder = None,
    report: ReportOptions,
) -> None:
    """Show the architecture of a model, or the record of a generated image or clip.

    For a model: its config, its parameters by stream, part and number format, and whether they
    are complete. The weights are not loaded.

    \b
      neounify inspect FOLDER
      neounify inspect model-Q4_K.gguf --config FOLDER
      neounify inspect outputs/a-red-boat_s0_1.png
    """
    display = Display(quiet=report.quiet, json=report.json)
    weights = model is None or model.is_dir() or model.suffix.lower() in WEIGHT_FILES
    if model is not None and not weights:
        _inspect_output(model, display)
    else:
        _inspect_model(resolve_model(model, "MODEL"), config, display)


def _inspect_output(path: Path, display: Display) -> None:
    """Print the record of a generated PNG or MP4."""
    from neounify.cli.images import read_record

    record = read_record(path)
    if not display.json:
        typer.echo(json.dumps(record, ensure_ascii=False, indent=2))
    display.emit(record)


def _inspect_model(folder: Path, config: Path | None, display: Display) -> None:
    """Print the tables. Raises CheckpointError at the end for missing or unknown tensors."""
    with lasting_imports():
        from neounify.checkpoint import CheckpointFolder, stored_dtype, summarise
        from neounify.video.library import describe_library

    checkpoint = CheckpointFolder.open(folder, config)
    summary = summarise(checkpoint)
    problem = _problem(checkpoint)
    fingerprint = checkpoint.fingerprint()
    display.emit(
        {
            "folder": checkpoint.path.name,
            "fingerprint": fingerprint,
            "complete": problem is None,
            "computed_in": str(stored_dtype(checkpoint)).removeprefix("torch."),
            "quantised": _quantised(checkpoint),
            "video_files": describe_library()[0],
            "config": config_record(checkpoint.config),
            "rows": [asdict(row) for row in summary.rows],
            "streams": [asdict(row) for row in summary.streams],
            "total": asdict(summary.total),
        }
    )
    if not display.json:
        console = Console()
        if not console.is_terminal:
            console = Console(width=WIDTH)
        if is_narrow(console):
            _print_lines(checkpoint, fingerprint, summary)
        else:
            console.print(_facts_table(checkpoint, fingerprint))
            console.print(_weights_table(summary))
    if problem is not None:
        raise problem
    display.say("complete: every tensor of the model is present, in the right shape")


def config_record(config: ModelConfig) -> dict[str, Any]:
    """The config as JSON, without the config.json it was read from."""
    values = {name: value for name, value in vars(config).items() if name != "published"}
    parts = ("und_mlp", "gen_mlp", "flow", "sampling", "video")
    return values | {name: values[name] and asdict(values[name]) for name in parts}


def _problem(checkpoint: CheckpointFolder) -> CheckpointError | None:
    from neounify.checkpoint import expected_shapes

    try:
        checkpoint.check(expected_shapes(checkpoint.config))
    except CheckpointError as error:
        return error
    return None


def _print_lines(checkpoint: CheckpointFolder, fingerprint: str, summary: Summary) -> None:
    """The content of the tables, one value per line."""
    typer.echo(checkpoint.path.name)
    for name, value in _facts(checkpoint, fingerprint):
        typer.echo(f"{name}: {value}")
    for row in (*summary.rows, *summary.streams, summary.total):
        stream, part, dtype, tensors, parameters, size = _cells(row)
        typer.echo(
            f"{stream}, {part} ({dtype}):\n  {parameters} parameters, {tensors} tensors, {size}"
        )


def _facts_table(checkpoint: CheckpointFolder, fingerprint: str) -> Table:
    title = Text(checkpoint.path.name, style="bold")
    table = Table(title=title, show_header=False)
    for name, value in _facts(checkpoint, fingerprint):
        table.add_row(name, Text(value))
    return table


def _facts(checkpoint: CheckpointFolder, fingerprint: str) -> list[tuple[str, str]]:
    from neounify.checkpoint import stored_dtype
    from neounify.config.capabilities import CAPABILITIES
    from neounify.config.families import title_of
    from neounify.image.pixels import named_sizes, trained_sizes

    c = checkpoint.config
    sparsity = "sparse" if c.is_sparse else "dense"
    width, height = c.sampling.image_size
    sizes, pixels = trained_sizes(c.sampling)
    return [
        ("fingerprint", fingerprint),
        ("kind", f"{title_of(c.family)}, {sparsity}, {c.image_head} image head"),
        ("trained to", ", ".join(CAPABILITIES[name] for name in c.capabilities)),
        ("layers", f"{c.num_layers}, hidden size {c.hidden_size}"),
        (
            "attention",
            f"{c.num_heads} heads of {c.head_dim}, {c.num_kv_heads} for keys and values",
        ),
        ("understanding MLP", _mlp(c.und_mlp)),
        ("generation MLP", _mlp(c.gen_mlp)),
        ("vocabulary", f"{c.vocab_size:,} tokens"),
        ("context", f"{c.max_positions:,} positions"),
        ("image token", f"{c.token_size}x{c.token_size} pixels"),
        ("computed in", str(stored_dtype(checkpoint)).removeprefix("torch.")),
        ("text", "yes" if c.lm_head else "no: there is no lm_head, so it only generates images"),
        (
            "image defaults",
            f"{width}x{height}, {c.sampling.steps} steps, guidance {c.sampling.guidance:g}, "
            f"shift {c.sampling.shift:g}",
        ),
        ("trained at", named_sizes(sizes, pixels) if sizes or pixels else "not recorded"),
        *_video_facts(c),
        *((f"backend of {name}", backend) for name, backend in _quantised(checkpoint).items()),
    ]


def _video_facts(c: ModelConfig) -> list[tuple[str, str]]:
    """Of a model of videos: its tubes, the defaults of generated ones, and what reads files."""
    from neounify.video.library import describe_library

    facts, video = [], c.sampling.video
    if not {"chat_video", "generate_video"}.intersection(c.capabilities):
        return []
    if c.video is not None:
        seen = "" if c.sees_tubes else ", generated alone: videos are seen as images"
        frames = f"{c.video.tube_frames} frames" if c.video.tube_frames > 1 else "one frame"
        weights = ", by the weights of images" if c.clips_are_images else ""
        size = f"{c.token_size}x{c.token_size} pixels"
        facts.append(("video token", f"{frames} of {size}{weights}{seen}"))
    if "generate_video" in c.capabilities:
        width, height = video.size
        facts.append(
            (
                "video defaults",
                f"{width}x{height}, {video.frames} frames at {video.fps:g} a second, "
                f"{video.steps} steps, guidance {video.guidance:g}, shift {video.shift:g}, "
                f"{video.solver}",
            )
        )
    return [*facts, ("video files", describe_library()[1])]


def _quantised(checkpoint: CheckpointFolder) -> dict[str, str]:
    """Format of quantised weights → how layers of it compute on this machine, or why not."""
    if not checkpoint.quantised:
        return {}
    import torch

    from neounify.checkpoint.quantised_layers import kept_formats
    from neounify.cli.models import default_device

    device = torch.device(default_device())
    kept = kept_formats(checkpoint)
    backends: dict[str, set[str]] = {}
    for name, codes in checkpoint.quantised.items():
        backend = DECODED_WEIGHTS
        if name in kept:
            backend = _backend(name, codes, device)
        backends.setdefault(codes.label, set()).add(backend)
    return {label: ", ".join(sorted(chosen)) for label, chosen in sorted(backends.items())}


def _backend(name: str, codes: StoredCodes, device: torch.device) -> str:
    """How codes of a weight (published name) compute on a device."""
    from neounify.checkpoint.names import from_published, part_of
    from neounify.quant import experts
    from neounify.quant.backends import AUTO, check_held, choose_backend

    try:
        check_held(codes.format, device)
    except RequestError:
        return f"none: {device.type} cannot hold it; --backend decoded makes plain weights"
    ours = from_published(name)
    if ours is not None and part_of(ours) == "experts" and experts.groups_on(device):
        return experts.GROUPED
    return str(choose_backend(AUTO, codes.format, codes.shape, device))


def _mlp(mlp: MlpConfig) -> str:
    if not any(mlp.sparse):
        return f"width {mlp.width}"
    dense = mlp.sparse.count(False)
    text = f"{mlp.num_experts} experts of width {mlp.expert_width}, {mlp.experts_per_token} active"
    return f"{text}; {dense} layers dense, width {mlp.width}" if dense else text


def _weights_table(summary: Summary) -> Table:
    table = Table(title="weights", title_style="bold")
    for name in ("stream", "part", "dtype"):
        table.add_column(name)
    for name in ("tensors", "parameters", "size"):
        table.add_column(name, justify="right")
    for total in summary.streams:
        for row in summary.rows:
            if row.stream == total.stream:
                table.add_row(*map(Text, _cells(row)))
        table.add_row(*map(Text, _cells(total)), style="bold", end_section=True)
    table.add_row(*map(Text, _cells(summary.total)), style="bold")
    return table


def _cells(row: SummaryRow) -> list[str]:
    name = STREAMS.get(row.stream, row.stream)
    return [
        name,
        row.part,
        row.dtype,
        str(row.tensors),
        f"{row.parameters:,}",
        human_bytes(row.bytes),
    ]
