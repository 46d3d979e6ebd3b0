"""Validation of the checker: true renders must pass, deliberately wrong ones must not.

Wrong means: one thing that the prompt names is changed in the scene before it is rendered, chosen
by what the words say and never by asking the checker. Worn copies of the true renders (noise,
blur, a colour cast) must still pass.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from neounify.data.sample import DataError
from neounify.evaluate.metrics import Rate
from neounify.scenes.bench.checks import check_caption, check_edit, check_image
from neounify.scenes.bench.prompts import PaintCase, categories, draw_paint_case
from neounify.scenes.world.draw import pick, sample_rng, shuffled
from neounify.scenes.world.edits import edit_scene, sample_edit
from neounify.scenes.world.facts import FULL_STYLE, ObjectFact, SceneFacts, facts_of
from neounify.scenes.world.language import caption
from neounify.scenes.world.lexicon import COLOURS, LANGUAGES, SHAPES, stands_out
from neounify.scenes.world.questions import Question, ask, check_answer
from neounify.scenes.world.render import object_mask, render
from neounify.scenes.world.scene import Scene, SceneConfig, sample_scene, visible_colours

Pixels = NDArray[np.uint8]

WRONGS = ("colour", "shape", "one more", "one less", "places", "size", "background")
WEARS = ("noise", "blur", "shift")


def validate_painting(
    config: SceneConfig, number: int, seed: int = 0
) -> dict[str, dict[str, Rate]]:
    """Per category: how often true, worn, wrong and malformed renders are judged as they are.

    Every rate counts right judgements: "true" and the worn ones accepted, "wrong …" rejected.
    """
    rates: dict[str, dict[str, Rate]] = {}
    for position, category in enumerate(categories(config)):
        tally: defaultdict[str, list[bool]] = defaultdict(list)
        for index in range(number):
            rng = sample_rng(seed, 500, position, index)
            case = draw_paint_case(category, rng, config)
            image = render(case.scene, config)
            tally["true"].append(check_image(case.facts, image, config).correct)
            for wear in WEARS:
                worn = wear_out(image, wear, rng)
                tally[wear].append(check_image(case.facts, worn, config).correct)
            wrong = make_wrong(case, config, rng)
            if wrong is not None:
                name, scene = wrong
                verdict = check_image(case.facts, render(scene, config), config)
                tally["wrong"].append(not verdict.correct)
                tally[f"wrong {name}"].append(not verdict.correct)
            torn = check_image(case.facts, malform(case.scene, config, rng), config)
            tally["malformed"].append(not torn.correct)
        rates[category] = {name: Rate(sum(right), len(right)) for name, right in tally.items()}
    return rates


def validate_answers(config: SceneConfig, number: int, seed: int = 0) -> dict[str, Rate]:
    """True and wrong answers to questions, and captions, in English and Chinese."""
    tally: defaultdict[str, list[bool]] = defaultdict(list)
    for index in range(number):
        rng = sample_rng(seed, 501, index)
        scene = sample_scene(rng, config, split="any")
        language = pick(rng, LANGUAGES)
        question = ask(scene, config, rng, None, language)
        tally["answer true"].append(check_answer(question, question.answer))
        other = _other_answer(question, config, rng)
        tally["answer wrong"].append(not check_answer(question, other))
        facts = facts_of(scene, config, FULL_STYLE)
        text = caption(facts, rng, language)
        tally["caption true"].append(check_caption(text, scene, config).correct)
        case = PaintCase("caption", text, facts, scene, held_out=False)
        wrong = make_wrong(case, config, rng)
        if wrong is not None:
            lie = caption(facts_of(wrong[1], config, FULL_STYLE), rng, language)
            tally["caption wrong"].append(not check_caption(lie, scene, config).correct)
    return {name: Rate(sum(right), len(right)) for name, right in tally.items()}


def validate_edits(config: SceneConfig, number: int, seed: int = 0) -> dict[str, Rate]:
    """True edits; edits that were not made, made twice, or touched something else."""
    tally: defaultdict[str, list[bool]] = defaultdict(list)
    for index in range(number):
        rng = sample_rng(seed, 502, index)
        edit = sample_edit(rng, config, split="any")
        source, target = render(edit.source, config), render(edit.target, config)
        tally["edit true"].append(check_edit(edit, source, target, config).correct)
        for wear in WEARS:
            worn = check_edit(edit, source, wear_out(target, wear, rng), config)
            tally[f"edit reached, {wear}"].append(worn.target.correct)
        tally["edit not made"].append(not check_edit(edit, source, source, config).correct)
        more = edit_scene(edit.target, rng, config, split="any")
        if more is not None and more.target != edit.target:
            other = check_edit(edit, source, render(more.target, config), config)
            tally["edit too much"].append(not other.correct)
    return {name: Rate(sum(right), len(right)) for name, right in tally.items()}


def make_wrong(
    case: PaintCase, config: SceneConfig, rng: np.random.Generator
) -> tuple[str, Scene] | None:
    """The case's scene with one thing changed that the prompt names, and what it was."""
    for name in shuffled(rng, WRONGS):
        scene = _change(case.scene, case.facts, name, config, rng)
        if scene is not None:
            return name, scene
    return None


