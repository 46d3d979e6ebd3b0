"""Sentences that describe the knobs of sampling, in `--help` and in the HTTP API alike."""

from __future__ import annotations

from dataclasses import fields


def doc(sentence: str) -> dict[str, str]:
    """Metadata of a dataclass field: what it does, its unit, range and default."""
    return {"doc": sentence}


def knob_doc(config: type, name: str) -> str:
    """The sentence of one field."""
    sentences = {field.name: field.metadata["doc"] for field in fields(config)}
    return str(sentences[name])
