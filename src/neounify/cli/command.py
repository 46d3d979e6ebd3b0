"""Commands of Typer: option groups as dataclasses, errors as one line, help for any width.

Typer reads help as rich markup, which drops text in brackets, and lays options out as a table,
which a narrow terminal cuts. Here every text is escaped, and below `MIN_OPTION_TABLE` columns each
option stands above its description.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import shutil
import textwrap
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from importlib import import_module
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup
from typer.models import ParameterInfo

from neounify.errors import NeounifyError, SizeWarning, is_out_of_memory

INTERRUPTED = 130
"""The exit code after Ctrl-C, as of shells."""
MIN_OPTION_TABLE = 100
"""Columns of a table of options, with names as long as --colour-profiles."""


class CliError(NeounifyError):
    """Files or options that the user can correct."""


class UsageError(CliError):
    """Options that contradict each other or cannot be read; exit code 2."""


class WriteError(CliError):
    """A file that could not be written: a full disk, a folder without permission."""


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Turn every dataclass parameter of a command into one option per field.

    Fields are annotated as Typer wants its parameters. Errors of the command end it with
    a line on stderr and an exit code: 1 for errors, 2 for wrong usage, 130 for Ctrl-C.
    """
    groups: dict[str, type[Any]] = {}
    parameters: list[inspect.Parameter] = []
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        if dataclasses.is_dataclass(hints[name]):
            groups[name] = hints[name]
            parameters += _parameters(hints[name])
        else:
            keyword = inspect.Parameter.KEYWORD_ONLY
            annotation = _escaped(hints[name])
            parameters.append(parameter.replace(annotation=annotation, kind=keyword))

    def run(**values: Any) -> None:
        debug = values.get("debug", False)
        for name, group in groups.items():
            names = [field.name for field in dataclasses.fields(group)]
            values[name] = group(**{option: values.pop(option) for option in names})
        with reported(debug=debug), warnings.catch_warnings():
            # The commands warn about sizes before the model is loaded.
            warnings.simplefilter("ignore", SizeWarning)
            function(**values)

    run.__name__, run.__doc__ = function.__name__, _help(function)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    vars(run)["__signature__"] = inspect.Signature(parameters)
    return run


def _command(name: str, function: Callable[..., None]) -> Any:
    single = typer.Typer(
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    single.command(name, cls=CliCommand)(with_options(function))
    return typer.main.get_command(single)


def _help(function: Any) -> str:
    """The docstring of a function or module, its paragraphs unwrapped: widths are not known here.

    Paragraphs after a backspace, the examples, keep their lines.
    """
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    text = "\n\n".join(p if p.startswith("\b") else " ".join(p.split()) for p in paragraphs)
    return escape(text)


def _parameters(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=_escaped(hints[field.name]),
        )
        for field in dataclasses.fields(group)
    ]


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) from "1024x768". Raises UsageError."""
    match = re.fullmatch(r"\s*(\d{1,9})\s*[xX×]\s*(\d{1,9})\s*", text)
    if match is None:
        raise UsageError(f"size {text!r} is not WIDTHxHEIGHT, such as 1024x768")
    return int(match[1]), int(match[2])


def parse_interval(text: str) -> tuple[float, float]:
    """(low, high) from "0.1,0.9". Raises UsageError."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"interval {text!r} is not LO,HI, such as 0.1,0.9") from None
    return low, high


def checked_value(name: str, value: Any, hint: Any, written: Any) -> Any:
    """A JSON value for the option `name`, of the type that its annotation allows.

    Raises CliError, with the value as it was written.
    """
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    kinds = get_args(hint) if get_origin(hint) is types.UnionType else (hint,)
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if not any(_is_a(value, kind) for kind in kinds):
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        wanted = " or ".join(names.get(kind, "a list of texts") for kind in kinds)
        raise CliError(f"{name} must be {wanted}, found {short_repr(written)}")
    return float(value) if float in kinds else value


def _is_a(value: Any, kind: Any) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is float:  # JSON writes 2.0 as 2; no setting is as large as 1e30, or infinite
        return isinstance(value, int | float) and abs(value) < 1e30
    if kind is int:
        return isinstance(value, int) and abs(value) < 2**64
    if kind is str:
        return isinstance(value, str)
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def short_repr(value: Any) -> str:
    """A value as Python writes it, in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextmanager
def reported(*, debug: bool) -> Iterator[None]:
    """Print expected errors as one message; unexpected ones, and all with `debug`, propagate."""
    try:
        yield
    except KeyboardInterrupt as stop:
        typer.echo(f"interrupted{stop}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        raise
    except (NeounifyError, OSError, MemoryError, RuntimeError) as error:
        message = explain(error)
        if debug or message is None:
            raise
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(2 if isinstance(error, UsageError) else 1) from None


def explain_os_error(error: OSError) -> str:
    """The file and the system's message for it."""
    reason = error.strerror or str(error) or type(error).__name__
    return reason if error.filename is None else f"{error.filename}: {reason}"


