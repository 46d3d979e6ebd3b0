"""The record every painted PNG carries, and the same beside it as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from neounify.cli.errors import CliError
from neounify.cli.files import candidates, write_new, write_whole
from neounify.errors import ImageError
from neounify.image.io import read_metadata
from neounify.provenance.metadata import CHUNK, encode_image


@dataclass(frozen=True)
class Picture:
    """A painted image, its record, and the sheet of its previews if one was wanted."""

    image: Image.Image
    record: dict[str, Any]
    sheet: Image.Image | None = None


def to_png(image: Image.Image, record: dict[str, Any] | None = None) -> bytes:
    """A lossless PNG that says a model made it, the record in its text chunk `neounify`."""
    return encode_image(image, "png", record or {})


def read_record(path: Path) -> dict[str, Any]:
    """The record of a PNG that this package painted. Raises CliError for any other file."""
    wanted = "give the folder of a model, or a PNG that neounify generated"
    if not path.exists():
        raise CliError(f"{path} is not there; {wanted}")
    if not path.is_file():
        raise CliError(f"{path} is neither a file nor a folder; {wanted}")
    try:
        text = read_metadata(path, (CHUNK,)).get(CHUNK)
    except ImageError as error:
        raise CliError(f"{path} is neither a model's folder nor a readable image") from error
    if not isinstance(text, str):
        raise CliError(
            f"{path} has no record: neounify did not generate it as a PNG, or another program "
            "saved it; `neounify provenance` shows what images of all kinds say"
        )
    try:
        record = json.loads(text)
    except ValueError as error:
        raise CliError(f"{path}: its record is damaged") from error
    if not isinstance(record, dict):
        raise CliError(f"{path}: its record is damaged")
    return record


def save_picture(picture: Picture, wanted: Path, *, overwrite: bool) -> Path:
    """Save a PNG and its JSON; where the name is taken, under the next free one.

    A name counts as free when what is there is the same job of a batch, cut off last time.
    """
    text = (json.dumps(picture.record, ensure_ascii=False, indent=2) + "\n").encode()
    for path in candidates(wanted):
        beside = path.with_suffix(".json")
        if overwrite or _is_same_job(beside, picture.record):
            write_whole(beside, text)
        elif path.exists() or not write_new(beside, text):
            continue
        try:
            write_whole(path, to_png(picture.image, picture.record))
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        if picture.sheet is not None:
            write_whole(sheet_path(path), to_png(picture.sheet))
        return path
    raise AssertionError("names never run out")


def check_free(path: Path) -> None:
    """CliError when saving a picture under exactly this name would replace something."""
    for taken in (path, path.with_suffix(".json")):
        if taken.exists():
            raise CliError(f"{taken} is already there; choose another name, or add --overwrite")


def sheet_path(path: Path) -> Path:
    """Where the previews of a picture go."""
    return path.with_name(f"{path.stem}.previews.png")


def _is_same_job(beside: Path, record: dict[str, Any]) -> bool:
    if "job" not in record:
        return False
    try:
        there = json.loads(beside.read_bytes())
    except (OSError, ValueError):
        return False
    same = ("job", "index")
    return isinstance(there, dict) and all(there.get(k) == record.get(k) for k in same)