def wear_out(image: Pixels, wear: str, rng: np.random.Generator) -> Pixels:
    """A worn copy: "noise" of σ 0.08 of the range, "blur" of 1 px, "shift" of up to ±10 of 255."""
    if wear == "blur":
        return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1)))
    if wear == "noise":
        worn = image + rng.normal(0, 0.08 * 255, image.shape)
    else:
        worn = image + rng.integers(-10, 11, 3).astype(float)
    return np.clip(np.round(worn), 0, 255).astype(np.uint8)


def malform(scene: Scene, config: SceneConfig, rng: np.random.Generator) -> Pixels:
    """A render in which one object is no proper shape: half of it is missing, or it is squashed."""
    image = render(scene, config).copy()
    placed = pick(rng, scene.objects)
    y0, x0, mask = object_mask(config, placed, config.side)
    h, w = mask.shape[:2]
    ground = np.asarray(COLOURS[scene.background], np.uint8)
    window = image[y0 : y0 + h, x0 : x0 + w]
    if pick(rng, ("half", "squash")) == "half":
        window[:, w // 2 :] = ground
    else:
        flat = np.asarray(Image.fromarray(window).resize((w, max(2, round(0.5 * h)))))
        window[:] = ground
        window[(h - len(flat)) // 2 :][: len(flat)] = flat
    return image


def _other_answer(question: Question, config: SceneConfig, rng: np.random.Generator) -> str:
    """The answer to a question of the same kind about another scene, one that differs."""
    while True:
        scene = sample_scene(rng, config, split="any")
        try:
            other = ask(scene, config, rng, question.kind, question.language)
        except DataError:
            continue  # that scene has no such question
        if other.value != question.value:
            return other.answer


def _change(
    scene: Scene, facts: SceneFacts, name: str, config: SceneConfig, rng: np.random.Generator
) -> Scene | None:
    """The scene with one change of that kind, or None if the prompt does not rule it out."""
    placed = pick(rng, scene.objects)
    named: Mapping[str, bool] = {
        attribute: all(getattr(f, attribute) is not None for f in facts.objects)
        for attribute in ("shape", "colour", "size", "place")
    }
    if name == "colour" and named["colour"]:
        others = [c for c in visible_colours(config, scene.background) if c != placed.colour]
        return scene.swap(placed, replace(placed, colour=pick(rng, others)))
    if name == "shape" and named["shape"]:
        others = [shape for shape in SHAPES if shape != placed.shape]
        return scene.swap(placed, replace(placed, shape=pick(rng, others)))
    if name == "size" and named["size"]:
        return scene.swap(
            placed, replace(placed, size="small" if placed.size == "large" else "large")
        )
    if name == "one less":
        return replace(scene, objects=tuple(o for o in scene.objects if o != placed))
    if name == "one more":
        free = [cell for cell in config.cells if scene.at(cell) is None]
        return replace(scene, objects=(*scene.objects, replace(placed, cell=pick(rng, free))))
    if name == "background" and facts.background is not None:
        grounds = [
            g
            for g in config.backgrounds
            if g != scene.background and all(stands_out(o.colour, g) for o in scene.objects)
        ]
        return replace(scene, background=pick(rng, grounds)) if grounds else None
    if name == "places" and (named["place"] or (facts.relations and len(scene.objects) == 2)):
        return _swap_places(scene, rng)
    return None


def _swap_places(scene: Scene, rng: np.random.Generator) -> Scene | None:
    """Two objects that look unlike change places."""

    def look(index: int) -> ObjectFact:
        o = scene.objects[index]
        return ObjectFact(o.shape, o.colour)

    pairs = [
        (a, b)
        for a in range(len(scene.objects))
        for b in range(a + 1, len(scene.objects))
        if look(a) != look(b)
    ]
    if not pairs:
        return None
    a, b = (scene.objects[i] for i in pick(rng, pairs))
    moved = {a: replace(a, cell=b.cell), b: replace(b, cell=a.cell)}
    return replace(scene, objects=tuple(moved.get(o, o) for o in scene.objects))
