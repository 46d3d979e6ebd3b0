"""Questions about a scene with one short right answer each, and the check of an answer.

Kinds: "shape", "colour", "count", "where", "exists", "relation", "background", "size".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from neounify.data.sample import DataError
from neounify.scenes.world.draw import chance, pick, shuffled, shuffled_by_weight
from neounify.scenes.world.facts import ObjectFact, matching, reference
from neounify.scenes.world.language import definite, noun
from neounify.scenes.world.lexicon import (
    LANGUAGES,
    OPPOSITE,
    Language,
    TokenKind,
    number_word,
    phrases,
    place_name,
    plural,
    relations_between,
    word,
)
from neounify.scenes.world.scene import HELD_OUT_PAIRS, Scene, SceneConfig, Split, visible_colours

QuestionKind = Literal[
    "shape", "colour", "count", "where", "exists", "relation", "background", "size"
]
QUESTION_KINDS: tuple[QuestionKind, ...] = (
    *("shape", "colour", "count", "where", "exists", "relation", "background", "size"),
)

QUESTION_WEIGHTS: dict[QuestionKind, float] = {
    kind: {"relation": 3.0, "where": 4.0}.get(kind, 1.0) for kind in QUESTION_KINDS
}
"""How often each kind comes among several questions: those learned last more often."""

_SIDES = {"left of": "left", "right of": "right", "above": "above", "below": "below"}
_CHINESE_ANSWERS = {
    "yes": "是",
    "no": "否",
    "left": "左边",
    "right": "右边",
    "above": "上面",
    "below": "下面",
}


# Kinds whose answer is one word of the lexicon.
_WORD_KINDS: dict[QuestionKind, TokenKind] = {
    "shape": "shape",
    "colour": "colour",
    "background": "colour",
    "where": "place",
    "size": "size",
}


@dataclass(frozen=True)
class Question:
    """A question and its answer; `value` is the canonical name of what `answer` says in words."""

    kind: QuestionKind
    text: str
    answer: str
    value: str
    language: Language = "en"


def ask(
    scene: Scene,
    config: SceneConfig,
    rng: np.random.Generator,
    kind: QuestionKind | None = None,
    language: Language = "en",
    split: Split = "train",
) -> Question:
    """Draw a question of that kind, or of any kind the scene allows.

    With split "train", no question names a held-out pair of shape and colour.

    Raises:
        DataError: the scene allows no question of that kind.
    """
    for candidate in [kind] if kind else shuffled(rng, QUESTION_KINDS):
        asked = _ASKERS[candidate](scene, config, rng, language, split)
        if asked is not None:
            text, value = asked
            return Question(candidate, text, _answer(candidate, value, language), value, language)
    raise DataError(f"the scene allows no question of kind {kind}: {scene}")


def ask_several(
    scene: Scene,
    config: SceneConfig,
    rng: np.random.Generator,
    count: int,
    language: Language = "en",
    split: Split = "train",
) -> list[Question]:
    """Up to `count` questions of different kinds, hard ones more often; fewer if few fit."""
    found: list[Question] = []
    for kind in shuffled_by_weight(rng, QUESTION_WEIGHTS):
        asked = _ASKERS[kind](scene, config, rng, language, split)
        if asked is not None and len(found) < count:
            text, value = asked
            found.append(Question(kind, text, _answer(kind, value, language), value, language))
    return found


def ask_relation_yes_no(
    scene: Scene, config: SceneConfig, rng: np.random.Generator
) -> Question | None:
    """A question of relation that is answered by yes or no, "Is the star left of the cross?".

    No training data has this form, so it is none of `QUESTION_KINDS`; its answer is read as that of
    "exists". None where the scene allows no such question. English only.
    """
    asked = _related(scene, config, rng)
    if asked is None:
        return None
    first, relation, second = asked
    said = relation if chance(rng, 0.5) else OPPOSITE[relation]
    value = "yes" if said == relation else "no"
    text = f"Is {definite(first)} {said} {definite(second)}?"
    return Question("exists", text, value, value)


def check_answer(question: Question, answer: str) -> bool:
    """Whether an answer in free words names the right value and no other value of its kind."""
    return read_answer(question.kind, answer) == {question.value}


def read_answer(kind: QuestionKind, answer: str) -> set[str]:
    """All values of a question's kind that an answer names, in English or Chinese."""
    found: set[str] = set()
    for language in LANGUAGES:
        edge = r"\b" if language == "en" else ""
        known = _answer_phrases(kind, language)
        longest_first = sorted(known, key=len, reverse=True)
        pattern = edge + "(" + "|".join(map(re.escape, longest_first)) + ")" + edge
        found |= {known[hit] for hit in re.findall(pattern, answer.lower())}
    return found


