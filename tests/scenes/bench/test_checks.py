"""Verdicts: strict, split by attribute, for images, captions, thoughts, edits and stories."""

from dataclasses import replace

import numpy as np
import pytest

from neounify.scenes.bench import (
    EditVerdict,
    check_caption,
    check_edit,
    check_image,
    check_story,
    check_thought,
    check_vqa,
)
from neounify.scenes.bench.checks import untouched
from neounify.scenes.world import (
    PRESETS,
    CaptionStyle,
    Question,
    Scene,
    SceneEdit,
    SceneObject,
    layout_text,
    parse_caption,
    render,
    sample_edit,
    sample_rng,
    sample_story,
)

CONFIG = PRESETS["wide"]
RED = SceneObject("circle", "red", "large", (0, 0))
BLUE = SceneObject("square", "blue", "small", (0, 2))
SCENE = Scene("white", (RED, BLUE))


def wrong_in(prompt: str, scene: Scene) -> set[str]:
    """The attributes that an image of the scene gets wrong."""
    verdict = check_image(parse_caption(prompt), render(scene, CONFIG), CONFIG)
    assert verdict.correct == all(verdict.attributes.values())
    return {name for name, right in verdict.attributes.items() if not right}


@pytest.mark.parametrize(
    ("prompt", "wrong"),
    [
        ("a circle and a square", set()),
        ("a red circle and a blue square", set()),
        ("a large red circle left of a small blue square on a white background", set()),
        ("a red circle in the top left and a blue square in the top right", set()),
        ("two objects", set()),
        ("a blue circle and a red square", {"colour"}),
        ("a red circle and a blue star", {"shape"}),
        ("a red circle right of a blue square", {"place"}),
        ("a red circle above a blue square", {"place"}),
        ("a red circle in the centre and a blue square", {"place"}),
        ("a small red circle and a blue square", {"size"}),
        ("a red circle and a blue square on a grey background", {"background"}),
        ("a red circle", {"count"}),
        ("a red circle and two blue squares", {"count", "shape", "colour"}),
        ("a green circle and a blue square on a black background", {"colour", "background"}),
    ],
)
def test_each_wrong_thing_costs_its_own_attribute(prompt: str, wrong: set[str]) -> None:
    assert wrong_in(prompt, SCENE) == wrong


def test_only_what_is_named_is_judged() -> None:
    verdict = check_image(parse_caption("two objects"), render(SCENE, CONFIG), CONFIG)
    assert set(verdict.attributes) == {"count"}


def test_a_diagonal_holds_both_relations() -> None:
    diagonal = Scene("white", (RED, replace(BLUE, cell=(2, 1))))
    assert not wrong_in("a red circle left of a blue square", diagonal)
    assert not wrong_in("a red circle above a blue square", diagonal)
    assert wrong_in("a red circle below a blue square", diagonal) == {"place"}


def test_alike_objects_may_take_any_place() -> None:
    two = Scene("white", (RED, replace(RED, cell=(2, 2))))
    assert not wrong_in("a red circle in the bottom right and a red circle in the top left", two)


def test_an_empty_image_fails_everything_asked() -> None:
    wrong = wrong_in("a small red circle in the centre on a black background", Scene("white"))
    assert wrong == {"count", "shape", "colour", "size", "place", "background"}


def test_many_objects_are_judged_in_time() -> None:
    full = Scene("white", tuple(replace(RED, cell=cell) for cell in CONFIG.cells))
    wrong = wrong_in("a red circle, a blue square, a green star, two pink crosses", full)
    assert wrong == {"count", "shape", "colour"}


@pytest.mark.parametrize("count", ["nine", "8"])
def test_captions_with_too_many_objects_are_judged_in_time(count: str) -> None:
    lie = f"{count} red circles and {count} blue squares on a white background"
    attributes = check_caption(lie, SCENE, CONFIG, CaptionStyle()).attributes
    assert not attributes["count"]
    assert attributes["background"]


