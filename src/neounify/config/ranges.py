"""Checks of settings from files: no unknown field, no silent conversion."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib import import_module
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, TypeAdapter

STRICT = ConfigDict(extra="forbid", str_strip_whitespace=False, arbitrary_types_allowed=True)
"""For `pydantic.dataclasses.dataclass(config=STRICT)`."""


@dataclass(frozen=True)
class Range:
    """The numbers a setting may have. `open_low`/`open_high`: the bound itself is outside.

    Used as `Annotated[float, AfterValidator(Range(0, 1))]`. NaN and infinities are in no range.
    """

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __call__(self, value: float) -> float:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        if not (math.isfinite(value) and above and below):
            raise ValueError(f"must be {self}, got {value}")
        return value

    def __str__(self) -> str:
        if self.high == math.inf:
            if self.low == -math.inf:
                return "a finite number"
            return f"above {self.low:g}" if self.open_low else f"at least {self.low:g}"
        left, right = "(" if self.open_low else "[", ")" if self.open_high else "]"
        return f"within {left}{self.low:g}, {self.high:g}{right}"


Count = Annotated[int, AfterValidator(Range(1))]
"""A whole number, at least 1."""
NonNegativeInt = Annotated[int, AfterValidator(Range(0))]
Seed = Annotated[int, AfterValidator(Range(0, 2**63 - 1))]
Positive = Annotated[float, AfterValidator(Range(0, open_low=True))]
NonNegative = Annotated[float, AfterValidator(Range(0))]
Finite = Annotated[float, AfterValidator(Range())]
Fraction = Annotated[float, AfterValidator(Range(0, 1))]
"""A share or a probability: 0 to 1, both included."""
BelowOne = Annotated[float, AfterValidator(Range(0, 1, open_high=True))]
AboveZero = Annotated[float, AfterValidator(Range(0, 1, open_low=True))]
"""A positive share: above 0, at most 1."""


def _area(value: tuple[int, int]) -> tuple[int, int]:
    low, high = value
    if not 1 <= low <= high:
        raise ValueError(
            f"must be [least, greatest] area in pixels with 1 <= least <= greatest, got "
            f"{[low, high]}"
        )
    return value


AreaBounds = Annotated[tuple[int, int], AfterValidator(_area)]
"""(least, greatest) area of an image in pixels."""


def check_names(field: str, names: Iterable[str], known: Iterable[str], kind: str = "name") -> None:
    """Raise ValueError for unknown names, with the nearest and all known ones."""
    listed = list(known)
    for name in names:
        if name not in listed:
            raise ValueError(
                f"{field}: unknown {kind} {name!r}; {closest(name, listed)}known are "
                f"{', '.join(listed)}"
            )


def closest(name: str, known: Sequence[str]) -> str:
    """'did you mean "…"? ' with the known name closest to an unknown one, or ''."""
    close = get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def check_weights(field: str, weights: Mapping[str, float], known: Iterable[str]) -> None:
    """Raise ValueError for unknown names, and for weights that are negative or not finite."""
    check_names(field, weights, known)
    for name, value in weights.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{field}.{name}: must be at least 0, got {value}")


def read_kind(value: Any, kinds: Mapping[str, str], default: str, what: str) -> Any:
    """A table of settings as the dataclass that `kinds` has for its "kind", as "module:class".

    The module is imported when its kind is named. Raises ValueError for an unknown kind or field,
    with those there are, and ValidationError for a wrong value.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f'must be a table such as {{ kind = "{default}" }}')
    kind = str(value.get("kind", default))
    config_class = kind_class(kind, kinds, what)
    known = [item.name for item in fields(config_class)]
    for field in value:
        if field not in known:
            raise ValueError(
                f'{what} of kind "{kind}" has no {field}; {closest(str(field), known)}it has '
                f"{', '.join(known)}"
            )
    # As JSON, so that strict validation takes lists for tuples but no text for numbers.
    return TypeAdapter(config_class).validate_json(json.dumps(value, default=str), strict=True)


def kind_class(kind: str, kinds: Mapping[str, str], what: str) -> type:
    """The dataclass that `kinds` has for a kind, imported. Raises ValueError for an unknown one."""
    check_names("kind", [kind], kinds, what)
    module, _, name = kinds[kind].partition(":")
    config_class: type = getattr(import_module(module), name)
    return config_class