def _answer(kind: QuestionKind, value: str, language: Language) -> str:
    if kind == "count":
        return number_word(int(value), language)
    if language == "en":
        return value
    if kind in ("exists", "relation"):
        return _CHINESE_ANSWERS[value]
    return word(_WORD_KINDS[kind], value, "zh")


def _answer_phrases(kind: QuestionKind, language: Language) -> Mapping[str, str]:
    if kind == "exists":
        spoken = {"yes": "yes", "no": "no", "not": "no", "isn't": "no"}
        chinese = {"是": "yes", "有": "yes", "否": "no", "没有": "no", "不是": "no"}
        return spoken if language == "en" else chinese
    if kind == "relation":
        if language == "en":
            return {side: side for side in _SIDES.values()} | {"under": "below", "over": "above"}
        return {p: _SIDES[r] for p, r in phrases("relation", "zh").items()}
    if kind == "count":
        return {p: n for p, n in phrases("number", language).items() if p not in ("a", "an")}
    return {p: v for p, v in phrases(_WORD_KINDS[kind], language).items() if v}


Asked = tuple[str, str] | None


def _ask_attribute(
    scene: Scene, config: SceneConfig, rng: np.random.Generator, hide: str
) -> tuple[ObjectFact, int] | None:
    """A way to mean one object without naming an attribute, and the object's index."""
    for index in shuffled(rng, range(len(scene.objects))):
        fact = reference(scene, config, scene.objects[index], rng, hide)
        if fact is not None:
            return fact, index
    return None


def _ask_shape(
    scene: Scene, config: SceneConfig, rng: np.random.Generator, language: Language, _: Split
) -> Asked:
    meant = _ask_attribute(scene, config, rng, "shape")
    if meant is None:
        return None
    target, value = definite(meant[0], language), scene.objects[meant[1]].shape
    if language == "zh":
        return f"{target}是什么形状？", value
    return pick(rng, (f"What shape is {target}?", f"Which shape does {target} have?")), value


def _ask_colour(
    scene: Scene, config: SceneConfig, rng: np.random.Generator, language: Language, _: Split
) -> Asked:
    meant = _ask_attribute(scene, config, rng, "colour")
    if meant is None:
        return None
    target, value = definite(meant[0], language), scene.objects[meant[1]].colour
    if language == "zh":
        return f"{target}是什么颜色？", value
    forms = (f"What colour is {target}?", f"What color is {target}?", f"Which colour is {target}?")
    return pick(rng, forms), value


def _ask_size(
    scene: Scene, config: SceneConfig, rng: np.random.Generator, language: Language, _: Split
) -> Asked:
    meant = _ask_attribute(scene, config, rng, "size") if len(config.sizes) > 1 else None
    if meant is None:
        return None
    target, value = definite(meant[0], language), scene.objects[meant[1]].size
    if language == "zh":
        return f"{target}是大的还是小的？", value
    return pick(rng, (f"Is {target} small or large?", f"What size is {target}?")), value


