"""The measuring pass: stages 1 to 4, hashes and text of every sample of a unit, as a table part."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from neounify.curate.images import ImageRow, decode, luma_of, measure_hashes, measure_quality
from neounify.curate.near import first_within, hash_words
from neounify.curate.parts import code_version, digest_of, part_path, write_table
from neounify.curate.recipe import CurateError, CurateRecipe, Known
from neounify.curate.rules import IMAGE_BOUNDS, Bound, image_reasons, text_reasons
from neounify.curate.seconds import Seconds, Stopwatch
from neounify.curate.table import MAX_DETAIL_CHARACTERS, Row, measured_table
from neounify.curate.texts import measure_text, signature
from neounify.curate.units import Item, Unit, read_items
from neounify.data import Sample
from neounify.errors import ImageError
from neounify.files import read_text
from neounify.text import IMAGE_MARK

MAX_LIST_BYTES = 2**32


def measured_path(unit: Unit, settings: str, folder: Path) -> Path:
    """The part of a unit with `measured_settings`."""
    digest = digest_of(code_version(), unit.digest, unit.stamp, settings)
    return part_path(folder, unit.name, digest, ".parquet")


def measured_settings(recipe: CurateRecipe) -> str:
    """A digest of all settings and lists that measures depend on. Raises CurateError.

    Where everything is measured, bounds do not change it.
    """
    stages = recipe.stages
    settings: list[object] = [recipe.measure, stages.readable, stages.known]
    settings += _list_digests(stages.known)
    if recipe.measure == "first":
        settings += [stages.geometry, stages.quality, stages.text]
    return digest_of(*settings)


def measure_unit(unit: Unit, recipe: CurateRecipe, path: Path) -> Seconds:
    """Measure a unit and write its part; returns the seconds by stage. Raises CurateError."""
    watch = Stopwatch()
    write_table(path, measured_table(measured_rows(unit, recipe, watch)))
    return watch.seconds


def measured_rows(unit: Unit, recipe: CurateRecipe, watch: Stopwatch) -> list[Row]:
    """The rows of a unit in order, known bad samples left blank."""
    known = recipe.stages.known
    items = read_items(unit, recipe.stages.readable.max_bytes)
    rows = [_Sampled(item, unit, recipe, watch).row for item in items]
    if known.enabled and known.hashes:
        listed = _known_hashes(known.hashes, Path(known.hashes).stat().st_mtime_ns)
        hashes = [(n, i.hash) for n, row in enumerate(rows) for i in row.images if i.hash]
        words = hash_words([content for _, content in hashes])
        found_at = first_within(words, listed, known.distance)
        for (number, _), match in zip(hashes, found_at, strict=True):
            if match >= 0:
                rows[number].blank("known.hash")
        watch.lap("known")
    return rows


class _Sampled:
    """The row of one sample, measured stage by stage until its first reason."""

    def __init__(self, item: Item, unit: Unit, recipe: CurateRecipe, watch: Stopwatch) -> None:
        self.stages, self.watch = recipe.stages, watch
        self.all = recipe.measure == "all"
        sample = item.sample
        name = sample.id if sample is not None else item.location
        self.row = Row(name, unit.container.source, item.location)
        if sample is None:
            self._drop("readable.record", item.error)
            return
        self.row.task = sample.task
        if not self._read(sample, item.contents):
            return
        self._measure_images()
        if self.row.reason is None or self.all:
            self._measure_text(sample)
            watch.lap("text")

    def _drop(self, reason: str, detail: str | None = None) -> None:
        if self.row.reason is None:
            self.row.reason = reason
            self.row.detail = None if detail is None else detail[:MAX_DETAIL_CHARACTERS]

    def _read(self, sample: Sample, contents: Sequence[bytes | str]) -> bool:
        """Decode the images; False where nothing else can or may be measured."""
        known, readable = self.stages.known, self.stages.readable
        bad = frozenset[str]()
        if known.enabled and known.sha256:
            bad = _known_files(known.sha256, Path(known.sha256).stat().st_mtime_ns)
        self.images: list[Image.Image] = []
        self.listed = bool(known.enabled and known.hashes)
        left, error = readable.max_pixels, ""
        for image, content in zip(sample.images, contents, strict=True):
            if isinstance(content, str):
                error = error or content
                continue
            row = ImageRow(image.role, len(content), hashlib.sha256(content).hexdigest())
            self.row.images.append(row)
            if row.sha256 in bad:
                self.row.blank("known.sha256")
                return False
            try:
                if not error:
                    self.images.append(decode(content, row, left, readable.max_bytes))
                    left -= self.images[-1].width * self.images[-1].height
                    self.watch.lap("readable")
                    if self.listed:  # even if another image of the sample cannot be read
                        measure_hashes(self.images[-1], row)
                        self.watch.lap("known")
            except ImageError as failure:
                error = str(failure).removeprefix("the image: ")
        self.watch.lap("readable")
        if error:
            self._drop("readable.image", error)
        return not error

    def _measure_images(self) -> None:
        stages, pairs = self.stages, list(zip(self.images, self.row.images, strict=True))
        if self._ends("geometry"):
            return
        if stages.quality.enabled:
            for image, row in pairs:
                if self.all or row.role in stages.quality.on:
                    measure_quality(luma_of(image), row)
        ends = self._ends("quality")
        self.watch.lap("quality")
        if not ends and not self.listed:
            for image, row in pairs:
                measure_hashes(image, row)
            self.watch.lap("near")

    def _ends(self, stage: str) -> bool:
        """Whether the sample ends at this stage; notes the reason."""
        bounds: list[Bound] = [bound for bound in IMAGE_BOUNDS if bound.stage == stage]
        values = [asdict(row) for row in self.row.images]
        reason = next(image_reasons(self.stages, values, bounds), None)
        if reason is not None and not self.all:
            self._drop(reason)
        return reason is not None and not self.all

    def _measure_text(self, sample: Sample) -> None:
        text = sample.text().replace(IMAGE_MARK, " ")
        row = self.row.text = measure_text(text)
        reason = next(text_reasons(self.stages, asdict(row)), None)
        if self.stages.text.enabled and (reason is None or self.all):
            row.signature = signature(text)


@lru_cache(maxsize=2)
def _known_files(path: str, time: int) -> frozenset[str]:
    """SHA-256 digests of a list in lower case. Raises CurateError."""
    return frozenset(_listed(path, 64, "SHA-256"))


@lru_cache(maxsize=2)
def _known_hashes(path: str, time: int) -> np.ndarray:
    """Perceptual hashes of a list, [n, 4]. Raises CurateError."""
    return hash_words([bytes.fromhex(line) for line in _listed(path, 64, "256-bit hash")])


def _listed(path: str, characters: int, what: str) -> Iterator[str]:
    """The hex words that begin the lines of a list; # begins a comment."""
    text = read_text(Path(path), MAX_LIST_BYTES, CurateError)
    for number, line in enumerate(text.splitlines(), 1):
        word = line.partition("#")[0].replace(",", " ").split()[:1]
        if not word:
            continue
        if len(word[0]) != characters or not set(word[0].lower()) <= set("0123456789abcdef"):
            raise CurateError(f"{path}, line {number}: not a {what} of {characters} hex digits")
        yield word[0].lower()


def _list_digests(known: Known) -> list[str]:
    """Digests of the lists' contents."""
    lists = [path for path in (known.sha256, known.hashes) if known.enabled and path]
    return [
        hashlib.sha256(read_text(Path(path), MAX_LIST_BYTES, CurateError).encode()).hexdigest()
        for path in lists
    ]
