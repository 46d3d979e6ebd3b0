"""`neounify provenance`: origin metadata of images and videos, watermarks of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neounify.cli.command import explain_os_error
from neounify.cli.display import Display, printable
from neounify.cli.options import ReportOptions
from neounify.errors import ImageError
from neounify.files import read_bytes

if TYPE_CHECKING:
    from neounify.provenance.watermark import Marker


def provenance(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Images, MP4 files.")],
    *,
    report: ReportOptions,
) -> None:
    """Show the origin metadata of images and videos, and invisible watermarks of images.

    Metadata can be written and removed by anyone, and a watermark can be lost: a result is a hint,
    and no result proves nothing. Unreadable files are reported on stderr and give exit code 1.
    Reading watermarks needs the extra `watermark`; without it, a line says how to install it.

    \b
      neounify provenance outputs/a-red-boat_s0_1.png
      neounify provenance *.jpg --json
    """
    display = Display(quiet=report.quiet, json=report.json)
    marker = _marker(display)
    entries = []
    for path in files:
        entry = _look(path, marker)
        entries.append(entry)
        if "error" in entry:
            typer.echo(f"error: {entry['error']}", err=True)
        elif not report.json:
            typer.echo("\n".join(_lines(entry)))
    display.emit({"files": entries})
    if any("error" in entry for entry in entries):
        raise typer.Exit(1)


def _marker(display: Any) -> Marker | None:
    from neounify.provenance.watermark import Marker, MarkError

    try:
        return Marker()
    except MarkError as error:
        display.note(f"watermarks are not read: {error}")
        return None


def _look(path: Path, marker: Marker | None) -> dict[str, Any]:
    """Metadata and watermark of one file, or under `error` why it cannot be read."""
    from neounify.image.io import read_image
    from neounify.provenance.metadata import is_video, read_provenance

    entry: dict[str, Any] = {"file": str(path)}
    try:
        data = _read(path)
        entry["metadata"] = read_provenance(data)
        if marker is not None and not is_video(data):
            entry["mark"] = marker.read(read_image(path))
    except ImageError as error:
        message = str(error).removeprefix("the image: ")
        return {
            "file": str(path),
            "error": message if str(path) in message else f"{path}: {message}",
        }
    except OSError as error:
        return {"file": str(path), "error": explain_os_error(error)}
    return entry


def _read(path: Path) -> bytes:
    from neounify.image.io import MAX_FILE_BYTES

    if path.exists() and not path.is_file():
        raise ImageError("not a file")
    return read_bytes(path, MAX_FILE_BYTES, ImageError)


def _lines(entry: dict[str, Any]) -> list[str]:
    lines = [printable(entry["file"])]
    lines += [printable(f"  {name}: {_text(value)}") for name, value in entry["metadata"].items()]
    if not entry["metadata"]:
        lines.append("  no metadata about its origin")
    if "mark" in entry:
        lines.append(f"  invisible watermark: {entry['mark'] or 'none'}")
    return lines


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
