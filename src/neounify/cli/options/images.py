"""Options of images: size, denoising and guidance; also the fields of a line of a JSONL batch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from neounify.cli.errors import UsageError
from neounify.cli.options.panels import PAINTING


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How an image is painted."""

    size: Annotated[
        str | None,
        typer.Option(
            metavar="WxH",
            help="Width and height in pixels, as 1024x768.",
            rich_help_panel=PAINTING,
        ),
    ] = None
    width: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS", help="With --height, instead of --size.", rich_help_panel=PAINTING
        ),
    ] = None
    height: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS", help="With --width, instead of --size.", rich_help_panel=PAINTING
        ),
    ] = None
    steps: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Denoising steps: more take longer and come out finer.",
            rich_help_panel=PAINTING,
        ),
    ] = None
    guidance: Annotated[
        float | None,
        typer.Option(
            metavar="G",
            help="How strongly the prompt pulls; 0 to 1 is no extra pull, and twice as fast.",
            rich_help_panel=PAINTING,
        ),
    ] = None
    negative_prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="What guidance steers away from; needs guidance above 1.",
            rich_help_panel=PAINTING,
        ),
    ] = None
    interval: Annotated[
        str | None,
        typer.Option(
            metavar="LO,HI",
            help="Guide only between these times; 0 is pure noise, 1 the image. Default: 0,1.",
            rich_help_panel=PAINTING,
        ),
    ] = None
    norm: Annotated[
        str | None,
        typer.Option(
            metavar="none|global|channel|cfg_zero_star",
            help="Tame strong guidance. Default: none.",
            rich_help_panel=PAINTING,
        ),
    ] = None
    shift: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            help="Above 1, more of the steps go to the noisy beginning.",
            rich_help_panel=PAINTING,
        ),
    ] = None
    solver: Annotated[
        str | None,
        typer.Option(
            metavar="euler|ab2",
            help="euler is what the models were published with; ab2 needs fewer steps.",
            rich_help_panel=PAINTING,
        ),
    ] = None
    t_eps: Annotated[
        float | None,
        typer.Option(
            "--t-eps",
            metavar="E",
            help="Smallest 1 - t that is divided by. Default: 0.02, or less for a last step "
            "that is shorter.",
            rich_help_panel=PAINTING,
        ),
    ] = None
    seed: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Number of the random draw: same seed, same image.",
            rich_help_panel=PAINTING,
        ),
    ] = 0
    think: Annotated[
        bool,
        typer.Option(
            "--think",
            help="Let the model think in words first.",
            rich_help_panel=PAINTING,
        ),
    ] = False
    system: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="System message. Default: the one that came with the model.",
            rich_help_panel=PAINTING,
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the pipeline's painting calls, but for the seed.

        Raises UsageError for a size or an interval that is none.
        """
        width, height = self.dimensions()
        values = {
            "width": width,
            "height": height,
            "steps": self.steps,
            "guidance": self.guidance,
            "negative_prompt": self.negative_prompt,
            "guidance_interval": None if self.interval is None else parse_interval(self.interval),
            "guidance_norm": self.norm,
            "shift": self.shift,
            "solver": self.solver,
            "t_eps": self.t_eps,
            "system": self.system,
            "think": self.think,
        }
        return {name: value for name, value in values.items() if value is not None}

    def dimensions(self) -> tuple[int | None, int | None]:
        """(width, height) as asked for, in either way."""
        if self.size is None:
            return self.width, self.height
        if self.width is not None or self.height is not None:
            raise UsageError("give --size, or --width and --height, not both")
        return parse_size(self.size)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(SamplingOptions):
    """Painting from words."""

    count: Annotated[
        int,
        typer.Option(
            "--count",
            "-n",
            metavar="N",
            help="Different images per prompt.",
            rich_help_panel=PAINTING,
        ),
    ] = 1
    max_think_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Longest thought, with --think.",
            rich_help_panel=PAINTING,
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        values = super().arguments() | {"images_per_prompt": self.count}
        if self.max_think_tokens is not None:
            values["max_think_tokens"] = self.max_think_tokens
        return values


@dataclass(frozen=True, kw_only=True)
class ImageGuidanceOptions(SamplingOptions):
    """How strongly input pictures pull."""

    image_guidance: Annotated[
        float | None,
        typer.Option(
            metavar="M",
            help="How strongly the input pictures pull; 1 is no extra pull.",
            rich_help_panel=PAINTING,
        ),
    ] = None
    published_interval: Annotated[
        bool,
        typer.Option(
            "--published-interval",
            help="As in the published code: an --interval from 0 never ends.",
            rich_help_panel=PAINTING,
        ),
    ] = False

    def arguments(self) -> dict[str, Any]:
        values = super().arguments() | {"published_interval": self.published_interval}
        if self.image_guidance is not None:
            values["image_guidance"] = self.image_guidance
        return values


@dataclass(frozen=True, kw_only=True)
class EditOptions(ImageGuidanceOptions, GenerateOptions):
    """Painting from pictures and words."""


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) from "1024x768". Raises UsageError."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*[xX×]\s*(\d{1,9})\s*", text)
    if match is None:
        raise UsageError(f"size {text!r} is not WIDTHxHEIGHT, as 1024x768")
    return int(match[1]), int(match[2])


def parse_interval(text: str) -> tuple[float, float]:
    """(low, high) from "0.1,0.9". Raises UsageError."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"interval {text!r} is not LO,HI, as 0.1,0.9") from None
    return low, high
