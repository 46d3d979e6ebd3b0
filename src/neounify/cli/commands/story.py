"""`neounify story`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neounify.cli.models import resolve_model
from neounify.cli.options import (
    FILES,
    ModelOptions,
    ReportOptions,
    StoryOptions,
    StoryOutputOptions,
)
from neounify.runtime import lasting_imports


def story(
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="What to tell and paint, in quotes.")
    ],
    *,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A picture to start from. May be repeated.",
            rich_help_panel=FILES,
        ),
    ] = None,
    model: ModelOptions,
    options: StoryOptions,
    output: StoryOutputOptions,
    report: ReportOptions,
) -> None:
    """Let the model answer in text and pictures by turns.

    The answer gets a folder of its own in `outputs`: numbered PNGs, story.md, and story.html,
    one file with the pictures in it that any browser shows.

    \b
      neounify story "How to fold a paper boat, in pictures" --model FOLDER
      neounify story "Tell the story of this boat" --image boat.png --max-images 4
    """
    resolve_model(model.model)
    with lasting_imports():
        from neounify.cli.storytelling import tell_story

    tell_story(prompt, image or (), model, options, output, report)
