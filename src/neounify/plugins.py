"""Objects of the user by name: "package.module:attribute"."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from neounify.errors import NeounifyError

NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def load_object(
    name: str, kind: str, error: type[NeounifyError], folder: Path | None = None
) -> object:
    """The object behind "package.module:attribute", a `kind` in messages. Raises `error`.

    Imports the module, so the name must come from the operator, never from a request. Modules that
    are not installed are looked for in `folder`.
    """
    if not NAME.fullmatch(name):
        raise error(f"{name!r} does not name a {kind}; write package.module:attribute")
    module, _, attribute = name.partition(":")
    try:
        with _importable(folder):
            return getattr(importlib.import_module(module), attribute)
    except AttributeError as failure:
        raise error(f"{name}: the module has no {attribute!r}") from failure
    except Exception as failure:  # a module's own code may fail in any way
        raise error(f"{name}: cannot be imported ({failure})") from failure


def module_file(
    name: str, kind: str, error: type[NeounifyError], folder: Path | None = None
) -> Path | None:
    """The file of the module of an object (see `load_object`), which is found and not run.

    Packages around it are imported. None for a module without a file. Raises `error`.
    """
    module = name.partition(":")[0]
    try:
        with _importable(folder):
            spec = importlib.util.find_spec(module)
    except Exception as failure:  # the code of its packages may fail in any way
        raise error(f"{name}: cannot be imported ({failure})") from failure
    if spec is None:
        raise error(f"{name}: there is no module {module}; a {kind} is package.module:attribute")
    return Path(spec.origin) if spec.has_location and spec.origin else None


def load_callable(
    name: str, kind: str, takes: str, error: type[NeounifyError], folder: Path | None = None
) -> Callable[..., Any]:
    """A callable of the user (see `load_object`): the object itself, or what its class makes.

    `takes` are its arguments, for messages. Raises `error`.
    """
    target = load_object(name, kind, error, folder)
    if isinstance(target, type):
        try:
            target = target()
        except Exception as failure:  # a class's own code may fail in any way
            raise error(f"{name}: calling it failed ({failure})") from failure
    if not callable(target):
        raise error(f"{name}: a {kind} is a callable of {takes}")
    return target


@contextmanager
def _importable(folder: Path | None) -> Iterator[None]:
    """A folder as the last place of imports; last, so that it replaces no installed module."""
    if folder is None:
        yield
        return
    place = str(folder.resolve())
    sys.path.append(place)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        del sys.path[len(sys.path) - 1 - sys.path[::-1].index(place)]
