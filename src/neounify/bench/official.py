"""Results of official scorers: JSON lines or CSV, a line for each file or prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from neounify.bench.cases import TABLES, BenchError, Case, PromptFiles, Record, jsonl, table
from neounify.bench.result import Result
from neounify.bench.runner import failures
from neounify.bench.scoring import Judgments, Key, sum_up
from neounify.post_train.reward_kinds import TOTAL

FILE_KEYS, ID_KEYS = ("filename", "image", "image_path"), ("id", "index", "prompt_id", "key")
"""Fields that name what a line is about."""
NO_PARTS = (*FILE_KEYS, *ID_KEYS, "seed")


def read_results(
    cases: Sequence[Case],
    folder: Path,
    path: Path,
    scale: tuple[float, float] = (0.0, 1.0),
    weights: Mapping[str, float] | None = None,
) -> Result:
    """The result of a run by a file of its official scorer: numbers and truth values are the parts.

    `scale` is what 0 and 1 are for its numbers, `weights` make the total of the parts they name,
    which are then the only ones that are read. A line is found by `filename` (or `image`,
    `image_path`), a path that ends with a name of an image of the run, or by `id` (or `index`,
    `prompt_id`, `key`). Raises BenchError for lines of no case, and for parts outside of the scale.
    """
    if not scale[0] < scale[1]:
        raise BenchError(f"scale must be lowest,highest of the scorer, got {list(scale)}")
    if weights is not None and not min(weights.values()) >= 0 < sum(weights.values()):
        raise BenchError(f"weights must be at least 0, and one of them above it: {weights}")
    by_id = {case.id: [(case.id, n) for n in range(case.samples)] for case in cases}
    by_file = {
        name: [(c.id, n)] if len(c.files) == c.samples else by_id[c.id]
        for c in cases
        for n, name in enumerate(c.files)
    }
    judged: Judgments = {}
    file = PromptFiles(path)
    for number, record in enumerate(_records(file), 1):
        keys = _find(record, by_file, by_id)
        if not keys or keys[0] in judged:
            problem = f"is the second one of {keys[0][0]}" if keys else "belongs to no case"
            raise BenchError(f"{path}: result {number} {problem}: {str(record)[:120]}")
        try:
            judged |= dict.fromkeys(keys, _parts(record, scale, weights))
        except (ValueError, OverflowError) as error:
            raise BenchError(f"{path}: result {number}: {error}") from error
    identity = {"kind": "results", "scale": list(scale), "weights": dict(weights or {})}
    missing = {c.id: "no result" for c in cases if (c.id, 0) not in judged}
    result = sum_up(cases, folder, identity, judged, missing | failures(folder))
    source = {"file": path.name, "sha256": file.sha256}
    return replace(result, about={**result.about, "results": source})


def _records(file: PromptFiles) -> Iterator[Record]:
    text = file.text(file.root)
    if file.root.suffix.lower() not in TABLES:
        yield from jsonl(text, file.root)
        return
    for row in table(text, file.root):
        yield {n: cell if n in NO_PARTS else _value(cell) for n, cell in row.items()}


def _value(cell: str) -> float | bool | str:
    """The truth value or number that a cell is, else its text."""
    if cell.lower() in ("true", "false"):
        return cell.lower() == "true"
    try:
        return float(cell)
    except ValueError:
        return cell


def _find(
    record: Record, by_file: Mapping[str, list[Key]], by_id: Mapping[str, list[Key]]
) -> list[Key]:
    """The outputs that a line is about: those in a file, or all of a case."""
    for name in FILE_KEYS:
        parts = str(record.get(name, "")).replace("\\", "/").split("/")
        for start in range(len(parts)):
            if keys := by_file.get("/".join(parts[start:])):
                return keys
    return next((by_id[str(record[k])] for k in ID_KEYS if str(record.get(k)) in by_id), [])


def _parts(
    record: Record, scale: tuple[float, float], weights: Mapping[str, float] | None
) -> dict[str, float]:
    """The parts of a line, from 0 to 1. Raises ValueError, OverflowError."""
    if weights is None:
        values = {n: v for n, v in record.items() if n not in NO_PARTS and _is_score(v)}
        if not values:
            raise ValueError(f"has no number and no truth value: {str(record)[:120]}")
    else:
        values = {name: record[name] for name in weights if _is_score(record.get(name))}
        if absent := [name for name in weights if name not in values]:
            raise ValueError(f"has no number {', '.join(absent)}: {str(record)[:120]}")
    parts = {name: _scaled(name, value, scale) for name, value in values.items()}
    if weights is None:
        return parts
    total = sum(parts[name] * weight for name, weight in weights.items())
    return parts | {TOTAL: total / sum(weights.values())}


def _is_score(value: Any) -> bool:
    return isinstance(value, bool | int | float)


def _scaled(name: str, value: float | bool, scale: tuple[float, float]) -> float:
    if isinstance(value, bool):
        return float(value)
    low, high = scale
    if not low <= value <= high:
        raise ValueError(
            f"{name} is {float(value):g}, not from {low:g} to {high:g}: give the scorer's --scale, "
            "or name its scores by --weights"
        )
    return (value - low) / (high - low)
