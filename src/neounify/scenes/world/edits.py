"""Edits: a source scene, an instruction in words, and the scene it leads to.

Kinds: "recolour", "remove", "add", "move", "background". Exactly one thing changes; the object
meant is singled out by its shape, and by colour, size or place where needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from neounify.data.sample import DataError
from neounify.scenes.world.draw import chance, pick, shuffled
from neounify.scenes.world.facts import FULL_STYLE, ObjectFact, facts_of, reference
from neounify.scenes.world.language import caption, definite, held_out_parts, layout_text, noun
from neounify.scenes.world.lexicon import Cell, Language, number_word, place_name, stands_out, word
from neounify.scenes.world.phrasebook import EDIT_FORMS, EDIT_STATEMENTS, POLITE, FormSet
from neounify.scenes.world.scene import (
    Scene,
    SceneConfig,
    SceneObject,
    Split,
    draw_offset,
    in_split,
    sample_scene,
    visible_colours,
)

EditKind = Literal["recolour", "remove", "add", "move", "background"]
EDIT_KINDS: tuple[EditKind, ...] = ("recolour", "remove", "add", "move", "background")
_TRIES = 20
KEEP_REQUESTS: dict[Language, tuple[str, ...]] = {
    "en": ("Copy the picture.", "Paint the same picture again.", "Change nothing."),
    "zh": ("照样画一张。", "不要改动。"),
}
"""Edits that ask for no change: what the understanding stream kept shows in the copy."""


@dataclass(frozen=True)
class SceneEdit:
    """One change of a scene, and the words for it."""

    kind: EditKind
    source: Scene
    target: Scene
    instruction: str
    narration: str
    """The change as a sentence of a story: "The red circle turns blue."."""

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The cells whose object changes; none for a new background."""
        if self.kind == "background":
            return ()
        before = {placed.cell: placed for placed in self.source.objects}
        after = {placed.cell: placed for placed in self.target.objects}
        changed = (c for c in {*before, *after} if before.get(c) != after.get(c))
        return tuple(sorted(changed))


def sample_edit(
    rng: np.random.Generator,
    config: SceneConfig,
    kind: EditKind | None = None,
    language: Language = "en",
    split: Split = "train",
) -> SceneEdit:
    """Draw a scene and an edit of it; "held_out" means that the target scene is."""
    source_split: Split = "any" if split == "held_out" else split
    for _ in range(_TRIES * 20):
        source = sample_scene(rng, config, split=source_split)
        edit = edit_scene(source, rng, config, kind, language, split)
        if edit is not None:
            return edit
    raise DataError(f"no {kind or 'any'} edit of split {split!r} was found: {config}")


def edit_scene(
    source: Scene,
    rng: np.random.Generator,
    config: SceneConfig,
    kind: EditKind | None = None,
    language: Language = "en",
    split: Split = "train",
) -> SceneEdit | None:
    """Draw an edit of this scene, or None if none was found whose target is in the split."""
    for _ in range(_TRIES):
        chosen = pick(rng, EDIT_KINDS) if kind is None else kind
        edit = _EDITORS[chosen](source, rng, config, language)
        if edit is not None and in_split(edit.target, split):
            return edit
    return None


def edit_thought(edit: SceneEdit, config: SceneConfig, language: Language = "en") -> str:
    """The thought before an edit: the layout of the target."""
    return layout_text(edit.target, config, language)


def _meant(
    source: Scene, rng: np.random.Generator, config: SceneConfig
) -> tuple[SceneObject, ObjectFact] | None:
    for placed in shuffled(rng, source.objects):
        fact = reference(source, config, placed, rng)
        if fact is not None:
            return placed, fact
    return None


def _recolour(
    source: Scene, rng: np.random.Generator, config: SceneConfig, language: Language
) -> SceneEdit | None:
    meant = _meant(source, rng, config)
    if meant is None:
        return None
    placed, fact = meant
    others = [c for c in visible_colours(config, source.background) if c != placed.colour]
    colour = pick(rng, others)
    target = source.swap(placed, replace(placed, colour=colour))
    name, new = definite(fact, language), word("colour", colour, language)
    wording = _plain("recolour", rng, language, name=name, new=new)
    narration = f"{name}变成了{new}。" if language == "zh" else f"{_capital(name)} turns {new}."
    return SceneEdit("recolour", source, target, wording, narration)


