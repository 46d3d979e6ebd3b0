"""Samples from tar shards in the WebDataset layout, by number.

The standard library's tarfile indexes the members once, and single members are read where they
lie. The `webdataset` library streams shards instead: a position in a stream, with its shuffle
buffer, cannot be resumed exactly, and that is what training here promises.

The files of a sample share the name up to the first dot: `KEY.json` with a record of the published
schema, or an image or clip with its caption (`KEY.jpg` or `KEY.mp4` with `KEY.txt`, `KEY.caption`,
or a `KEY.json` that holds a "caption") that is its target. Those without a text take the captions
of img2dataset's table beside the shard, `SHARD.parquet`. "image" and "video" of a record name files
of the shard: siblings by their whole name or what follows the key (`KEY.0.png`, `0.png`), others by
their path in the shard.
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
    MEDIA_ENDINGS,
    VIDEO_ENDINGS,
    files_below,
    has_ending,
    named,
    recognise,
)
from neounify.data.forms.captions import caption_sample
from neounify.data.media import IN_RECORD, Blobs, Unread
from neounify.data.parquet import captions_by_key
from neounify.data.records import RecordRules, parse_record, sample_from_record
from neounify.data.sample import DataError, Sample
from neounify.data.sources import FileSource

MAX_MEMBER_BYTES = 256 * 2**20
MAX_MEMBERS = 1_000_000
"""Members of one shard; published ones have some thousands."""
MAX_EMPTY = 10_000
"""Empty members of one shard: a header of 512 bytes makes one, so a small file holds millions."""
MAX_TEXT_BYTES = 16 * 2**20
"""Size of a record or caption."""

Member = tuple[int, int]
"""Offset and size in bytes of a file's content in its shard."""
_TWICE: Member = (-1, -1)
"""In place of a file whose name stands twice: which of the two is meant is not known."""


