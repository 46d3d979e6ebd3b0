"""Options of text, and of text with images; also the fields of a line of a JSONL batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from neounify.cli.options.images import ImageGuidanceOptions
from neounify.cli.options.panels import PAINTING, TEXT


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How text is written."""

    max_new_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Longest answer, in tokens.", rich_help_panel=TEXT),
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(
            metavar="T",
            help="0 always takes the likeliest word; towards 1 the answers vary.",
            rich_help_panel=TEXT,
        ),
    ] = None
    top_p: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            help="Draw from the likeliest words that together have this probability.",
            rich_help_panel=TEXT,
        ),
    ] = None
    top_k: Annotated[
        int | None,
        typer.Option(
            metavar="K", help="Draw from the K likeliest words only.", rich_help_panel=TEXT
        ),
    ] = None
    min_p: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            help="Drop tokens with less than this fraction of the most likely token's "
            "probability. Default: 0, none.",
            rich_help_panel=TEXT,
        ),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            help="Above 1, words already there become less likely.",
            rich_help_panel=TEXT,
        ),
    ] = None

    def text_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the pipeline's text calls."""
        values = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
        }
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class ChatOptions(TextOptions):
    """How a question is answered."""

    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="End the answer before this text. May be repeated.",
            rich_help_panel=TEXT,
        ),
    ] = None
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Number of the random draw, for a --temperature above 0. "
            "Default: another one each time.",
            rich_help_panel=TEXT,
        ),
    ] = None
    think: Annotated[
        bool,
        typer.Option("--think", help="Let the model think first.", rich_help_panel=TEXT),
    ] = False
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="System message.", rich_help_panel=TEXT),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the pipeline's chat calls."""
        values = self.text_arguments() | {"think": self.think}
        others = {"stop": self.stop, "seed": self.seed, "system": self.system}
        return values | {name: value for name, value in others.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class StoryOptions(ImageGuidanceOptions, TextOptions):
    """Options of interleaved answers."""

    max_images: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Images at most; after the last one the text goes on. Default: 10.",
            rich_help_panel=PAINTING,
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        values = super().arguments() | self.text_arguments()
        if self.max_images is not None:
            values["max_images"] = self.max_images
        return values
