"""Reading a JSONL file of prompts, with bounds: every line is a job or the reason it is none."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin, get_type_hints

from neounify.cli.errors import CliError
from neounify.cli.task_options import ChatOptions, GenerateOptions

MAX_LINE_BYTES = 2**20

Options = TypeVar("Options", bound=GenerateOptions | ChatOptions)
Options_co = TypeVar("Options_co", bound=GenerateOptions | ChatOptions, covariant=True)


@dataclass(frozen=True)
class Line(Generic[Options_co]):
    """The job of one line. `images` are as written, `paths` relative to the file's folder."""

    number: int
    id: str | int | None
    prompt: str
    images: tuple[str, ...]
    paths: tuple[Path, ...]
    options: Options_co


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be processed, and why."""

    number: int
    reason: str
    id: str | int | None = None


def count_lines(path: Path) -> int:
    """The number of lines that are not blank."""
    return sum(1 for _ in _raw_lines(path))


def read_lines(path: Path, defaults: Options, *, images: bool) -> Iterator[Line[Options] | BadLine]:
    """The jobs of a file, line by line; `defaults` fill the fields a line leaves out.

    A line without a seed gets the default seed plus its line number - 1, so that a line's
    result does not depend on how often the batch was interrupted. `images` says whether
    lines may name images; relative paths start at the file's folder.
    """
    for number, raw in _raw_lines(path):
        identity: str | int | None = None
        try:
            document = _parse(raw)
            identity = _identity(document)
            yield _to_line(number, identity, document, defaults, path.parent, images)
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
        raise CliError(f"id must be a text or a whole number, found {_short(value)}")
    return value


def _to_line(
    number: int,
    identity: str | int | None,
    document: dict[str, Any],
    defaults: Options,
    folder: Path,
    images: bool,
) -> Line[Options]:
    fields = {key: value for key, value in document.items() if key not in ("id", "prompt")}
    names = _names(fields.pop("images", [])) if images else ()
    options = _override(defaults, fields, images=images)
    if "seed" not in document:
        options = dataclasses.replace(options, seed=(defaults.seed or 0) + number - 1)
    if "prompt" not in document:
        raise CliError("the field `prompt` is missing")
    prompt = document["prompt"]
    if not isinstance(prompt, str):
        raise CliError(f"prompt must be a text, found {_short(prompt)}")
    paths = tuple(folder / name for name in names)
    return Line(number, identity, prompt, names, paths, options)


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise CliError(f"images must be a list of file names, found {_short(value)}")
    return tuple(value)


def _override(defaults: Options, fields: dict[str, Any], *, images: bool) -> Options:
    """The defaults with a line's own values. A line may write a size or an interval as a list."""
    hints = get_type_hints(type(defaults), include_extras=True)
    known = {field.name for field in dataclasses.fields(type(defaults))}
    for name in fields:
        if name not in known:
            names = ["prompt", "id", *(["images"] if images else []), *sorted(known)]
            raise CliError(f"unknown field {_short(name)}; known are {', '.join(names)}")
    values: dict[str, Any] = {}
    for name, value in fields.items():
        plain = _plain(name, value)
        if plain is not None and not _fits(plain, hints[name]):
            raise CliError(f"{name} must be {_wanted(hints[name])}, found {_short(value)}")
        if plain is not None:
            values[name] = float(plain) if float in _kinds(hints[name]) else plain
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


def _kinds(hint: Any) -> list[Any]:
    """The types an option's annotation allows, None left out."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) is types.UnionType:
        return [kind for kind in get_args(hint) if kind is not type(None)]
    return [hint]


def _fits(value: Any, hint: Any) -> bool:
    for kind in _kinds(hint):
        if kind is bool:
            return isinstance(value, bool)
        if isinstance(value, bool):
            return False
        if kind is float and isinstance(value, int | float):
            return abs(value) < 1e30 and math.isfinite(value)
        if kind is int:
            return isinstance(value, int) and abs(value) < 2**64
        if kind is str:
            return isinstance(value, str)
        if get_origin(kind) is list:
            return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return False


def _wanted(hint: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return " or ".join(names.get(kind, "a list of texts") for kind in _kinds(hint))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
