"""Samples from tar shards in the WebDataset layout, by number.

The standard library's tarfile indexes the members once, and single members are read where they
lie. The `webdataset` library streams shards instead: a position in a stream, with its shuffle
buffer, cannot be resumed exactly, and that is what training here promises.

The files of a sample share the name up to the first dot: `key.json` with a record of the published
schema whose "image" names its siblings (`key.0.png`, or `0.png`), or `key.jpg` with `key.txt`, a
picture and the prompt it should be painted for.
"""

from __future__ import annotations

import io
import json
import secrets
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from PIL import Image

from neounify.data.pictures import map_pictures, read_picture
from neounify.data.sample import (
    DataError,
    ImagePart,
    Sample,
    TextPart,
    Turn,
    sample_from_record,
    sample_to_record,
)

MAX_MEMBER_BYTES = 256 * 2**20
PICTURES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".avif", ".heic", ".heif", ".gif", ".bmp", ".tif"),
    ".tiff",
)
"""Endings of files that are images, in lower case."""


@dataclass(frozen=True)
class _Entry:
    """One sample: its shard, its key, and where each of its files lies (offset, bytes).

    `members` are by the endings of their names, in lower case.
    """

    shard: Path
    key: str
    members: dict[str, tuple[int, int]]


class ShardSource:
    """Samples of some shards, in order. `damage` lists what indexing could not read.

    `task` overrides the records' own; a picture with a prompt is always to be painted.
    `colour_profiles` is that of `read_image`. Raises DataError when the shards hold no sample.
    """

    def __init__(
        self, paths: Sequence[Path], *, task: str | None = None, colour_profiles: bool = True
    ) -> None:
        self.task, self.colour_profiles = task, colour_profiles
        self.damage: list[str] = []
        self._entries = [entry for path in paths for entry in _index(path, self.damage)]
        if not self._entries:
            why = f" ({self.damage[0]})" if self.damage else ""
            raise DataError(f"{len(paths)} shards hold no sample{why}")

    @property
    def size(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Sample:
        """Read one sample. Raises DataError that names shard and key."""
        entry = self._entries[index]
        try:
            return _read(entry, self.task, self.colour_profiles)
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{entry.shard.name}, {entry.key}: {error}") from error


def write_shard(samples: Iterable[Sample], path: Path) -> None:
    """Write samples, whose pictures have been read, as one shard; all or nothing."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with tarfile.open(aside, "w") as archive:
            for number, sample in enumerate(samples):
                _write(archive, f"{number:08d}", sample)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _write(archive: tarfile.TarFile, key: str, sample: Sample) -> None:
    names = [f"{key}.{place}.png" for place in range(len(sample.images))]
    record = json.dumps(sample_to_record(sample, names), ensure_ascii=False)
    _add(archive, f"{key}.json", record.encode())
    for name, part in zip(names, sample.images, strict=True):
        buffer = io.BytesIO()
        Image.fromarray(part.pixels()).save(buffer, "PNG")
        _add(archive, name, buffer.getvalue())


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _index(path: Path, damage: list[str]) -> list[_Entry]:
    """The samples of one shard; what comes before a break is kept."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if not member.isreg() or name.name.startswith("."):
                    continue
                stem, _, ending = name.name.partition(".")
                place = (member.offset_data, member.size)
                found.setdefault(str(name.parent / stem), {})[ending.lower()] = place
    except (OSError, tarfile.TarError) as error:
        damage.append(f"{path.name}: {error}; a shard is an uncompressed tar file")
    return [_Entry(path, key, members) for key, members in found.items()]


def _read(entry: _Entry, task: str | None, colour_profiles: bool) -> Sample:
    if "json" in entry.members:
        record = json.loads(_bytes(entry, "json"))
        sample = sample_from_record(record, Path(), task)
    else:
        sample = _caption_pair(entry)

    def read(path: Path) -> Image.Image:
        ending = _ending(entry, path.name)
        name = f"{entry.key}.{ending}"
        return read_picture(_bytes(entry, ending), name, colour_profiles=colour_profiles)

    sample = map_pictures(sample, read)
    return replace(sample, id=sample.id or f"{entry.shard.stem}-{entry.key}")


def _caption_pair(entry: _Entry) -> Sample:
    picture = next((e for e in entry.members if f".{e}".endswith(PICTURES)), None)
    if picture is None or "txt" not in entry.members:
        raise DataError("neither a json record nor a picture with a txt caption")
    prompt = _bytes(entry, "txt").decode("utf-8").strip()
    answer = Turn("assistant", (ImagePart(Path(picture), "target"),))
    return Sample("t2i", (Turn("user", (TextPart(prompt),)), answer))


def _ending(entry: _Entry, name: str) -> str:
    """A member's ending from the name a record gives it: whole, or without the key."""
    for ending in (name.lower(), name.lower().partition(".")[2]):
        if ending in entry.members:
            return ending
    raise DataError(f"the picture {name!r} is not in the shard")


def _bytes(entry: _Entry, ending: str) -> bytes:
    offset, size = entry.members[ending]
    if size > MAX_MEMBER_BYTES:
        raise DataError(f"{ending} has {size} bytes, more than {MAX_MEMBER_BYTES}")
    with entry.shard.open("rb") as stream:
        stream.seek(offset)
        content = stream.read(size)
    if len(content) != size:
        raise DataError(f"{ending} is cut off after {len(content)} of {size} bytes")
    return content
