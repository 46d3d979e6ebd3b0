"""Arguments that are one value for all prompts, or one for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from neounify.errors import RequestError

T = TypeVar("T", int, str)


def read_prompts(prompt: str | Sequence[str]) -> list[str]:
    """One prompt or several, at least one, all of them text. Raises RequestError."""
    prompts: list[Any] = list(prompt) if isinstance(prompt, list | tuple) else [prompt]
    if not prompts:
        raise RequestError("the list of prompts is empty; at least one is needed", param="prompt")
    for one in prompts:
        if not isinstance(one, str):
            raise RequestError(f"prompt must be text, not {type(one).__name__}", param="prompt")
    return prompts


def per_prompt(value: T | Sequence[T], count: int, name: str) -> list[T]:
    """One value for every prompt, or a list with as many values as prompts."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != count:
            raise RequestError(
                f"{len(value)} values of {name} for {count} prompts; give one, or one per prompt",
                param=name,
            )
        return list(value)
    return [value] * count
