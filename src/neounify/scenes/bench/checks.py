"""Verdicts: whether an image, an answer, a caption, an edit or a story fulfils its request.

Strict means that everything the text claims holds and nothing is there besides. Each verdict is
also split by attribute, as far as the text names it, under the assignment of objects to words
that does the text most justice: a wrong colour alone costs "colour", not "shape".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from neounify.data.sample import DataError
from neounify.evaluate.metrics import psnr
from neounify.scenes.bench.perceive import Percept, SeenObject, as_array, perceive
from neounify.scenes.world.edits import SceneEdit, Story
from neounify.scenes.world.facts import FULL_STYLE, CaptionStyle, ObjectFact, SceneFacts, facts_of
from neounify.scenes.world.language import parse_layout
from neounify.scenes.world.lexicon import COLOURS, place_name
from neounify.scenes.world.parse import parse_caption
from neounify.scenes.world.questions import Question, check_answer
from neounify.scenes.world.render import object_mask, size_at
from neounify.scenes.world.scene import MAX_OBJECTS, Scene, SceneConfig

AnyImage = NDArray[np.uint8] | Image.Image

RELATION_MARGIN = 0.25
"""How far (in cell sides) a centre must lie left of, or above, another to count as such."""
MIN_EDIT_PSNR = 30.0
"""PSNR in dB that the untouched part of an edited image must reach."""


@dataclass(frozen=True)
class Verdict:
    """`attributes`: what was asked for and whether it is right; correct if all are."""

    attributes: Mapping[str, bool]

    @property
    def correct(self) -> bool:
        """The strict verdict."""
        return all(self.attributes.values())


@dataclass(frozen=True)
class EditVerdict(Verdict):
    """An edit's verdict: "achieved" (the target scene, strictly) and "unchanged" (the rest)."""

    target: Verdict
    psnr_elsewhere: float | None
    """PSNR in dB outside the edited region; None where nothing lies outside."""


def check_image(facts: SceneFacts, image: AnyImage, config: SceneConfig) -> Verdict:
    """Whether an image shows exactly what facts claim."""
    return check_facts(facts, perceive(image, config), config)


def check_facts(facts: SceneFacts, seen: Percept, config: SceneConfig) -> Verdict:
    """Whether facts hold of what was seen; see the module for the split by attribute."""
    # Beyond the most a scene can hold, the count is wrong and the rest is judged on a part.
    slots = [(i, fact) for i, fact in enumerate(facts.objects) for _ in range(fact.count)]
    slots = slots[:MAX_OBJECTS]
    objects = sorted(seen.objects, key=lambda o: -o.radius)[:MAX_OBJECTS]
    best: dict[str, bool] = {}
    best_score = -1
    for chosen in _assignments(len(slots), objects):
        score, met = _judge(slots, chosen, facts, config)
        if score > best_score:
            best_score, best = score, met
            if all(met.values()):
                break
    attributes = {"count": len(seen.objects) == facts.count, **best}
    if facts.background is not None:
        attributes["background"] = seen.background == facts.background
    return Verdict(attributes)


def seen_as(scene: Scene, config: SceneConfig) -> Percept:
    """The percept of a scene that is known, for checking texts about it."""
    objects = []
    for placed in scene.objects:
        x, y = config.centre(placed)
        r, g, b = COLOURS[placed.colour]
        objects.append(
            SeenObject(
                shape=placed.shape,
                colour=placed.colour,
                size=placed.size,
                x=x,
                y=y,
                radius=config.radius(placed.size),
                cell=placed.cell,
                place=place_name(placed.cell, config.grid),
                misfit=0.0,
                rgb=(float(r), float(g), float(b)),
            )
        )
    r, g, b = COLOURS[scene.background]
    return Percept(scene.background, tuple(objects), (float(r), float(g), float(b)), 0.0)


def check_vqa(question: Question, answer: str) -> Verdict:
    """Whether an answer in free words is the right one."""
    return Verdict({"answer": check_answer(question, answer)})


def check_caption(
    text: str, scene: Scene, config: SceneConfig, style: CaptionStyle = FULL_STYLE
) -> Verdict:
    """Whether a caption is true of a scene and complete in what the style mentions.

    An attribute is right only if it is stated for every object and true; one that the style does
    not ask for counts only if it is stated. "readable": the caption speaks of this world at all.
    """
    asked = facts_of(scene, config, style)
    names = ["count", "shape"] + [
        name
        for name, wanted in (
            ("colour", any(f.colour for f in asked.objects)),
            ("size", any(f.size for f in asked.objects)),
            ("place", style.places == "cell" or bool(asked.relations)),
            ("background", style.background),
        )
        if wanted
    ]
    try:
        stated = parse_caption(text)
    except DataError:
        return Verdict({"readable": False, **dict.fromkeys(names, False)})
    met = dict(check_facts(stated, seen_as(scene, config), config).attributes)
    complete = {
        "count": True,
        "shape": all(f.shape for f in stated.objects),
        "colour": all(f.colour for f in stated.objects),
        "size": all(f.size for f in stated.objects),
        "place": (style.places != "cell" or all(f.place for f in stated.objects))
        and (style.places != "relation" or len(stated.relations) >= len(asked.relations)),
        "background": stated.background is not None,
    }
    attributes = {"readable": True, **met}
    attributes.update({name: complete[name] and met.get(name, False) for name in names})
    return Verdict(attributes)


