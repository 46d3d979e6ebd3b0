"""Options of files in and out, and of what is shown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from neounify.cli.options.panels import BATCH, FILES, REPORT


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """What is shown."""

    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet",
            "-q",
            help="No progress bars, no comments: only the result.",
            rich_help_panel=REPORT,
        ),
    ] = False
    json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print the result as one line of JSON.", rich_help_panel=REPORT
        ),
    ] = False
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show where an error came from.", rich_help_panel=REPORT),
    ] = False


@dataclass(frozen=True, kw_only=True)
class OverwriteOptions:
    """Whether existing files may go."""

    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace what is already there.", rich_help_panel=FILES),
    ] = False


@dataclass(frozen=True, kw_only=True)
class PaintedFileOptions(OverwriteOptions):
    """How painted files are saved."""

    previews: Annotated[
        bool,
        typer.Option(
            "--previews",
            help="Also save a sheet that shows the image after each step.",
            rich_help_panel=FILES,
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class _PictureTarget:
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER|FILE.png",
            help="Where to save. In a folder nothing is overwritten: a second file of a name "
            "gets -2 in it.",
            rich_help_panel=FILES,
        ),
    ] = Path("outputs")


@dataclass(frozen=True, kw_only=True)
class _StoryTarget:
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Where the story's own folder goes. A second story of a name gets -2 in it.",
            rich_help_panel=FILES,
        ),
    ] = Path("outputs")


@dataclass(frozen=True, kw_only=True)
class PictureOutputOptions(PaintedFileOptions, _PictureTarget):
    """Where painted pictures go."""


@dataclass(frozen=True, kw_only=True)
class StoryOutputOptions(PaintedFileOptions, _StoryTarget):
    """Where stories go."""


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Work that comes from a file."""

    input: Annotated[
        Path | None,
        typer.Option(
            "--input",
            "-i",
            metavar="FILE.jsonl",
            help="Do every line of a file instead: one JSON object per line with `prompt` and, "
            "if wanted, `id`, `images` and any option by its name (`max_new_tokens`). Run the "
            "same command again to go on after an interruption. A line without a seed "
            "gets --seed + its line number - 1.",
            rich_help_panel=BATCH,
        ),
    ] = None
    batch_size: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Prompts worked on at once, where their settings are equal.",
            rich_help_panel=BATCH,
        ),
    ] = 4
