"""Questions about a scene with one short right answer each, and the check of an answer.

Kinds: "shape", "colour", "count", "where", "exists", "relation", "background", "size". Every kind
but "exists" can also be asked for yes or no; "absent" asks about an object that is not there,
"no_image" about an image that is not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    relation_words,
    relations_between,
    tokens,
    word,
)
from neounify.scenes.world.phrasebook import IMAGE_WORDS, NO_IMAGE, QUESTION_FORMS, FormSet
from neounify.scenes.world.scene import HELD_OUT_PAIRS, Scene, SceneConfig, Split, visible_colours

QuestionKind = Literal[
    "shape",
    "colour",
    "count",
    "where",
    "exists",
    "relation",
    "background",
    "size",
    "absent",
    "no_image",
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
            return _question(candidate, asked, rng, language, "plain")
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
    questions: list[Question] = []
    for kind in shuffled_by_weight(rng, QUESTION_WEIGHTS):
        asked = _ASKERS[kind](scene, config, rng, language, split)
        if asked is not None:
            # Drawn even where it is one too many: the next kind's draws must not depend on it.
            question = _question(kind, asked, rng, language, "plain")
            questions += [question] * (len(questions) < count)
    return questions


def ask_relation_yes_no(
    scene: Scene, config: SceneConfig, rng: np.random.Generator
) -> Question | None:
    """A question of relation that is answered by yes or no, "Is the star left of the cross?".

    The plain templates do not have this form, so it is none of `QUESTION_KINDS`; its answer is read
    as that of "exists". None where the scene allows no such question. English only.
    """
    asked = _related(scene, config, rng)
    if asked is None:
        return None
    first, relation, second = asked
    said = relation if chance(rng, 0.5) else OPPOSITE[relation]
    value = "yes" if said == relation else "no"
    text = f"Is {definite(first)} {said} {definite(second)}?"
    return Question("exists", text, value, value)


def ask_wide(
    scene: Scene,
    config: SceneConfig,
    rng: np.random.Generator,
    kind: QuestionKind,
    language: Language = "en",
    split: Split = "train",
    *,
    forms: FormSet = "wide",
    yes_no: bool = False,
) -> Question | None:
    """A question of a kind in another form; None where the scene allows none.

    `yes_no`: whether something is so, right in half of the cases, read as an answer to "exists".
    """
    asked = _ASKERS[kind](scene, config, rng, language, split)
    if asked is None:
        return None
    if not yes_no:
        return _question(kind, asked, rng, language, forms)
    claims = {v: w for v, w in _claims(kind, asked, config, language).items() if v != asked.value}
    if split == "train":
        claims = {v: w for v, w in claims.items() if not _claims_held_out(kind, asked.fact, v)}
    if not claims:
        return None
    true_claim = _claims(kind, asked, config, language).get(asked.value)
    is_so = true_claim is not None and chance(rng, 0.5)
    claim = true_claim if is_so and true_claim is not None else claims[pick(rng, sorted(claims))]
    value = "yes" if is_so else "no"
    slots = {**asked.slots, "claim": claim, "rel": claim}
    asked = _Asked(f"is {kind}", slots, value)
    return _question("exists", asked, rng, language, forms)


def ask_absent(
    scene: Scene,
    config: SceneConfig,
    rng: np.random.Generator,
    language: Language = "en",
    split: Split = "train",
    forms: FormSet = "wide",
) -> Question | None:
    """A question about an object that is not there; the answer says so, "there is no red star"."""
    coloured = chance(rng, 0.4)
    absent = [
        fact
        for shape in config.shapes
        for colour in (visible_colours(config, scene.background) if coloured else (None,))
        if (split != "train" or (shape, colour) not in HELD_OUT_PAIRS)
        and not matching(scene, config, fact := ObjectFact(shape, colour))
    ]
    if not absent:
        return None
    fact = pick(rng, absent)
    kinds = ["where", *["size"] * (len(config.sizes) > 1), *["colour", "colour"] * (not coloured)]
    asked = _Asked(pick(rng, kinds), {"t": definite(fact, language)}, _named(noun(fact, language)))
    text = _worded(asked, rng, language, forms)
    bare = noun(fact, language, "")
    answer = f"there is no {bare}" if language == "en" else f"没有{bare}"
    return Question("absent", text, answer, asked.value, language)


def without_image(question: Question) -> Question:
    """The same question where no image is given: the answer says so."""
    answer = NO_IMAGE[question.language]
    return replace(question, kind="no_image", answer=answer, value="image")


def check_answer(question: Question, answer: str) -> bool:
    """Whether an answer in free words names the right value and no other value of its kind."""
    return read_answer(question.kind, answer) == {question.value}


def read_answer(kind: QuestionKind, answer: str) -> set[str]:
    """All values of a question's kind that an answer names, in English or Chinese.

    An answer that says "no" or "not" only to say that it does not know names none.
    """
    if kind in ("absent", "no_image"):
        return _missing(answer, kind)
    values = _named_values(kind, answer)
    if kind == "exists" and not _named_values(kind, _UNKNOWN.sub(" ", answer)):
        return set()
    return values


_UNKNOWN = re.compile(
    r"\bnot\s+(?:really\s+|quite\s+|at all\s+)?"
    r"(?:know|known|sure|certain|clear|tell|say|able to|possible to|enough)\b"
    r"|\bno\s+(?:idea|clue|way)\b|没有(?:把握|办法|头绪)",
    re.IGNORECASE,
)
"""Words of not knowing that hold a "no"."""


def _named_values(kind: QuestionKind, answer: str) -> set[str]:
    values: set[str] = set()
    for language in LANGUAGES:
        edge = r"\b" if language == "en" else ""
        known = _answer_phrases(kind, language)
        longest_first = sorted(known, key=len, reverse=True)
        pattern = edge + "(" + "|".join(map(re.escape, longest_first)) + ")" + edge
        values |= {known[hit] for hit in re.findall(pattern, answer.lower())}
    return values


_MISSING = re.compile(r"\b(?:no|not an?|isn't an?)\s+([a-z ]+)|没有(?:一个)?([\u4e00-\u9fff]+)")


def _missing(answer: str, kind: QuestionKind) -> set[str]:
    """Names of things an answer calls absent: "image", or objects as `_named` gives them."""
    missing = set[str]()
    for hit in _MISSING.finditer(answer.lower()):
        name = (hit[1] or hit[2]).strip()
        if kind == "no_image":
            missing |= {"image"} if name.startswith(IMAGE_WORDS) else {name}
            continue
        try:
            missing.add(_named(name))
        except DataError:
            missing.add(name)
    return missing


def _named(name: str) -> str:
    """A noun phrase as its canonical words, sorted: "circle red"."""
    return " ".join(sorted(t.value for t in tokens(name) if t.kind in ("colour", "shape", "size")))


def _question(
    kind: QuestionKind, asked: _Asked, rng: np.random.Generator, language: Language, forms: FormSet
) -> Question:
    text = _worded(asked, rng, language, forms)
    return Question(kind, text, _answer(kind, asked.value, language), asked.value, language)


def _claims(
    kind: QuestionKind, asked: _Asked, config: SceneConfig, language: Language
) -> dict[str, str]:
    """Claims for yes-or-no questions of a kind: the words for each value."""
    if asked.claims:
        return dict(asked.claims)
    values: Mapping[QuestionKind, Sequence[str]] = {
        "shape": config.shapes,
        "colour": config.colours,
        "background": config.backgrounds,
        "size": config.sizes,
        "where": [place_name(cell, config.grid) for cell in config.cells],
    }
    return {value: word(_WORD_KINDS[kind], value, language) for value in values[kind]}


def _claims_held_out(kind: QuestionKind, fact: ObjectFact, value: str) -> bool:
    """Whether a claim names a pair of shape and colour that training never shows."""
    shape = value if kind == "shape" else fact.shape
    colour = value if kind == "colour" else fact.colour
    return (shape, colour) in HELD_OUT_PAIRS


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


@dataclass(frozen=True)
class _Asked:
    """Question before its wording: key of its forms, words for their slots, the answer's value."""

    form: str
    slots: Mapping[str, str]
    value: str
    claims: Mapping[str, str] = field(default_factory=dict)
    """For yes or no: what may be claimed, words by value; by default every value of the kind."""
    fact: ObjectFact = field(default_factory=ObjectFact)
    """The object that is meant, if it is one."""


