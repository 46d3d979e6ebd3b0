"""Rules of the source that a machine can check: lengths of files and functions, docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "tests", "benchmarks", "examples", "scripts")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 500, 70

LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}
"""Longer than the rule, and by how many lines in all: these shrink, and no new one is added."""

DIALECT = {
    "[Pp]ictures?": 18,
    "nobody|anybody|whoever": 0,
    "most_(?!common)[a-z_]+|MOST_[A-Z_]+": 1,
    "told|by turns|by heart|at work|learnt|vouch(es)?": 0,
    "of (its|their) own": 10,
    "go(es)? on|going on|went on": 0,
}
"""Words with a better one in the field (image; max_*; separate), and how often src may use them."""
VAGUE = {"found", "made", "own", "held", "given"}
"""Names that say nothing of the content: no local or parameter has one."""
MAX_ASKING = 0
"""Docstrings of modules that still begin with a question: they say the noun first."""

FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def _key(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{_key(path)}: {node.name}", (node.end_lineno or 0) - node.lineno + 1


def _check(lengths: dict[str, int], limit: int, known: dict[str, int]) -> None:
    long = {name: lines for name, lines in lengths.items() if lines > limit}
    grown = {name: lines for name, lines in long.items() if lines > known.get(name, limit)}
    assert not grown, f"over {limit} lines: {grown}"
    assert not set(known) - set(long), "short enough now: take it out of the list"


def test_files_are_short() -> None:
    lengths = {_key(path): len(path.read_text("utf-8").splitlines()) for path in FILES}
    _check(lengths, MAX_FILE_LINES, LONG_FILES)


def test_functions_are_short() -> None:
    lengths: dict[str, int] = {}
    for path in FILES:
        for name, lines in _functions(path):
            lengths[name] = max(lines, lengths.get(name, 0))
    _check(lengths, MAX_FUNCTION_LINES, LONG_FUNCTIONS)


def test_every_module_says_what_it_is() -> None:
    silent = [
        _key(path)
        for path in FILES
        if "src" in path.parts and not ast.get_docstring(ast.parse(path.read_text("utf-8")))
    ]
    assert not silent


@pytest.mark.parametrize("pattern", DIALECT)
def test_words_that_the_field_does_not_use_become_fewer(pattern: str) -> None:
    # The phrasebook holds what users say, in their own words.
    files = [p for p in FILES if "src" in p.parts and p.name != "phrasebook.py"]
    count = sum(len(re.findall(rf"\b({pattern})\b", path.read_text("utf-8"))) for path in files)
    assert count <= DIALECT[pattern], "use the field's word instead"


def test_locals_are_named_by_their_content() -> None:
    assert not [f"{_key(path)}:{line}" for path in FILES for line in _vague_bindings(path)]


def _vague_bindings(path: Path) -> Iterator[int]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) if name in VAGUE:
                yield node.lineno


def test_docstrings_of_modules_begin_with_a_noun() -> None:
    begin = re.compile(r"(What|Who|Whose|Where|Whether|When|Why|How)\b")
    asking = [
        _key(path)
        for path in FILES
        if "src" in path.parts
        and begin.match(ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "")
    ]
    assert len(asking) <= MAX_ASKING, asking


def test_growth_is_found() -> None:
    _check({"a": 70, "b": 90}, 70, {"b": 95})
    for lengths in ({"a": 71}, {"a": 71, "b": 96}):
        with pytest.raises(AssertionError, match="over 70 lines"):
            _check(lengths, 70, {"b": 95})
    with pytest.raises(AssertionError, match="take it out"):
        _check({"b": 70}, 70, {"b": 95})
