"""What a checkpoint holds, as tables or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from neounify.checkpoint import CheckpointFolder, Summary, SummaryRow, expected_shapes, summarise
from neounify.cli.display import Display, is_narrow
from neounify.cli.record import read_record
from neounify.config import MlpConfig, ModelConfig
from neounify.errors import CheckpointError
from neounify.pipeline.trained_sizes import named_sizes, trained_sizes

STREAMS = {
    "und": "understanding",
    "gen": "generation",
    "shared": "shared",
    "unknown": "unknown",
    "all": "total",
}
WIDTH = 100
"""Of tables that do not go to a terminal."""


def inspect_picture(path: Path, display: Display) -> None:
    """Print the record of a painted PNG."""
    record = read_record(path)
    if not display.json:
        typer.echo(json.dumps(record, ensure_ascii=False, indent=2))
    display.emit(record)


def inspect_model(folder: Path, display: Display) -> None:
    """Print the tables; raises CheckpointError at the end when tensors are missing or too many."""
    checkpoint = CheckpointFolder.open(folder)
    summary = summarise(checkpoint)
    problem = _problem(checkpoint)
    fingerprint = checkpoint.fingerprint()
    display.emit(
        {
            "folder": checkpoint.path.name,
            "fingerprint": fingerprint,
            "complete": problem is None,
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
    display.say("complete: every tensor the model needs is there, in the right shape")


def config_record(config: ModelConfig) -> dict[str, Any]:
    """The config as JSON; the foreign document it came from is left out."""
    values = {name: value for name, value in vars(config).items() if name != "published"}
    parts = ("und_mlp", "gen_mlp", "flow", "sampling")
    return values | {name: asdict(values[name]) for name in parts}


def _problem(checkpoint: CheckpointFolder) -> CheckpointError | None:
    try:
        checkpoint.check(expected_shapes(checkpoint.config))
    except CheckpointError as error:
        return error
    return None


def _print_lines(checkpoint: CheckpointFolder, fingerprint: str, summary: Summary) -> None:
    """The same as the tables, one fact a line."""
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
    c = checkpoint.config
    width, height = c.sampling.image_size
    sizes, pixels = trained_sizes(c.sampling)
    return [
        ("fingerprint", fingerprint),
        ("kind", f"{'sparse' if c.is_sparse else 'dense'}, {c.image_head} image head"),
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
        (
            "paints by default",
            f"{width}x{height}, {c.sampling.steps} steps, guidance {c.sampling.guidance:g}, "
            f"shift {c.sampling.shift:g}",
        ),
        ("trained at", named_sizes(sizes, pixels) if sizes or pixels else "not recorded"),
    ]


def _mlp(mlp: MlpConfig) -> str:
    if not any(mlp.sparse):
        return f"width {mlp.width}"
    dense = mlp.sparse.count(False)
    text = f"{mlp.num_experts} experts of width {mlp.expert_width}, {mlp.experts_per_token} at work"
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


def human_bytes(count: int) -> str:
    """1234567 -> '1.2 MB'."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
