"""Lines of JSONL batches: bounded in length, each a job or the reason why it is none."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

from neounify.cli.command import CliError, checked_value, short_repr
from neounify.cli.options import ChatOptions, GenerateOptions

MAX_LINE_BYTES = 2**20
IMAGES, VIDEOS, CONDITION = "images", "videos", "condition"
"""Fields of a line that name files: lists, and `condition` one file."""

Options = TypeVar("Options", bound=GenerateOptions | ChatOptions)


@dataclass(frozen=True)
class Line(Generic[Options]):
    """The job of one line. `files` are names as written, by the field, relative to `folder`."""

    number: int
    id: str | int | None
    prompt: str
    files: Mapping[str, tuple[str, ...]]
    folder: Path
    options: Options

    def paths(self, field: str) -> tuple[Path, ...]:
        """The files of a field, in the order of the line."""
        return tuple(self.folder / name for name in self.files.get(field, ()))


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be processed, and why."""

    number: int
    reason: str
    id: str | int | None = None


def count_lines(path: Path) -> int:
    """The number of lines that are not blank."""
    return sum(1 for _ in _raw_lines(path))


def read_lines(
    path: Path, defaults: Options, files: Collection[str] = ()
) -> Iterator[Line[Options] | BadLine]:
    """The jobs of a file, line by line; `defaults` fill the fields a line leaves out.

    A line without a seed gets the default seed plus its line number - 1, so that a line's
    result does not depend on how often the batch was interrupted. `files` are the fields in which
    lines may name files; relative paths start at the folder of `path`.
    """
    for number, raw in _raw_lines(path):
        identity: str | int | None = None
        try:
            document = _parse(raw)
            identity = _identity(document)
            yield _to_line(number, identity, document, defaults, path.parent, files)
        except CliError as error:
            yield BadLine(number, str(error), identity)


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """(line number, content) of lines that are not blank; None for one that is too long."""
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
                    while (rest := file.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                        pass
                    yield number, None
                    continue
                text = raw.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else raw.strip()
                if text:
                    yield number, text
    except OSError as error:
        raise CliError(f"{path} cannot be read: {error.strerror or error}") from error


def _parse(raw: bytes | None) -> dict[str, Any]:
    if raw is None:
        raise CliError(f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        document = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise CliError("the line is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise CliError(f"the line is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise CliError('the line is not a JSON object such as {"prompt": "a red boat"}')
    return document


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _identity(document: dict[str, Any]) -> str | int | None:
    value = document.get("id")
    if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
        raise CliError(f"id must be a text or a whole number, found {short_repr(value)}")
    return value


def _to_line(
    number: int,
    identity: str | int | None,
    document: dict[str, Any],
    defaults: Options,
    folder: Path,
    files: Collection[str],
) -> Line[Options]:
    others = ("prompt", "id", *files)
    names = {field: _names(field, document[field]) for field in files if field in document}
    fields = {key: value for key, value in document.items() if key not in others}
    options = _with_fields(defaults, fields, others)
    if "seed" not in document:
        options = dataclasses.replace(options, seed=(defaults.seed or 0) + number - 1)
    if "prompt" not in document:
        raise CliError("the field `prompt` is missing")
    prompt = document["prompt"]
    if not isinstance(prompt, str):
        raise CliError(f"prompt must be a text, found {short_repr(prompt)}")
    return Line(number, identity, prompt, names, folder, options)


def _names(field: str, value: Any) -> tuple[str, ...]:
    if field == CONDITION:
        if not isinstance(value, str) or not value:
            raise CliError(f"{field} must be a file name, found {short_repr(value)}")
        return (value,)
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise CliError(f"{field} must be a list of file names, found {short_repr(value)}")
    return tuple(value)


def _with_fields(defaults: Options, fields: dict[str, Any], others: Sequence[str]) -> Options:
    """The defaults with the fields of a line of a batch. A size or an interval may be a list.

    `others` are fields of a line that are no options. Raises CliError.
    """
    hints = get_type_hints(type(defaults), include_extras=True)
    known = {field.name for field in dataclasses.fields(type(defaults))}
    for name in fields:
        if name not in known:
            names = ", ".join([*others, *sorted(known)])
            raise CliError(f"unknown field {short_repr(name)}; known are {names}")
    values = {}
    for name, value in fields.items():
        if (plain := _plain(name, value)) is not None:
            values[name] = checked_value(name, plain, hints[name], value)
    sizes = {"size", "width", "height"}
    if values.keys() & sizes:
        # A line's size replaces the command line's, however either is written.
        values = dict.fromkeys(known & sizes) | values
    return dataclasses.replace(defaults, **values)


def _plain(name: str, value: Any) -> Any:
    separators = {"size": "x", "interval": ","}
    if name in separators and isinstance(value, list) and len(value) == 2:
        return separators[name].join(str(part) for part in value)
    if name == "stop" and isinstance(value, str):
        return [value]
    return value
