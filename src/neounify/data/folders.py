"""Folders of images and clips, each with its caption in a text file of the same name.

`a.png` with `a.txt`, `a.caption`, or with an `a.json` that holds a "caption" (img2dataset), in any
folder below; with `images = FOLDER`, the texts have the same paths below their own folder. Those
of a folder without texts take the captions of img2dataset's table beside it, `FOLDER.parquet`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic.dataclasses import dataclass as config_dataclass

from neounify.config.ranges import STRICT
from neounify.data.configs import RecordData
from neounify.data.formats import CAPTION_ENDINGS, MEDIA_ENDINGS, named, recognise
from neounify.data.forms.captions import caption_sample
from neounify.data.media import Unread, file_inside, files_in
from neounify.data.parquet import captions_by_key
from neounify.data.records import parse_record
from neounify.data.sample import DataError
from neounify.data.sources import RecordSource
from neounify.files import read_bytes

MAX_CAPTION_BYTES = 2**20
MAX_FILES = 20_000_000
"""Files of a folder, of which the names are kept in memory."""
_TEXTS = (*CAPTION_ENDINGS, ".json")


@config_dataclass(frozen=True, kw_only=True, config=STRICT)
class CaptionData(RecordData):
    """`kind = "captions"`: a folder of images or clips and text files of the same names."""

    kind: Literal["captions"] = "captions"

    def build(self) -> CaptionFolder:
        return CaptionFolder.of(self)


class CaptionFolder(RecordSource):
    """Images and clips below a folder in order of their paths, each the target of its caption.

    An image without a caption is a damaged sample; texts without an image are listed in `damage`.
    Hidden files are left out, and links that lead outside are refused. Raises DataError for a
    folder without a caption.
    """

    def _index(self, path: Path) -> None:
        self.folder, self.image_folder = path, self.root or path
        if not path.is_dir():
            what = recognise(path).but_for("captions") if path.is_file() else "is not there"
            raise DataError(f"the data {path} {what or 'is not a folder'}")
        texts = _by_stem(_names_below(path, _TEXTS))
        self._media = _names_below(self.image_folder, MEDIA_ENDINGS)
        stems = [_stem(name) for name in self._media]
        taken: dict[str, int] = {}
        for stem in stems:
            taken[stem] = taken.get(stem, 0) + 1
        self._texts = [tuple(texts.get(stem, ())) for stem in stems]
        self._shared = {stem for stem, count in taken.items() if count > 1}
        self._captions = self._from_tables(stems)
        if not any(self._texts) and not self._captions:
            what = recognise(path).but_for("captions") or "has no text beside an image or clip"
            raise DataError(f"the data {path} {what}")
        # A .json that belongs to no image may be a list of something else.
        alone = [t for stem, names in texts.items() if stem not in taken for t in names]
        alone = [name for name in alone if not name.lower().endswith(".json")]
        if alone:
            what = f"{len(alone):,} texts without an image or clip: {named(alone)}"
            self.damage.append(f"{self.name}: {what}")

    @property
    def size(self) -> int:
        return len(self._media)

    def location(self, index: int) -> str:
        """The image of a sample, from the folder on."""
        return self._media[index]

    def _unread(self, index: int) -> Unread:
        image, texts = self._media[index], self._texts[index]
        stem = _stem(image)
        if not texts and stem not in self._captions:
            endings = ", ".join(CAPTION_ENDINGS)
            raise DataError(f"no caption: a file of the same name with {endings} is expected")
        if stem in self._shared:
            raise DataError("other files have the same name but for the ending, and one caption")
        plain = [name for name in texts if not name.lower().endswith(".json")]
        if len(plain) > 1:
            raise DataError(f"two captions: {named(plain)}")
        text = self._text(plain[0]) if plain else None
        if text is None and stem in self._captions:
            text = self._captions[stem].encode()
        metadata = [parse_record(self._text(name)) for name in texts if name not in plain]
        sample = caption_sample(
            self.image_folder / image, text, metadata[0] if metadata else None, self.rules
        )
        return Unread(replace(sample, id=stem), files_in(self.image_folder))

    def _from_tables(self, stems: Sequence[str]) -> dict[str, str]:
        """Captions of images without a text, from tables of img2dataset beside their folders."""
        captions: dict[str, str] = {}
        with_plain = {stem for stem, texts in zip(stems, self._texts, strict=True) if texts}
        folders = {stem.rpartition("/")[0] for stem in stems if stem not in with_plain}
        for inside in sorted(folders):
            table = self.folder / f"{inside}.parquet"
            if inside and table.is_file():
                try:
                    by_key = captions_by_key(table)
                except DataError as error:
                    self.damage.append(f"{table.name}: {error}")
                    continue
                captions |= {f"{inside}/{key}": text for key, text in by_key.items()}
        return {stem: captions[stem] for stem in stems if stem in captions}

    def _text(self, name: str) -> bytes:
        file = file_inside(self.folder / name, self.folder)
        return read_bytes(file, MAX_CAPTION_BYTES, DataError)


def _names_below(folder: Path, endings: Sequence[str] | frozenset[str]) -> list[str]:
    """Paths of visible files of some endings below a folder, from it on, in order.

    Raises DataError for a folder that cannot be read, or has too many files.
    """
    names: list[str] = []

    def failed(error: OSError) -> None:
        raise DataError(f"the data {folder} cannot be read: {error}")

    for root, folders, files in os.walk(folder, onerror=failed):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = os.path.relpath(root, folder)
        prefix = "" if inside == "." else f"{inside}/"
        names += [
            prefix + name
            for name in files
            if not name.startswith(".") and f".{name.rpartition('.')[2].lower()}" in endings
        ]
        if len(names) > MAX_FILES:
            raise DataError(f"the data {folder} has more than {MAX_FILES:,} files")
    return sorted(names)


def _stem(name: str) -> str:
    """The path without the ending."""
    return name[: name.rindex(".")]


def _by_stem(names: Sequence[str]) -> dict[str, list[str]]:
    by_stem: dict[str, list[str]] = {}
    for name in names:
        by_stem.setdefault(_stem(name), []).append(name)
    return by_stem