def _remove(
    source: Scene, rng: np.random.Generator, config: SceneConfig, language: Language
) -> SceneEdit | None:
    meant = _meant(source, rng, config)
    if meant is None or len(source.objects) < 2:
        return None
    placed, fact = meant
    target = replace(source, objects=tuple(o for o in source.objects if o != placed))
    name = definite(fact, language)
    narration = f"{name}消失了。" if language == "zh" else f"{_capital(name)} disappears."
    return SceneEdit(
        "remove", source, target, _plain("remove", rng, language, name=name), narration
    )


def _add(
    source: Scene, rng: np.random.Generator, config: SceneConfig, language: Language
) -> SceneEdit | None:
    free = _free_cells(source, config)
    if len(source.objects) >= config.max_objects or not free:
        return None
    new = SceneObject(
        pick(rng, config.shapes),
        pick(rng, visible_colours(config, source.background)),
        pick(rng, config.sizes),
        pick(rng, free),
        draw_offset(rng, config),
    )
    target = replace(source, objects=(*source.objects, new))
    size = new.size if len(config.sizes) > 1 else None
    name = noun(ObjectFact(new.shape, new.colour, size), language)
    place = word("place", place_name(new.cell, config.grid), language)
    wording = _plain("add", rng, language, name=name, place=place)
    narration = f"{place}出现了{name}。"
    if language == "en":
        narration = f"{_capital(name)} appears in the {place}."
    return SceneEdit("add", source, target, wording, narration)


def _move(
    source: Scene, rng: np.random.Generator, config: SceneConfig, language: Language
) -> SceneEdit | None:
    meant, free = _meant(source, rng, config), _free_cells(source, config)
    if meant is None or not free:
        return None
    placed, fact = meant
    cell = pick(rng, free)
    target = source.swap(placed, replace(placed, cell=cell))
    name, place = definite(fact, language), word("place", place_name(cell, config.grid), language)
    wording = _plain("move", rng, language, name=name, place=place)
    narration = f"{name}移到了{place}。"
    if language == "en":
        narration = f"{_capital(name)} moves to the {place}."
    return SceneEdit("move", source, target, wording, narration)


def _background(
    source: Scene, rng: np.random.Generator, config: SceneConfig, language: Language
) -> SceneEdit | None:
    others = [
        ground
        for ground in config.backgrounds
        if ground != source.background
        and all(stands_out(placed.colour, ground) for placed in source.objects)
    ]
    if not others:
        return None
    ground = pick(rng, others)
    target = replace(source, background=ground)
    new = word("colour", ground, language)
    wording = _plain("background", rng, language, new=new)
    narration = f"背景变成了{new}。" if language == "zh" else f"The background turns {new}."
    return SceneEdit("background", source, target, wording, narration)


def _plain(kind: EditKind, rng: np.random.Generator, language: Language, **slots: str) -> str:
    return pick(rng, EDIT_FORMS["plain"][language][kind]).format_map(slots)


def instruct(
    edit: SceneEdit,
    config: SceneConfig,
    rng: np.random.Generator,
    language: Language = "en",
    forms: FormSet = "wide",
) -> str:
    """An instruction for an edit in other words, which say the same.

    With forms "held_out", the request or the polite form around it is one that training never has.
    """
    slots = _slots(edit, config, rng, language)
    if forms == "wide" and chance(rng, 0.12):
        return _capital(pick(rng, EDIT_STATEMENTS[language][edit.kind]).format_map(slots))
    inside, around = held_out_parts(rng) if forms == "held_out" else (forms, forms)
    request = pick(rng, EDIT_FORMS[inside][language][edit.kind]).format_map(slots)
    return _capital(pick(rng, POLITE[around][language]).format(x=request))


