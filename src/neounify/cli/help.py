"""Help texts: safe from markup, and readable on narrow terminals.

Typer reads help as rich markup, which drops text in brackets, and lays options out as a table,
which a narrow terminal cuts. Here every text is escaped, and below `MIN_OPTION_TABLE` columns each
option stands above its description.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable
from copy import copy
from typing import Annotated, Any, get_args, get_origin

from rich.markup import escape
from typer.core import TyperCommand, TyperGroup
from typer.models import ParameterInfo

MIN_TABLE_WIDTH = 76
"""Columns that the tables of results need."""

MIN_OPTION_TABLE = 100
"""Columns that a table of options needs, with names as long as --colour-profiles."""


class Command(TyperCommand):
    """A command whose help fits any width."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        if _columns() >= MIN_OPTION_TABLE:
            super().format_help(ctx, formatter)
        else:
            formatter.write(_stacked(self, ctx))


class Group(TyperGroup):
    """A group of commands whose help fits any width."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        if _columns() >= MIN_OPTION_TABLE:
            super().format_help(ctx, formatter)
            return
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        records = [(name, item.get_short_help_str(10**6)) for name, item in commands if item]
        formatter.write(_stacked(self, ctx) + _section("Commands", records))


def escaped(annotation: Any) -> Any:
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
        if paragraph.startswith("\b"):  # an example keeps its lines
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
