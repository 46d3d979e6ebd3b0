"""`neounify generate`: images and videos from prompts of the command line or of a JSONL file."""

from __future__ import annotations

import json
import time
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from neounify.cli.batch import (
    BatchOptions,
    BatchRun,
    LineOutcome,
    Results,
    check_lines,
    finish,
    job_hash,
    settings_key,
)
from neounify.cli.command import UsageError, WriteError
from neounify.cli.display import Display, printable
from neounify.cli.files import slug, writable_folder
from neounify.cli.lines import CONDITION, IMAGES, Line
from neounify.cli.models import LoadedModel, open_model, resolve_model
from neounify.cli.options import (
    ClipOptions,
    EditOptions,
    GenerateOptions,
    ImageOutputOptions,
    ModelOptions,
    ReportOptions,
)
from neounify.cli.videos import ConditionFile, read_condition_file
from neounify.files import locked_folder
from neounify.runtime import lasting_imports
from neounify.video.library import video_library

if TYPE_CHECKING:
    from neounify.cli.images import ImageJob, RecordedImage

OTHER_SUFFIXES = (
    *(".jpg", ".jpeg", ".webp", ".gif", ".bmp"),
    *(".tif", ".tiff", ".avif", ".heic", ".json"),
    *(".webm", ".mov", ".mkv", ".avi", ".m4v"),
)
"""Endings of --output, besides .png and .mp4, that name a file and not a folder."""


def generate(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROMPT",
            help="Description of the image, in quotes. Several prompts give several images.",
        ),
    ] = None,
    *,
    condition: ConditionFile = None,
    model: ModelOptions,
    options: ClipOptions,
    output: ImageOutputOptions,
    batch: BatchOptions,
    report: ReportOptions,
) -> None:
    """Generate images, or videos, from prompts.

    Images are saved as PNG in the folder `outputs`, videos as MP4. Everything needed to generate
    one again is inside the file and beside it as JSON.

    \b
      neounify generate "a red boat on a calm lake" --model FOLDER
      neounify generate "a cat" "a dog" --size 1024x768 --seed 7 --count 4
      neounify generate --input prompts.jsonl --output images
      neounify generate "a star moves left" --frames 48 --fps 24 --output star.mp4
      neounify generate "What happens next?" --condition star.mp4 --frames 48
    """
    resolve_model(model.model)
    if batch.input is not None:
        generate_batch(prompts, (), model, options, output, batch, report, condition)
    else:
        generate_prompts(prompts, (), model, options, output, batch, report, condition)


def generate_prompts(
    prompts: list[str] | None,
    images: Sequence[Path],
    model: ModelOptions,
    options: GenerateOptions,
    output: ImageOutputOptions,
    batch: BatchOptions,
    report: ReportOptions,
    condition: Path | None = None,
) -> None:
    """Generate or edit for the prompts of the command line, and print where the images are."""
    with lasting_imports():
        from neounify.cli.checks import check_image_request, note_size, open_processor
        from neounify.cli.images import ImageJob, check_free, generate_jobs, save_image
        from neounify.tasks.chat import read_images

    if not prompts:
        raise UsageError("give a PROMPT in quotes, or --input FILE.jsonl")
    editing = isinstance(options, EditOptions)
    if editing and not images:
        raise UsageError("give --image FILE, the image to edit (`generate` needs none)")
    exact = _exact_file(output, len(prompts) * options.count, _suffix(options))
    processor = open_processor(model)
    config = processor.config
    inputs = read_images(images, colour_profiles=model.colour_profiles)
    before = read_condition_file(condition, options, config)
    for prompt in prompts:
        check_image_request(prompt, options, processor, inputs, before)
    _check_encoder(options)
    if exact is not None and not output.overwrite:
        check_free(exact)
    folder = writable_folder(output.output if exact is None else exact.parent)
    display = Display(quiet=report.quiet, json=report.json)
    note_size(options, config, display, inputs)
    if len(prompts) > 1 and not any(" " in prompt for prompt in prompts):
        display.note(f"{len(prompts)} prompts, one image each; one prompt needs quotes around it")
    loaded = open_model(model, display)
    jobs = [
        ImageJob(prompt=p, options=options, images=tuple(images), condition=condition)
        for p in prompts
    ]
    size = 1 if editing else batch.batch_size
    files: list[dict[str, object]] = []
    start_time = time.perf_counter()
    for start in range(0, len(jobs), size):
        chunk = jobs[start : start + size]
        results = generate_jobs(loaded, chunk, display, previews=output.previews)
        for job, result in _each(chunk, results):
            wanted = exact or folder / f"{_name(job, result)}{_suffix(options)}"
            try:
                path = save_image(result, wanted, overwrite=output.overwrite)
            except WriteError as error:
                raise WriteError(f"{error}\n{_what_is_left(files, jobs)}") from error
            files.append(_entry(path, result))
            _print_saved(display, path, result)
    display.say(f"done in {time.perf_counter() - start_time:.1f} s")
    display.emit({"task": jobs[0].task, "files": files})


