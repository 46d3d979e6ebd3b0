"""Hooks from the options of a command line. Requests never name code."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from pathlib import Path

from neounify.errors import NeounifyError
from neounify.serve.safety.hooks import Hooks, SafetyHook
from neounify.serve.safety.wordlist import WordList

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


class HookError(NeounifyError, ValueError):
    """A hook that the command line names cannot be loaded."""


def make_hooks(word_list: Path | None, names: Sequence[str]) -> Hooks:
    """The hooks a server was started with: the word list first, if there is one, then the others.

    Without either nothing is ever refused. Raises WordListError and HookError.
    """
    first: list[SafetyHook] = [] if word_list is None else [WordList.read(word_list)]
    return Hooks([*first, *(load_hook(name) for name in names)])


def load_hook(name: str) -> SafetyHook:
    """The hook behind "package.module:attribute", which is a hook, or makes one when called.

    Imports the module, so the name must come from the operator of the server. Raises HookError.
    """
    hook = _find(name)
    if isinstance(hook, type) or not isinstance(hook, SafetyHook):
        hook = _make(name, hook)
    if not isinstance(hook, SafetyHook):
        raise HookError(f"{name}: a hook has the methods check_prompt and check_image")
    return hook


def _find(name: str) -> object:
    if not _NAME.fullmatch(name):
        raise HookError(f"{name!r} does not name a hook; write package.module:attribute")
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except AttributeError as error:
        raise HookError(f"{name}: the module has no {attribute!r}") from error
    except Exception as error:  # a module's own code may fail in any way
        raise HookError(f"{name}: cannot be imported ({error})") from error


def _make(name: str, factory: object) -> object:
    if not callable(factory):
        raise HookError(f"{name}: neither a hook nor something that makes one")
    try:
        return factory()
    except Exception as error:  # a factory's own code may fail in any way
        raise HookError(f"{name}: calling it failed ({error})") from error
