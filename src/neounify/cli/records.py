"""Saved images: a PNG with its generation record inside, and the same record beside it as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from neounify.cli.errors import CliError
from neounify.cli.files import candidates, write_new, write_whole
from neounify.errors import ImageError
from neounify.files import check_absent
from neounify.image.io import read_metadata
from neounify.provenance.metadata import CHUNK, encode_image


@dataclass(frozen=True)
class RecordedImage:
    """A generated image, its record, and its contact sheet of previews if one was asked for."""

    image: Image.Image
    record: dict[str, Any]
    sheet: Image.Image | None = None


def to_png(image: Image.Image, record: dict[str, Any] | None = None) -> bytes:
    """A PNG with provenance metadata and the record in its text chunk `neounify`."""
    return encode_image(image, "png", record or {})


def read_record(path: Path) -> dict[str, Any]:
    """The record of a PNG that neounify generated. Raises CliError for any other file."""
    advice = "give the folder of a model, or a PNG that neounify generated"
    if not path.exists():
        raise CliError(f"{path} is not an existing file or folder; {advice}")
    if not path.is_file():
        raise CliError(f"{path} is neither a file nor a folder; {advice}")
    try:
        text = read_metadata(path, (CHUNK,)).get(CHUNK)
    except ImageError as error:
        raise CliError(f"{path} is neither a model's folder nor a readable image") from error
    if not isinstance(text, str):
        raise CliError(
            f"{path} has no record: neounify did not generate it as a PNG, or another program "
            "saved it; `neounify provenance` shows the metadata of any image"
        )
    try:
        record = json.loads(text)
    except ValueError as error:
        raise CliError(f"{path}: its record is damaged") from error
    if not isinstance(record, dict):
        raise CliError(f"{path}: its record is damaged")
    return record


def save_image(result: RecordedImage, wanted: Path, *, overwrite: bool) -> Path:
    """Save a PNG and its JSON, under the next free name where `wanted` is taken.

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
            write_whole(path, to_png(result.image, result.record))
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        if result.sheet is not None:
            write_whole(sheet_path(path), to_png(result.sheet))
        return path
    raise AssertionError("names never run out")


def check_free(path: Path) -> None:
    """CliError when saving an image under exactly this name would replace a file."""
    for taken in (path, path.with_suffix(".json")):
        check_absent(taken, CliError, "choose another name, or add --overwrite")


def sheet_path(path: Path) -> Path:
    """The path of an image's contact sheet."""
    return path.with_name(f"{path.stem}.previews.png")


def _is_same_job(beside: Path, record: dict[str, Any]) -> bool:
    if "job" not in record:
        return False
    try:
        existing = json.loads(beside.read_bytes())
    except (OSError, ValueError):
        return False
    keys = ("job", "index")
    return isinstance(existing, dict) and all(existing.get(k) == record.get(k) for k in keys)
