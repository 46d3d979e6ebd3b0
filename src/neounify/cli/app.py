"""The Typer app with all commands."""

from __future__ import annotations

from typing import Annotated

import typer

import neounify
from neounify.cli.command import Command, Group, with_options
from neounify.cli.commands.chat import chat
from neounify.cli.commands.convert import convert
from neounify.cli.commands.doctor import doctor
from neounify.cli.commands.edit import edit
from neounify.cli.commands.eval import evaluate
from neounify.cli.commands.generate import generate
from neounify.cli.commands.inspect import inspect
from neounify.cli.commands.provenance import provenance
from neounify.cli.commands.serve import serve
from neounify.cli.commands.story import story
from neounify.cli.commands.toy import toy
from neounify.cli.commands.train import train

app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


_HELP = """\
One model that understands and generates text and images.

The commands use the bundled model, trained on a synthetic world of flat shapes, or the \
SenseNova-U1 checkpoint named by --model or by the environment variable NEOUNIFY_MODEL: a folder \
with config.json, *.safetensors and tokenizer files.

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


for command in (
    generate,
    edit,
    chat,
    story,
    serve,
    inspect,
    provenance,
    convert,
    train,
    doctor,
    toy,
):
    app.command(cls=Command)(with_options(command))
app.command("eval", cls=Command)(with_options(evaluate))