def check_thought(thought: str, facts: SceneFacts, config: SceneConfig) -> Verdict:
    """Whether a layout thought lists a scene that satisfies what was asked."""
    text = thought.replace("<think>", "").replace("</think>", "").strip()
    try:
        scene = parse_layout(text, config)
    except DataError:
        return Verdict({"readable": False})
    met = check_facts(facts, seen_as(scene, config), config).attributes
    return Verdict({"readable": True, **met})


def check_edit(
    edit: SceneEdit, source: AnyImage, edited: AnyImage, config: SceneConfig
) -> EditVerdict:
    """Whether the target is reached and everything else is as it was.

    `source` is the input image of the edit; both must have one size.
    """
    before, after = as_array(source), as_array(edited)
    target = check_image(facts_of(edit.target, config, FULL_STYLE), after, config)
    mask = untouched(edit, config, min(after.shape[:2]))
    elsewhere = psnr(before, after, mask) if mask.any() else None
    attributes = {
        "achieved": target.correct,
        "unchanged": elsewhere is None or elsewhere >= MIN_EDIT_PSNR,
    }
    return EditVerdict(attributes, target, elsewhere)


def untouched(edit: SceneEdit, config: SceneConfig, side: int) -> NDArray[np.bool_]:
    """Pixels [height, width] that an edit must leave alone: all other cells, or all objects.

    `side`: pixels of the image's shorter side.
    """
    width, height = size_at(config, side)
    mask = np.zeros((height, width), bool)
    if edit.kind == "background":
        for placed in edit.source.objects:
            y0, x0, cover = object_mask(config, placed, side)
            h, w = cover.shape[:2]
            mask[y0 : y0 + h, x0 : x0 + w] |= cover[..., 0] >= 1
        return mask
    mask[:] = True
    rows, columns = config.grid
    for row, column in edit.cells:
        y0, y1 = int(row * height / rows), int(np.ceil((row + 1) * height / rows))
        x0, x1 = int(column * width / columns), int(np.ceil((column + 1) * width / columns))
        mask[y0:y1, x0:x1] = False
    return mask


def check_story(story: Story, images: Sequence[AnyImage], config: SceneConfig) -> Verdict:
    """Whether every image of a story shows its step, and there are neither more nor fewer."""
    attributes = {"pictures": len(images) == len(story.steps)}
    for number, step in enumerate(story.steps):
        facts = facts_of(step.scene, config, FULL_STYLE)
        shown = number < len(images) and check_image(facts, images[number], config).correct
        attributes[f"step {number + 1}"] = shown
    return Verdict(attributes)


Slot = tuple[int, ObjectFact]


def _assignments(
    slots: int, objects: Sequence[SeenObject]
) -> Iterator[Sequence[SeenObject | None]]:
    """Every way to give each slot an object of its own, or None where objects are too few."""
    if slots <= len(objects):
        yield from permutations(objects, slots)
        return
    for places in permutations(range(slots), len(objects)):
        chosen: list[SeenObject | None] = [None] * slots
        for place, seen in zip(places, objects, strict=True):
            chosen[place] = seen
        yield chosen


def _judge(
    slots: Sequence[Slot],
    chosen: Sequence[SeenObject | None],
    facts: SceneFacts,
    config: SceneConfig,
) -> tuple[int, dict[str, bool]]:
    """How many claims hold if the chosen objects are those meant, and which kinds hold wholly."""
    score = 0
    holds: dict[str, bool] = {}
    meant: dict[int, SeenObject | None] = {}
    for (index, fact), seen in zip(slots, chosen, strict=True):
        meant[index] = seen
        for name in ("shape", "colour", "size", "place"):
            wanted = getattr(fact, name)
            if wanted is not None:
                right = seen is not None and getattr(seen, name) == wanted
                score += right
                holds[name] = holds.get(name, True) and right
    for relation in facts.relations:
        a, b = meant.get(relation.subject), meant.get(relation.object)
        right = a is not None and b is not None and _stands(a, relation.relation, b, config)
        score += right
        holds["place"] = holds.get("place", True) and right
    return score, holds


def _stands(a: SeenObject, relation: str, b: SeenObject, config: SceneConfig) -> bool:
    margin = RELATION_MARGIN * config.cell_side
    gaps = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
    return gaps[relation] > margin
