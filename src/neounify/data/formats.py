"""Data formats of other tools: recognised, with a message on how to convert them."""

from __future__ import annotations

from collections.abc import Iterable
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
CAPTION_ENDINGS = (".txt", ".caption")

RECORD = (
    '{"conversations": [{"from": "human", "value": "…"}, {"from": "gpt", "value": "…"}], '
    '"image": ["…"]}'
)
"""The form of a record, for messages."""
GENERATION_RECORD = (
    '{"conversations": [{"from": "human", "value": PROMPT}, {"from": "gpt", "value": "<image>"}], '
    '"image": FILE}'
)
"""The form of a record of text-to-image generation, for messages."""

_GZIP = "is compressed with gzip; decompress it first (gunzip)"
_PARQUET = f"is a Parquet table; export it as JSON lines, each {RECORD}"
_ARROW = f"is an Arrow table; export it as JSON lines, each {RECORD}"
_MAGIC = (
    (b"\x1f\x8b", _GZIP),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd; decompress it first (unzstd)"),
    (b"BZh", "is compressed with bzip2; decompress it first (bunzip2)"),
    (b"\xfd7zXZ\x00", "is compressed with xz; decompress it first (unxz)"),
    (b"PK\x03\x04", "is a zip archive; unpack it first"),
    (b"PAR1", _PARQUET),
    (b"ARROW1", _ARROW),
    (b"version https://git-lfs", "is a Git LFS pointer, not the data; fetch it (git lfs pull)"),
)
_UTF16 = "is UTF-16 text; convert it to UTF-8 (iconv -f UTF-16 -t UTF-8 OLD > NEW)"
_TABLE = f"is a table (CSV or TSV); write JSON lines, each {RECORD}"


def foreign_file(path: Path) -> str | None:
    """Name and conversion of a file of a known format other than JSON lines or tar; else None."""
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    for magic, what in _MAGIC:
        if head.startswith(magic):
            return what
    if head.startswith((b"\xff\xfe", b"\xfe\xff", b"{\0", b"\0{", b"[\0", b"\0[")):
        return _UTF16
    if path.suffix.lower() in (".csv", ".tsv"):
        return _TABLE
    return None


def foreign_lines(path: Path) -> str | None:
    """As `foreign_file`, for a file that should hold JSON lines."""
    if format_of_file := foreign_file(path):
        return format_of_file
    with path.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    if is_tar(head):
        return 'is a tar archive; read it with kind = "shards"'
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    first = text.split(b"\n", 1)[0].strip()
    if text.startswith(b"["):
        return (
            "is one JSON array, as LLaVA and LLaMA-Factory write; JSON lines have one object a "
            "line (jq -c '.[]' OLD > NEW.jsonl)"
        )
    if first == b"{":
        return (
            "holds JSON objects written over several lines; JSON lines have one object a line "
            "(jq -c . OLD > NEW.jsonl)"
        )
    if b"{" not in first and (b"," in first or b"\t" in first) and path.suffix.lower() != ".jsonl":
        return _TABLE
    return None


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


def foreign_folder(path: Path) -> str:
    """Content of a folder without any .jsonl file, and how to use it."""
    endings: dict[str, int] = {}
    for file in islice(path.rglob("*"), MAX_LISTED):
        if not _is_data(file, path):
            continue
        ending = file.suffix.lower()
        endings[ending] = endings.get(ending, 0) + 1
    if ".jsonl" in endings:
        return 'holds JSON lines; read them with kind = "jsonl"'
    images = sum(endings.get(ending, 0) for ending in IMAGE_ENDINGS)
    if images and any(ending in endings for ending in CAPTION_ENDINGS):
        return (
            "is a folder of images with captions; pack it (tar --create --file data.tar "
            f'--directory {path} .) and read it with kind = "shards", path = "data.tar"'
        )
    if ".tar" in endings:
        return 'holds tar files; read them with kind = "shards"'
    for ending, what in (
        (".parquet", _PARQUET),
        (".arrow", _ARROW),
        (".csv", _TABLE),
        (".tsv", _TABLE),
        (".gz", _GZIP),
    ):
        if ending in endings:
            return f"holds no .jsonl file; its {ending} file {what}"
    if ".json" in endings:
        return (
            "holds .json files but no .jsonl; JSON lines have one object a line "
            "(jq -c '.[]' OLD.json > NEW.jsonl)"
        )
    if images:
        return (
            "holds images but no .jsonl file that describes them; a line of it is "
            f"{GENERATION_RECORD}"
        )
    return "holds no .jsonl file"


def named(names: Iterable[str]) -> str:
    """Names in quotes for a message; the first ones of many, each cut."""
    listed = [f'"{str(name)[:40]}"' for name in names]
    more = f" and {len(listed) - MAX_NAMED} more" if len(listed) > MAX_NAMED else ""
    return (", ".join(listed[:MAX_NAMED]) + more) or "no fields"