def generate_batch(
    prompts: list[str] | None,
    images: Sequence[Path],
    model: ModelOptions,
    options: GenerateOptions,
    output: ImageOutputOptions,
    batch: BatchOptions,
    report: ReportOptions,
    condition: Path | None = None,
) -> None:
    """Generate or edit for every line of a JSONL file that no earlier run has finished."""
    with lasting_imports():
        from neounify.cli.checks import (
            check_image_request,
            check_jobs_file,
            note_size,
            open_processor,
            resolve_sampling,
        )
        from neounify.tasks.chat import read_images

    assert batch.input is not None
    if prompts or images or condition:
        raise UsageError("give prompts and files on the command line or with --input, not both")
    check_jobs_file(batch.input)
    if output.output.suffix.lower() in (".png", ".mp4", *OTHER_SUFFIXES):
        raise UsageError(f"--output {output.output} names one file; --input needs a folder")
    processor = open_processor(model)
    config = processor.config
    resolve_sampling(options, config)
    files = (IMAGES,) if isinstance(options, EditOptions) else (CONDITION,)
    folder = writable_folder(output.output)
    display = Display(quiet=report.quiet, json=report.json)

    def check(line: Line[GenerateOptions]) -> None:
        before = read_condition_file(_condition(line), line.options, config)
        images = read_images(line.paths(IMAGES))
        check_image_request(line.prompt, line.options, processor, images, before)
        _check_encoder(line.options)

    with locked_folder(folder):
        results = Results(folder)
        check_lines(batch.input, options, check, display, results, files)
        if not isinstance(options, EditOptions):
            note_size(options, config, display)
        task = ImageLines(open_model(model, display), display, output)
        runner = BatchRun(task, results, display, batch_size=batch.batch_size, debug=report.debug)
        finish(runner.run(batch.input, options, files), results, display)


def _condition(line: Line[GenerateOptions]) -> Path | None:
    """The clip that a line continues."""
    return next(iter(line.paths(CONDITION)), None)


class ImageLines:
    """The batch task of `generate` and `edit`: images with their records, saved in a folder."""

    def __init__(self, model: LoadedModel, display: Display, output: ImageOutputOptions) -> None:
        self._model, self._display, self._output = model, display, output

    def job(self, line: Line[GenerateOptions]) -> str:
        return job_hash(line, self._model)

    def group(self, line: Line[GenerateOptions]) -> Hashable:
        # Edits, the lines with images, are generated one at a time.
        if line.paths(IMAGES):
            return line.number
        return settings_key(line.options), _condition(line)

    def do(self, lines: Sequence[Line[GenerateOptions]]) -> list[LineOutcome]:
        from neounify.cli.images import ImageJob, generate_jobs

        jobs = [
            ImageJob(
                prompt=n.prompt,
                options=n.options,
                images=n.paths(IMAGES),
                condition=_condition(n),
                job=self.job(n),
            )
            for n in lines
        ]
        results = generate_jobs(self._model, jobs, self._display, previews=self._output.previews)
        return [self._save(line, images) for line, images in zip(lines, results, strict=True)]

    def _save(self, line: Line[GenerateOptions], images: Sequence[RecordedImage]) -> LineOutcome:
        from neounify.cli.images import save_image, settings_record, sheet_path

        folder = self._output.output
        stem = f"{line.number:04d}-{slug(line.prompt)}" if line.id is None else slug(str(line.id))
        files: list[str] = []
        for image in images:
            name = f"{stem}_s{line.options.seed}_{image.record['index']}"
            wanted = folder / f"{name}{_suffix(line.options)}"
            path = save_image(image, wanted, overwrite=self._output.overwrite)
            files.append(path.name)
            if image.sheet is not None:
                files.append(sheet_path(path).name)
        return {
            "files": files,
            "seed": line.options.seed,
            "size": images[0].record["size"],
            "settings": settings_record(line.options, self._model.pipe.config),
        }


