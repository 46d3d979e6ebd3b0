"""`neounify curate`: what it prints, JSON, quiet, errors of recipes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.curation import encoded, textured, write_samples


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    samples = [(f"n{n}", encoded(textured(n % 2)), f"a view of stone {n}") for n in range(3)]
    path = write_samples(tmp_path / "in", samples)
    file = tmp_path / "mine.toml"
    file.write_text(f'name = "mine"\n[[sources]]\nname = "web"\npath = "{path}"\n')
    return file


def test_the_command_says_what_is_kept(run_bare: Callable[..., Any], recipe: Path) -> None:
    ran = run_bare("curate", str(recipe), "--workers", "1")
    assert ran.code == 0, ran.err
    assert "web: 2 of 3 samples kept (66.7%)" in ran.out
    assert "exact.copy" in ran.out
    assert (Path("out") / "mine" / "report.html").is_file()
    summary = json.loads((Path("out") / "mine" / "summary.json").read_text())
    assert summary["dropped"] == {"web": {"exact.copy": 1}}


def test_json_and_quiet(run_bare: Callable[..., Any], recipe: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    ran = run_bare("curate", str(recipe), "--workers", "1", "--out", out, "--json")
    assert ran.json["kept"] == {"web": 2}
    assert ran.json["folder"] == out
    ran = run_bare("curate", str(recipe), "--workers", "1", "--out", out, "--quiet")
    assert ran.out.strip() == out
    assert ran.err == ""


WRONG = {
    "name = 1": "name",
    "nme = 'a'": "did you mean 'name'",
    "[[sources]]\npath = 'x'\nkind = 'jsnl'": "did you mean 'jsonl'",
    "[[sources]]\npath = 'missing.jsonl'": "missing.jsonl",
    "[[sources]]\npath = 'x.jsonl'\n[stages.near]\ndistance = 40": "stages.near.distance",
    "[[sources]]\npath = 'x.jsonl'\n[stages.blur]\nx = 1": "stages.blur",
    "[[sources]]\npath = 'x.jsonl'\n[stages.safety]\nhook = 'nothing'": "package.module:name",
    "[[sources]]\nkind = 'scenes'": "cannot be curated",
    "sources = []": "sources with different names, got []",
    "not toml": "is not TOML",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_recipe_is_one_error(
    text: str, run_bare: Callable[..., Any], tmp_path: Path
) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text + "\n")
    ran = run_bare("curate", str(file), "--workers", "1")
    assert ran.code == 1
    assert WRONG[text] in ran.err
    assert len(ran.err.strip().splitlines()) == 1, ran.err
