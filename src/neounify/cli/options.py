"""Options of the commands: dataclasses whose fields are options, grouped by what they set.

A field of the tasks' options is also a field of a line of a JSONL batch. None leaves the value to
the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from neounify.cli.command import UsageError, parse_interval, parse_size
from neounify.config import TextSampling
from neounify.config.sampling import knob_doc
from neounify.flow.guidance import Norm
from neounify.flow.sampling import SOLVERS, Fast, ImageSampling

MODEL, IMAGES, TEXT = "Model", "Image generation", "Text generation"
FILES, BATCH, REPORT = "Output", "Batch", "Reporting"
"""Headings under which `--help` groups the options of most commands."""


def option(panel: str, metavar: str | None, help: str, *flags: str, **details: Any) -> Any:
    """An option under a heading of `--help`; `details` as for typer.Option."""
    return typer.Option(
        *flags, metavar=metavar, help=help or None, rich_help_panel=panel, **details
    )


def image_knob(name: str, metavar: str | None, *flags: str) -> Any:
    """The option of one field of ImageSampling, described by the sentence of the field."""
    help = knob_doc(ImageSampling, name)
    return option(IMAGES, metavar, help, *flags)


def text_knob(name: str, metavar: str, *flags: str) -> Any:
    """The option of one field of TextSampling, described by the sentence of the field."""
    help = knob_doc(TextSampling, name)
    return option(TEXT, metavar, help, *flags)


# --- model, output, reporting ---


ResidentLayers = Annotated[
    int | None,
    option(MODEL, "N", "Layers that stay with --memory layers. Default: as many as fit.", min=0),
]
PlanCheck = Annotated[
    str, option(MODEL, "check|ignore", "Refuse a model that does not fit in memory, or try it.")
]
ConfigFolder = Annotated[
    Path | None,
    option(
        MODEL,
        "FOLDER",
        "Folder of config.json and the tokenizer, for a model that is one file of weights, or for "
        "PixelUMM, that of Qwen3-8B. Default: the folder of the model or file.",
        "--config",
    ),
]
"""The option --config of every command that opens a model."""


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """Folder or file of the model."""

    model: Annotated[
        Path | None,
        option(
            MODEL,
            "FOLDER|FILE",
            "Folder of the checkpoint: config.json, *.safetensors, tokenizer files. Or one file, "
            "*.safetensors or *.gguf.",
            "--model",
            "-m",
            envvar="NEOUNIFY_MODEL",
        ),
    ] = None
    config: ConfigFolder = None


@dataclass(frozen=True, kw_only=True)
class WeightOptions:
    """Number format and LoRAs of a checkpoint's weights."""

    dtype: Annotated[
        str | None,
        option(
            MODEL,
            "TYPE",
            "Number format of the weights: float32, bfloat16 or float16. Default: the "
            "fastest exact one on this machine; convert keeps the stored one.",
        ),
    ] = None
    lora: Annotated[
        list[str] | None,
        option(
            MODEL,
            "FILE[:STRENGTH]",
            "Merge a LoRA of any format, with a strength (default 1). May be repeated.",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Device of a command."""

    device: Annotated[
        str | None,
        option(MODEL, "cpu|cuda:N|mps|xpu", "Where to compute. Default: a GPU if there is one."),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ThreadOptions(DeviceOptions):
    """Device and threads of a command."""

    threads: Annotated[
        int | None,
        option(
            MODEL,
            "N",
            "CPU threads. Default: all cores; `serve` in one process leaves one for HTTP.",
            min=1,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ColourOptions:
    """Colour management of input images."""

    colour_profiles: Annotated[
        bool,
        option(
            MODEL,
            None,
            "Convert input images by their colour profile, or treat their values as sRGB, "
            "as the published code does.",
            "--colour-profiles/--no-colour-profiles",
        ),
    ] = True


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Attention backend."""

    attention: Annotated[
        str,
        option(
            MODEL,
            "auto|sdpa|blocks|varlen|graphs",
            "Attention backend: the best one for the device, batched kernels, the reference, or "
            "for a GPU varlen_attn or recorded steps.",
        ),
    ] = "auto"


@dataclass(frozen=True, kw_only=True)
class QuantOptions:
    """Quantised weights of a model."""

    quantise: Annotated[
        str | None,
        option(
            MODEL,
            "PRESET",
            "Quantise the weights whenever they are read: int8, int8-all, fp8, w4-mixed or w4.",
        ),
    ] = None
    backend: Annotated[
        str,
        option(
            MODEL,
            "NAME",
            "How quantised layers compute: auto, reference, torch, w8a8, comfy-kitchen, or "
            "decoded to plain weights.",
        ),
    ] = "auto"


@dataclass(frozen=True, kw_only=True)
class ModelOptions(
    QuantOptions, AttentionOptions, ColourOptions, ThreadOptions, WeightOptions, NamedModel
):
    """The model of a command, its weights and its devices."""

    devices: Annotated[
        str | None,
        option(MODEL, "NAME,NAME", "Spread the model over these, in place of --device."),
    ] = None
    memory: Annotated[
        str,
        option(
            MODEL,
            "auto|all|stream|layers",
            "Weights kept in memory: all, those of the active stream, or of that only some "
            "layers. Default: the first that fits.",
        ),
    ] = "auto"
    resident_layers: ResidentLayers = None
    plan: PlanCheck = "check"


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Output of a command: quiet, JSON, tracebacks."""

    quiet: Annotated[
        bool,
        option(REPORT, None, "Only the result: no progress bars, no notes.", "--quiet", "-q"),
    ] = False
    json: Annotated[
        bool,
        option(REPORT, None, "Print the result as one line of JSON.", "--json"),
    ] = False
    debug: Annotated[
        bool,
        option(REPORT, None, "Show the traceback of an error.", "--debug"),
    ] = False


@dataclass(frozen=True, kw_only=True)
class OverwriteOptions:
    """Whether existing files may be replaced."""

    overwrite: Annotated[
        bool,
        option(FILES, None, "Replace existing files.", "--overwrite"),
    ] = False


@dataclass(frozen=True, kw_only=True)
class ImageFileOptions(OverwriteOptions):
    """Files of generated images."""

    previews: Annotated[
        bool,
        option(
            FILES,
            None,
            "Also save a contact sheet with the predicted image of every step.",
            "--previews",
        ),
    ] = False


@dataclass(frozen=True, kw_only=True)
class _ImageTarget:
    output: Annotated[
        Path,
        option(
            FILES,
            "FOLDER|FILE.png",
            "Where to save. Files in a folder are never overwritten: the second of a name "
            "gets the suffix -2.",
            "--output",
            "-o",
        ),
    ] = Path("outputs")


@dataclass(frozen=True, kw_only=True)
class ImageOutputOptions(ImageFileOptions, _ImageTarget):
    """Files of generated images, and their folder."""


# --- tasks ---


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """Image generation, without guidance by images."""

    size: Annotated[
        str | None,
        option(IMAGES, "WxH", "Width and height in pixels, such as 1024x768."),
    ] = None
    width: Annotated[
        int | None,
        option(IMAGES, "PIXELS", "With --height, instead of --size."),
    ] = None
    height: Annotated[
        int | None,
        option(IMAGES, "PIXELS", "With --width, instead of --size."),
    ] = None
    steps: Annotated[int | None, image_knob("steps", "N")] = None
    guidance: Annotated[float | None, image_knob("guidance", "G")] = None
    negative_prompt: Annotated[
        str | None,
        option(IMAGES, "TEXT", "What guidance steers away from; needs --guidance above 1."),
    ] = None
    interval: Annotated[str | None, image_knob("guidance_interval", "LO,HI")] = None
    norm: Annotated[str | None, image_knob("guidance_norm", "|".join(get_args(Norm)))] = None
    shift: Annotated[float | None, image_knob("shift", "S")] = None
    solver: Annotated[str | None, image_knob("solver", "|".join(SOLVERS))] = None
    published_solver: Annotated[
        bool, image_knob("published_solver", None, "--published-solver")
    ] = False
    t_eps: Annotated[float | None, image_knob("t_eps", "E", "--t-eps")] = None
    fast: Annotated[str | None, image_knob("fast", "|".join(get_args(Fast)))] = None
    guidance_reuse: Annotated[int | None, image_knob("guidance_reuse", "K")] = None
    guidance_stop: Annotated[float | None, image_knob("guidance_stop", "SHARE")] = None
    step_cache: Annotated[float | None, image_knob("step_cache", "SHARE")] = None
    step_cache_most: Annotated[int | None, image_knob("step_cache_most", "N")] = None
    step_cache_warm: Annotated[int | None, image_knob("step_cache_warm", "N")] = None
    seed: Annotated[
        int,
        option(IMAGES, "N", "Random seed: same seed, same image."),
    ] = 0
    think: Annotated[
        bool,
        option(IMAGES, None, "Let the model write a thought first.", "--think"),
    ] = False
    system: Annotated[
        str | None,
        option(IMAGES, "TEXT", "System message. Default: the checkpoint's."),
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
            "published_solver": self.published_solver,
            "t_eps": self.t_eps,
            "fast": self.fast,
            "guidance_reuse": self.guidance_reuse,
            "guidance_stop": self.guidance_stop,
            "step_cache": self.step_cache,
            "step_cache_most": self.step_cache_most,
            "step_cache_warm": self.step_cache_warm,
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
        option(IMAGES, "N", "Images per prompt.", "--count", "-n"),
    ] = 1
    max_think_tokens: Annotated[
        int | None,
        option(IMAGES, "N", "Maximum length of the thought, with --think."),
    ] = None

    def arguments(self) -> dict[str, Any]:
        values = super().arguments() | {"images_per_prompt": self.count}
        if self.max_think_tokens is not None:
            values["max_think_tokens"] = self.max_think_tokens
        return values


@dataclass(frozen=True, kw_only=True)
class ClipOptions(GenerateOptions):
    """Generation of images, or with `frames` of clips, from a prompt."""

    frames: Annotated[
        int | None,
        option(IMAGES, "N", "Frames of a video to generate instead, a multiple of a tube's."),
    ] = None
    fps: Annotated[
        float | None, option(IMAGES, "RATE", "Frames per second. Default: the checkpoint's.")
    ] = None

    def arguments(self) -> dict[str, Any]:
        rate = {} if self.fps is None else {"fps": self.fps}
        frames = {} if self.frames is None else {"frames": self.frames}
        return super().arguments() | frames | rate


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
    """Text generation."""

    max_new_tokens: Annotated[
        int | None,
        option(TEXT, "N", "Maximum length of the answer, in tokens."),
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
    """Answers to questions."""

    stop: Annotated[
        list[str] | None,
        option(TEXT, "TEXT", "End the answer before this text. May be repeated."),
    ] = None
    seed: Annotated[
        int | None,
        option(
            TEXT, "N", "Random seed, for a --temperature above 0. Default: a new one each time."
        ),
    ] = None
    think: Annotated[
        bool,
        option(TEXT, None, "Let the model write a thought first.", "--think"),
    ] = False
    system: Annotated[
        str | None,
        option(TEXT, "TEXT", "System message."),
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
        option(
            IMAGES,
            "N",
            "Maximum number of images; the text continues after the last one. Default: 10.",
        ),
    ] = None

    def arguments(self) -> dict[str, Any]:
        values = super().arguments() | self.text_arguments()
        if self.max_images is not None:
            values["max_images"] = self.max_images
        return values
