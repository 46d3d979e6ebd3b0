"""The writing pass: the table part of a unit, and its kept samples as a shard the trainer reads."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from neounify.curate.parts import arrow, read_table, write_part, write_table
from neounify.curate.recipe import CurateError, CurateRecipe
from neounify.curate.seconds import Seconds, Stopwatch
from neounify.curate.table import SCORES, final_schema
from neounify.curate.units import Item, Unit, read_items
from neounify.data import Sample, SampleImage, SampleText, Turn, sample_to_record
from neounify.image import read_image

if TYPE_CHECKING:
    from neounify.curate.captions import Captioned

KEPT, DROPPED = "kept", "dropped"
CAPTION_BATCH = 16
"""Images that are captioned together, fewer where they have over `max_pixels`."""
NEVER = ("known.", "safety.never")
"""Reasons whose samples are only counted: nothing of them is written."""
FORMAT_ENDINGS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "HEIF": "heic"}
"""Endings of files by Pillow's format, where they are not its name in lower case."""


@dataclass(frozen=True)
class Verdicts:
    """What was decided about the samples of a unit: reasons, "" for kept, and their copies."""

    reasons: tuple[str, ...]
    copies: tuple[str | None, ...]
    distances: tuple[float | None, ...]


@dataclass(frozen=True)
class Outputs:
    """Paths of a unit's table part and of its shard."""

    table: Path
    shard: Path

    @property
    def exist(self) -> bool:
        """Whether both are there; a unit without a kept sample has an empty shard."""
        return self.table.is_file() and self.shard.is_file()


def is_unspeakable(reason: str) -> bool:
    """Whether nothing of a sample with this reason may be shown."""
    return reason.startswith(NEVER)


def write_unit(
    unit: Unit,
    recipe: CurateRecipe,
    verdicts: Verdicts,
    measured: Path,
    scored: Path | None,
    outputs: Outputs,
) -> Seconds:
    """Write shard and table part of a unit, the table last; returns the seconds by stage.

    Raises CurateError.
    """
    watch = Stopwatch()
    rows = read_table(measured).to_pylist()
    scores = {} if scored is None else {r["number"]: r for r in read_table(scored).to_pylist()}
    for number, row in enumerate(rows):
        _decided(row, number, verdicts, scores.get(number))
    watch.lap("writing")
    captioned = _captioned(unit, rows, recipe)
    watch.lap("captions")
    for number, result in captioned.items():
        rows[number]["caption"] = result.chosen
        rows[number]["captions"] = [
            {"kind": kind, "text": text, "score": score} for kind, text, score in result.captions
        ]

    def write(aside: Path) -> None:
        with tarfile.open(aside, "w", format=tarfile.GNU_FORMAT) as archive:
            for number, item in enumerate(read_items(unit, recipe.stages.readable.max_bytes)):
                row = rows[number]
                if row["verdict"] == KEPT:
                    row["shard"] = outputs.shard.name
                    row["key"] = f"{unit.name}-{number:06d}"
                    _add_sample(archive, row, item)

    write_part(outputs.shard, write)
    table = arrow().Table.from_pylist(rows, schema=final_schema())
    write_table(outputs.table, table)
    watch.lap("writing")
    return watch.seconds


def _captioned(
    unit: Unit, rows: list[dict[str, Any]], recipe: CurateRecipe
) -> dict[int, Captioned]:
    """Captions of the kept samples of a unit that are captioned, by number."""
    if recipe.stages.captions.model is None or not recipe.stages.captions.enabled:
        return {}
    from neounify.curate.captions import caption_images, wants_caption

    results: dict[int, Captioned] = {}
    group: list[tuple[int, Sample, Image.Image]] = []

    pixels, readable = 0, recipe.stages.readable

    def finish() -> None:
        captions = caption_images([i for _, _, i in group], [s for _, s, _ in group], recipe)
        results.update({n: c for (n, _, _), c in zip(group, captions, strict=True)})
        group.clear()

    for number, item in enumerate(read_items(unit, readable.max_bytes)):
        row = rows[number]
        if row["verdict"] != KEPT or item.sample is None:
            continue
        if wants_caption(item.sample, row.get("match"), recipe):
            image = read_image(item.files()[0])
            group.append((number, item.sample, image))
            pixels += image.width * image.height
        if len(group) == CAPTION_BATCH or pixels >= readable.max_pixels:
            finish()
            pixels = 0
    if group:
        finish()
    return results


def _decided(
    row: dict[str, Any], number: int, verdicts: Verdicts, scores: dict[str, Any] | None
) -> None:
    """Fill in verdict, reason and scores of a row."""
    reason, detail = verdicts.reasons[number], row["detail"]
    if scores is not None:
        row.update({name: scores[name] for name in SCORES})
        detail = scores["detail"] or detail
    row["reason"], row["verdict"] = reason or None, DROPPED if reason else KEPT
    row["detail"] = detail if reason else None
    row["copy_of"], row["distance"] = verdicts.copies[number], verdicts.distances[number]
    if is_unspeakable(reason):
        row.update(images=[], text=None, detail=None, copy_of=None, distance=None)
        row.update(dict.fromkeys(SCORES))


def _add_sample(archive: tarfile.TarFile, row: dict[str, Any], item: Item) -> None:
    """Add a record and its images; the files of the images are those of the input.

    Raises CurateError for what is not as it was measured.
    """
    if item.sample is None:
        raise CurateError(f"{item.location} has changed while it was read: {item.error}")
    caption = row.get("caption")
    sample = item.sample if caption is None else with_prompt(item.sample, caption)
    key, names = row["key"], []
    for number, (image, content) in enumerate(zip(row["images"], item.files(), strict=True)):
        if hashlib.sha256(content).hexdigest() != image["sha256"]:
            raise CurateError(f"{item.location}: an image has changed while it was read; run again")
        form = image["format"]
        names.append(f"{key}.{number}.{FORMAT_ENDINGS.get(form, str(form).lower())}")
        _add(archive, names[-1], content)
    record = sample_to_record(sample, names)
    _add(archive, f"{key}.json", json.dumps(record, ensure_ascii=False).encode())


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # without time, user and group
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def with_prompt(sample: Sample, text: str) -> Sample:
    """The sample with another text in its last user turn; images of that turn stay in front."""
    at = max(n for n, turn in enumerate(sample.turns) if turn.role == "user")
    images = tuple(part for part in sample.turns[at].parts if isinstance(part, SampleImage))
    turn = Turn("user", (*images, SampleText(text)))
    return replace(sample, turns=(*sample.turns[:at], turn, *sample.turns[at + 1 :]))
