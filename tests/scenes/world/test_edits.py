"""Edits change one thing and say which; stories are chains of them."""

from collections import Counter
from typing import Any

import pytest

from neounify.data.sample import DataError
from neounify.scenes.world import (
    EDIT_KINDS,
    PRESETS,
    Scene,
    SceneObject,
    edit_scene,
    edit_thought,
    is_held_out,
    parse_layout,
    sample_edit,
    sample_rng,
    sample_story,
)
from neounify.scenes.world.lexicon import Language

DEFAULT = PRESETS["wide"]


def looks(scene: Scene) -> Counter[tuple[str, str, str]]:
    return Counter((o.shape, o.colour, o.size) for o in scene.objects)


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_each_kind_changes_its_one_thing(kind: Any, language: Language) -> None:
    for index in range(80):
        edit = sample_edit(sample_rng(1, index), DEFAULT, kind, language)
        before, after = edit.source, edit.target
        assert before != after
        same_ground = before.background == after.background
        assert same_ground == (kind != "background")
        gone, come = looks(before) - looks(after), looks(after) - looks(before)
        if kind in ("background", "move"):
            assert not gone
            assert not come
        elif kind == "recolour":
            (old,), (new,) = gone, come
            assert (old[0], old[2]) == (new[0], new[2])
            assert old[1] != new[1]
        else:
            assert (sum(gone.values()), sum(come.values())) == (
                (1, 0) if kind == "remove" else (0, 1)
            )
        assert len(edit.cells) == {"background": 0, "move": 2}.get(kind, 1)
        assert not is_held_out(before)
        assert not is_held_out(after)


def test_the_instruction_names_the_new_colour_and_place() -> None:
    scene = Scene(
        "white",
        (
            SceneObject("circle", "red", "large", (0, 0)),
            SceneObject("star", "blue", "small", (1, 1)),
        ),
    )
    for index in range(60):
        edit = edit_scene(scene, sample_rng(2, index), DEFAULT, "recolour")
        assert edit is not None
        (cell,) = edit.cells
        changed, old = edit.target.at(cell), scene.at(cell)
        assert changed is not None
        assert old is not None
        assert changed.colour in edit.instruction
        assert old.shape in edit.instruction


def test_alike_objects_are_meant_by_their_place() -> None:
    red = [SceneObject("circle", "red", "large", (0, c)) for c in (0, 2)]
    scene = Scene("white", tuple(red))
    for index in range(20):
        edit = edit_scene(scene, sample_rng(3, index), DEFAULT, "remove")
        assert edit is not None
        (cell,) = edit.cells
        assert ("top left" if cell == (0, 0) else "top right") in edit.instruction


def test_an_edit_that_cannot_be_is_none() -> None:
    alone = Scene("white", (SceneObject("star", "red", "small", (0, 0)),))
    assert edit_scene(alone, sample_rng(0, 0), DEFAULT, "remove") is None


def test_held_out_edits_lead_to_held_out_scenes() -> None:
    for index in range(40):
        assert is_held_out(sample_edit(sample_rng(4, index), DEFAULT, split="held_out").target)


def test_the_thought_before_an_edit_is_the_target() -> None:
    edit = sample_edit(sample_rng(5, 0), DEFAULT)
    assert parse_layout(edit_thought(edit, DEFAULT), DEFAULT) == edit.target


@pytest.mark.parametrize("language", ["en", "zh"])
def test_stories_change_step_by_step(language: Language) -> None:
    for index in range(60):
        story = sample_story(sample_rng(6, index), DEFAULT, 3, language)
        assert len(story.steps) == 3
        for edit, before, after in zip(story.edits, story.steps, story.steps[1:], strict=False):
            assert (edit.source, edit.target) == (before.scene, after.scene)
            assert edit.instruction.rstrip(".") in story.request
            assert after.text == edit.narration
        assert not any(is_held_out(step.scene) for step in story.steps)


def test_a_story_has_two_to_four_images() -> None:
    with pytest.raises(DataError, match="2 to 4"):
        sample_story(sample_rng(0, 0), DEFAULT, 5)
