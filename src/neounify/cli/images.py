"""Image generation for prompts of the command line: jobs, their images and records, previews."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

import neounify
from neounify.cli.checks import resolve_sampling
from neounify.cli.display import Display
from neounify.cli.models import LoadedModel
from neounify.cli.records import RecordedImage
from neounify.cli.task_options import EditOptions, GenerateOptions, ImageOptions
from neounify.config import ModelConfig
from neounify.pipeline import ImageProgress, ImageResult

THUMBNAIL = 192
GAP = 4


@dataclass(frozen=True, kw_only=True)
class ImageJob:
    """One prompt and `options.count` images of it; with input `images` it is an edit.

    `job` identifies a line of a batch, so that a later run can skip it.
    """

    prompt: str
    options: GenerateOptions
    images: tuple[Path, ...] = ()
    job: str | None = None

    @property
    def task(self) -> str:
        return "edit" if isinstance(self.options, EditOptions) else "generate"


class PreviewSheets:
    """Contact sheets of the clean images predicted at every step, one sheet per image."""

    def __init__(self) -> None:
        self._steps: list[list[Image.Image]] = []

    def add(self, progress: ImageProgress) -> None:
        images = progress.preview()
        for image in images:
            image.thumbnail((THUMBNAIL, THUMBNAIL))
        self._steps.append(images)

    def sheet(self, number: int) -> Image.Image:
        """The steps of one image of the call, row by row."""
        steps = [images[number] for images in self._steps]
        width, height = steps[0].width + GAP, steps[0].height + GAP
        columns = min(len(steps), max(5, math.ceil(math.sqrt(len(steps)))))
        rows = math.ceil(len(steps) / columns)
        sheet = Image.new("RGB", (columns * width - GAP, rows * height - GAP), "white")
        for index, image in enumerate(steps):
            sheet.paste(image, (index % columns * width, index // columns * height))
        return sheet


def generate_images(
    model: LoadedModel, jobs: Sequence[ImageJob], display: Display, *, previews: bool = False
) -> list[list[RecordedImage]]:
    """The images of each job. The options of all jobs are equal but for the seed.

    Edits are generated one job at a time.
    """
    sheets = PreviewSheets() if previews else None
    steps = resolve_sampling(jobs[0].options, model.pipe.config).steps
    with display.bar(_label(jobs), steps) as tick:

        def on_step(progress: ImageProgress) -> None:
            tick(progress.step)
            if sheets is not None:
                sheets.add(progress)

        result = _call(model, jobs, on_step)
    images, count = result.images, jobs[0].options.count
    recorded: list[list[RecordedImage]] = []
    for number, job in enumerate(jobs):
        of_job = []
        for index in range(count):
            position = number * count + index
            size = images[position].size
            record = make_record(model, job, size, index + 1, result.thoughts[number])
            sheet = None if sheets is None else sheets.sheet(position)
            of_job.append(RecordedImage(images[position], record, sheet))
        recorded.append(of_job)
    return recorded


def make_record(
    model: LoadedModel, job: ImageJob, size: tuple[int, int], index: int, thought: str | None
) -> dict[str, Any]:
    """Everything needed to generate the image again."""
    record: dict[str, Any] = {
        "neounify": neounify.__version__,
        "task": job.task,
        "prompt": job.prompt,
        "seed": job.options.seed,
        "index": index,
        "count": job.options.count,
        "size": list(size),
        "settings": settings_record(job.options, model.pipe.config),
        "model": model.description,
        "created": now(),
    }
    if job.images:
        record["images"] = [image.name for image in job.images]
    if thought is not None:
        record["thought"] = thought
    if job.job is not None:
        record["job"] = job.job
    return record


def settings_record(options: ImageOptions, config: ModelConfig) -> dict[str, Any]:
    """The settings under the names of the command line's options, with defaults resolved.

    `system` null means the checkpoint's message.
    """
    sampling = resolve_sampling(options, config)
    guidance = sampling.guidance
    settings: dict[str, Any] = {
        "steps": sampling.steps,
        "shift": sampling.shift,
        "guidance": guidance.text,
        "negative_prompt": options.negative_prompt or "",
        "interval": list(guidance.interval),
        "norm": guidance.norm,
        "solver": sampling.solver,
        "t_eps": sampling.effective_t_eps(),
        "think": options.think,
        "system": options.system,
    }
    if guidance.editing:
        settings["image_guidance"] = guidance.image
        settings["published_interval"] = guidance.published_interval
    return settings


def now() -> str:
    """The current UTC time in ISO format, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _call(model: LoadedModel, jobs: Sequence[ImageJob], on_step: Any) -> ImageResult:
    first = jobs[0]
    if first.task == "edit":
        return model.pipe.edit(
            first.prompt,
            first.images,
            seed=first.options.seed,
            callback=on_step,
            **first.options.arguments(),
        )
    return model.pipe.generate(
        [job.prompt for job in jobs],
        seed=[job.options.seed for job in jobs],
        callback=on_step,
        **first.options.arguments(),
    )


def _label(jobs: Sequence[ImageJob]) -> str:
    images = sum(job.options.count for job in jobs)
    return "generating" if images == 1 else f"generating {images} images"
