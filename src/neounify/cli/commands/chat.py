"""`neounify chat`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from neounify.cli.models import resolve_model
from neounify.cli.options import (
    FILES,
    BatchOptions,
    ChatOptions,
    ModelOptions,
    ReportOptions,
)
from neounify.runtime import lasting_imports


def chat(
    question: Annotated[
        str | None,
        typer.Argument(
            metavar="QUESTION", help="What to ask, in quotes. Without one, a conversation starts."
        ),
    ] = None,
    *,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A picture to talk about. May be repeated; `<image>` in the question marks "
            "where each belongs.",
            rich_help_panel=FILES,
        ),
    ] = None,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Where --input and /save write.",
            rich_help_panel=FILES,
        ),
    ] = Path("outputs"),
    model: ModelOptions,
    options: ChatOptions,
    batch: BatchOptions,
    report: ReportOptions,
) -> None:
    """Ask about pictures or anything else; the answer appears as it is written.

    Without a question you get a conversation: the model remembers what was said, /image FILE
    shows it a picture, /help lists what else there is.

    \b
      neounify chat "What is in the picture?" --image lake.png --model FOLDER
      neounify chat
      neounify chat --input questions.jsonl --output answers
    """
    resolve_model(model.model)
    with lasting_imports():
        from neounify.cli.chat_commands import answer, answer_batch, converse

    if batch.input is not None:
        answer_batch(question, image or (), output, model, options, batch, report)
    elif question is not None:
        answer(question, image or (), model, options, report)
    else:
        converse(image or (), output, model, options, report)
