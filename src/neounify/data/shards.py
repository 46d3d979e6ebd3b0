"""Samples from tar shards in the WebDataset layout, by number.

The standard library's tarfile indexes the members once, and single members are read where they
lie. The `webdataset` library streams shards instead: a position in a stream, with its shuffle
buffer, cannot be resumed exactly, and that is what training here promises.

The files of a sample share the name up to the first dot: `KEY.json` with a record of the published
schema, or an image with its caption (`KEY.jpg` with `KEY.txt`, `KEY.caption`, or a `KEY.json` that
holds a "caption") that is its target. "image" of a record names files of the shard: siblings by
their whole name or what follows the key (`KEY.0.png`, `0.png`), others by their path in the shard.
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic.dataclasses import dataclass as config_dataclass

from neounify.config.ranges import STRICT
from neounify.data.configs import FileData
from neounify.data.formats import (
    CAPTION_ENDINGS,
    IMAGE_ENDINGS,
    files_below,
    foreign_file,
    foreign_folder,
    named,
)
from neounify.data.sample import (
    DataError,
    RecordRules,
    Sample,
    SampleImage,
    SampleText,
    Turn,
    parse_record,
    sample_from_record,
)
from neounify.data.sources import FileSource, Unread

MAX_MEMBER_BYTES = 256 * 2**20
MAX_TEXT_BYTES = 16 * 2**20
"""Size of a record or caption."""

Member = tuple[int, int]
"""Offset and size in bytes of a file's content in its shard."""


@dataclass(frozen=True)
class _Entry:
    """One sample: its shard, its key, and its files by what follows the key, in lower case."""

    shard: Path
    key: str
    members: dict[str, Member]

    @property
    def image(self) -> str | None:
        """The ending of its image: KEY.jpg before others such as KEY.depth.png."""
        images = [ending for ending in self.members if _is_image(ending)]
        return min(images, key=lambda ending: "." in ending, default=None)

    @property
    def is_sample(self) -> bool:
        """Whether it has files other than images."""
        return not all(_is_image(ending) for ending in self.members)


@config_dataclass(frozen=True, kw_only=True, config=STRICT)
class ShardData(FileData):
    """`kind = "shards"`: tar files or a folder of them; `path` may hold `*`."""

    kind: Literal["shards"] = "shards"

    def build(self) -> ShardSource:
        return ShardSource(
            _shards(self.path),
            rules=self.rules,
            name=self.path,
            colour_profiles=self.colour_profiles,
        )


class ShardSource(FileSource):
    """Samples of some shards, in order. `damage` lists what indexing could not read.

    An image with a caption is always a target. Raises DataError when the shards hold no sample at
    all.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        *,
        rules: RecordRules | None = None,
        name: str | None = None,
        colour_profiles: bool = True,
    ) -> None:
        self.colour_profiles = colour_profiles
        self.rules = rules or RecordRules()
        self.unread_fields = self.rules.unread
        self.name = name or (paths[0].name if len(paths) == 1 else f"{len(paths)} shards")
        self.damage = []
        self._entries: list[_Entry] = []
        self._images: dict[Path, dict[tuple[str, str], Member]] = {}
        for path in paths:
            self._add(path)
        if not self._entries:
            why = f" ({self.damage[0]})" if self.damage else ""
            raise DataError(f"{self.name}: no sample in {len(paths)} shards{why}")

    def _add(self, path: Path) -> None:
        entries = _index(path, self.damage)
        if any("json" in entry.members for entry in entries):
            # Images without a record may be named by records, by their path in the shard.
            alone = [entry for entry in entries if not entry.is_sample]
            self._images[path] = {
                (entry.key, ending): member
                for entry in alone
                for ending, member in entry.members.items()
            }
            entries = [entry for entry in entries if entry.is_sample]
        self._entries += entries

    @property
    def size(self) -> int:
        return len(self._entries)

    def location(self, index: int) -> str:
        """Shard and key of a sample."""
        entry = self._entries[index]
        return f"{entry.shard.name}, {entry.key}"

    def _unread(self, index: int) -> Unread:
        entry = self._entries[index]
        record = parse_record(_bytes(entry, "json")) if "json" in entry.members else None
        if record is None or (_is_metadata(record) and entry.image is not None):
            sample = _caption_pair(entry, record)
        else:
            sample = sample_from_record(record, Path(), self.rules)
        name = sample.id or f"{entry.shard.stem}-{entry.key}"
        return Unread(replace(sample, id=name), partial(self._image, entry))

    def _image(self, entry: _Entry, path: Path) -> tuple[bytes, str]:
        name, member = self._find_image(entry, path)
        return _content(entry.shard, name, member), name

    def _find_image(self, entry: _Entry, path: Path) -> tuple[str, Member]:
        """The file a record names: by its path in the shard, or a sibling by its ending."""
        others = self._images.get(entry.shard, {})
        inside = PurePosixPath(path.as_posix())
        for full in (inside, PurePosixPath(entry.key).parent / inside):
            if _split(full) in others:
                return str(full), others[_split(full)]
        for ending in (path.name.lower(), _split(inside)[1]):
            if ending in entry.members:
                return f"{entry.key}.{ending}", entry.members[ending]
        siblings = named(ending for ending in entry.members if _is_image(ending))
        raise DataError(
            f"the image {str(path)!r} is not in the shard; name a file that shares the key, such "
            f"as {entry.key}.0.png, or one by its path in the shard (siblings here: {siblings})"
        )


def _shards(pattern: str) -> list[Path]:
    """The files a pattern names, or the tar files below a folder; endings in any case.

    Raises DataError when there are none.
    """
    path = Path(pattern)
    try:
        if path.is_file():
            return [path]
        shards = files_below(path, ".tar") if path.is_dir() else _matching(path)
    except (OSError, ValueError) as error:  # ValueError: "**" beside other characters
        raise DataError(
            f"the data {pattern[:200]!r} cannot be looked for: {error}"[:500]
        ) from error
    if not shards:
        what = foreign_folder(path) if path.is_dir() else "is not there"
        if "{" in path.name:
            what += "; braces are not expanded, write * (it matches any characters of a name)"
        raise DataError(f"the data {pattern} {what}")
    return sorted(shards)


def _matching(pattern: Path) -> list[Path]:
    """Files whose names match a pattern, in any case."""
    folders = [pattern.parent]
    if "*" in str(pattern.parent):
        base = Path(pattern.anchor)
        folders = list(base.glob(str(pattern.parent.relative_to(base))))
    name = pattern.name.lower()
    return [f for folder in folders for f in folder.glob("*") if fnmatch(f.name.lower(), name)]


def _index(path: Path, damage: list[str]) -> list[_Entry]:
    """The samples of one shard; those before a damaged header can be read."""
    members_of: dict[str, dict[str, Member]] = {}
    try:
        if not path.is_file():
            raise OSError("not a file")
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if not member.isreg() or member.issparse() or name.name.startswith("."):
                    continue
                key, ending = _split(name)
                members_of.setdefault(key, {})[ending] = (member.offset_data, member.size)
    except (OSError, tarfile.TarError, ValueError, OverflowError) as error:
        # The last two: tarfile does not check all numbers of a damaged header.
        damage.append(f"{path.name}: {_why(path, error)}")
    return [_Entry(path, key, members) for key, members in members_of.items()]


def _split(name: PurePosixPath) -> tuple[str, str]:
    """A file's key, with its folders, and what follows the first dot, in lower case."""
    stem, _, ending = name.name.partition(".")
    return str(name.parent / stem), ending.lower()