def _suffix(options: GenerateOptions) -> str:
    from neounify.cli.checks import of_clips

    return ".mp4" if of_clips(options) else ".png"


def _check_encoder(options: GenerateOptions) -> None:
    """VideoError where clips are asked for that could not be saved."""
    from neounify.cli.checks import of_clips

    if of_clips(options):
        video_library()


def _exact_file(output: ImageOutputOptions, images: int, wanted: str) -> Path | None:
    """The one file that --output names, which ends in `wanted`, or None when it is a folder."""
    path = output.output
    suffix = path.suffix.lower()
    if path.is_dir() or suffix not in (".png", ".mp4", *OTHER_SUFFIXES):
        return None
    if suffix != wanted:
        what = "images are saved as .png" if wanted == ".png" else "videos are saved as .mp4"
        hint = "; --frames N generates a video" if suffix == ".mp4" else ""
        raise UsageError(f"--output {path}: {what}, or into a folder{hint}")
    if images > 1:
        what = "images" if wanted == ".png" else "videos"
        raise UsageError(f"--output {path} names one file for {images} {what}; name a folder")
    return path


def _what_is_left(files: Sequence[dict[str, object]], jobs: Sequence[ImageJob]) -> str:
    """Which images were saved before a file could not be written, and how to resume."""
    count = jobs[0].options.count
    if not files:
        return "No image was saved. Free some space or choose another --output, and start again."
    prompts = [job.prompt for job in jobs[len(files) // count :]]
    left = " ".join(json.dumps(prompt, ensure_ascii=False) for prompt in prompts)
    return (
        f"{len(files)} of {len(jobs) * count} images are saved, {files[-1]['file']} last. Free "
        "some space or choose another --output, and run the command again with the remaining "
        f"prompts: {left}"
    )


def _name(job: ImageJob, result: RecordedImage) -> str:
    return f"{slug(job.prompt)}_s{job.options.seed}_{result.record['index']}"


def _each(
    jobs: Sequence[ImageJob], results: Sequence[Sequence[RecordedImage]]
) -> Iterator[tuple[ImageJob, RecordedImage]]:
    for job, images in zip(jobs, results, strict=True):
        for image in images:
            yield job, image


def _entry(path: Path, result: RecordedImage) -> dict[str, object]:
    from neounify.cli.images import sheet_path

    entry: dict[str, object] = {"file": str(path), "record": result.record}
    if result.sheet is not None:
        entry["previews"] = str(sheet_path(path))
    return entry


def _print_saved(display: Display, path: Path, result: RecordedImage) -> None:
    from neounify.cli.images import sheet_path

    record = result.record
    if record["index"] == 1 and "thought" in record:
        display.say(f"thought: {printable(record['thought'])}")
    width, height = record["size"]
    facts = f"{width}x{height}, seed {record['seed']}, {record['settings']['steps']} steps"
    if "frames" in record:
        facts = f"{record['frames']} frames at {record['fps']:g} a second, {facts}"
    display.result(f"saved {path}  ({facts})", path)
    if result.sheet is not None:
        display.say(f"saved {sheet_path(path)}  (the image after each step)")
