"""Deprecated names, which keep working for one version."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any


def moved(old: str, new: str, names: dict[str, str] | None = None) -> Callable[[str], Any]:
    """A module's `__getattr__` that finds its attributes in the module `new`.

    `names` maps old attributes to new ones; without it, every attribute keeps its name. Each use
    gives a DeprecationWarning with both full names.
    """

    def __getattr__(name: str) -> Any:
        renamed = name if names is None else names.get(name)
        if renamed is None or renamed.startswith("__"):
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        try:
            value = getattr(import_module(new), renamed)
        except AttributeError:
            raise AttributeError(f"module {old!r} has no attribute {name!r}") from None
        warnings.warn(
            f"{old}.{name} is deprecated: use {new}.{renamed}", DeprecationWarning, stacklevel=2
        )
        return value

    return __getattr__
