"""Images and videos of the command line: jobs, generation, records, files, sheets of previews."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

import neounify
from neounify.cli.checks import of_clips, resolve_sampling
from neounify.cli.command import CliError
from neounify.cli.display import Display
from neounify.cli.files import candidates, write_error, write_new, write_whole
from neounify.cli.models import LoadedModel
from neounify.cli.options import EditOptions, GenerateOptions, ImageOptions
from neounify.config import ModelConfig
from neounify.errors import ImageError
from neounify.files import check_absent
from neounify.image.io import read_metadata
from neounify.pipeline import ImageProgress, ImageResult
from neounify.provenance.metadata import (
    CHUNK,
    encode_image,
    is_video,
    packet_facts,
    write_packet,
)
from neounify.video.boxes import find_xmp
from neounify.video.clip import Video

THUMBNAIL = 192
GAP = 4
HEAD_BYTES = 256
"""Of a file, to tell MP4 from images."""


@dataclass(frozen=True, kw_only=True)
class ImageJob:
    """One prompt and `options.count` images of it; with input `images` it is an edit.

    `condition` is the clip that generated ones continue, one for all jobs of a call. `job`
    identifies a line of a batch, so that a later run can skip it.
    """

    prompt: str
    options: GenerateOptions
    images: tuple[Path, ...] = ()
    condition: Path | None = None
    job: str | None = None

    @property
    def task(self) -> str:
        return "edit" if isinstance(self.options, EditOptions) else "generate"


@dataclass(frozen=True)
class RecordedImage:
    """A generated image or clip, its record, and its contact sheet of previews if asked for."""

    image: Image.Image | Video
    record: dict[str, Any]
    sheet: Image.Image | None = None


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


# --- generation ---


def generate_jobs(
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
    count = jobs[0].options.count
    images: Sequence[Image.Image | Video] = result.videos or result.images
    recorded: list[list[RecordedImage]] = []
    for number, job in enumerate(jobs):
        of_job = []
        for index in range(count):
            position = number * count + index
            image = images[position]
            size = _size_of(image)
            record = make_record(model, job, size, index + 1, result.thoughts[number])
            if isinstance(image, Video):
                record |= {"frames": len(image.frames), "fps": float(image.fps)}
            record["evaluations"] = result.evaluations[position]
            sheet = None if sheets is None else sheets.sheet(position)
            of_job.append(RecordedImage(image, record, sheet))
        recorded.append(of_job)
    return recorded


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
        condition=first.condition,
        **first.options.arguments(),
    )


def _size_of(image: Image.Image | Video) -> tuple[int, int]:
    """(width, height) in pixels."""
    if isinstance(image, Video):
        return image.frames.shape[2], image.frames.shape[1]
    return image.size


def _label(jobs: Sequence[ImageJob]) -> str:
    images = sum(job.options.count for job in jobs)
    what = "videos" if of_clips(jobs[0].options) else "images"
    return "generating" if images == 1 else f"generating {images} {what}"


# --- records ---


def make_record(
    model: LoadedModel, job: ImageJob, size: tuple[int, int], index: int, thought: str | None
) -> dict[str, Any]:
    """Record of an image with every setting needed to generate it again."""
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
    if job.condition is not None:
        record["condition"] = job.condition.name
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
    if sampling.published_solver:
        settings["published_solver"] = True
    if guidance.reuse > 1:
        settings["guidance_reuse"] = guidance.reuse
    if guidance.stop:
        settings["guidance_stop"] = guidance.stop
    if sampling.cache.threshold:
        settings |= {
            "step_cache": sampling.cache.threshold,
            "step_cache_most": sampling.cache.most,
            "step_cache_warm": sampling.cache.warm,
        }
    if guidance.editing:
        settings["image_guidance"] = guidance.image
        settings["published_interval"] = guidance.published_interval
    return settings


def now() -> str:
    """The current UTC time in ISO format, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def read_record(path: Path) -> dict[str, Any]:
    """The record of a PNG or an MP4 that neounify generated. Raises CliError for other files."""
    advice = "give the folder of a model, or a PNG or MP4 that neounify generated"
    if not path.exists():
        raise CliError(f"{path} is not an existing file or folder; {advice}")
    if not path.is_file():
        raise CliError(f"{path} is neither a file nor a folder; {advice}")
    if (record := _clip_record(path)) is not None:
        return record
    try:
        text = read_metadata(path, (CHUNK,)).get(CHUNK)
    except ImageError as error:
        raise CliError(f"{path} is neither a model's folder nor a readable image or MP4") from error
    if not isinstance(text, str):
        raise CliError(_no_record(path, "PNG"))
    try:
        record = json.loads(text)
    except ValueError as error:
        raise CliError(f"{path}: its record is damaged") from error
    if not isinstance(record, dict):
        raise CliError(f"{path}: its record is damaged")
    return record


def _clip_record(path: Path) -> dict[str, Any] | None:
    """The record of an MP4, None for another kind of file. Raises CliError without a record."""
    with path.open("rb") as file:
        if not is_video(file.read(HEAD_BYTES)):
            return None
        record = packet_facts(find_xmp(file))
    if not record:
        raise CliError(_no_record(path, "MP4"))
    return record


def _no_record(path: Path, kind: str) -> str:
    return (
        f"{path} has no record: neounify did not generate it as {kind}, or another program saved "
        "it; `neounify provenance` shows the metadata of any image or MP4"
    )


# --- files ---


def save_image(result: RecordedImage, wanted: Path, *, overwrite: bool) -> Path:
    """Save a PNG, or an MP4, and its JSON, under the next free name where `wanted` is taken.

    A name also counts as free when it holds the same job of a batch that was interrupted.
    """
    text = (json.dumps(result.record, ensure_ascii=False, indent=2) + "\n").encode()
    for path in candidates(wanted):
        beside = path.with_suffix(".json")
        if overwrite or _is_same_job(beside, result.record):
            write_whole(beside, text)
        elif path.exists() or not write_new(beside, text):
            continue
        try:
            _write(result, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        if result.sheet is not None:
            write_whole(sheet_path(path), to_png(result.sheet))
        return path
    raise AssertionError("names never run out")


def _write(result: RecordedImage, path: Path) -> None:
    if isinstance(result.image, Video):
        try:
            result.image.save(path, xmp=write_packet(result.record))
        except OSError as error:
            raise write_error(path, error) from error
    else:
        write_whole(path, to_png(result.image, result.record))


def check_free(path: Path) -> None:
    """CliError when saving an image under exactly this name would replace a file."""
    for taken in (path, path.with_suffix(".json")):
        check_absent(taken, CliError, "choose another name, or add --overwrite")


def sheet_path(path: Path) -> Path:
    """The path of an image's contact sheet."""
    return path.with_name(f"{path.stem}.previews.png")


def to_png(image: Image.Image, record: dict[str, Any] | None = None) -> bytes:
    """A PNG with provenance metadata and the record in its text chunk `neounify`."""
    return encode_image(image, "png", record or {})


def _is_same_job(beside: Path, record: dict[str, Any]) -> bool:
    if "job" not in record:
        return False
    try:
        existing = json.loads(beside.read_bytes())
    except (OSError, ValueError):
        return False
    keys = ("job", "index")
    return isinstance(existing, dict) and all(existing.get(k) == record.get(k) for k in keys)
