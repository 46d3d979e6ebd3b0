"""The scoring pass: stages 8 to 11 of the samples of a unit that are left, as a part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from neounify.curate.hooks import (
    Reader,
    call_hook,
    hook_digest,
    load_hook,
    read_number,
    read_scores,
    read_vector,
)
from neounify.curate.parts import arrow, code_version, digest_of, part_path, write_table
from neounify.curate.recipe import CurateError, CurateRecipe, HookStage, Safety
from neounify.curate.rules import HOOK_BOUNDS, setting
from neounify.curate.seconds import Seconds, Stopwatch
from neounify.curate.table import MAX_DETAIL_CHARACTERS
from neounify.curate.units import Item, Unit, read_items, writable
from neounify.image import read_image
from neounify.text import IMAGE_MARK

READERS: dict[str, Reader] = {
    "safety": read_scores,
    "watermark": read_number,
    "beauty": read_number,
    "match": read_number,
    "embeddings": read_vector,
}
"""Stages of hooks in their order."""
MAX_FAILED = 0.5
"""Share of a unit's calls that may fail; a hook that fails more often is broken."""
MIN_CALLS = 8


Decoded = tuple[int, Item, list[Image.Image]]
"""A sample by its number, and its images."""


@dataclass
class Scored:
    """Values of one sample: a list for each stage, one value for an image that it looked at."""

    number: int
    reason: str | None = None
    detail: str | None = None
    values: dict[str, list[Any]] = field(default_factory=dict)


def hook_stages(recipe: CurateRecipe) -> dict[str, HookStage]:
    """Stages that have a hook and are enabled, in order."""
    stages = {name: getattr(recipe.stages, name) for name in READERS}
    return {name: stage for name, stage in stages.items() if stage.enabled and stage.hook}


def scored_path(unit: Unit, alive: NDArray[np.bool_], settings: str, folder: Path) -> Path:
    """The part of a unit, for these samples and `scored_settings`."""
    kept = np.packbits(alive).tobytes().hex()
    digest = digest_of(code_version(), unit.digest, unit.stamp, kept, settings)
    return part_path(folder, unit.name, digest, ".parquet")


def scored_settings(recipe: CurateRecipe) -> str:
    """A digest of all settings and hooks that values depend on. Raises CurateError."""
    stages = hook_stages(recipe)
    files = [hook_digest(str(stage.hook), recipe.folder) for stage in stages.values()]
    return digest_of(recipe.measure, stages, files)


def score_unit(unit: Unit, alive: NDArray[np.bool_], recipe: CurateRecipe, path: Path) -> Seconds:
    """Call the hooks on the samples of a unit and write the part; returns the seconds by stage.

    Raises CurateError.
    """
    pa, watch = arrow(), Stopwatch()
    rows = [
        {
            "number": scored.number,
            "reason": scored.reason,
            "detail": scored.detail,
            "safety": [list(scores.items()) for scores in scored.values.get("safety", [])],
            **{name: scored.values.get(name, []) for name in ("watermark", "beauty", "match")},
            "embeddings": [vector.tolist() for vector in scored.values.get("embeddings", [])],
        }
        for scored in score_rows(unit, alive, recipe, watch)
    ]
    numbers = pa.list_(pa.float64())
    schema = pa.schema(
        [("number", pa.int64()), ("reason", pa.string()), ("detail", pa.string())]
        + [("safety", pa.list_(pa.map_(pa.string(), pa.float64())))]
        + [(name, numbers) for name in ("watermark", "beauty", "match")]
        + [("embeddings", pa.list_(pa.list_(pa.float32())))]
    )
    write_table(path, pa.Table.from_pylist(rows, schema=schema))
    return watch.seconds


