"""Cases: image prompts by category, questions, captions, edits and stories.

Painting has GenEval's six categories and three more:

- single_object: one shape, no colour named;     - two_object: two shapes, no colours named
- counting: several alike, with or without colour - colours: one shape of a named colour
- position: two objects and a relation            - attribution: two objects, each with its colour
- size: small and large                           - background: its colour is named
- layout: every object with its colour and place, that is a whole layout (of shapes, not of text)

Every case is deterministic in (category, config, seed, index) and marks whether what it *names*
is held out of training: a share of `HELD_OUT_SHARE` where a category can name such a thing at
all (single_object and two_object name no colours and cannot).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, count
from typing import TypeVar

import numpy as np

from neounify.data.sample import DataError
from neounify.scenes.world.draw import chance, pick, sample_rng
from neounify.scenes.world.edits import (
    EDIT_KINDS,
    EditKind,
    SceneEdit,
    Story,
    sample_edit,
    sample_story,
)
from neounify.scenes.world.facts import FULL_STYLE, CaptionStyle, SceneFacts, facts_of
from neounify.scenes.world.language import caption
from neounify.scenes.world.lexicon import OPPOSITE, Language, cell_of_place, relations_between
from neounify.scenes.world.questions import (
    QUESTION_KINDS,
    Question,
    QuestionKind,
    ask,
    ask_relation_yes_no,
)
from neounify.scenes.world.samples import CAPTION_REQUESTS
from neounify.scenes.world.scene import (
    HELD_OUT_PAIRS,
    HELD_OUT_RELATIONS,
    Scene,
    SceneConfig,
    SceneKind,
    Split,
    in_split,
    is_held_out,
    sample_scene,
)

CATEGORIES = (
    *("single_object", "two_object", "counting", "colours", "position", "attribution"),
    *("size", "background", "layout"),
)
HELD_OUT_SHARE = 0.25
_NAMES_NO_COLOUR = ("single_object", "two_object")


@dataclass(frozen=True)
class PaintCase:
    """A prompt, what it claims, and one scene (of many) that would satisfy it."""

    category: str
    prompt: str
    facts: SceneFacts
    scene: Scene
    held_out: bool


@dataclass(frozen=True)
class VqaCase:
    """A scene and a question about it."""

    scene: Scene
    question: Question
    held_out: bool


@dataclass(frozen=True)
class CaptionCase:
    """A scene and a request to describe it; `style`: what a complete answer mentions."""

    scene: Scene
    request: str
    style: CaptionStyle
    held_out: bool


@dataclass(frozen=True)
class EditCase:
    """An edit to be made; held out if its target scene is."""

    edit: SceneEdit
    held_out: bool


@dataclass(frozen=True)
class StoryCase:
    """A story; held out if one of its scenes is."""

    story: Story
    held_out: bool


def categories(config: SceneConfig) -> tuple[str, ...]:
    """The image categories that a world allows (no sizes where there is one)."""
    left_out = {"size"} if len(config.sizes) == 1 else set()
    if len(config.backgrounds) == 1:
        left_out.add("background")
    if config.max_objects < 2:
        left_out |= {"two_object", "counting", "position", "attribution", "layout"}
    return tuple(category for category in CATEGORIES if category not in left_out)


def draw_paint_case(
    category: str,
    rng: np.random.Generator,
    config: SceneConfig,
    held_out: bool | None = None,
    language: Language = "en",
) -> PaintCase:
    """Draw a prompt of a category; `held_out`: whether it must name such a combination."""
    if category not in CATEGORIES:
        raise DataError(f"no category {category!r}; there are {', '.join(CATEGORIES)}")
    for _ in range(500):
        kind, style = _recipe(category, rng)
        split: Split = "held_out" if held_out else "any"
        scene = sample_scene(rng, config, kind, split)
        facts = facts_of(scene, config, style, rng)
        if category == "position" and not facts.relations:
            continue
        named = names_held_out(facts, config)
        if held_out is None or named == held_out:
            return PaintCase(category, caption(facts, rng, language), facts, scene, named)
    raise DataError(f"no {category} prompt with held_out={held_out} was found: {config}")


def paint_cases(
    category: str,
    config: SceneConfig,
    number: int = 200,
    seed: int = 0,
    language: Language = "en",
) -> tuple[PaintCase, ...]:
    """Prompts of a category, with distinct texts as long as the world has enough of them.

    Where it has not (few shapes, no colours named) prompts are repeated with
    other noise, as GenEval generates each of its prompts four times.
    """
    cases: list[PaintCase] = []
    seen: set[str] = set()
    stale = 0
    for index in count():
        if len(cases) == number:
            return tuple(cases)
        rng = sample_rng(seed, CATEGORIES.index(category), index)
        wanted = None if category in _NAMES_NO_COLOUR else is_held_out_turn(len(cases))
        case = draw_paint_case(category, rng, config, wanted, language)
        if case.prompt in seen and stale < 200:
            stale += 1
            continue
        seen.add(case.prompt)
        cases.append(case)
        stale = 0 if stale < 200 else stale
    raise AssertionError  # the count above never ends


def vqa_cases(
    kind: QuestionKind,
    config: SceneConfig,
    number: int = 200,
    seed: int = 0,
    language: Language = "en",
) -> tuple[VqaCase, ...]:
    """Questions of one kind, each about its own scene."""

    def draw(rng: np.random.Generator, split: Split) -> VqaCase | None:
        scene = sample_scene(rng, config, split=split)
        try:
            question = ask(scene, config, rng, kind, language, "any")
        except DataError:
            return None  # this scene has no such question
        return VqaCase(scene, question, is_held_out(scene))

    return _draw_cases(100 + QUESTION_KINDS.index(kind), number, seed, draw)


def relation_yes_no_cases(
    config: SceneConfig, number: int = 200, seed: int = 0
) -> tuple[VqaCase, ...]:
    """Questions of relation for yes or no, a form that training never shows; each of its scene."""

    def draw(rng: np.random.Generator, split: Split) -> VqaCase | None:
        scene = sample_scene(rng, config, split=split)
        question = ask_relation_yes_no(scene, config, rng)
        return None if question is None else VqaCase(scene, question, is_held_out(scene))

    return _draw_cases(150, number, seed, draw)


def caption_cases(
    config: SceneConfig, number: int = 200, seed: int = 0, language: Language = "en"
) -> tuple[CaptionCase, ...]:
    """Scenes to be described in full."""

    def draw(rng: np.random.Generator, split: Split) -> CaptionCase:
        scene = sample_scene(rng, config, split=split)
        request = pick(rng, CAPTION_REQUESTS[language]["full"])
        return CaptionCase(scene, request, FULL_STYLE, is_held_out(scene))

    return _draw_cases(200, number, seed, draw)


def edit_kinds(config: SceneConfig) -> list[EditKind]:
    """The kinds of edits that a world allows (no new background where there is one)."""
    return [k for k in EDIT_KINDS if k != "background" or len(config.backgrounds) > 1]


def edit_cases(
    config: SceneConfig, number: int = 200, seed: int = 0, language: Language = "en"
) -> tuple[EditCase, ...]:
    """Edits, the five kinds in turn."""
    kinds = edit_kinds(config)

    def draw(rng: np.random.Generator, split: Split) -> EditCase:
        edit = sample_edit(rng, config, pick(rng, kinds), language, split)
        return EditCase(edit, is_held_out(edit.target))

    return _draw_cases(300, number, seed, draw)


def story_cases(
    config: SceneConfig, number: int = 200, seed: int = 0, language: Language = "en"
) -> tuple[StoryCase, ...]:
    """Stories of two or three images."""

    def draw(rng: np.random.Generator, split: Split) -> StoryCase:
        story = sample_story(rng, config, None, language, split)
        is_held_out = any(in_split(step.scene, "held_out") for step in story.steps)
        return StoryCase(story, is_held_out)

    return _draw_cases(400, number, seed, draw)


def names_held_out(facts: SceneFacts, config: SceneConfig) -> bool:
    """Whether facts name a combination that training never shows."""
    if any((f.shape, f.colour) in HELD_OUT_PAIRS for f in facts.objects):
        return True
    stated = [(r.subject, r.relation, r.object) for r in facts.relations]
    for a, b in combinations(range(len(facts.objects)), 2):
        cells = [cell_of_place(facts.objects[i].place or "", config.grid) for i in (a, b)]
        if cells[0] is not None and cells[1] is not None:
            stated += [(a, relation, b) for relation in relations_between(cells[0], cells[1])]
    for subject, relation, other in stated:
        a_look, b_look = (
            (facts.objects[i].shape, facts.objects[i].colour) for i in (subject, other)
        )
        if a_look != b_look and (
            (*a_look, relation) in HELD_OUT_RELATIONS
            or (*b_look, OPPOSITE[relation]) in HELD_OUT_RELATIONS
        ):
            return True
    return False


def _recipe(category: str, rng: np.random.Generator) -> tuple[SceneKind, CaptionStyle]:
    """The kind of scene and the style of prompt that make a category."""
    if category == "single_object":
        return "single", CaptionStyle(colour=False)
    if category == "two_object":
        return "pair", CaptionStyle(colour=False)
    if category == "counting":
        return "group", CaptionStyle(colour=chance(rng, 0.5))
    if category == "colours":
        return "single", CaptionStyle()
    if category == "position":
        return "pair", CaptionStyle(colour=chance(rng, 0.5), places="relation")
    if category == "attribution":
        return "pair", CaptionStyle()
    if category == "size":
        kinds: tuple[SceneKind, ...] = ("single", "pair")
        return pick(rng, kinds), CaptionStyle(colour=chance(rng, 0.5), size=True)
    if category == "background":
        kinds = ("single", "pair")
        return pick(rng, kinds), CaptionStyle(background=True)
    kinds = ("pair", "mixed", "group")
    return pick(rng, kinds), CaptionStyle(places="cell")


def is_held_out_turn(index: int) -> bool:
    """Whether case `index` is one of the `HELD_OUT_SHARE` that training never shows."""
    every = round(1 / HELD_OUT_SHARE)
    return index % every == every - 1


Case = TypeVar("Case")


def _draw_cases(
    stream: int,
    number: int,
    seed: int,
    draw: Callable[[np.random.Generator, Split], Case | None],
) -> tuple[Case, ...]:
    """`number` cases, every fourth from held-out scenes, the rest from scenes as trained on."""

    def cases() -> Iterator[Case]:
        index = 0
        for turn in range(number):
            split: Split = "held_out" if is_held_out_turn(turn) else "train"
            for _ in range(500):
                case = draw(sample_rng(seed, stream, index), split)
                index += 1
                if case is not None:
                    yield case
                    break
            else:
                raise DataError(f"no case of stream {stream} in split {split!r} was found")

    return tuple(cases())