def _why(path: Path, error: Exception) -> str:
    """The reason why a shard cannot be read to its end."""
    what = None
    with suppress(OSError):
        what = foreign_file(path)
    if what is None and path.suffix.lower() in (".jsonl", ".json"):
        what = 'is no tar archive; read JSON lines with kind = "jsonl"'
    return f"{what or error}; a shard is an uncompressed tar file"


def _is_image(ending: str) -> bool:
    return f".{ending.rpartition('.')[2]}" in IMAGE_ENDINGS


def _is_metadata(record: Any) -> bool:
    """Whether JSON beside an image is metadata of it, and not a record."""
    return isinstance(record, dict) and not {"conversations", "messages"} & record.keys()


def _caption_pair(entry: _Entry, metadata: Any) -> Sample:
    """An image as the target of its caption: a text file, or else "caption" of its JSON."""
    image = entry.image
    text = next((e for e in CAPTION_ENDINGS if e[1:] in entry.members), None)
    caption = metadata.get("caption") if isinstance(metadata, dict) else None
    if image is None or (text is None and not isinstance(caption, str)):
        raise DataError(
            "neither a json record nor an image with a txt caption; files of one sample share the "
            f"name up to the first dot, here there are {named(entry.members)}"
        )
    if text is not None:
        content = _bytes(entry, text[1:])
        try:
            caption = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(
                f"the caption is not UTF-8 text ({error.reason}); convert it"
            ) from error
    assert isinstance(caption, str)
    if not caption.strip():
        raise DataError("the caption is empty")
    answer = Turn("assistant", (SampleImage(Path(image), "target"),))
    return Sample("t2i", (Turn("user", (SampleText(caption.strip()),)), answer))


def _bytes(entry: _Entry, ending: str) -> bytes:
    """The content of a record or caption."""
    _, size = entry.members[ending]
    if size > MAX_TEXT_BYTES:
        raise DataError(f"{ending} has {size} bytes, more than {MAX_TEXT_BYTES}")
    return _content(entry.shard, ending, entry.members[ending])


def _content(shard: Path, name: str, member: Member) -> bytes:
    offset, size = member
    if not 0 <= size <= MAX_MEMBER_BYTES:
        raise DataError(f"{name} has {size} bytes; up to {MAX_MEMBER_BYTES} are read")
    with shard.open("rb") as stream:
        stream.seek(offset)
        content = stream.read(size)
    if len(content) != size:
        raise DataError(f"{name} is cut off after {len(content)} of {size} bytes")
    return content
