"""The Typer app with all commands."""

from __future__ import annotations

from typing import Annotated

import typer

import neounify
from neounify.cli.command import CliGroup

COMMANDS = {
    "generate": "generate",
    "edit": "edit",
    "chat": "chat",
    "story": "story",
    "serve": "serve",
    "inspect": "inspect",
    "provenance": "provenance",
    "convert": "convert",
    "quantise": "quantise",
    "parity": "parity",
    "train": "train",
    "report": "report",
    "doctor": "doctor",
    "data": "COMMANDS",
    "curate": "curate",
    "plan": "plan",
    "toy": "toy",
    "eval": "evaluate",
    "bench": "COMMANDS",
}
"""The function of every command, in the module of this package that has the command's name.

A mapping in place of a function is a group: its functions by their commands.
"""

app = typer.Typer(
    cls=CliGroup.of(COMMANDS),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


_HELP = """\
One model that understands and generates text and images.

The commands use the bundled model, trained on a synthetic world of flat shapes, or the \
SenseNova-U1 or PixelUMM checkpoint named by --model or by the environment variable \
NEOUNIFY_MODEL: a folder with config.json, *.safetensors and tokenizer files, or one with \
*.safetensors alone, whose other files --config names.

\b
  neounify generate "a red circle left of a blue star"
  neounify chat "How many objects are there?" --image shapes.png
"""


def _show_version(requested: bool) -> None:
    if requested:
        typer.echo(f"neounify {neounify.__version__}")
        raise typer.Exit


@app.callback(help=_HELP)
def about(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """One model that understands and generates text and images."""
