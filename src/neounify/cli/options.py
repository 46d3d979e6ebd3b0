"""Every option of every command, in groups; None leaves a value to the checkpoint.

The painting and text groups are also the fields that a line of a JSONL batch may set.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from neounify.cli.errors import UsageError

MODEL, PAINTING, TEXT, FILES, BATCH, REPORT = (
    "Model",
    "Painting",
    "Text",
    "Output",
    "Batch",
    "Reporting",
)


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """Which model."""

    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            "-m",
            envvar="NEOUNIFY_MODEL",
            metavar="FOLDER",
            help="Folder of the checkpoint: config.json, *.safetensors, tokenizer files.",
            rich_help_panel=MODEL,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class WeightOptions:
    """How a checkpoint's weights are read."""

    dtype: Annotated[
        str | None,
        typer.Option(
            metavar="float32|bfloat16|float16",
            help="Number format of the weights. Default: the fastest that is exact on this "
            "machine; convert keeps the stored one.",
            rich_help_panel=MODEL,
        ),
    ] = None
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:STRENGTH]",
            help="Merge a LoRA of any form, with a strength (1 if not given). May be repeated.",
            rich_help_panel=MODEL,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ModelOptions(WeightOptions, NamedModel):
    """Which model runs, and where."""

    device: Annotated[
        str | None,
        typer.Option(
            metavar="cpu|cuda|cuda:N",
            help="Where to compute. Default: a GPU if there is one.",
            rich_help_panel=MODEL,
        ),
    ] = None
    memory: Annotated[
        str,
        typer.Option(
            metavar="all|stream",
            help="stream keeps only the half of the weights that is at work in memory: "
            "slower, for models that do not fit.",
            rich_help_panel=MODEL,
        ),
    ] = "all"
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="CPU threads. Default: all cores.",
            rich_help_panel=MODEL,
        ),
    ] = None
    colour_profiles: Annotated[
        bool,
        typer.Option(
            "--colour-profiles/--no-colour-profiles",
            help="Convert input images by their colour profile, or take their numbers for sRGB, "
            "as the published code does.",
            rich_help_panel=MODEL,
        ),
    ] = True


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
    """How text and images by turns are made."""

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
