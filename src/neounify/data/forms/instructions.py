"""One instruction and its answer, with earlier turns: Alpaca (LLaMA-Factory), and ms-swift's query.

    {"instruction": "Name a colour.", "input": "", "output": "Red.", "history": [["Hi", "Hello"]]}
    {"query": "<image>Which colour?", "response": "Red.", "images": ["a.png"]}

As LLaMA-Factory does, `input` follows `instruction` on another line, and answers of `history`
are trained on too.
"""

from __future__ import annotations

from typing import Any

from neounify.data.forms import Fields, has_value
from neounify.data.records import RecordRules
from neounify.data.sample import DataError


def from_alpaca(fields: Fields, rules: RecordRules) -> Fields:
    """The published record of one with "instruction" and "output". Raises DataError."""
    record = dict(fields)
    asked = [_text(record, name) for name in ("instruction", "input")]
    return _with_turns(record, "\n".join(text for text in asked if text), _text(record, "output"))


def from_query(fields: Fields, rules: RecordRules) -> Fields:
    """The published record of one with "query" and "response". Raises DataError."""
    record = dict(fields)
    return _with_turns(record, _text(record, "query"), _text(record, "response"))


def _with_turns(record: Fields, question: str, answer: str) -> Fields:
    history = record.pop("history", None)
    pairs: list[Any] = history if has_value(history) else []
    if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
        raise DataError('"history" must be a list of pairs of texts, [question, answer]')
    record["conversations"] = [
        {"from": speaker, "value": text}
        for pair in (*pairs, (question, answer))
        for speaker, text in zip(("human", "gpt"), pair, strict=True)
    ]
    return record


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and all(isinstance(text, str) for text in value)
    )


def _text(record: Fields, name: str) -> str:
    text = record.pop(name, None)
    if text is not None and not isinstance(text, str):
        raise DataError(f'"{name}" is {type(text).__name__}, not text')
    return text or ""
