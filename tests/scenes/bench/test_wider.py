"""The parts "wording" and "sizes": true answers pass, blind ones fail, forms share their scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from neounify.scenes.bench import BenchConfig, Painting, Report, check_vqa, names
from neounify.scenes.bench.category import Pixels, Score
from neounify.scenes.bench.prompts import EditCase, PaintCase, VqaCase
from neounify.scenes.bench.run import run_scenebench
from neounify.scenes.bench.runners import question_kinds
from neounify.scenes.bench.subject import Side
from neounify.scenes.bench.wider import (
    FORMS,
    SIZES,
    WORDING_FORMS,
    wider_names,
    wording_edit_cases,
    wording_paint_cases,
    wording_question_cases,
)
from neounify.scenes.world import PRESETS, parse_caption, render
from neounify.scenes.world.facts import canonical
from neounify.scenes.world.wording import plain

WORLD = PRESETS["default"]


def config(part: str, cases: int = 6) -> BenchConfig:
    return BenchConfig(world=WORLD, tasks=(part,), cases=cases, batch_size=4)


class Knowing:
    """Answers every case of the parts; `right` False answers it wrongly."""

    def __init__(self, asked: BenchConfig, *, right: bool = True) -> None:
        self.right = right
        self.sizes: set[tuple[int, int]] = set()
        self.images = 0
        drawn = (asked.cases, asked.seed)
        paint: list[PaintCase] = []
        questions: list[VqaCase] = []
        edits: list[EditCase] = []
        for form in WORDING_FORMS["paint"]:
            paint += wording_paint_cases(form, WORLD, *drawn)
        for form in WORDING_FORMS["question"]:
            questions += wording_question_cases(form, WORLD, question_kinds(asked), *drawn)
        for form in WORDING_FORMS["edit"]:
            edits += wording_edit_cases(form, WORLD, *drawn)
        self.scenes = {case.prompt: case.scene for case in paint}
        self.answers: dict[tuple[bytes, str], str] = {}
        self.targets = {}
        for width, height in SIZES:
            world = WORLD.sized(width, height)
            for asked_case in questions:
                question = asked_case.question
                seen = b"" if question.kind == "no_image" else self._seen(asked_case.scene, world)
                self.answers[seen, question.text] = question.answer
            for case in edits:
                key = self._seen(case.edit.source, world), case.edit.instruction
                self.targets[key] = case.edit.target, world

    def _seen(self, scene, world) -> bytes:  # type: ignore[no-untyped-def]
        return render(scene, world).tobytes()

    def answer(self, images: Sequence[Pixels | None], questions: Sequence[str]) -> list[str]:
        self.images += sum(image is not None for image in images)
        seen = [b"" if image is None else image.tobytes() for image in images]
        known = [self.answers[key] for key in zip(seen, questions, strict=True)]
        return known if self.right else ["purple elephants"] * len(known)

    def paint(
        self, prompts: Sequence[str], side: Side, seeds: Sequence[int], *, think: bool
    ) -> list[Painting]:
        width, height = (side, side) if isinstance(side, int) else side
        self.sizes.add((width, height))
        world = WORLD.sized(width, height)
        images = [render(self.scenes[prompt], world) for prompt in prompts]
        return [Painting(image if self.right else np.zeros_like(image)) for image in images]

    def edit(
        self,
        images: Sequence[Pixels],
        instructions: Sequence[str],
        seeds: Sequence[int],
        *,
        think: bool,
    ) -> list[Painting]:
        if not self.right:
            return [Painting(image) for image in images]
        pairs = zip(images, instructions, strict=True)
        return [Painting(render(*self.targets[i.tobytes(), text])) for i, text in pairs]

    def tell(self, request: str, side: int, seed: int) -> list[Pixels]:
        raise AssertionError("no story is asked for")


@pytest.mark.parametrize("part", ["wording", "sizes"])
@pytest.mark.parametrize("right", [True, False])
def test_true_answers_pass_and_wrong_ones_fail(part: str, right: bool) -> None:
    asked = config(part)
    subject = Knowing(asked, right=right)
    outcomes = list(run_scenebench(subject, asked))
    assert [o.score.category for o in outcomes] == names(asked) == wider_names(part)
    for outcome in outcomes:
        assert outcome.score.strict.correct == (asked.cases if right else 0), outcome.score.category
    assert subject.sizes == (set(SIZES) if part == "sizes" else {(64, 64)})


def test_forms_ask_for_the_same_scenes() -> None:
    template = wording_paint_cases("template", WORLD, 30, 0)
    for form in FORMS[1:]:
        cases = wording_paint_cases(form, WORLD, 30, 0)
        assert [c.scene for c in cases] == [c.scene for c in template]
        changed = sum(a.prompt != b.prompt for a, b in zip(cases, template, strict=True))
        assert changed >= 20, form
        for case in cases:
            assert canonical(parse_caption(plain(case.prompt))) == canonical(case.facts)
    edits = wording_edit_cases("template", WORLD, 30, 0)
    for form in FORMS[1:]:
        targets = [c.edit.target for c in wording_edit_cases(form, WORLD, 30, 0)]
        assert targets == [c.edit.target for c in edits]


def test_removals_and_moves_have_categories_of_one_kind() -> None:
    for kind in ("remove", "move"):
        assert {c.edit.kind for c in wording_edit_cases(kind, WORLD, 12, 0)} == {kind}


def test_yes_or_no_questions_of_a_relation_have_both_answers() -> None:
    cases = wording_question_cases(
        "relation_yes_no", WORLD, question_kinds(config("wording")), 40, 0
    )
    assert {case.question.answer for case in cases} == {"yes", "no"}
    assert not any(check_vqa(case.question, "left").correct for case in cases)


def test_a_question_without_an_image_is_asked_without_one() -> None:
    asked = config("wording", 2)
    subject = Knowing(asked)
    list(run_scenebench(subject, asked))
    assert subject.images == 2 * (len(WORDING_FORMS["question"]) - 1)


def test_cases_name_nothing_that_training_never_shows() -> None:
    assert not any(case.held_out for case in wording_paint_cases("template", WORLD, 60, 0))


def test_each_part_has_its_own_table() -> None:
    asked = config("wording", 2)
    outcomes = list(run_scenebench(Knowing(asked), asked))
    scores: list[Score] = [o.score for o in outcomes]
    tasks = replace(scores[0], category="edit")
    text = Report((tasks, *scores), {}).to_markdown()
    tables = text.split("\n\n")
    assert len(tables) == 2
    assert "| edit | 2 |" in tables[0]
    assert "wording/" not in text
    head, _, *rows = tables[1].strip().splitlines()
    assert head == "| wording | n | paint, % (95 %) | question, % (95 %) | edit, % (95 %) |"
    forms = [row.split(" | ")[0].removeprefix("| ") for row in rows]
    assert forms[: len(FORMS)] == list(FORMS)
    assert {"no_image", "remove"} <= set(forms)
