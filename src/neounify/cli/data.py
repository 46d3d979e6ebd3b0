"""Look at training data before a run.

\b
  neounify data inspect photos/
  neounify data inspect train.json --images photos/ --page preview.html
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neounify.cli.command import CliError
from neounify.cli.display import Display, printable
from neounify.cli.files import check_writable
from neounify.cli.models import resolve_model
from neounify.cli.options import FILES, MODEL, ReportOptions, option
from neounify.runtime import lasting_imports

if TYPE_CHECKING:
    from neounify.data.configs import FileData
    from neounify.data.encode import Encoder
    from neounify.data.preview import Piece, Preview, Shown
    from neounify.data.sizes import Pixels
    from neounify.data.sources import FileSource

DATA, CLIPS = "Data", "Clips"
READING = ("fps", "max_frames", "tubes", "target_fps", "target_frames")
"""Settings of `clips` in a recipe."""
MAX_MESSAGES = 10
"""Skipped samples that the terminal shows."""
MAX_TEXT = 400
"""Characters of one piece of text that the terminal shows."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """The settings of a source, as a recipe has them."""

    kind: Annotated[
        str | None, option(DATA, "KIND", "Kind of files, as in a recipe. Default: recognised.")
    ] = None
    form: Annotated[
        str | None, option(DATA, "FORM", "The only form that records may have. Default: any.")
    ] = None
    task: Annotated[str | None, option(DATA, "TASK", "Task of all records.")] = None
    images: Annotated[
        Path | None, option(DATA, "FOLDER", "Folder that paths of images and clips start at.")
    ] = None
    ignore: Annotated[
        list[str] | None, option(DATA, "FIELD", "Field that is not to be read; repeatable.")
    ] = None
    dataset: Annotated[
        str | None, option(DATA, "NAME", "Data set of a dataset_info.json of LLaMA-Factory.")
    ] = None
    fps: Annotated[
        float | None,
        option(CLIPS, "N", "Frames of a second that are looked at. Default: the model's."),
    ] = None
    max_frames: Annotated[
        int | None, option(CLIPS, "N", "Maximum frames of a clip that are looked at.", min=1)
    ] = None
    tubes: Annotated[
        bool, option(CLIPS, None, "Look at clips in tubes of several frames.", "--tubes")
    ] = False
    target_fps: Annotated[
        float | None, option(CLIPS, "N", "Frames of a second of clips to generate.")
    ] = None
    target_frames: Annotated[
        int | None, option(CLIPS, "N", "First frames of longer clips to generate.", min=1)
    ] = None
    tokens_per_pack: Annotated[
        int | None,
        option(DATA, "N", "Tokens of a pack, which every sample must fit into.", min=1),
    ] = None


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="File or folder of data.")],
    *,
    source: SourceOptions,
    samples: Annotated[int, option(DATA, "N", "Samples to show.", min=0)] = 10,
    tries: Annotated[
        int, option(DATA, "N", "Samples to read, spread evenly over the data.", "--try", min=1)
    ] = 1000,
    model: Annotated[
        Path | None, option(MODEL, "FOLDER", "Model whose tokenizer and image sizes count.")
    ] = None,
    page: Annotated[
        Path | None, option(FILES, "FILE", "Also write an HTML page with the images.")
    ] = None,
    report: ReportOptions,
) -> None:
    """Show the form of training data, samples as the model sees them, and what would be skipped.

    Text between ⟦ and ⟧ is what the model learns to predict. Exit code 1 if no sample is usable.

    \b
      neounify data inspect photos/
      neounify data inspect train.json --images photos/ --page preview.html
    """
    with lasting_imports():
        from neounify.data.preview import preview

    display = Display(quiet=report.quiet, json=report.json)
    if page is not None:
        check_writable(page.parent)
    settings = _settings(path, source)
    built = settings.build()
    encoder = _encoder(resolve_model(model), source.tokens_per_pack)
    result = None
    total = min(max(tries, samples), built.size)
    with display.bar("reading", total, "sample") as tick:
        for result in preview(built, encoder, tries, samples):
            tick(result.tried)
    assert result is not None
    facts = _facts(path, settings, built, result)
    _print(display, facts, result)
    display.emit(_document(path, settings, built, result))
    if page is not None:
        from neounify.data.preview_page import preview_page
        from neounify.files import write_bytes

        write_bytes(page, preview_page(built.name, facts, result).encode())
        display.result(f"saved {page}", page)
    if not result.lengths:
        raise CliError(f"{built.name}: no sample can be used. {result.skipped[0].message}")


def _settings(path: Path, source: SourceOptions) -> Any:
    """The item of a recipe that reads the data. Raises CliError."""
    from neounify.data.configs import FORMATS, read_data
    from neounify.data.formats import recognise

    try:
        kind = source.kind
        if kind is None:
            recognised = recognise(path)
            if recognised.kind is None:
                what = recognised.what or f"is of no known kind; known are {', '.join(FORMATS)}"
                raise CliError(f"{path} {what}")
            kind = recognised.kind
        values: dict[str, Any] = {"kind": kind, "path": str(path)}
        for name in ("form", "task", "images", "ignore", "dataset"):
            value = getattr(source, name)
            if value:
                values[name] = list(value) if name == "ignore" else str(value)
        values["clips"] = {n: getattr(source, n) for n in READING if getattr(source, n)}
        return read_data(values)
    except ValueError as error:
        if isinstance(error, CliError):
            raise
        raise CliError(" ".join(str(error).split())) from error


def _encoder(model: Path, tokens_per_pack: int | None) -> Encoder:
    import torch

    from neounify.checkpoint import CheckpointFolder
    from neounify.data.draws import GuidanceDropout
    from neounify.data.encode import Encoder
    from neounify.pipeline.loading import load_processor

    processor = load_processor(CheckpointFolder.open(model), torch.float32)
    plain = GuidanceDropout(text=0.0, all=0.0)
    encoder = Encoder(config=processor.config, tokenizer=processor.tokenizer, dropout=plain)
    return replace(encoder, max_tokens=tokens_per_pack)


def _facts(
    path: Path, settings: FileData, source: FileSource, result: Preview
) -> list[tuple[str, str]]:
    """What there is, as names and texts."""
    from neounify.data.formats import NAMES
    from neounify.data.reasons import counted

    facts = [
        ("data", f"{path}: {NAMES[settings.kind]}"),
        ("recipe", _recipe(settings)),
        ("records", ", ".join(f"{form} {n:,}" for form, n in source.rules.forms.most_common())),
        ("samples", f"{source.size:,}; {result.tried:,} read, {len(result.lengths):,} usable"),
        ("tasks", ", ".join(f"{task} {n:,}" for task, n in result.tasks.most_common())),
    ]
    if result.lengths:
        middle, longest = statistics.median(result.lengths), max(result.lengths)
        facts.append(("tokens", f"median {middle:,.0f}, at most {longest:,} (tokens_per_pack)"))
    if result.skipped:
        facts.append(("skipped", counted(result.reasons)))
    if downloads := _downloads(source):
        facts.append(("downloads", downloads))
    facts += [("cannot be read", text) for text in source.damage]
    if source.rules.unread:
        fields = ", ".join(sorted(source.rules.unread))
        facts.append(("not read", f"fields {fields}; list them in ignore = [...] if that is right"))
    return facts


def _downloads(source: FileSource) -> str:
    """Counts of the tables that img2dataset writes beside its shards, where pyarrow is there."""
    from neounify.data.parquet import count_statuses
    from neounify.data.reasons import counted
    from neounify.data.sample import DataError
    from neounify.data.shards import ShardSource

    if not isinstance(source, ShardSource):
        return ""
    tables = [shard.with_suffix(".parquet") for shard in source.shards]
    try:
        counts = count_statuses([table for table in tables if table.is_file()])
    except DataError as error:
        return str(error)
    return f"{counts.total():,} rows of img2dataset: {counted(counts)}" if counts else ""


def _recipe(settings: FileData) -> str:
    """The item of a recipe, on one line."""
    import json

    values = {"kind": settings.kind, "path": settings.path, "form": settings.form}
    values |= {"task": settings.task}
    values |= {name: getattr(settings, name, None) for name in ("images", "dataset")}
    pairs = [f"{name} = {json.dumps(v, ensure_ascii=False)}" for name, v in values.items() if v]
    clips = {name: value for name in READING if (value := getattr(settings.clips, name))}
    if clips:
        inner = ", ".join(f"{name} = {json.dumps(value)}" for name, value in clips.items())
        pairs.append(f"clips = {{ {inner} }}")
    if settings.ignore:
        pairs.append(f"ignore = {json.dumps(list(settings.ignore), ensure_ascii=False)}")
    return f"{{ {', '.join(pairs)} }}"


def _print(display: Display, facts: list[tuple[str, str]], result: Preview) -> None:
    for name, text in facts:
        display.say(printable(f"{name:>14}  {text}"))
    for skipped in result.skipped[:MAX_MESSAGES]:
        display.say(printable(f"{'':>14}  {skipped.message}"))
    for number, shown in enumerate(result.shown, 1):
        display.say(
            printable(
                f"\n{number}. {shown.location} ({shown.task}): {shown.tokens:,} tokens, "
                f"{shown.with_loss:,} with loss"
            )
        )
        display.say(printable("".join(map(_piece_text, shown.pieces))))


def _piece_text(piece: Piece) -> str:
    if piece.pixels is not None:
        text = f"[{'clip' if piece.frames else 'image'} {piece.about}]"
    else:
        text = piece.text
        if len(text) > MAX_TEXT:
            text = f"{text[: MAX_TEXT // 2]} … {text[-MAX_TEXT // 2 :]}"
    return f"⟦{text}⟧" if piece.loss else text


def _document(
    path: Path, settings: FileData, source: FileSource, result: Preview
) -> dict[str, Any]:
    """The result as JSON."""
    return {
        "path": str(path),
        "kind": settings.kind,
        "recipe": _recipe(settings),
        "forms": dict(source.rules.forms),
        "samples": source.size,
        "tried": result.tried,
        "usable": len(result.lengths),
        "tasks": dict(result.tasks),
        "max_tokens": max(result.lengths, default=0),
        "skipped": dict(result.reasons.most_common()),
        "messages": [skipped.message for skipped in result.skipped[:MAX_MESSAGES]],
        "damage": source.damage,
        "unread_fields": sorted(source.rules.unread),
        "shown": [_shown(shown) for shown in result.shown],
    }


def _shown(shown: Shown) -> dict[str, Any]:
    pieces = [
        {
            "tokens": piece.tokens,
            "loss": piece.loss,
            **({"text": piece.text} if piece.pixels is None else _size(piece.pixels)),
        }
        for piece in shown.pieces
    ]
    return {"location": shown.location, "task": shown.task, "pieces": pieces}


def _size(pixels: Pixels) -> dict[str, Any]:
    """Width and height of an image or clip, and its frames."""
    *frames, height, width, _ = pixels.shape
    return {"clip": [width, height], "frames": frames[0]} if frames else {"image": [width, height]}


COMMANDS = {"inspect": inspect}
"""The functions of the group by command."""