def _ask_where(
    scene: Scene, config: SceneConfig, rng: np.random.Generator, language: Language, _: Split
) -> Asked:
    meant = _ask_attribute(scene, config, rng, "place")
    if meant is None:
        return None
    target = definite(meant[0], language)
    value = place_name(scene.objects[meant[1]].cell, config.grid)
    if language == "zh":
        return f"{target}在哪里？", value
    return pick(rng, (f"Where is {target}?", f"In which place is {target}?")), value


def _ask_background(
    scene: Scene, config: SceneConfig, rng: np.random.Generator, language: Language, _: Split
) -> Asked:
    if language == "zh":
        return "背景是什么颜色？", scene.background
    forms = (
        "What colour is the background?",
        "What color is the background?",
        "Which background does the picture have?",
    )
    return pick(rng, forms), scene.background


def _ask_count(
    scene: Scene, config: SceneConfig, rng: np.random.Generator, language: Language, split: Split
) -> Asked:
    form = pick(rng, ("shape", "shape", "look", "all"))
    if form == "all":
        wanted = ObjectFact()
    elif chance(rng, 0.15) or not scene.objects:
        wanted = ObjectFact(pick(rng, config.shapes))
    else:
        some = pick(rng, scene.objects)
        wanted = ObjectFact(some.shape, some.colour if form == "look" else None)
    value = str(len(matching(scene, config, wanted)))
    if language == "zh":
        return f"图中有几个{noun(wanted, 'zh', '')}？", value
    name = f"{wanted.colour} " if wanted.colour else ""
    name += plural(wanted.shape or "object")
    return pick(rng, (f"How many {name} are there?", f"How many {name} do you see?")), value


def _ask_exists(
    scene: Scene, config: SceneConfig, rng: np.random.Generator, language: Language, split: Split
) -> Asked:
    if not scene.objects:
        return None
    some = pick(rng, scene.objects)
    fact = ObjectFact(some.shape, some.colour)
    if chance(rng, 0.5):
        absent = [
            other
            for shape in config.shapes
            for colour in visible_colours(config, scene.background)
            if (shape == some.shape) != (colour == some.colour)
            and (split != "train" or (shape, colour) not in HELD_OUT_PAIRS)
            and not matching(scene, config, other := ObjectFact(shape, colour))
        ]
        if not absent:
            return None
        fact = pick(rng, absent)
    value = "yes" if matching(scene, config, fact) else "no"
    name = noun(fact, language)
    if language == "zh":
        return f"图中有{name}吗？", value
    return pick(rng, (f"Is there {name}?", f"Do you see {name}?")), value


def _ask_relation(
    scene: Scene, config: SceneConfig, rng: np.random.Generator, language: Language, _: Split
) -> Asked:
    asked = _related(scene, config, rng)
    if asked is None:
        return None
    first, relation, second = asked
    subject, other = definite(first, language), definite(second, language)
    across = relation in ("left of", "right of")
    if language == "zh":
        choice = "左边还是右边" if across else "上面还是下面"
        return f"{subject}在{other}的{choice}？", _SIDES[relation]
    choice = "left or right of" if across else "above or below"
    return f"Is {subject} {choice} {other}?", _SIDES[relation]


def _related(
    scene: Scene, config: SceneConfig, rng: np.random.Generator
) -> tuple[ObjectFact, str, ObjectFact] | None:
    """Two objects, meant without their places, and how the first stands to the second."""
    if len(scene.objects) < 2:
        return None
    a, b = shuffled(rng, scene.objects)[:2]
    first = reference(scene, config, a, rng, hide="place")
    second = reference(scene, config, b, rng, hide="place")
    if first is None or second is None:
        return None
    return first, pick(rng, relations_between(a.cell, b.cell)), second


_ASKERS = {
    "shape": _ask_shape,
    "colour": _ask_colour,
    "count": _ask_count,
    "where": _ask_where,
    "exists": _ask_exists,
    "relation": _ask_relation,
    "background": _ask_background,
    "size": _ask_size,
}
