"""The benchmark's cases: enough, deterministic, what their category says, held-out ones marked."""

import pytest

from neounify.data.sample import DataError
from neounify.scenes.bench import (
    CATEGORIES,
    caption_cases,
    categories,
    check_image,
    edit_cases,
    paint_cases,
    story_cases,
    vqa_cases,
)
from neounify.scenes.bench.prompts import draw_paint_case, names_held_out
from neounify.scenes.world import (
    PRESETS,
    QUESTION_KINDS,
    ObjectFact,
    SceneFacts,
    is_held_out,
    parse_caption,
    render,
    sample_rng,
)
from neounify.scenes.world.facts import canonical

CONFIG = PRESETS["wide"]
NO_COLOUR = ("single_object", "two_object")


@pytest.mark.parametrize("category", CATEGORIES)
def test_two_hundred_prompts_that_say_what_they_should(category: str) -> None:
    cases = paint_cases(category, CONFIG)
    assert len(cases) == 200
    assert cases == paint_cases(category, CONFIG)
    assert cases != paint_cases(category, CONFIG, seed=1)
    distinct = len({case.prompt for case in cases})
    assert distinct == 200 or (category == "single_object" and distinct > 100)
    assert sum(case.held_out for case in cases) == (0 if category in NO_COLOUR else 50)
    for case in cases:
        assert canonical(parse_caption(case.prompt)) == canonical(case.facts)
        assert case.held_out == names_held_out(case.facts, CONFIG)
        assert not case.held_out or is_held_out(case.scene)


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_scene_of_a_case_satisfies_it(category: str) -> None:
    for case in paint_cases(category, CONFIG, 12, seed=5):
        assert check_image(case.facts, render(case.scene, CONFIG), CONFIG).correct


def facts_of_category(category: str) -> list[SceneFacts]:
    return [case.facts for case in paint_cases(category, CONFIG, 80)]


def test_categories_ask_for_their_own_thing() -> None:
    for facts in facts_of_category("single_object"):
        assert facts.count == 1
        assert facts.objects[0] == ObjectFact(facts.objects[0].shape)
    for facts in facts_of_category("two_object"):
        assert [f.count for f in facts.objects] == [1, 1]
        assert facts.objects[0].shape != facts.objects[1].shape
    assert {f.count for f in facts_of_category("counting")} == {2, 3}
    assert all(f.objects[0].colour for f in facts_of_category("colours"))
    assert all(len(f.relations) == 1 for f in facts_of_category("position"))
    for facts in facts_of_category("attribution"):
        assert len({o.colour for o in facts.objects}) == 2
    assert all(o.size for f in facts_of_category("size") for o in f.objects)
    assert all(f.background for f in facts_of_category("background"))
    assert all(o.place and o.colour for f in facts_of_category("layout") for o in f.objects)


def test_worlds_without_a_choice_lack_the_category() -> None:
    assert "size" not in categories(PRESETS["easy"])
    assert set(categories(CONFIG)) == set(CATEGORIES)
    for category in categories(PRESETS["easy"]):
        assert len(paint_cases(category, PRESETS["easy"])) == 200


def test_other_cases_are_enough_and_a_quarter_is_held_out() -> None:
    for kind in QUESTION_KINDS:
        cases = vqa_cases(kind, CONFIG, 40)
        assert [case.question.kind for case in cases] == [kind] * 40
        assert [case.held_out for case in cases] == [i % 4 == 3 for i in range(40)]
    captions = caption_cases(CONFIG)
    assert len(captions) == 200
    assert [is_held_out(c.scene) for c in captions] == [c.held_out for c in captions]
    edits = edit_cases(CONFIG)
    assert len(edits) == 200
    assert sum(c.held_out for c in edits) == 50
    assert len({c.edit.kind for c in edits}) == 5
    stories = story_cases(CONFIG, 20)
    assert sum(c.held_out for c in stories) == 5


def test_chinese_prompts_too() -> None:
    cases = paint_cases("position", CONFIG, 20, language="zh")
    assert all(canonical(parse_caption(c.prompt)) == canonical(c.facts) for c in cases)
    assert not any(c.prompt.isascii() for c in cases)


def test_what_cannot_be_asked_is_an_error() -> None:
    with pytest.raises(DataError, match="no category"):
        draw_paint_case("poetry", sample_rng(0, 0), CONFIG)
    with pytest.raises(DataError, match="held_out"):
        draw_paint_case("single_object", sample_rng(0, 0), CONFIG, held_out=True)
