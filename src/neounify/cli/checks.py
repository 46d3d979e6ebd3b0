"""Checks of a request before the model is loaded: everything that needs no weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch

from neounify.attention import check_backend
from neounify.checkpoint.dtypes import choose_dtype
from neounify.checkpoint.load import check_backend_used, check_memory, resolve_device
from neounify.checkpoint.mapped import MappedFile
from neounify.checkpoint.peft_config import PEFT_WEIGHTS
from neounify.checkpoint.reader import CheckpointFolder
from neounify.cli.command import CliError, UsageError
from neounify.cli.display import Display
from neounify.cli.models import parse_devices, parse_loras, resolve_model
from neounify.cli.options import (
    ChatOptions,
    ClipOptions,
    EditOptions,
    GenerateOptions,
    ImageGuidanceOptions,
    ImageOptions,
    ModelOptions,
    StoryOptions,
)
from neounify.config import ModelConfig, TextSampling
from neounify.errors import PromptError, RequestError
from neounify.flow.sampling import ImageSampling, ResolvedSampling
from neounify.image.pixels import output_size, size_advice
from neounify.pipeline.loading import load_processor
from neounify.tasks.chat import make_chat_request
from neounify.tasks.clips import Frames
from neounify.tasks.image import ImageRequest, check_prompts, check_trained
from neounify.tasks.interleave import InterleaveRequest
from neounify.tasks.program import Processor
from neounify.tasks.video import OutputShape, after_clip, clip_shape
from neounify.text.forms import Template
from neounify.text.template import Message, place_images

if TYPE_CHECKING:
    from neounify.cli.serve_options import ServeModelOptions

_SAMPLING = tuple(field.name for field in fields(ImageSampling))
_TEXT = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_COMMON = ("system", "negative_prompt")

InputImages = Sequence[PIL.Image.Image]


def check_model(options: ModelOptions | ServeModelOptions) -> CheckpointFolder:
    """The opened checkpoint, after checking every option about the model.

    Raises the errors of loading for a folder without a config, a dtype, device, memory or LoRA
    that cannot be used; whether LoRA tensors fit is known only with the model.
    """
    checkpoint = CheckpointFolder.open(resolve_model(options.model), options.config)
    choose_dtype(options.dtype, checkpoint, "cpu")
    check_backend(options.attention)
    check_device(options.device)
    check_memory(options.memory, options.plan)
    if isinstance(options, ModelOptions):
        check_devices(options.devices, "--devices")
        check_threads(options.threads)
    check_backend_used(checkpoint, options.quantise, options.backend)
    check_loras(options.lora)
    return checkpoint


def open_processor(options: ModelOptions) -> Processor:
    """What prepares the prompts of a model, without its weights, after `check_model`.

    Raises TokenizerError besides.
    """
    return load_processor(check_model(options), torch.float32)


def check_device(name: str | None) -> None:
    """RequestError for a device this machine does not have."""
    if name is not None:
        resolve_device(name)


def check_devices(text: str | None, option: str) -> None:
    """RequestError for devices this machine does not have, UsageError for no list of names."""
    for name in dict.fromkeys(parse_devices(text, option)):
        resolve_device(name)


def check_threads(number: int | None, option: str = "--threads") -> None:
    """UsageError for more threads than cores: they slow each other, or cannot even start."""
    cores = os.cpu_count()
    if number is not None and cores is not None and number > cores:
        some = "1 core" if cores == 1 else f"{cores} cores"
        raise UsageError(f"{option} {number}: this machine has {some}, so at most {cores}")


def check_jobs_file(path: Path) -> None:
    """CliError for an --input that is no file."""
    if not path.is_file():
        reason = "not a file, but a folder" if path.is_dir() else "no such file"
        raise CliError(f"--input {path}: {reason}")


def check_loras(texts: list[str] | None) -> None:
    """CliError for a LoRA that is no readable file; CheckpointError for one of another kind."""
    for path, _ in parse_loras(texts):
        if not path.exists():
            raise CliError(f"--lora {path}: no such file")
        if path.is_file():
            MappedFile(path)
        elif not (path / PEFT_WEIGHTS).is_file():
            below = path / "adapter"  # where a training run saves it
            hint = f"; {below} does" if (below / PEFT_WEIGHTS).is_file() else ""
            raise CliError(f"--lora {path}: the folder holds no {PEFT_WEIGHTS}{hint}")


def check_prompt(prompt: str, images: int) -> None:
    """PromptError for a prompt that is empty, is no text or has more <image> marks than images."""
    text = place_images(prompt, images, numbered=True)
    Message("user", text)
    if not text.strip():
        raise PromptError("the prompt is empty; describe what you want, in quotes")


def check_image_request(
    prompt: str,
    options: GenerateOptions,
    processor: Processor,
    images: InputImages = (),
    condition: InputImages = (),
) -> None:
    """Check one image request. Raises the errors that generating it would raise."""
    if isinstance(options, EditOptions) and not images:
        raise RequestError("edit needs at least one image; generate needs none")
    check_prompt(prompt, len(images))
    values = options.arguments()
    config = processor.config
    shape = output_shape(options, config, images, condition)
    request = ImageRequest(
        prompt=after_clip(shape.condition, prompt),
        condition=shape.condition,
        width=shape.width,
        height=shape.height,
        frames=shape.frames,
        fps=shape.fps,
        sampling=resolve_sampling(options, config),
        images=tuple(images),
        seed=options.seed,
        count=options.count,
        **_chosen(values, ("max_think_tokens", *_COMMON)),
    )
    _check_system(options.system)
    check_trained(config, request)
    check_prompts(processor, request)


def of_clips(options: ImageOptions) -> bool:
    """Whether clips are generated, and no images."""
    return isinstance(options, ClipOptions) and options.frames is not None


def output_shape(
    options: GenerateOptions,
    config: ModelConfig,
    images: InputImages = (),
    condition: InputImages = (),
) -> OutputShape:
    """Size of what is generated. Raises the errors that generating it would raise."""
    if isinstance(options, ClipOptions):
        if options.frames is not None:
            size = options.dimensions()
            return clip_shape(config, size, options.frames, options.fps, condition)
        if options.fps is not None:
            raise UsageError("--fps is of videos: give --frames too")
    width, height = output_size(config, *options.dimensions(), *images[:1])
    return OutputShape(width=width, height=height)


def check_chat_request(
    question: str,
    images: InputImages,
    options: ChatOptions,
    videos: Sequence[Frames] = (),
    *,
    template: Template,
) -> None:
    """Check a question. Raises the errors that answering it would raise."""
    if not question.strip() and not images and not videos:
        raise PromptError("the question is empty; write it in quotes")
    make_chat_request(question, images, videos, template, **options.arguments())
    _check_system(options.system)


def check_chat_options(options: ChatOptions) -> None:
    """Check the options of questions that are not known yet. Raises RequestError."""
    make_chat_request("?", (), **options.arguments())


def check_story_request(
    prompt: str, options: StoryOptions, config: ModelConfig, images: InputImages = ()
) -> None:
    """Check a story request. Raises the errors that generating it would raise."""
    check_prompt(prompt, len(images))
    values = options.arguments()
    InterleaveRequest(
        prompt=prompt,
        sizes=[output_size(config, *options.dimensions(), *images[:1])],
        sampling=resolve_sampling(options, config),
        images=images,
        seed=options.seed,
        text=TextSampling(seed=options.seed, **_chosen(values, _TEXT)),
        **_chosen(values, ("max_images", "max_new_tokens", *_COMMON)),
    )
    _check_system(options.system)


def resolve_sampling(options: ImageOptions, config: ModelConfig) -> ResolvedSampling:
    """The sampling settings with the checkpoint's defaults resolved. Raises RequestError."""
    chosen = _chosen(options.arguments(), _SAMPLING)
    return ImageSampling(**chosen).resolve(
        config, editing=isinstance(options, ImageGuidanceOptions), video=of_clips(options)
    )


def note_size(
    options: ImageOptions, config: ModelConfig, display: Display, images: InputImages = ()
) -> None:
    """A line on stderr for a size of images that the model was not trained at."""
    if of_clips(options):
        return
    size = output_size(config, *options.dimensions(), *images[:1])
    if advice := size_advice(config, *size):
        display.note(f"warning: {advice}")


def _chosen(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if name in values}


def _check_system(system: str | None) -> None:
    if system:
        Message("system", system)
