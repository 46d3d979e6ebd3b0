"""Wider sentences of training: prompts, questions and instructions in all their forms.

A form of the phrasebook is drawn, then how it is written; what is held out is never drawn.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import numpy as np

from neounify.data.sample import DataError
from neounify.scenes.world.draw import chance, pick, pick_weighted
from neounify.scenes.world.edits import EditKind, SceneEdit, articles_may_go, instruct
from neounify.scenes.world.facts import SceneFacts, canonical
from neounify.scenes.world.language import caption, prompt
from neounify.scenes.world.lexicon import Language
from neounify.scenes.world.parse import parse_caption
from neounify.scenes.world.phrasebook import ASKED, FormSet, WordTask
from neounify.scenes.world.questions import (
    QUESTION_WEIGHTS,
    Question,
    QuestionKind,
    ask_absent,
    ask_wide,
)
from neounify.scenes.world.scene import Scene, SceneConfig, Split
from neounify.scenes.world.wording import draw_surface, plain

_TRIES = 50
WIDE_QUESTION_WEIGHTS: dict[QuestionKind, float] = {**QUESTION_WEIGHTS, "absent": 1.2}
YES_NO_SHARE = {False: 0.3, True: 0.6}
"""Of the questions of one kind, and of those of relation, in wider wordings."""
WIDE_EDIT_WEIGHTS: dict[EditKind | None, float] = {
    "recolour": 1.0,
    "remove": 2.0,
    "add": 1.0,
    "move": 1.5,
    "background": 1.0,
}
_HALF_WIDE: tuple[FormSet, ...] = ("plain", "wide", "wide")


def say(
    text: str,
    rng: np.random.Generator,
    task: WordTask,
    language: Language,
    *,
    question: bool = False,
    articles: bool = True,
) -> str:
    """A text as training writes it; `articles`: whether they must stay."""
    return draw_surface(rng, task, language, question=question, articles=articles).write(text, rng)


def wide_prompt(rng: np.random.Generator, facts: SceneFacts, language: Language) -> str:
    """A prompt in wider wording that says no more and no less than the facts."""
    wanted = canonical(facts)
    for _ in range(_TRIES):
        is_new = chance(rng, 0.65)
        text = prompt(facts, rng, language) if is_new else caption(facts, rng, language)
        text = say(text, rng, "paint", language, articles=False)
        # Left-out articles and words behind a noun can join into another meaning.
        with suppress(DataError):
            if canonical(parse_caption(plain(text))) == wanted:
                return text
    return caption(facts, rng, language)


def wide_question(question: Question, rng: np.random.Generator) -> Question:
    """The same question in other words around it, and written otherwise."""
    text = pick(rng, ASKED["wide"][question.language]).format(q=question.text)
    text = say(text, rng, "question", question.language, question=True, articles=False)
    return replace(question, text=text)


def draw_wide_question(
    rng: np.random.Generator, scene: Scene, config: SceneConfig, language: Language, split: Split
) -> Question:
    """A question of any kind and form, about what there is or is not."""
    while True:
        kind = pick_weighted(rng, WIDE_QUESTION_WEIGHTS)
        if kind == "absent":
            question = ask_absent(scene, config, rng, language, split, pick(rng, _HALF_WIDE))
        else:
            yes_no = kind != "exists" and chance(rng, YES_NO_SHARE[kind == "relation"])
            forms: FormSet = "wide" if yes_no else pick(rng, _HALF_WIDE)
            question = ask_wide(
                scene, config, rng, kind, language, split, forms=forms, yes_no=yes_no
            )
        if question is not None:
            return wide_question(question, rng)


def wide_instruction(
    rng: np.random.Generator, edit: SceneEdit, config: SceneConfig, language: Language
) -> str:
    """An edit's instruction in other words, or the same ones, written otherwise."""
    is_new = chance(rng, 0.7)
    text = instruct(edit, config, rng, language) if is_new else edit.instruction
    return say(text, rng, "edit", language, articles=not articles_may_go(edit, text))
