"""`neounify provenance`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neounify.cli.options import ReportOptions

if TYPE_CHECKING:
    from neounify.provenance.watermark import Marker


def provenance(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Image files.")],
    *,
    report: ReportOptions,
) -> None:
    """Show what images say of their origin, and whether they carry an invisible mark.

    Anybody can write or remove such metadata, and a mark can be washed out: what is found is a
    hint, what is not found proves nothing. A file that cannot be read is named, the others are
    shown, and the exit code is 1. Looking for marks needs the extra `watermark`; without it, a
    line says how to install it.

    \b
      neounify provenance outputs/a-red-boat_s0_1.png
      neounify provenance *.jpg --json
    """
    from neounify.cli.display import Display

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
        display.note(f"not looking for marks: {error}")
        return None


def _look(path: Path, marker: Marker | None) -> dict[str, Any]:
    """What one file says, or under `error` why it cannot be read."""
    from neounify.cli.command import explain_os_error
    from neounify.errors import ImageError
    from neounify.image.io import read_image
    from neounify.provenance.metadata import read_provenance

    entry: dict[str, Any] = {"file": str(path)}
    try:
        entry["metadata"] = read_provenance(_read(path))
        if marker is not None:
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
    from neounify.errors import ImageError
    from neounify.image.io import MAX_FILE_BYTES

    if path.exists() and not path.is_file():
        raise ImageError("not a file")
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(f"larger than {MAX_FILE_BYTES} bytes")
    return data


def _lines(entry: dict[str, Any]) -> list[str]:
    from neounify.cli.display import printable

    lines = [printable(entry["file"])]
    lines += [printable(f"  {name}: {_said(value)}") for name, value in entry["metadata"].items()]
    if not entry["metadata"]:
        lines.append("  no metadata about its origin")
    if "mark" in entry:
        lines.append(f"  invisible mark: {entry['mark'] or 'none'}")
    return lines


def _said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
