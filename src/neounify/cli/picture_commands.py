"""`generate` and `edit`, carried out: for prompts of the command line, or for a file's lines."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from neounify.cli.batch.check import check_lines
from neounify.cli.batch.lines import Line
from neounify.cli.batch.results import Results
from neounify.cli.batch.run import Batch, finish
from neounify.cli.batch.tasks import PaintLines
from neounify.cli.checks import (
    check_jobs_file,
    check_model,
    check_painting,
    note_size,
    resolve_sampling,
    writable_folder,
)
from neounify.cli.display import Display, printable
from neounify.cli.errors import UsageError, WriteError
from neounify.cli.files import slug
from neounify.cli.options import (
    BatchOptions,
    EditOptions,
    GenerateOptions,
    ModelOptions,
    PictureOutputOptions,
    ReportOptions,
)
from neounify.cli.painting import Order, paint
from neounify.cli.record import Picture, check_free, save_picture, sheet_path
from neounify.cli.session import open_session
from neounify.lock import locked_folder
from neounify.pipeline.messages import read_pictures

OTHER_SUFFIXES = (
    *(".jpg", ".jpeg", ".webp", ".gif", ".bmp"),
    *(".tif", ".tiff", ".avif", ".heic", ".json"),
)
"""Endings of --output, besides .png, that name a file and not a folder."""


def paint_orders(
    prompts: list[str] | None,
    images: Sequence[Path],
    model: ModelOptions,
    options: GenerateOptions,
    output: PictureOutputOptions,
    batch: BatchOptions,
    report: ReportOptions,
) -> None:
    """Paint the prompts of the command line and say where the pictures are."""
    if not prompts:
        raise UsageError("give a PROMPT in quotes, or --input FILE.jsonl")
    editing = isinstance(options, EditOptions)
    if editing and not images:
        raise UsageError("give --image FILE: a picture to start from (`generate` needs none)")
    pictures = len(prompts) * options.count
    exact = _exact_file(output, pictures)
    config = check_model(model)
    loaded = read_pictures(images, colour_profiles=model.colour_profiles)
    for prompt in prompts:
        check_painting(prompt, options, config, loaded)
    if exact is not None and not output.overwrite:
        check_free(exact)
    folder = writable_folder(output.output if exact is None else exact.parent)
    display = Display(quiet=report.quiet, json=report.json)
    note_size(options, config, display, loaded)
    if len(prompts) > 1 and not any(" " in prompt for prompt in prompts):
        display.note(f"{len(prompts)} prompts, one picture each; one prompt needs quotes around it")
    session = open_session(model, display)
    orders = [Order(prompt=p, options=options, images=tuple(images)) for p in prompts]
    size = 1 if editing else batch.batch_size
    files: list[dict[str, object]] = []
    begun = time.perf_counter()
    for start in range(0, len(orders), size):
        chunk = orders[start : start + size]
        painted = paint(session, chunk, display, previews=output.previews)
        for order, picture in _each(chunk, painted):
            wanted = exact or folder / _name(order, picture)
            try:
                path = save_picture(picture, wanted, overwrite=output.overwrite)
            except WriteError as error:
                raise WriteError(f"{error}\n{_left_over(files, orders)}") from error
            files.append(_entry(path, picture))
            _tell(display, path, picture)
    display.say(f"painted in {time.perf_counter() - begun:.1f} s")
    display.emit({"task": orders[0].task, "files": files})


def _left_over(files: Sequence[dict[str, object]], orders: Sequence[Order]) -> str:
    """What was saved before a file could not be written, and how to go on."""
    count = orders[0].options.count
    total = len(orders) * count
    first = len(files) // count
    if not files:
        return "No image was saved. Free some space or choose another --output, and start again."
    left = " ".join(json.dumps(order.prompt, ensure_ascii=False) for order in orders[first:])
    return (
        f"{len(files)} of {total} images are saved, {files[-1]['file']} last. Free some space or "
        f"choose another --output, and run the command again with the prompts that are left: {left}"
    )


def _name(order: Order, picture: Picture) -> str:
    return f"{slug(order.prompt)}_s{order.options.seed}_{picture.record['index']}.png"


def paint_batch(
    prompts: list[str] | None,
    images: Sequence[Path],
    model: ModelOptions,
    options: GenerateOptions,
    output: PictureOutputOptions,
    batch: BatchOptions,
    report: ReportOptions,
) -> None:
    """Paint every line of a JSONL file that is not painted yet."""
    assert batch.input is not None
    if prompts or images:
        raise UsageError("give prompts and images on the command line or with --input, not both")
    check_jobs_file(batch.input)
    if output.output.suffix.lower() in (".png", *OTHER_SUFFIXES):
        raise UsageError(f"--output {output.output} names one file; --input needs a folder")
    config = check_model(model)
    resolve_sampling(options, config)
    editing = isinstance(options, EditOptions)
    folder = writable_folder(output.output)
    display = Display(quiet=report.quiet, json=report.json)

    def check(line: Line[GenerateOptions]) -> None:
        check_painting(line.prompt, line.options, config, read_pictures(line.paths))

    with locked_folder(folder):
        results = Results(folder)
        check_lines(batch.input, options, check, display, results, images=editing)
        if not editing:
            note_size(options, config, display)
        session = open_session(model, display)
        task = PaintLines(
            session, display, folder, previews=output.previews, overwrite=output.overwrite
        )
        runner = Batch(task, results, display, batch_size=batch.batch_size, debug=report.debug)
        finish(runner.run(batch.input, options, images=editing), results, display)


def _exact_file(output: PictureOutputOptions, pictures: int) -> Path | None:
    """The one file that --output names, or None when it is a folder."""
    path = output.output
    suffix = path.suffix.lower()
    if path.is_dir() or suffix not in (".png", *OTHER_SUFFIXES):
        return None
    if suffix != ".png":
        raise UsageError(f"--output {path}: pictures are saved as .png, or into a folder")
    if pictures > 1:
        raise UsageError(f"--output {path} names one file for {pictures} pictures; name a folder")
    return path


def _each(
    orders: Sequence[Order], painted: Sequence[Sequence[Picture]]
) -> Iterator[tuple[Order, Picture]]:
    for order, pictures in zip(orders, painted, strict=True):
        for picture in pictures:
            yield order, picture


def _entry(path: Path, picture: Picture) -> dict[str, object]:
    entry: dict[str, object] = {"file": str(path), "record": picture.record}
    if picture.sheet is not None:
        entry["previews"] = str(sheet_path(path))
    return entry


def _tell(display: Display, path: Path, picture: Picture) -> None:
    record = picture.record
    if record["index"] == 1 and "thought" in record:
        display.say(f"thought: {printable(record['thought'])}")
    width, height = record["size"]
    facts = f"{width}x{height}, seed {record['seed']}, {record['settings']['steps']} steps"
    display.result(f"saved {path}  ({facts})", path)
    if picture.sheet is not None:
        display.say(f"saved {sheet_path(path)}  (the image after each step)")
