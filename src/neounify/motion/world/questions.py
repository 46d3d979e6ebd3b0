"""Questions about a clip with one short right answer each, and the check of an answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from neounify.data.sample import DataError
from neounify.motion.world.language import WAYS
from neounify.motion.world.scene import EDGES, MOTION_KINDS, MotionKind, MotionScene
from neounify.scenes.world.draw import chance, pick, shuffled
from neounify.scenes.world.lexicon import COLOURS, SHAPES, number_word

MotionQuestionKind = Literal["direction", "edge", "what", "which", "colour", "event", "count"]
MOTION_QUESTIONS: tuple[MotionQuestionKind, ...] = get_args(MotionQuestionKind)

_DOES: dict[MotionKind, tuple[str, str]] = {
    "move": ("moves", "move"),
    "grow": ("grows", "grow"),
    "shrink": ("shrinks", "shrink"),
    "appear": ("appears", "appear"),
    "vanish": ("vanishes", "vanish"),
    "bounce": ("bounces", "bounce"),
    "stay": ("stays as it is", "stay as it is"),
}
"""Third person and infinitive of every kind of motion."""
_SYNONYMS = {
    "disappear": "vanish",
    "bigger": "grow",
    "larger": "grow",
    "smaller": "shrink",
    "stay": "stay",
    "stand": "stay",
    "still": "stay",
}
_TEXTS: dict[str, tuple[str, ...]] = {
    "direction": (
        "Which way does the {name} go?",
        "In which direction does the {name} move?",
        "Where does the {name} move?",
    ),
    "edge": (
        "Which edge does the {name} bounce off?",
        "Off which edge does the {name} bounce?",
    ),
    "what": ("What does the {name} do?", "What happens to the {name}?"),
    "which": ("Which shape {does}?", "What shape {does}?"),
    "colour": ("What colour is the shape that {does}?", "Which colour has the shape that {does}?"),
    "event": ("Does anything {do}?", "Is there a shape that {does}?"),
    "count": (
        "How many shapes are there at the {end}?",
        "How many shapes can be seen at the {end}?",
    ),
}


@dataclass(frozen=True)
class MotionQuestion:
    """A question and its answer; `value` is the canonical name of what `answer` says in words."""

    kind: MotionQuestionKind
    text: str
    answer: str
    value: str


def ask_motion(
    scene: MotionScene, rng: np.random.Generator, kind: MotionQuestionKind | None = None
) -> MotionQuestion:
    """Draw a question of that kind, or of any kind the clip allows. Raises DataError for none."""
    for candidate in [kind] if kind else shuffled(rng, MOTION_QUESTIONS):
        if (asked := _ASKERS[candidate](scene, rng)) is not None:
            words, value, answer = asked
            text = pick(rng, _TEXTS[candidate]).format(**words)
            return MotionQuestion(candidate, text, answer, value)
    raise DataError(f"the clip allows no question of kind {kind}: {scene}")


def ask_several_motion(
    scene: MotionScene,
    rng: np.random.Generator,
    count: int,
    first: MotionQuestionKind | None = None,
) -> list[MotionQuestion]:
    """Up to `count` questions of different kinds; fewer if few fit. `first` names the first kind.

    Raises DataError where the clip does not allow `first`.
    """
    questions = [] if first is None else [ask_motion(scene, rng, first)]
    for kind in shuffled(rng, MOTION_QUESTIONS):
        fits = kind != first and allows_question(scene, rng, kind)
        if len(questions) < count and fits:
            questions.append(ask_motion(scene, rng, kind))
    return questions


def allows_question(scene: MotionScene, rng: np.random.Generator, kind: MotionQuestionKind) -> bool:
    """Whether the clip has an answer to a question of that kind."""
    return _ASKERS[kind](scene, rng) is not None


Asked = tuple[dict[str, str], str, str] | None
"""Words of the question, canonical value, answer; None where the clip has no such question."""


def _named(scene: MotionScene, number: int, rng: np.random.Generator) -> dict[str, str]:
    mover = scene.movers[number]
    return {"name": f"{mover.colour} {mover.shape}" if chance(rng, 0.5) else mover.shape}


def _of_kind(scene: MotionScene, rng: np.random.Generator, kind: MotionKind) -> int | None:
    fitting = [n for n, mover in enumerate(scene.movers) if mover.motion.kind == kind]
    return pick(rng, fitting) if fitting else None


def _direction(scene: MotionScene, rng: np.random.Generator) -> Asked:
    number = _of_kind(scene, rng, "move")
    if number is None:
        return None
    way = str(scene.movers[number].motion.way)
    return _named(scene, number, rng), way, WAYS[way][0]


def _edge(scene: MotionScene, rng: np.random.Generator) -> Asked:
    number = _of_kind(scene, rng, "bounce")
    if number is None:
        return None
    way = str(scene.movers[number].motion.way)
    return _named(scene, number, rng), way, way


def _what(scene: MotionScene, rng: np.random.Generator) -> Asked:
    number = int(rng.integers(len(scene.movers)))
    kind = scene.movers[number].motion.kind
    return _named(scene, number, rng), kind, f"it {_DOES[kind][0]}"


def _implied(kinds: Collection[MotionKind]) -> set[MotionKind]:
    """Kinds that are not asked about beside others: a shape that bounces moves as well."""
    return {"move"} if "bounce" in kinds else set()


def _single(scene: MotionScene, rng: np.random.Generator) -> int | None:
    """One of two shapes that do different things; None where the clip has no such pair."""
    kinds = [mover.motion.kind for mover in scene.movers]
    if len(set(kinds)) < 2:
        return None
    return pick(rng, [n for n, kind in enumerate(kinds) if kind not in _implied(kinds)])


def _which(scene: MotionScene, rng: np.random.Generator) -> Asked:
    number = _single(scene, rng)
    if number is None:
        return None
    mover = scene.movers[number]
    return {"does": _DOES[mover.motion.kind][0]}, mover.shape, f"the {mover.shape}"


def _colour(scene: MotionScene, rng: np.random.Generator) -> Asked:
    number = _single(scene, rng)
    if number is None:
        return None
    mover = scene.movers[number]
    return {"does": _DOES[mover.motion.kind][0]}, mover.colour, mover.colour


def _event(scene: MotionScene, rng: np.random.Generator) -> Asked:
    shown = {mover.motion.kind for mover in scene.movers}
    absent = [kind for kind in MOTION_KINDS if kind not in shown | _implied(shown)]
    value = "yes" if chance(rng, 0.5) else "no"
    kind = pick(rng, sorted(shown) if value == "yes" else absent)
    return {"does": _DOES[kind][0], "do": _DOES[kind][1]}, value, value


def _count(scene: MotionScene, rng: np.random.Generator) -> Asked:
    end = pick(rng, ("end", "start"))
    value = number_word(scene.shown(-1 if end == "end" else 0))
    return {"end": end}, value, value


_ASKERS: dict[MotionQuestionKind, Callable[[MotionScene, np.random.Generator], Asked]] = {
    "direction": _direction,
    "edge": _edge,
    "what": _what,
    "which": _which,
    "colour": _colour,
    "event": _event,
    "count": _count,
}


def check_motion_answer(question: MotionQuestion, answer: str) -> bool:
    """Whether an answer in free words names the right value and no other value of its kind."""
    return read_motion_answer(question.kind, answer) == {question.value}


def read_motion_answer(kind: MotionQuestionKind, answer: str) -> set[str]:
    """All values of a question's kind that an answer names."""
    words = re.findall(r"[a-z]+|\d+", answer.lower())
    if kind == "direction":
        ways = [way for way in ("up", "down", "left", "right") if {way, f"{way}wards"} & set(words)]
        return {" ".join(ways)} if ways else set()
    text = f" {' '.join(words)} "
    values: set[str] = set()
    phrases = _phrases(kind)
    for phrase in sorted(phrases, key=len, reverse=True):
        if f" {phrase} " in text:
            values.add(phrases[phrase])
            text = text.replace(f" {phrase} ", " , ")
    return values


def _phrases(kind: MotionQuestionKind) -> dict[str, str]:
    """Phrases of answers, with the value that each names."""
    if kind == "what":
        verbs = {form: name for name, forms in _DOES.items() for form in forms}
        stems = {f"{stem}{s}": name for stem, name in _SYNONYMS.items() for s in ("", "s")}
        return verbs | stems | {"goes": "move", "slides": "move", "does not move": "stay"}
    if kind == "count":
        numbers = {number_word(n): number_word(n) for n in range(10)}
        return numbers | {str(n): number_word(n) for n in range(10)} | {"none": "zero"}
    values = {"edge": EDGES, "which": SHAPES, "colour": COLOURS, "event": ("yes", "no")}[kind]
    return {value: value for value in values}
