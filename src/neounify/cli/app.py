"""The commands, gathered."""

from __future__ import annotations

from typing import Annotated

import typer

import neounify
from neounify.cli.command import with_options
from neounify.cli.commands.chat import chat
from neounify.cli.commands.convert import convert
from neounify.cli.commands.edit import edit
from neounify.cli.commands.eval import evaluate
from neounify.cli.commands.generate import generate
from neounify.cli.commands.inspect import inspect
from neounify.cli.commands.story import story
from neounify.cli.commands.toy import toy
from neounify.cli.commands.train import train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


_HELP = """\
One model that reads, writes, looks and paints.

The commands need a model: a folder with a SenseNova-U1 checkpoint (config.json, *.safetensors, \
tokenizer files), named by --model or by the environment variable NEOUNIFY_MODEL. No model at \
hand? The command `neounify toy FOLDER` makes a tiny untrained one, enough to try every command.

\b
  neounify toy my-toy
  neounify generate "a red boat on a calm lake" --model my-toy
"""


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"neounify {neounify.__version__}")
        raise typer.Exit


@app.callback(help=_HELP)
def about(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """One model that reads, writes, looks and paints."""


for command in (generate, edit, chat, story, inspect, convert, train, toy):
    app.command()(with_options(command))
app.command("eval")(with_options(evaluate))
