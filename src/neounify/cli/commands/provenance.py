"""`neounify provenance`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from neounify.cli.options import ReportOptions

if TYPE_CHECKING:
    from neounify.serve.safety.watermark import Marker


def provenance(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Pictures: PNG, JPEG or WebP.")
    ],
    *,
    report: ReportOptions,
) -> None:
    """Show what pictures say of their origin, and whether they carry an invisible mark.

    Anybody can write or remove such metadata, and a mark can be washed out: what is found is a
    hint, what is not found proves nothing. Marks need: pip install 'neounify[watermark]'.

    \b
      neounify provenance outputs/a-red-boat_s0_1.png
      neounify provenance *.jpg --json
    """
    from neounify.cli.display import Display

    display = Display(quiet=report.quiet, json=report.json)
    marker = _marker(display)
    found = [_look(path, marker) for path in files]
    display.emit({"files": found})
    if not report.json:
        typer.echo("\n".join(line for entry in found for line in _lines(entry)))


def _marker(display: Any) -> Marker | None:
    from neounify.serve.safety.watermark import Marker, MarkError

    try:
        return Marker()
    except MarkError as error:
        display.note(f"not looking for marks: {error}")
        return None


def _look(path: Path, marker: Marker | None) -> dict[str, Any]:
    from neounify.cli.errors import CliError
    from neounify.errors import ImageError
    from neounify.image.io import read_image
    from neounify.serve.safety.provenance import read_provenance

    try:
        entry: dict[str, Any] = {"file": str(path), "metadata": read_provenance(_read(path))}
        if marker is not None:
            entry["mark"] = marker.read(read_image(path))
    except ImageError as error:
        message = str(error)
        raise CliError(message if str(path) in message else f"{path}: {message}") from error
    return entry


def _read(path: Path) -> bytes:
    from neounify.errors import ImageError
    from neounify.image.io import MAX_FILE_BYTES

    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(f"larger than {MAX_FILE_BYTES} bytes")
    return data


def _lines(entry: dict[str, Any]) -> list[str]:
    from neounify.cli.display import printable

    lines = [entry["file"]]
    lines += [printable(f"  {name}: {value}") for name, value in entry["metadata"].items()]
    if not entry["metadata"]:
        lines.append("  no metadata about its origin")
    if "mark" in entry:
        lines.append(f"  invisible mark: {entry['mark'] or 'none'}")
    return lines