@pytest.mark.parametrize(
    ("caption", "wrong"),
    [
        (
            "a large red circle in the top left and a small blue square in the top right"
            " on a white background",
            set(),
        ),
        (
            "White background, top right: a little blue square, top left: a big red circle",
            set(),
        ),
        ("白色背景，左上角有一个大的红色圆形，右上角有一个小的蓝色正方形", set()),
        ("a red circle and a blue square", {"size", "place", "background"}),
        (
            "a large red circle in the top left and a blue square in the top right"
            " on a white background",
            {"size"},
        ),
        (
            "a large red circle in the top left and a small green square in the top right"
            " on a white background",
            {"colour"},
        ),
        (
            "a large red circle in the top left on a white background",
            {"count"},
        ),
        ("a dog", {"readable", "count", "shape", "colour", "size", "place", "background"}),
    ],
)
def test_captions_must_be_true_and_complete(caption: str, wrong: set[str]) -> None:
    attributes = check_caption(caption, SCENE, CONFIG).attributes
    assert {name for name, right in attributes.items() if not right} == wrong


def test_a_brief_caption_needs_less_but_no_lies() -> None:
    brief = CaptionStyle()
    assert check_caption("a red circle and a blue square", SCENE, CONFIG, brief).correct
    assert not check_caption("a circle and a blue square", SCENE, CONFIG, brief).correct
    lie = "a red circle right of a blue square"
    assert not check_caption(lie, SCENE, CONFIG, brief).correct
    related = CaptionStyle(places="relation")
    assert not check_caption("a red circle and a blue square", SCENE, CONFIG, related).correct
    assert check_caption("a red circle left of a blue square", SCENE, CONFIG, related).correct


def test_answers() -> None:
    question = Question("colour", "What colour is the circle?", "red", "red")
    assert check_vqa(question, "Red").correct
    assert not check_vqa(question, "blue").correct


def test_thoughts_are_held_against_the_prompt() -> None:
    facts = parse_caption("a red circle left of a blue square")
    thought = f"<think>\n{layout_text(SCENE, CONFIG)}\n</think>\n\n"
    assert check_thought(thought, facts, CONFIG).correct
    other = replace(SCENE, objects=(replace(RED, cell=(0, 2)), replace(BLUE, cell=(0, 0))))
    assert not check_thought(layout_text(other, CONFIG), facts, CONFIG).correct
    assert check_thought("let me see", facts, CONFIG).attributes == {"readable": False}


def edited(edit: SceneEdit, image: np.ndarray) -> EditVerdict:
    return check_edit(edit, render(edit.source, CONFIG), image, CONFIG)


def test_edits_must_reach_the_target_and_leave_the_rest() -> None:
    for index in range(60):
        edit = sample_edit(sample_rng(8, index), CONFIG)
        target = render(edit.target, CONFIG)
        good = edited(edit, target)
        assert good.correct, edit
        assert good.psnr_elsewhere in (None, 100.0)
        unmade = edited(edit, render(edit.source, CONFIG))
        assert unmade.attributes == {"achieved": False, "unchanged": True}
        haze = np.clip(target + 20.0, 0, 235).astype(np.uint8)
        touched = edited(edit, haze)
        assert not touched.attributes["unchanged"], edit
        assert touched.psnr_elsewhere is not None
        assert touched.psnr_elsewhere < 30


def test_what_an_edit_must_leave_alone() -> None:
    recolour = sample_edit(sample_rng(9, 0), CONFIG, "recolour")
    mask = untouched(recolour, CONFIG, 96)
    (row, column) = recolour.cells[0]
    assert not mask[row * 32 : row * 32 + 32, column * 32 : column * 32 + 32].any()
    assert mask.sum() == 96 * 96 - 32 * 32
    ground = sample_edit(sample_rng(9, 1), CONFIG, "background")
    objects = untouched(ground, CONFIG, 64)
    before, after = render(ground.source, CONFIG), render(ground.target, CONFIG)
    assert objects.any()
    assert (before[objects] == after[objects]).all()


def test_stories_are_checked_image_by_image() -> None:
    story = sample_story(sample_rng(10, 0), CONFIG, 3)
    images = [render(step.scene, CONFIG) for step in story.steps]
    assert check_story(story, images, CONFIG).correct
    swapped = [images[0], images[2], images[1]]
    verdict = check_story(story, swapped, CONFIG)
    assert verdict.attributes == {
        "pictures": True,
        "step 1": True,
        "step 2": False,
        "step 3": False,
    }
    assert not check_story(story, images[:2], CONFIG).correct
    assert not check_story(story, [*images, images[0]], CONFIG).correct