def _slots(
    edit: SceneEdit, config: SceneConfig, rng: np.random.Generator, language: Language
) -> dict[str, str]:
    """The words of an edit: its object, new colour or place."""
    if edit.kind == "background":
        return {"new": word("colour", edit.target.background, language)}
    gone = [o for o in edit.source.objects if o not in edit.target.objects]
    come = [o for o in edit.target.objects if o not in edit.source.objects]
    slots: dict[str, str] = {}
    if come:
        place = place_name(come[0].cell, config.grid)
        slots = {
            "new": word("colour", come[0].colour, language),
            "place": word("place", place, language),
        }
    if not gone:
        size = come[0].size if len(config.sizes) > 1 else None
        return slots | {"name": noun(ObjectFact(come[0].shape, come[0].colour, size), language)}
    fact = reference(edit.source, config, gone[0], rng)
    assert fact is not None  # the edit was drawn for an object that can be referred to
    return slots | {"name": definite(fact, language)}


def articles_may_go(edit: SceneEdit, text: str) -> bool:
    """Whether an instruction is as clear without articles.

    "Put star in top left" is not: "the star" moves, "a star" is a new one.
    """
    return edit.kind not in ("add", "move") or not re.search(
        r"\b(?:put|place|want|should|draw)\b", text, re.IGNORECASE
    )


def _free_cells(source: Scene, config: SceneConfig) -> list[Cell]:
    return [cell for cell in config.cells if source.at(cell) is None]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


_EDITORS = {
    "recolour": _recolour,
    "remove": _remove,
    "add": _add,
    "move": _move,
    "background": _background,
}


@dataclass(frozen=True)
class StoryStep:
    """A sentence and the scene shown after it."""

    text: str
    scene: Scene


@dataclass(frozen=True)
class Story:
    """The request and its steps; `edits[i]` leads from step i to step i + 1."""

    request: str
    steps: tuple[StoryStep, ...]
    edits: tuple[SceneEdit, ...]


def sample_story(
    rng: np.random.Generator,
    config: SceneConfig,
    length: int | None = None,
    language: Language = "en",
    split: Split = "train",
) -> Story:
    """Draw a story of `length` images, 2 to 4; "held_out" means that some scene in it is."""
    length = length or int(rng.integers(2, 4))
    if not 2 <= length <= 4:
        raise DataError(f"a story has 2 to 4 images, not {length}")
    each: Split = "train" if split == "train" else "any"
    for _ in range(200):
        scene = sample_scene(rng, config, split=each)
        scenes, edits = [scene], []
        while len(scenes) < length:
            edit = edit_scene(scenes[-1], rng, config, None, language, each)
            if edit is None:
                break
            edits.append(edit)
            scenes.append(edit.target)
        if len(scenes) == length and (
            split != "held_out" or any(in_split(s, "held_out") for s in scenes)
        ):
            return _tell(scenes, edits, rng, config, language)
    raise DataError(f"no story of {length} images of split {split!r} was found: {config}")


def _tell(
    scenes: list[Scene],
    edits: list[SceneEdit],
    rng: np.random.Generator,
    config: SceneConfig,
    language: Language,
) -> Story:
    start = caption(facts_of(scenes[0], config, FULL_STYLE), language=language)
    count = number_word(len(scenes), language)
    if language == "zh":
        request = f"用{count}张图讲一个故事：{start}。" + "".join(
            f"{edit.instruction}。" for edit in edits
        )
        texts = [f"{start}。", *(edit.narration for edit in edits)]
    else:
        opening = pick(
            rng,
            (
                f"Tell a story in {count} pictures. It starts with {start}.",
                f"Paint a story of {count} pictures that begins with {start}.",
            ),
        )
        request = " ".join([opening.rstrip(".") + ".", *(edit.instruction for edit in edits)])
        texts = [start.rstrip(".").capitalize() + ".", *(edit.narration for edit in edits)]
    steps = tuple(StoryStep(text, scene) for text, scene in zip(texts, scenes, strict=True))
    return Story(request, steps, tuple(edits))