def explain(error: Exception) -> str | None:
    """The message for the user; None for an unexpected error."""
    text = str(error)
    if isinstance(error, NeounifyError):
        return text
    if isinstance(error, OSError):
        return explain_os_error(error)
    if is_out_of_memory(error):
        first = text.splitlines()[0] if text else "out of memory"
        return (
            f"{first}\nTo use less memory: --memory layers, --dtype bfloat16, "
            "a smaller --size, fewer images at once."
        )
    return None


class CliCommand(TyperCommand):
    """A command whose help fits any width."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        if _columns() >= MIN_OPTION_TABLE:
            super().format_help(ctx, formatter)
        else:
            typer.echo(_stacked(self, ctx), nl=False)


class CliGroup(TyperGroup):
    """A group of commands whose modules are imported on use, with help for any width."""

    functions: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def of(cls, functions: Mapping[str, str]) -> type[CliGroup]:
        """The group of these functions by command, in modules of this package named as these."""
        return type("CliGroup", (cls,), {"functions": functions})

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.functions)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in self.functions:
            return None
        if cmd_name not in self.commands:
            module = import_module(f"neounify.cli.{cmd_name}")
            item = getattr(module, self.functions[cmd_name])
            make = _subgroup if isinstance(item, Mapping) else _command
            self.commands[cmd_name] = make(cmd_name, item)
        return self.commands[cmd_name]

    def format_help(self, ctx: Any, formatter: Any) -> None:
        if _columns() >= MIN_OPTION_TABLE:
            super().format_help(ctx, formatter)
            return
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        records = [(name, item.get_short_help_str(10**6)) for name, item in commands if item]
        # Printed at once, as Typer does: text in the formatter is not shown without arguments.
        typer.echo(_stacked(self, ctx) + _section("Commands", records), nl=False)


def _subgroup(name: str, functions: Mapping[str, Callable[..., None]]) -> Any:
    """The group of several functions of one module, whose docstring is its help."""
    module = import_module(f"neounify.cli.{name}")
    return CliGroup.of(dict.fromkeys(functions, ""))(
        name=name,
        help=_help(module),
        commands={command: _command(command, item) for command, item in functions.items()},
        no_args_is_help=True,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def _escaped(annotation: Any) -> Any:
    """A parameter's annotation with its help text escaped for markup."""
    if get_origin(annotation) is not Annotated:
        return annotation
    kind, *notes = get_args(annotation)
    arguments = (kind, *(_escaped_note(note) for note in notes))
    return Annotated[arguments]


def _escaped_note(note: Any) -> Any:
    if not isinstance(note, ParameterInfo) or not note.help:
        return note
    note = copy(note)
    note.help = escape(note.help)
    return note


def _columns() -> int:
    return shutil.get_terminal_size().columns


def _stacked(command: Any, ctx: Any) -> str:
    panels: dict[str, list[tuple[str, str]]] = {}
    for param in command.get_params(ctx):
        record = param.get_help_record(ctx)
        if record is not None:
            usual = "Options" if param.param_type_name == "option" else "Arguments"
            panel = getattr(param, "rich_help_panel", None) or usual
            panels.setdefault(panel, []).append(record)
    sections = (_section(name, records) for name, records in panels.items())
    return "".join((f"{_wrapped(ctx.get_usage())}\n", _about(command.help or ""), *sections))


def _about(text: str) -> str:
    paragraphs = []
    for paragraph in map(_plain, text.split("\n\n")):
        if paragraph.startswith("\b"):  # an example keeps its line breaks
            paragraphs.append(paragraph.removeprefix("\b").strip("\n"))
        else:
            paragraphs.append(_wrapped(paragraph))
    return "".join(f"\n{paragraph}\n" for paragraph in paragraphs)


def _section(name: str, records: Iterable[tuple[str, str]]) -> str:
    lines = [f"\n{name}:\n"]
    for names, text in records:
        lines += [f"{_wrapped(_plain(names), 2)}\n", f"{_wrapped(_plain(text), 6)}\n"]
    return "".join(lines)


def _wrapped(text: str, indent: int = 0) -> str:
    space = " " * indent
    width = max(20, _columns() - 1)
    return textwrap.fill(
        " ".join(text.split()), width, initial_indent=space, subsequent_indent=space
    )


def _plain(text: str) -> str:
    return text.replace("\\[", "[")
