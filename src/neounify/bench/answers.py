"""Metrics of answers: multiple choice, exact match, OCR by containment, ANLS, relaxed accuracy.

Each takes an answer and the record of its question, and gives 0 to 1. A thought before the answer
and the words around a final one ("The answer is B") are left out first.
"""

from __future__ import annotations

import ast
import re
import string
from collections.abc import Callable, Mapping
from typing import Any

from neounify.bench.cases import BenchError
from neounify.evaluate.metrics import levenshtein

Metric = Callable[[str, Mapping[str, Any]], float]
RELAXED_TOLERANCE = 0.05
"""Relative error that relaxed accuracy allows a number (ChartQA, Masry et al. 2022)."""
ANLS_THRESHOLD = 0.5
"""Normalised distance from which ANLS is 0 (ST-VQA, Biten et al. 2019)."""
MAX_ANSWER_CHARACTERS, MAX_ANLS_CHARACTERS = 20_000, 2_000
"""What is read of an answer, and compared letter by letter."""
CHOICES = string.ascii_uppercase
_FINAL = re.compile(
    r"(?:final answer|correct answer|answer|correct option|correct choice)\W*(?:is|:|：)\W*(.+)",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?\.?\d+(?:[eE][-+]?\d+)?")


def final_text(answer: str) -> str:
    """An answer without its thought, cut to a length that metrics can afford."""
    return answer.rpartition("</think>")[2].strip()[:MAX_ANSWER_CHARACTERS]


def options(record: Mapping[str, Any]) -> dict[str, str]:
    """The options of a question by letter: its fields A, B, C, …, as far as there are any."""
    listed: dict[str, str] = {}
    for letter in CHOICES:
        if letter not in record:
            break
        listed[letter] = str(record[letter])
    return listed


def choice(answer: str, record: Mapping[str, Any]) -> float:
    """1 if the answer names the right letter, or says the text of that option alone."""
    listed, wanted = options(record), str(record["answer"]).strip().upper()
    if wanted not in listed:
        raise BenchError(f"the answer {wanted[:40]!r} is none of the options {', '.join(listed)}")
    return float(chosen(final_text(answer), listed) == wanted)


def chosen(text: str, listed: Mapping[str, str]) -> str | None:
    """The letter that an answer chooses, None if it chooses none or several.

    In this order: what stands in \\boxed{} or behind "answer is"; a letter alone, in brackets or
    with a mark behind it, at the start; the only such letter anywhere; the text of one option.
    """
    for source in (*_BOXED.findall(text)[-1:], *_FINAL.findall(text)[-1:], text):
        letters = "".join(listed)
        start = re.match(rf"\W*([{letters}])(?![\w'’])", source.strip())
        if start and not _is_article(start, source):
            return start[1]
        marked = set(re.findall(rf"\(([{letters}])\)|\b([{letters}])[.:)]", source))
        alone = {a or b for a, b in marked}
        if len(alone) == 1:
            return alone.pop()
    named = [
        letter
        for letter, option in listed.items()
        if re.search(rf"(?<!\w){re.escape(option.strip().lower())}(?!\w)", text.lower())
    ]
    return named[0] if len(named) == 1 else None


def _is_article(match: re.Match[str], source: str) -> bool:
    """Whether the A at the start is a word: "A cat is seen", not "A", "A." or "A cat" as option."""
    return match[1] == "A" and bool(re.match(r"\W*A [a-z]", source.strip()))


def exact(answer: str, record: Mapping[str, Any]) -> float:
    """1 if the answer is one of those wanted, or a number equal to it.

    Case, outer punctuation, articles and spaces do not count; `precision` of the record rounds
    numbers to so many decimals (MathVista).
    """
    said = _final(final_text(answer))
    for wanted in _wanted(record):
        if _plain(said) == _plain(wanted):
            return 1.0
        numbers = _number(said), _number(wanted)
        decimals = record.get("precision")
        if None not in numbers and _plain(wanted) and _equal(*numbers, decimals):
            return 1.0
    return 0.0


def contains(answer: str, record: Mapping[str, Any]) -> float:
    """1 if one of the answers wanted stands in the answer (OCRBench); case does not count.

    For handwritten formulas, category "Handwritten Mathematical Expression Recognition", case
    counts and spaces do not.
    """
    text = final_text(answer)
    formula = "Handwritten Mathematical Expression" in str(record.get("category", ""))

    def plain(value: str) -> str:
        if formula:
            return "".join(value.split())
        return value.lower().strip().replace("\n", " ")

    return float(any(plain(wanted) in plain(text) for wanted in _wanted(record)))


def anls(answer: str, record: Mapping[str, Any]) -> float:
    """Average normalised Levenshtein similarity: the best of the answers wanted (DocVQA).

    1 - d, with d the edit distance over the longer length; 0 if d is at least `ANLS_THRESHOLD`.
    """
    said = " ".join(final_text(answer).lower().split())[:MAX_ANLS_CHARACTERS]
    best = 0.0
    for wanted in _wanted(record):
        text = " ".join(wanted.lower().split())
        longer = max(len(said), len(text))
        if abs(len(said) - len(text)) >= ANLS_THRESHOLD * longer > 0:
            continue  # so many characters differ at least
        distance = levenshtein(said, text) / longer if longer else 0.0
        best = max(best, 1 - distance if distance < ANLS_THRESHOLD else 0.0)
    return best


def relaxed(answer: str, record: Mapping[str, Any]) -> float:
    """1 for a number within 5 % of that wanted, or the same text (ChartQA)."""
    said = _final(final_text(answer))
    for wanted in _wanted(record):
        target, value = _number(wanted), _number(said)
        if target is not None and value is not None:
            if value == target or (
                target and abs(value - target) <= RELAXED_TOLERANCE * abs(target)
            ):
                return 1.0
        elif _plain(said) == _plain(wanted):
            return 1.0
    return 0.0


METRICS: dict[str, Metric] = {
    "choice": choice,
    "exact": exact,
    "contains": contains,
    "anls": anls,
    "relaxed": relaxed,
}


def _wanted(record: Mapping[str, Any]) -> list[str]:
    """The answers of a question: one, or a list, also written as Python or JSON writes one."""
    answer = record["answer"]
    if isinstance(answer, str) and answer.startswith("[") and answer.endswith("]"):
        try:
            answer = ast.literal_eval(answer)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return [str(answer)]
    return [str(item) for item in answer] if isinstance(answer, list | tuple) else [str(answer)]


def _final(text: str) -> str:
    """What an answer says at its end: in \\boxed{}, behind "answer is", else all of it."""
    for found_last in (_BOXED.findall(text)[-1:], _FINAL.findall(text)[-1:]):
        if found_last:
            return str(found_last[0])
    return text


def _plain(text: str) -> str:
    words = text.lower().strip().strip(string.punctuation + "。，").split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _number(text: str) -> float | None:
    """The number that a text is, with its percent sign, currency or unit of one word left out."""
    text = text.strip().strip("$€£¥").rstrip(".")
    words = text.replace("%", " % ").split()
    match = _NUMBER.fullmatch(words[0]) if words else None
    if match is None or len(words) > 2:
        return None
    value = float(match[0].replace(",", ""))
    return value / 100 if words[1:] == ["%"] else value


def _equal(a: float | None, b: float | None, decimals: Any) -> bool:
    if a is None or b is None:
        return False
    if decimals in (None, ""):
        return a == b
    try:
        places = int(float(decimals))
        return round(a, places) == round(b, places)
    except (TypeError, ValueError, OverflowError) as error:
        raise BenchError(f"precision {str(decimals)[:40]!r} is no number of decimals") from error