def score_rows(
    unit: Unit, alive: NDArray[np.bool_], recipe: CurateRecipe, watch: Stopwatch
) -> list[Scored]:
    """The values of all samples left, in order, batch by batch."""
    results: list[Scored] = []
    failed = dict.fromkeys(READERS, 0)
    calls = dict.fromkeys(READERS, 0)
    batch = min((stage.batch for stage in hook_stages(recipe).values()), default=1)
    for group in _groups(unit, alive, batch, recipe):
        scored = [Scored(number) for number, _, _ in group]
        watch.lap("readable")
        for name, stage in hook_stages(recipe).items():
            _run_stage(name, stage, group, scored, recipe, failed, calls)
            watch.lap(name)
        results += scored
    for name, count in failed.items():
        if calls[name] >= MIN_CALLS and count > MAX_FAILED * calls[name]:
            example = next(s.detail for s in results if s.reason == f"{name}.failed")
            raise CurateError(
                f"the hook of stage {name} failed on {count} of {calls[name]} images of "
                f"{unit.name}, so it is broken: {example}"
            )
    return results


def _groups(
    unit: Unit, alive: NDArray[np.bool_], size: int, recipe: CurateRecipe
) -> Iterator[list[Decoded]]:
    """The samples left with their images, `size` at a time, fewer where images are large."""
    group: list[Decoded] = []
    readable, pixels = recipe.stages.readable, 0
    for number, item in enumerate(read_items(unit, readable.max_bytes)):
        if not alive[number]:
            continue
        images = [read_image(content) for content in item.files()]
        group.append((number, item, images))
        pixels += sum(image.width * image.height for image in images)
        if len(group) == size or pixels >= readable.max_pixels:
            yield group
            group, pixels = [], 0
    if group:
        yield group


def _run_stage(
    name: str,
    stage: HookStage,
    group: list[Decoded],
    scored: list[Scored],
    recipe: CurateRecipe,
    failed: dict[str, int],
    calls: dict[str, int],
) -> None:
    """One stage over the samples of a batch that have no reason yet."""
    assert stage.hook is not None
    wanted: list[tuple[Scored, Image.Image | None, str]] = []
    for (_, item, decoded), sample in zip(group, scored, strict=True):
        if item.sample is None or (sample.reason and recipe.measure == "first"):
            continue
        text = item.sample.text().replace(IMAGE_MARK, " ").strip()
        roles = [image.role for image in item.sample.images]
        looked = [i for i, role in zip(decoded, roles, strict=True) if role in stage.on]
        wanted += [(sample, image, text) for image in looked]
        if not roles and isinstance(stage, Safety):
            wanted.append((sample, None, text))
    hook = load_hook(stage.hook, recipe.folder)
    for start in range(0, len(wanted), stage.batch):
        block = wanted[start : start + stage.batch]
        values = call_hook(
            hook,
            [image for _, image, _ in block],
            [text for _, _, text in block],
            READERS[name],
            stage.timeout,
        )
        calls[name] += len(block)
        for (sample, _, _), value in zip(block, values, strict=True):
            if isinstance(value, BaseException):
                failed[name] += 1
                detail = writable(f"{type(value).__name__}: {value}")[:MAX_DETAIL_CHARACTERS]
                _drop(sample, f"{name}.failed", detail)
                continue
            sample.values.setdefault(name, []).append(value)
            if reason := hook_reason(name, value, recipe):
                _drop(sample, reason)


def _drop(sample: Scored, reason: str, detail: str | None = None) -> None:
    if sample.reason is None or reason == "safety.never":
        sample.reason, sample.detail = reason, detail


def hook_reason(name: str, value: Any, recipe: CurateRecipe) -> str | None:
    """The reason that a value of a stage gives; embeddings give none alone."""
    stages = recipe.stages
    if name == "safety":
        if any(value.get(key, 0.0) > 0 for key in stages.safety.never):
            return "safety.never"
        return "safety.bound" if any(s >= stages.safety.bound for s in value.values()) else None
    for bound in HOOK_BOUNDS:
        limit = setting(stages, bound) if bound.stage == name else None
        if limit is not None and bound.drops(float(value), limit):
            return bound.reason
    return None
