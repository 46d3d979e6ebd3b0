"""Sets of questions about images: TSV, CSV or JSON lines with the columns of VLMEvalKit.

`index`, `question`, `answer`; options in `A`, `B`, …; `hint`; `category` or `split`; the image as
base64 in `image`, or several as a list, or the `index` of another row that has it; or a path in
`image_path`, or a list of them.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping
from typing import Any

from neounify.bench.adapter import Adapter, each_file
from neounify.bench.answers import METRICS, options
from neounify.bench.cases import BASE64, TABLES, BenchError, Case, PromptFiles, Record, jsonl, table

MAX_REFERENCE_CHARACTERS = 64
"""A shorter `image` is the index of the row that holds it."""
HIDDEN = ("image", "image_path", "stem")
"""Fields that a case's record leaves out: the images are in the case."""
_SHORT = "Answer with a single word, number or phrase."
INSTRUCTIONS = {
    "choice": "Answer with the letter of the right option alone.",
    "exact": _SHORT,
    "anls": _SHORT,
    "relaxed": _SHORT,
}
"""The last line of a question, by metric."""


QUESTIONS = Adapter(
    name="questions",
    title="Questions about images",
    task="question",
    source="https://github.com/open-compass/VLMEvalKit",
    prompts="a TSV, CSV or JSON lines file with the columns of VLMEvalKit",
    read=each_file("*", jsonl),
    prompt="question",
    id="{index}",
    category="all",
    file="",
)
"""What `run` needs to know of questions; their cases are made by `question_cases`."""


def question_cases(prompts: PromptFiles, metric: str, instruction: str | None = None) -> list[Case]:
    """The questions of a set, for a metric; `instruction` ends each, None for the metric's own.

    Raises BenchError for a set that does not fit the metric.
    """
    if metric not in METRICS:
        raise BenchError(f"there is no metric {metric!r}; known are {', '.join(METRICS)}")
    path = prompts.root
    parse = table if path.suffix.lower() in TABLES else jsonl
    records = list(each_file("*", parse)(prompts)) if path.is_file() else []
    if not records:
        raise BenchError(f"{path} holds no questions; give a TSV, CSV or JSON lines file")
    images = {str(record["index"]): record.get("image") for record in records}
    asked = INSTRUCTIONS.get(metric, "") if instruction is None else instruction
    cases = [_case(record, images, metric, asked) for record in records]
    if len({case.id for case in cases}) < len(cases):
        raise BenchError(f"{path}: two questions have the same index")
    return cases


def _case(record: Record, images: Mapping[str, Any], metric: str, instruction: str) -> Case:
    place = f"question {record['index']}"
    for name in ("question", "answer"):
        if record.get(name) in (None, ""):
            raise BenchError(f"{place} has no {name!r}")
    case = Case(
        id=str(record["index"]),
        category=str(record.get("category") or record.get("split") or "all"),
        prompt=_prompt(record, metric, instruction),
        record={name: value for name, value in record.items() if name not in HIDDEN},
        images=tuple(_sources(record, images, place)),
    )
    METRICS[metric]("", case.record)  # an answer that the metric cannot use
    return case


def _prompt(record: Mapping[str, Any], metric: str, instruction: str) -> str:
    lines = [f"Hint: {hint}" for hint in [record.get("hint")] if hint] + [str(record["question"])]
    listed = options(record) if metric == "choice" else {}
    lines += [f"{letter}. {text}" for letter, text in listed.items()]
    return "\n".join([*lines, instruction]).strip()


def _sources(record: Record, images: Mapping[str, Any], place: str) -> Iterator[str]:
    """The images of a question, as `cases.image_bytes` reads them."""
    value = record.get("image")
    if isinstance(value, str) and 0 < len(value) <= MAX_REFERENCE_CHARACTERS:
        value = images.get(value)
        if value is None:
            raise BenchError(f"{place}: no row has the image {record['image']!r}")
    if value:
        yield from (f"{BASE64}{item}" for item in _listed(value, place))
    elif record.get("image_path"):
        yield from _listed(record["image_path"], place)


def _listed(value: Any, place: str) -> list[str]:
    """A text, or the texts of a list, also written as Python or JSON writes one."""
    if isinstance(value, str) and value.startswith("["):
        try:
            value = json.loads(value) if '"' in value[:2] else ast.literal_eval(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            raise BenchError(f"{place}: a list of images cannot be read: {error}") from error
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in items):
        raise BenchError(f"{place}: images must be texts")
    return items