def _worded(asked: _Asked, rng: np.random.Generator, language: Language, forms: FormSet) -> str:
    options = QUESTION_FORMS[forms][language][asked.form]
    chosen = options[0] if len(options) == 1 else pick(rng, options)
    return chosen.format_map(asked.slots)


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
) -> _Asked | None:
    meant = _ask_attribute(scene, config, rng, "shape")
    if meant is None:
        return None
    slots = {"t": definite(meant[0], language)}
    return _Asked("shape", slots, scene.objects[meant[1]].shape, fact=meant[0])


def _ask_colour(
    scene: Scene, config: SceneConfig, rng: np.random.Generator, language: Language, _: Split
) -> _Asked | None:
    meant = _ask_attribute(scene, config, rng, "colour")
    if meant is None:
        return None
    slots = {"t": definite(meant[0], language)}
    return _Asked("colour", slots, scene.objects[meant[1]].colour, fact=meant[0])


def _ask_size(
    scene: Scene, config: SceneConfig, rng: np.random.Generator, language: Language, _: Split
) -> _Asked | None:
    meant = _ask_attribute(scene, config, rng, "size") if len(config.sizes) > 1 else None
    if meant is None:
        return None
    slots = {"t": definite(meant[0], language)}
    return _Asked("size", slots, scene.objects[meant[1]].size, fact=meant[0])


