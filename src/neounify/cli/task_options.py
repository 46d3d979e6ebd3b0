"""Options of the tasks: image generation, text generation, and both together.

A field is an option of the command line and a field of a line of a JSONL batch. None leaves the
value to the checkpoint.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from neounify.cli.errors import UsageError
from neounify.cli.options import IMAGES, TEXT
from neounify.config import TextSampling
from neounify.config.knobs import knob_doc
from neounify.flow.sampling import ImageSampling


def image_knob(name: str, metavar: str | None, *flags: str) -> Any:
    """The option of one field of ImageSampling, described by the sentence of the field."""
    help = knob_doc(ImageSampling, name)
    return typer.Option(*flags, metavar=metavar, help=help, rich_help_panel=IMAGES)


def text_knob(name: str, metavar: str, *flags: str) -> Any:
    """The option of one field of TextSampling, described by the sentence of the field."""
    help = knob_doc(TextSampling, name)
    return typer.Option(*flags, metavar=metavar, help=help, rich_help_panel=TEXT)


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How an image is generated."""

    size: Annotated[
        str | None,
        typer.Option(
            metavar="WxH",
            help="Width and height in pixels, such as 1024x768.",
            rich_help_panel=IMAGES,
        ),
    ] = None
    width: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS", help="With --height, instead of --size.", rich_help_panel=IMAGES
        ),
    ] = None
    height: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS", help="With --width, instead of --size.", rich_help_panel=IMAGES
        ),
    ] = None
    steps: Annotated[int | None, image_knob("steps", "N")] = None
    guidance: Annotated[float | None, image_knob("guidance", "G")] = None
    negative_prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="What guidance steers away from; needs --guidance above 1.",
            rich_help_panel=IMAGES,
        ),
    ] = None
    interval: Annotated[str | None, image_knob("guidance_interval", "LO,HI")] = None
    norm: Annotated[
        str | None, image_knob("guidance_norm", "none|global|channel|cfg_zero_star")
    ] = None
    shift: Annotated[float | None, image_knob("shift", "S")] = None
    solver: Annotated[str | None, image_knob("solver", "euler|ab2")] = None
    t_eps: Annotated[float | None, image_knob("t_eps", "E", "--t-eps")] = None
    seed: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Random seed: same seed, same image.",
            rich_help_panel=IMAGES,
        ),
    ] = 0
    think: Annotated[
        bool,
        typer.Option(
            "--think",
            help="Let the model write a thought first.",
            rich_help_panel=IMAGES,
        ),
    ] = False
    system: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="System message. Default: the checkpoint's.",
            rich_help_panel=IMAGES,
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the pipeline's image calls, without the seed.

        Raises UsageError for a size or an interval that cannot be read.
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
        """(width, height) in pixels, from --size or from --width and --height."""
        if self.size is None:
            return self.width, self.height
        if self.width is not None or self.height is not None:
            raise UsageError("give --size, or --width and --height, not both")
        return parse_size(self.size)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(ImageOptions):
    """Image generation from a prompt."""

    count: Annotated[
        int,
        typer.Option(
            "--count",
            "-n",
            metavar="N",
            help="Images per prompt.",
            rich_help_panel=IMAGES,
        ),
    ] = 1
    max_think_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Maximum length of the thought, with --think.",
            rich_help_panel=IMAGES,
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        values = super().arguments() | {"images_per_prompt": self.count}
        if self.max_think_tokens is not None:
            values["max_think_tokens"] = self.max_think_tokens
        return values


@dataclass(frozen=True, kw_only=True)
class ImageGuidanceOptions(ImageOptions):
    """Guidance by input images."""

    image_guidance: Annotated[float | None, image_knob("image_guidance", "M")] = None
    published_interval: Annotated[
        bool, image_knob("published_interval", None, "--published-interval")
    ] = False

    def arguments(self) -> dict[str, Any]:
        values = super().arguments() | {"published_interval": self.published_interval}
        if self.image_guidance is not None:
            values["image_guidance"] = self.image_guidance
        return values


@dataclass(frozen=True, kw_only=True)
class EditOptions(ImageGuidanceOptions, GenerateOptions):
    """Image editing: generation from input images and an instruction."""


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How text is generated."""

    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Maximum length of the answer, in tokens.", rich_help_panel=TEXT
        ),
    ] = None
    temperature: Annotated[float | None, text_knob("temperature", "T")] = None
    top_p: Annotated[float | None, text_knob("top_p", "P")] = None
    top_k: Annotated[int | None, text_knob("top_k", "K")] = None
    min_p: Annotated[float | None, text_knob("min_p", "P")] = None
    repetition_penalty: Annotated[float | None, text_knob("repetition_penalty", "R")] = None

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
            help="Random seed, for a --temperature above 0. Default: a new one each time.",
            rich_help_panel=TEXT,
        ),
    ] = None
    think: Annotated[
        bool,
        typer.Option("--think", help="Let the model write a thought first.", rich_help_panel=TEXT),
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
            help="Maximum number of images; the text continues after the last one. Default: 10.",
            rich_help_panel=IMAGES,
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        values = super().arguments() | self.text_arguments()
        if self.max_images is not None:
            values["max_images"] = self.max_images
        return values


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) from "1024x768". Raises UsageError."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*[xX×]\s*(\d{1,9})\s*", text)
    if match is None:
        raise UsageError(f"size {text!r} is not WIDTHxHEIGHT, such as 1024x768")
    return int(match[1]), int(match[2])


def parse_interval(text: str) -> tuple[float, float]:
    """(low, high) from "0.1,0.9". Raises UsageError."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"interval {text!r} is not LO,HI, such as 0.1,0.9") from None
    return low, high
