"""Hooks: callables on batches of images and texts, loaded once per worker.

A hook is `package.module:name`: a function, or a class that is instantiated once. It is called as
`hook(images, texts)` with two lists of the same length (RGB PIL images or None, and texts), and
returns a value for each: a mapping from classes to scores (safety), a number (watermark, beauty,
match) or a vector (embeddings).
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from PIL import Image

from neounify.curate.recipe import CurateError
from neounify.files import file_sha256
from neounify.plugins import load_callable, module_file

Hook = Callable[[list[Image.Image | None], list[str]], Sequence[Any]]
Reader = Callable[[Any], Any]
"""The checked value of what a hook returned for one image. Raises ValueError."""


MAX_LATE = 8
"""Calls with one image that may take too long one after the other; then the hook is broken."""


class HookTimeout(BaseException):
    """A call took longer than its stage allows; no Exception, which a hook itself may catch."""


@lru_cache(maxsize=16)
def load_hook(name: str, folder: Path | None) -> Hook:
    """The hook of this process. Raises CurateError."""
    _loaded[name] = hook_digest(name, folder)
    return load_callable(name, "hook", "(images, texts)", CurateError, folder)


_loaded: dict[str, str] = {}
"""Digests of the files of hooks when this process loaded them."""


def hook_digest(name: str, folder: Path | None) -> str:
    """SHA-256 of the file of a hook's module, which is not run; "" for a module without a file.

    Raises CurateError, also for a file that has changed since this process loaded it.
    """
    file = module_file(name, "hook", CurateError, folder)
    try:
        digest = "" if file is None else file_sha256(file)
    except OSError as error:
        raise CurateError(f"the hook {name} cannot be read: {error}") from error
    if _loaded.get(name, digest) != digest:
        raise CurateError(f"{file} has changed since this process loaded it; start a new one")
    return digest


def call_hook(
    hook: Hook,
    images: list[Image.Image | None],
    texts: list[str],
    read: Reader,
    timeout: float,
) -> list[Any]:
    """The value of every image; an exception for one without.

    A batch that fails is tried again image by image, so that one image costs no other its value.
    Raises CurateError for a hook that hangs.
    """
    try:
        return _called(hook, images, texts, read, timeout)
    except (Exception, HookTimeout) as error:
        if len(images) == 1:
            return [error]
    results: list[Any] = []
    late = 0
    for image, text in zip(images, texts, strict=True):
        try:
            results += _called(hook, [image], [text], read, timeout)
            late = 0
        except Exception as error:
            results.append(error)
        except HookTimeout as error:
            results.append(error)
            late += 1
        if late == MAX_LATE:
            raise CurateError(
                f"{late} calls one after the other, each with one image, took longer than "
                f"{timeout:g} s; raise timeout, or mend the hook"
            )
    return results


def _called(
    hook: Hook,
    images: list[Image.Image | None],
    texts: list[str],
    read: Reader,
    timeout: float,
) -> list[Any]:
    with _time_limit(timeout):
        values = list(hook(list(images), list(texts)))
    if len(values) != len(images):
        raise ValueError(f"{len(values)} values for {len(images)} images")
    results: list[Any] = []
    for value in values:
        try:
            results.append(read(value))
        except (TypeError, ValueError) as error:
            results.append(error)
    return results


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise HookTimeout in the block after a time; only in the main thread of a Unix process."""
    if (
        not hasattr(signal, "setitimer")
        or threading.current_thread() is not threading.main_thread()
    ):
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise HookTimeout(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read_number(value: Any) -> float:
    """A finite number. Raises ValueError and TypeError."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"the value {number} is not finite")
    return number


def read_scores(value: Any) -> dict[str, float]:
    """Scores by class. Raises ValueError and TypeError."""
    if not isinstance(value, Mapping):
        raise TypeError(f"a {type(value).__name__}, not a mapping from classes to scores")
    return {str(name): read_number(score) for name, score in value.items()}


def read_vector(value: Any) -> np.ndarray:
    """A unit vector in float32. Raises ValueError and TypeError."""
    vector = np.asarray(value, np.float64).reshape(-1)
    length = float(np.linalg.norm(vector))
    if not len(vector) or not math.isfinite(length) or length == 0:
        raise ValueError(f"a vector of {len(vector)} values and length {length}")
    return (vector / length).astype(np.float32)
