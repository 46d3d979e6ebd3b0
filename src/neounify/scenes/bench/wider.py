"""Parts of SceneBench beside its tasks: "wording", the same requests in other words, and "sizes".

A form of "wording" asks for the same scenes with the same noise as the form "template", so that
forms compare case by case. Held-out forms and synonyms are in no training sample. "sizes" asks in
templates for images of several sizes. All cases show and name what training may show and name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count

import numpy as np

from neounify.data.sample import DataError
from neounify.scenes.bench.category import Category, Example, Pixels
from neounify.scenes.bench.checks import check_edit, check_image, check_vqa
from neounify.scenes.bench.plan import BenchConfig, noise_seed, question_kinds
from neounify.scenes.bench.prompts import (
    EditCase,
    PaintCase,
    VqaCase,
    categories,
    draw_paint_case,
    edit_kinds,
)
from neounify.scenes.bench.subject import Subject
from neounify.scenes.world import phrasebook as book
from neounify.scenes.world.draw import chance, pick, sample_rng
from neounify.scenes.world.edits import EditKind, instruct, sample_edit
from neounify.scenes.world.language import caption, prompt
from neounify.scenes.world.lexicon import Language
from neounify.scenes.world.questions import (
    Question,
    QuestionKind,
    ask_absent,
    ask_wide,
    without_image,
)
from neounify.scenes.world.render import render
from neounify.scenes.world.scene import SceneConfig, sample_scene
from neounify.scenes.world.wording import MISSPELT, UPPER, Surface, punctuated

FORMS = (
    *("template", "held_out", "synonyms", "upper", "punctuation", "typo"),
    *("chinese", "chinese_held_out"),
)
"""Forms of every task of "wording"."""
WORDING_FORMS: dict[book.WordTask, tuple[str, ...]] = {
    "paint": FORMS,
    "question": (*FORMS, "relation_yes_no", "absent", "no_image"),
    "edit": (*FORMS, "remove", "move"),
}
SIZES = ((64, 64), (96, 96), (128, 64))
"""Widths and heights of "sizes" in pixels."""
_PAINT, _QUESTION, _EDIT = 700, 710, 720
"""Random streams; the next one writes the words."""


def wider_names(part: str) -> list[str]:
    """The categories of a part, in order."""
    if part == "wording":
        return [f"wording/{task}/{form}" for task in WORDING_FORMS for form in WORDING_FORMS[task]]
    return [f"sizes/{task}/{w}x{h}" for w, h in SIZES for task in ("paint", "question", "edit")]


def wider_plan(subject: Subject, config: BenchConfig, part: str) -> Iterator[Category]:
    """The categories of a part, in the order of `wider_names`."""
    if part == "wording":
        for task, forms in WORDING_FORMS.items():
            for form in forms:
                yield _CATEGORIES[task](subject, config, f"wording/{task}/{form}", form)
        return
    for width, height in SIZES:
        sized = replace(config, world=config.world.sized(width, height))
        for task, category in _CATEGORIES.items():
            yield category(subject, sized, f"sizes/{task}/{width}x{height}", "template")


def wording_paint_cases(form: str, config: SceneConfig, number: int, seed: int) -> list[PaintCase]:
    """Prompts of all categories in turn, worded in a form."""
    names = categories(config)
    cases = []
    for index in range(number):
        rng = sample_rng(seed, _PAINT, index)
        case = draw_paint_case(names[index % len(names)], rng, config, held_out=False)
        words = sample_rng(seed, _PAINT + 1, index)
        language = _language_of(form)
        if form in ("held_out", "chinese_held_out"):
            text = prompt(case.facts, words, language, "held_out")
        elif form == "chinese":
            text = caption(case.facts, words, "zh")
        else:
            text = _written(case.prompt, form, words, "paint")
        cases.append(replace(case, prompt=text))
    return cases


def wording_question_cases(
    form: str, config: SceneConfig, kinds: Sequence[QuestionKind], number: int, seed: int
) -> list[VqaCase]:
    """Questions of all kinds in turn, worded in a form, each about its own scene."""
    cases: list[VqaCase] = []
    for index in count():
        if len(cases) == number:
            break
        if index > 500 * number:
            raise DataError(f"no question of the form {form!r} was found: {config}")
        rng = sample_rng(seed, _QUESTION, index)
        scene = sample_scene(rng, config)
        kind: QuestionKind = kinds[len(cases) % len(kinds)]
        words = sample_rng(seed, _QUESTION + 1, index)
        forms = pick(words, _NEW)
        if form == "relation_yes_no":
            question = ask_wide(scene, config, rng, "relation", forms=forms, yes_no=True)
        elif form == "absent":
            question = ask_absent(scene, config, rng, forms=forms)
        else:
            question = _worded_question(
                form,
                ask_wide(scene, config, rng, kind, _language_of(form), forms=_forms(form)),
                words,
            )
        if question is not None:
            cases.append(VqaCase(scene, question, held_out=False))
    return cases


def wording_edit_cases(form: str, config: SceneConfig, number: int, seed: int) -> list[EditCase]:
    """Edits of all kinds in turn, or removals or moves alone, worded in a form."""
    kinds: Sequence[EditKind] = edit_kinds(config)
    language = _language_of(form)
    cases = []
    for index in range(number):
        rng = sample_rng(seed, _EDIT, index)
        kind: EditKind = kinds[index % len(kinds)]
        if form in ("remove", "move"):
            kind = "remove" if form == "remove" else "move"
        edit = sample_edit(rng, config, kind, language)
        words = sample_rng(seed, _EDIT + 1, index)
        if form in ("held_out", "chinese_held_out"):
            text = instruct(edit, config, words, language, "held_out")
        elif form in ("remove", "move"):
            new = chance(words, 2 / 3)
            text = (
                instruct(edit, config, words, forms=pick(words, _NEW)) if new else edit.instruction
            )
        else:
            text = _written(edit.instruction, form, words, "edit")
        cases.append(EditCase(replace(edit, instruction=text), held_out=False))
    return cases


_NEW: tuple[book.FormSet, ...] = ("wide", "held_out")


def _language_of(form: str) -> Language:
    return "zh" if form.startswith("chinese") else "en"


def _forms(form: str) -> book.FormSet:
    return "held_out" if form.endswith("held_out") else "plain"


def _worded_question(
    form: str, question: Question | None, rng: np.random.Generator
) -> Question | None:
    if question is None or form in ("template", "chinese"):
        return question
    if form == "no_image":
        return without_image(question)
    if form.endswith("held_out"):
        around = pick(rng, ("{q}", pick(rng, book.ASKED["held_out"][question.language])))
        return replace(question, text=around.format(q=question.text))
    return replace(question, text=_written(question.text, form, rng, "question"))


def _written(text: str, form: str, rng: np.random.Generator, task: book.WordTask) -> str:
    """A template in the writing of a form."""
    if form == "synonyms":
        known = {word for others in book.SYNONYMS.values() for word in others}
        held_out = Surface(words=1.0, without=frozenset(known - book.HELD_OUT_WORDS[task]))
        return Surface(words=1.0).write(held_out.write(text, rng), rng)
    surfaces: dict[str, Surface] = {
        "upper": UPPER,
        "typo": MISSPELT,
        "punctuation": punctuated(rng),
    }
    return surfaces.get(form, Surface()).write(text, rng)


def _paint(subject: Subject, config: BenchConfig, name: str, form: str) -> Category:
    cases = wording_paint_cases(form, config.world, config.cases, config.seed)

    def take(chunk: range) -> list[Example]:
        chosen = [cases[i] for i in chunk]
        seeds = [noise_seed(config, _PAINT, i) for i in chunk]
        size = (config.world.width, config.world.height)
        side = size[0] if size[0] == size[1] else size
        images = subject.paint([case.prompt for case in chosen], side, seeds, think=False)
        return [
            Example(case.prompt, check_image(case.facts, item.image, config.world), item.image)
            for case, item in zip(chosen, images, strict=True)
        ]

    return _category(name, config, take)


def _question(subject: Subject, config: BenchConfig, name: str, form: str) -> Category:
    kinds = question_kinds(config)
    cases = wording_question_cases(form, config.world, kinds, config.cases, config.seed)

    def take(chunk: range) -> list[Example]:
        chosen = [cases[i] for i in chunk]
        hidden = form == "no_image"
        images: list[Pixels | None] = [
            None if hidden else render(case.scene, config.world) for case in chosen
        ]
        answers = subject.answer(images, [case.question.text for case in chosen])
        return [
            Example(
                f"{case.question.text} [{case.question.answer}]",
                check_vqa(case.question, answer),
                image,
                answer=answer,
            )
            for case, image, answer in zip(chosen, images, answers, strict=True)
        ]

    return _category(name, config, take)


def _edit(subject: Subject, config: BenchConfig, name: str, form: str) -> Category:
    cases = wording_edit_cases(form, config.world, config.cases, config.seed)

    def take(chunk: range) -> list[Example]:
        chosen = [cases[i].edit for i in chunk]
        sources = [render(edit.source, config.world) for edit in chosen]
        seeds = [noise_seed(config, _EDIT, i) for i in chunk]
        texts = [edit.instruction for edit in chosen]
        images = subject.edit(sources, texts, seeds, think=False)
        return [
            Example(
                edit.instruction,
                check_edit(edit, source, item.image, config.world),
                item.image,
                source,
            )
            for edit, source, item in zip(chosen, sources, images, strict=True)
        ]

    return _category(name, config, take)


def _category(name: str, config: BenchConfig, take: Callable[[range], list[Example]]) -> Category:
    return Category(name, [False] * config.cases, take, batch_size=config.batch_size)


_CATEGORIES: dict[book.WordTask, Callable[[Subject, BenchConfig, str, str], Category]] = {
    "paint": _paint,
    "question": _question,
    "edit": _edit,
}