def _ask_where(
    scene: Scene, config: SceneConfig, rng: np.random.Generator, language: Language, _: Split
) -> _Asked | None:
    meant = _ask_attribute(scene, config, rng, "place")
    if meant is None:
        return None
    slots = {"t": definite(meant[0], language)}
    return _Asked("where", slots, place_name(scene.objects[meant[1]].cell, config.grid))


def _ask_background(
    scene: Scene, config: SceneConfig, rng: np.random.Generator, language: Language, _: Split
) -> _Asked | None:
    return _Asked("background", {}, scene.background)


def _ask_count(
    scene: Scene, config: SceneConfig, rng: np.random.Generator, language: Language, split: Split
) -> _Asked | None:
    form = pick(rng, ("shape", "shape", "look", "all"))
    if form == "all":
        wanted = ObjectFact()
    elif chance(rng, 0.15) or not scene.objects:
        wanted = ObjectFact(pick(rng, config.shapes))
    else:
        some = pick(rng, scene.objects)
        wanted = ObjectFact(some.shape, some.colour if form == "look" else None)
    count = len(matching(scene, config, wanted))
    slots = {"ns": noun(replace(wanted, count=2), language, "")}
    one = "one" if language == "en" else None
    claims = {
        str(n): noun(replace(wanted, count=n), language, one if n == 1 else None)
        for n in range(max(1, count - 1), min(9, count + 1) + 1)
    }
    return _Asked("count", slots, str(count), claims)


def _ask_exists(
    scene: Scene, config: SceneConfig, rng: np.random.Generator, language: Language, split: Split
) -> _Asked | None:
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
    slots = {
        "n": noun(fact, language),
        "n1": noun(fact, language, ""),
        "ns": noun(replace(fact, count=2), language, ""),
    }
    return _Asked("exists", slots, value)


def _ask_relation(
    scene: Scene, config: SceneConfig, rng: np.random.Generator, language: Language, _: Split
) -> _Asked | None:
    asked = _related(scene, config, rng)
    if asked is None:
        return None
    first, relation, second = asked
    slots = {"a": definite(first, language), "b": definite(second, language)}
    across = relation in ("left of", "right of")
    claims = {r: relation_words(r, language)[0] for r in (relation, OPPOSITE[relation])}
    return _Asked(
        "across" if across else "along",
        slots,
        _SIDES[relation],
        {_SIDES[r]: words for r, words in claims.items()},
    )


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
