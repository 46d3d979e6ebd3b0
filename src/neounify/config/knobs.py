"""Sentences that describe the knobs of sampling, in `--help` and in the HTTP API alike."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields


def doc(sentence: str) -> dict[str, str]:
    """Metadata of a dataclass field: what it does, its unit, range and default."""
    return {"doc": sentence}


def knob_doc(config: type, name: str) -> str:
    """The sentence of one field."""
    sentences = {field.name: field.metadata["doc"] for field in fields(config)}
    return str(sentences[name])


def check_keywords(call: str, names: Collection[str], knobs: type) -> None:
    """Raise TypeError, as Python does, for names that are no key of a TypedDict of knobs."""
    known = knobs.__optional_keys__  # type: ignore[attr-defined]
    for name in names:
        if name not in known:
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}")
