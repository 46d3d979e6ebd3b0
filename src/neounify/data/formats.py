"""Kinds of files and folders of data, recognised by their content, and what reads them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

HEAD_BYTES = 4096
"""Bytes at the start of a file that are read to recognise it."""
MAX_LISTED = 10_000
"""Files of a folder that are read to recognise it."""
MAX_NAMED = 6
"""Names that a message lists at most."""

_IMAGES = "png jpg jpeg jfif webp gif bmp tif tiff ppm avif heic heif"
IMAGE_ENDINGS = frozenset(f".{ending}" for ending in _IMAGES.split())
VIDEO_ENDINGS = frozenset((".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi"))
"""Of clips; a GIF is an image, of which the first frame is read."""
MEDIA_ENDINGS = IMAGE_ENDINGS | VIDEO_ENDINGS
CAPTION_ENDINGS = (".txt", ".caption")

RECORD = (
    '{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}], '
    '"image": ["…"]}'
)
"""The form of a record, for messages."""
CAPTION_RECORD = '{"file_name": "a.png", "text": "…"}'

_MAGIC = (
    (b"\x1f\x8b", "is compressed with gzip; decompress it first (gunzip)"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd; decompress it first (unzstd)"),
    (b"BZh", "is compressed with bzip2; decompress it first (bunzip2)"),
    (b"\xfd7zXZ\x00", "is compressed with xz; decompress it first (unxz)"),
    (b"PK\x03\x04", "is a zip archive; unpack it first"),
    (b"ARROW1", "is an Arrow table; write it as Parquet (Dataset.to_parquet of Hugging Face)"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the data; fetch it (git lfs pull)"),
)
DESCRIPTION = "dataset_info.json"
_DESCRIBED = (b'"file_name"', b'_hub_url"', b'"script_url"', b'"cloud_file_name"')
"""A field of LLaMA-Factory's description; Hugging Face gives another file the same name."""
_UTF16 = "is UTF-16 text; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8 OLD > NEW)"

NAMES = {
    "jsonl": "JSON lines",
    "json": "one JSON array, as LLaVA and LLaMA-Factory write",
    "csv": "a table (CSV or TSV)",
    "parquet": "a Parquet table",
    "shards": "a tar archive",
    "captions": "images or clips with captions",
    "llama_factory": "data that a dataset_info.json of LLaMA-Factory describes",
}
"""Kinds of data in files, in words."""


@dataclass(frozen=True)
class Recognised:
    """The kind of data that reads a file or folder; without one, what there is, as a sentence."""

    kind: str | None = None
    what: str | None = None
    is_folder: bool = False

    def but_for(self, kind: str) -> str | None:
        """The sentence for a reader of `kind`, which follows a name; None for its own data."""
        if self.kind is None or self.kind == kind:
            return self.what
        verb = "holds" if self.is_folder else "is"
        return f'{verb} {NAMES[self.kind]}; read it with kind = "{self.kind}"'


def kind_of_file(path: Path) -> Recognised:
    """The kind of data of a file, by its first bytes and its ending. Raises OSError."""
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return Recognised(None, what)
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{", b"[\0", b"\0[")):
        return Recognised(None, _UTF16)
    if head.startswith(b"PAR1"):
        return Recognised("parquet")
    if is_tar(head):
        return Recognised("shards")
    if path.name == DESCRIPTION and any(field in head for field in _DESCRIBED):
        return Recognised("llama_factory")
    ending = path.suffix.lower()
    if ending in (".csv", ".tsv"):
        return Recognised("csv")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    first = text.split(b"\n", 1)[0].strip()
    if text.startswith(b"["):
        return Recognised("json")
    spread = text.startswith(b"{") and b"\n" in text and not first.endswith(b"}")
    if first == b"{" or (spread and ending != ".jsonl"):
        return Recognised(
            None,
            "holds one JSON object, or objects written over several lines; give an array of "
            "records, or one object a line (jq -c . OLD > NEW.jsonl)",
        )
    if text.startswith(b"{") or ending == ".jsonl":
        return Recognised("jsonl")
    if b"," in first or b"\t" in first:
        return Recognised("csv")
    return Recognised()


def kind_of_folder(path: Path) -> Recognised:
    """The kind of data in a folder, by the endings of its files. Raises OSError."""
    description = path / DESCRIPTION
    if description.is_file() and kind_of_file(description).kind == "llama_factory":
        return Recognised("llama_factory", is_folder=True)
    endings: dict[str, int] = {}
    for file in islice(path.rglob("*"), MAX_LISTED):
        if _is_data(file, path):
            ending = file.suffix.lower()
            endings[ending] = endings.get(ending, 0) + 1
    media = sum(endings.get(ending, 0) for ending in MEDIA_ENDINGS)
    captioned = media and any(ending in endings for ending in CAPTION_ENDINGS)
    # img2dataset writes a table beside each folder of images.
    captioned = captioned or (
        media and any(table.with_suffix("").is_dir() for table in path.glob("*.parquet"))
    )
    for ending, kind in _KIND_OF_ENDING:
        if ending in endings and not (captioned and kind in ("json", "parquet")):
            return Recognised(kind, is_folder=True)
    if captioned:
        return Recognised("captions", is_folder=True)
    if media:
        return Recognised(
            None,
            "holds images or clips, but neither records that name them nor texts of the same "
            f"names; a metadata.jsonl has lines such as {CAPTION_RECORD}",
        )
    for ending, advice in (
        (".gz", "decompress them first (gunzip)"),
        (".zip", "unpack them first"),
        (".arrow", "write them as Parquet"),
    ):
        if ending in endings:
            return Recognised(None, f"holds {ending} files; {advice}")
    return Recognised(None, "holds no data: " + (named(sorted(endings)) if endings else "no files"))


_KIND_OF_ENDING = (
    (".tar", "shards"),
    (".jsonl", "jsonl"),
    (".csv", "csv"),
    (".parquet", "parquet"),
    (".json", "json"),
)
"""In this order: a shard of img2dataset has a Parquet table beside it."""


def recognise(path: Path) -> Recognised:
    """The kind of data of a file or folder. Raises OSError."""
    return kind_of_folder(path) if path.is_dir() else kind_of_file(path)


def files_below(folder: Path, ending: str) -> list[Path]:
    """Files of an ending, in any case, below a folder in order of their names.

    Hidden files and folders are left out: copies of editors and notebooks, and resource files of
    macOS. So are pipes and devices; broken links are listed, so that reading reports them.
    """
    return sorted(
        f for f in folder.rglob("*") if f.suffix.lower() == ending and _is_data(f, folder)
    )


def _is_data(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return not hidden and (file.is_file() or not file.exists())


def is_tar(head: bytes) -> bool:
    """Whether the first bytes of a file are those of a POSIX or GNU tar archive."""
    return head[257:262] == b"ustar"


def has_ending(name: str, endings: frozenset[str]) -> bool:
    """Whether a file's name has one of some endings, in any case."""
    return f".{name.rpartition('.')[2].lower()}" in endings


def named(names: Iterable[str]) -> str:
    """Names in quotes for a message; the first ones of many, each cut."""
    listed = [f'"{str(name)[:40]}"' for name in names]
    more = f" and {len(listed) - MAX_NAMED} more" if len(listed) > MAX_NAMED else ""
    return (", ".join(listed[:MAX_NAMED]) + more) or "no fields"
