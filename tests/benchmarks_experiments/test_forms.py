"""Forms of requests: wordings change what they say they change, and rates are of changed cases."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks.experiments.__main__ import main
from benchmarks.experiments.bench import Bench
from benchmarks.experiments.forms import CATEGORIES, compare, markdown
from benchmarks.experiments.wordings import EDITS, PROMPTS, QUESTIONS

from neounify.config.presets import SCENES
from neounify.model import NeoUnify
from neounify.pipeline import Pipeline
from neounify.scenes.bench import (
    Painting,
    edit_cases,
    paint_cases,
    vqa_cases,
)
from neounify.scenes.bench.category import Pixels
from neounify.scenes.bench.plan import BenchConfig, question_kinds
from neounify.scenes.bench.subject import Side
from neounify.scenes.world import render, sample_rng, scene_config
from neounify.scenes.world.language import caption
from neounify.text import byte_tokenizer

WORLD = scene_config("default")
PROMPT = "two small purple squares and a red star"


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("plain", PROMPT),
        ("a full stop at the end", "two small purple squares and a red star."),
        ("a capital in front", "Two small purple squares and a red star"),
        ("no article", "two small purple squares and red star"),
        ("UPPER CASE", "TWO SMALL PURPLE SQUARES AND A RED STAR"),
        ("Please draw ….", "Please draw two small purple squares and a red star."),
        ("Can you paint …?", "Can you paint two small purple squares and a red star?"),
        ("digits for numbers", "2 small purple squares and a red star"),
        ("other words for shapes", "two small purple boxes and a red asterisk"),
        ("other words for colours", "two small violet squares and a scarlet star"),
    ],
)
def test_prompts_in_other_forms(form: str, expected: str) -> None:
    assert PROMPTS[form](PROMPT, sample_rng(0, 0)) == expected


def test_edits_and_questions_in_other_forms() -> None:
    rng = sample_rng(0, 0)
    assert EDITS["Please …"]("Remove the cross.", rng) == "Please remove the cross."
    assert EDITS["no full stop"]("Remove the cross.", rng) == "Remove the cross"
    assert QUESTIONS["no question mark"]("Where is the star?", rng) == "Where is the star"
    assert QUESTIONS["no article"]("The star, a cross?", rng) == "Star, cross?"


def test_a_typo_swaps_two_letters_inside_one_word() -> None:
    for index in range(40):
        changed = PROMPTS["one typo (two letters swapped)"](PROMPT, sample_rng(0, index))
        differing = [n for n, (a, b) in enumerate(zip(changed, PROMPT, strict=True)) if a != b]
        assert differing == [differing[0], differing[0] + 1]
        assert sorted(changed) == sorted(PROMPT)
        assert PROMPT[differing[0] - 1].isalpha()


class Literal:
    """Is right about requests in the trained wordings, and about no others."""

    def __init__(self, bench: Bench) -> None:
        config = BenchConfig(world=WORLD, cases=bench.cases)
        self.scenes = {
            caption(case.facts): case.scene
            for category in CATEGORIES
            for case in paint_cases(category, WORLD, bench.cases, 0)
        }
        self.edits = {
            (render(case.edit.source, WORLD).tobytes(), case.edit.instruction): case.edit.target
            for case in edit_cases(WORLD, bench.cases, 0)
        }
        self.answers = {
            (render(case.scene, WORLD).tobytes(), case.question.text): case.question.answer
            for kind in question_kinds(config)
            for case in vqa_cases(kind, WORLD, bench.cases, 0)
        }
        self.asked: list[str] = []

    def paint(
        self, prompts: Sequence[str], side: Side, seeds: Sequence[int], *, think: bool
    ) -> list[Painting]:
        self.asked += prompts
        empty = np.full((WORLD.height, WORLD.width, 3), 255, np.uint8)
        return [
            Painting(render(self.scenes[p], WORLD) if p in self.scenes else empty) for p in prompts
        ]

    def edit(
        self,
        images: Sequence[Pixels],
        instructions: Sequence[str],
        seeds: Sequence[int],
        *,
        think: bool,
    ) -> list[Painting]:
        edited = []
        for image, text in zip(images, instructions, strict=True):
            target = self.edits.get((image.tobytes(), text))
            edited.append(Painting(image if target is None else render(target, WORLD)))
        return edited

    def answer(self, images: Sequence[Pixels | None], questions: Sequence[str]) -> list[str]:
        asked = zip(images, questions, strict=True)
        seen = [(b"" if image is None else image.tobytes(), text) for image, text in asked]
        return [self.answers.get(key, "") for key in seen]

    def tell(self, request: str, side: int, seed: int) -> list[Pixels]:
        raise NotImplementedError


def test_rates_are_those_of_the_cases_a_form_changes() -> None:
    bench = Bench(world="default", cases=10, batch_size=4)
    subject = Literal(bench)
    compared = compare(subject, bench)
    by_kind = {
        kind: [f for f in compared if f.kind == kind] for kind in ("prompt", "edit", "question")
    }
    assert [f.name for f in by_kind["edit"]] == list(EDITS)
    for forms in by_kind.values():
        plain, *others = forms
        assert plain.paired.number == 10
        assert plain.paired.first.value == 1
        for form in others:
            assert 0 < form.paired.number <= 10
            assert form.paired.second.value == 1
            assert form.paired.first.value == 0, form
    digits = next(f for f in compared if f.name == "digits for numbers")
    assert digits.paired.number < 10
    assert sum("2" in text for text in subject.asked) <= digits.paired.number
    table = markdown(compared)
    assert table.count("right, % (95 %)") == 3
    assert "| Please draw ….: `Please draw" in table


def test_the_command_writes_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("neounify.scenes.bench.subject.MAX_ANSWER_TOKENS", 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = NeoUnify(replace(SCENES, num_layers=1)).requires_grad_(False).eval()
    Pipeline(model, byte_tokenizer()).save(tmp_path / "toy")
    words = ["forms", "--cases", "5", "--steps", "1", "--guidance", "1", "--threads", "1"]
    main([*words, "--model", str(tmp_path / "toy"), "--output", str(tmp_path / "out")])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["machine"]["processor"]
    assert {form["kind"] for form in report["forms"]} == {"prompt", "edit", "question"}
    assert "UPPER CASE" in (tmp_path / "out" / "report.md").read_text()