@dataclass(frozen=True)
class _Entry:
    """One sample: its shard, its key, and its files by what follows the key, in lower case."""

    shard: Path
    key: str
    members: dict[str, Member]

    @property
    def target(self) -> str | None:
        """The ending of its clip or image: KEY.jpg before others such as KEY.depth.png."""
        media = [ending for ending in self.members if _is_medium(ending)]
        # Of a clip and a still of it, the clip.
        media.sort(key=lambda ending: ("." in ending, not has_ending(ending, VIDEO_ENDINGS)))
        return media[0] if media else None

    @property
    def has_text(self) -> bool:
        """Whether it has a text beside the image or clip."""
        return any(ending[1:] in self.members for ending in CAPTION_ENDINGS)

    @property
    def is_sample(self) -> bool:
        """Whether it has files other than images and clips."""
        return not all(_is_medium(ending) for ending in self.members)


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

    An image or clip with a caption is always a target. Raises DataError when the shards hold no
    sample at all.
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
        self.name = name or (paths[0].name if len(paths) == 1 else f"{len(paths)} shards")
        self.damage = []
        self._entries: list[_Entry] = []
        self._media: dict[Path, dict[tuple[str, str], Member]] = {}
        self._captions: dict[tuple[Path, str], str] = {}
        self.shards, self.files = tuple(paths), list(paths)
        for path in paths:
            self._add(path)
        if not self._entries:
            why = f" ({self.damage[0]})" if self.damage else ""
            raise DataError(f"{self.name}: no sample in {len(paths)} shards{why}")

    def _add(self, path: Path) -> None:
        entries = _index(path, self.damage)
        self._add_captions(path, entries)
        if any("json" in entry.members for entry in entries):
            # Images and clips without a record may be named by records, by their path in the shard.
            alone = [entry for entry in entries if not self._is_sample(entry)]
            self._media[path] = {
                (entry.key, ending): member
                for entry in alone
                for ending, member in entry.members.items()
            }
            entries = [entry for entry in entries if self._is_sample(entry)]
        self._entries += entries

    def _is_sample(self, entry: _Entry) -> bool:
        return entry.is_sample or (entry.shard, entry.key) in self._captions

    def _add_captions(self, path: Path, entries: Sequence[_Entry]) -> None:
        """Captions of images without a text, from the table that img2dataset writes beside."""
        bare = [entry for entry in entries if entry.target and not entry.has_text]
        table = path.with_suffix(".parquet")
        if not bare or not table.is_file():
            return
        self.files.append(table)
        try:
            by_key = captions_by_key(table)
        except DataError as error:
            self.damage.append(f"{table.name}: {error}")
            return
        keys = ((entry.key, PurePosixPath(entry.key).name) for entry in bare)
        self._captions |= {(path, key): by_key[name] for key, name in keys if name in by_key}

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
        blobs: Blobs = {}
        if record is None or (_is_metadata(record) and entry.target is not None):
            caption = self._captions.get((entry.shard, entry.key))
            sample = _caption_pair(entry, record, caption, self.rules)
        else:
            sample = sample_from_record(record, Path(), self.rules, blobs)
        name = sample.id or f"{entry.shard.stem}-{entry.key}"
        return Unread(replace(sample, id=name), partial(self._content, entry, blobs))

    def _content(self, entry: _Entry, blobs: Blobs, path: Path) -> tuple[bytes, str]:
        if path.name in blobs:
            return blobs[path.name], IN_RECORD
        name, member = self._find(entry, path)
        return _content(entry.shard, name, member), name

    def _find(self, entry: _Entry, path: Path) -> tuple[str, Member]:
        """The file a record names: by its path in the shard, or a sibling by its ending."""
        others = self._media.get(entry.shard, {})
        inside = PurePosixPath(path.as_posix())
        for full in (inside, PurePosixPath(entry.key).parent / inside):
            if _split(full) in others:
                return str(full), others[_split(full)]
        for ending in (path.name.lower(), _split(inside)[1]):
            if ending in entry.members:
                return f"{entry.key}.{ending}", entry.members[ending]
        siblings = named(ending for ending in entry.members if _is_medium(ending))
        raise DataError(
            f"the file {str(path)!r} is not in the shard; name a file that shares the key, such "
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
        what = "is not there"
        if path.is_dir():
            what = recognise(path).but_for("shards") or "holds no .tar file"
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
    others = twice = empty = 0
    try:
        if not path.is_file():
            raise OSError("not a file")
        with tarfile.open(path, "r:") as archive:
            kept: list[tarfile.TarInfo] = vars(archive)["members"]
            for count, member in enumerate(archive):
                kept.clear()  # tarfile keeps all members, a kilobyte each
                if count >= MAX_MEMBERS:
                    raise ValueError(f"more than {MAX_MEMBERS:,} members; write several shards")
                name = PurePosixPath(member.name)
                if name.name.startswith(".") or member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    others += 1
                    continue
                empty += not member.size
                if empty > MAX_EMPTY:
                    raise ValueError(f"more than {MAX_EMPTY:,} empty files")
                key, ending = _split(name)
                members = members_of.setdefault(key, {})
                twice += ending in members
                members[ending] = _TWICE if ending in members else _place(member)
    except (OSError, tarfile.TarError, ValueError, OverflowError) as error:
        # The last two: tarfile does not check all numbers of a damaged header.
        damage.append(f"{path.name}: {_why(path, error)}")
    if others:
        damage.append(f"{path.name}: {others:,} links and other members that are no plain files")
    if twice:
        damage.append(f"{path.name}: {twice:,} names that stand twice; none of their files is read")
    return [_Entry(path, key, members) for key, members in members_of.items()]


def _place(member: tarfile.TarInfo) -> Member:
    return member.offset_data, member.size


def _split(name: PurePosixPath) -> tuple[str, str]:
    """A file's key, with its folders, and what follows the first dot, in lower case."""
    stem, _, ending = name.name.partition(".")
    return str(name.parent / stem), ending.lower()


def _why(path: Path, error: Exception) -> str:
    """The reason why a shard cannot be read to its end."""
    what = None
    with suppress(OSError):
        what = recognise(path).but_for("shards")
    return f"{what or error}; a shard is an uncompressed tar file"


def _is_medium(ending: str) -> bool:
    return has_ending(ending, MEDIA_ENDINGS)


def _is_metadata(record: Any) -> bool:
    """Whether JSON beside an image or clip is metadata of it, and not a record."""
    return isinstance(record, dict) and not {"conversations", "messages"} & record.keys()


def _caption_pair(entry: _Entry, metadata: Any, caption: str | None, rules: RecordRules) -> Sample:
    """An image or clip as the target of its caption: a text file, or "caption" of its JSON.

    `caption` is that of a table beside the shard, where neither has one.
    """
    target = entry.target
    text = next((e for e in CAPTION_ENDINGS if e[1:] in entry.members), None)
    if target is None or (text is None and caption is None and not isinstance(metadata, dict)):
        raise DataError(
            "neither a json record nor an image or clip with a txt caption; files of one sample "
            f"share the name up to the first dot, here there are {named(entry.members)}",
            "neither a json record nor an image or clip with a txt caption",
        )
    content = None if text is None else _bytes(entry, text[1:])
    if content is None and caption and not (isinstance(metadata, dict) and metadata.get("caption")):
        content = caption.encode()
    return caption_sample(Path(target), content, metadata, rules)


def _bytes(entry: _Entry, ending: str) -> bytes:
    """The content of a record or caption."""
    _, size = entry.members[ending]
    if size > MAX_TEXT_BYTES:
        raise DataError(f"{ending} has {size} bytes, more than {MAX_TEXT_BYTES}")
    return _content(entry.shard, ending, entry.members[ending])


def _content(shard: Path, name: str, member: Member) -> bytes:
    offset, size = member
    if member == _TWICE:
        raise DataError(f"{name} stands twice in the shard", "a name stands twice in the shard")
    if not 0 <= size <= MAX_MEMBER_BYTES:
        raise DataError(f"{name} has {size} bytes; up to {MAX_MEMBER_BYTES} are read")
    with shard.open("rb") as stream:
        stream.seek(offset)
        content = stream.read(size)
    if len(content) != size:
        raise DataError(f"{name} is cut off after {len(content)} of {size} bytes")
    return content
