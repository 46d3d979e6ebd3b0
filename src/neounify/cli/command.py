"""What all commands share: groups of options as dataclasses, errors as one clear line."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_type_hints

import typer
from rich.markup import escape

from neounify.cli.errors import UsageError
from neounify.cli.help import escaped
from neounify.errors import NeounifyError, SizeWarning

INTERRUPTED = 130
"""The exit code after Ctrl-C, as shells have it."""


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Turn every dataclass parameter into one option per field, so that each is written once.

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
            annotation = escaped(hints[name])
            parameters.append(parameter.replace(annotation=annotation, kind=keyword))

    def run(**values: Any) -> None:
        debug = values.get("debug", False)
        for name, group in groups.items():
            own = {field.name: values.pop(field.name) for field in dataclasses.fields(group)}
            values[name] = group(**own)
        with reported(debug=debug), warnings.catch_warnings():
            # Commands say it themselves, before the model is loaded.
            warnings.simplefilter("ignore", SizeWarning)
            function(**values)

    run.__name__, run.__doc__ = function.__name__, _help(function)
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    vars(run)["__signature__"] = inspect.Signature(parameters)
    return run


def _help(function: Callable[..., None]) -> str:
    """The docstring with its paragraphs unwrapped, as a terminal's width is not known here.

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
            annotation=escaped(hints[field.name]),
        )
        for field in dataclasses.fields(group)
    ]


@contextmanager
def reported(*, debug: bool) -> Iterator[None]:
    """Errors that a user can understand become one message; others, and all with `debug`, pass."""
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
    """The file and what is wrong with it, in the system's words."""
    reason = error.strerror or str(error) or type(error).__name__
    return reason if error.filename is None else f"{error.filename}: {reason}"


def explain(error: Exception) -> str | None:
    """What to tell the user; None for an error nobody foresaw."""
    text = str(error)
    if isinstance(error, NeounifyError):
        return text
    if isinstance(error, OSError):
        return explain_os_error(error)
    if isinstance(error, MemoryError) or any(
        words in text.lower() for words in ("out of memory", "can't allocate memory")
    ):
        first = text.splitlines()[0] if text else "out of memory"
        return (
            f"{first}\nWhat needs less memory: --memory stream, --dtype bfloat16, "
            "a smaller --size, fewer pictures at once."
        )
    return None
