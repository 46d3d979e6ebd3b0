"""Captions say what they should and are read back to the same facts, in both languages."""

from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neounify.data.sample import DataError
from neounify.scenes.world import (
    FULL_STYLE,
    PRESETS,
    CaptionStyle,
    ObjectFact,
    RelationFact,
    Scene,
    SceneFacts,
    SceneObject,
    caption,
    facts_of,
    layout_text,
    parse_caption,
    parse_layout,
    sample_rng,
    sample_scene,
)
from neounify.scenes.world.draw import chance, pick
from neounify.scenes.world.facts import canonical, matching, reference
from neounify.scenes.world.lexicon import Language

DEFAULT = PRESETS["wide"]
RED = ObjectFact("circle", "red")
BLUE = ObjectFact("square", "blue")
LEFT = SceneFacts((RED, BLUE), (RelationFact(0, "left of", 1),))


def claims(text: str) -> SceneFacts:
    return canonical(parse_caption(text))


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", PRESETS)
def test_captions_are_read_back_to_their_facts(name: str, language: Language) -> None:
    config = PRESETS[name]
    for index in range(500):
        rng = sample_rng(5, index)
        scene = sample_scene(rng, config, split="any")
        style = CaptionStyle(
            colour=chance(rng, 0.8),
            size=chance(rng, 0.5),
            background=chance(rng, 0.5),
            places=pick(rng, ("none", "relation", "cell")),
        )
        facts = facts_of(scene, config, style, rng)
        text = caption(facts, rng, language)
        assert claims(text) == canonical(facts), text


def test_captions_come_in_many_wordings() -> None:
    texts = {caption(LEFT, sample_rng(0, index)).lower().rstrip(".") for index in range(300)}
    assert len(texts) >= 15
    assert all(claims(text) == canonical(LEFT) for text in texts)


@pytest.mark.parametrize(
    "text",
    [
        "a red circle left of a blue square",
        "A blue square to the right of a red circle.",
        "To the left of the blue square there is a red circle",
        "to the left of a blue square, there is one red circle.",
        "There is a red circle and a blue square. The circle is left of the square.",
        "an image of a circle and a square. the circle is red. the square is blue. "
        "the square is on the right of the circle",
        "一个红色的圆形在一个蓝色的正方形的左边",
        "一个蓝色正方形的左侧有一个红色圆形",
        "图中有一个红色圆形和一个蓝色正方形，圆形在正方形的左边",
    ],
)
def test_wordings_of_one_relation_mean_the_same(text: str) -> None:
    assert claims(text) == canonical(LEFT)


def test_groups_sizes_places_and_background_are_read() -> None:
    facts = parse_caption("Two small red circles and a large star on a light blue background.")
    assert facts.objects == (
        ObjectFact("circle", "red", "small", count=2),
        ObjectFact("star", size="large"),
    )
    assert facts.background == "light blue"
    placed = parse_caption("top left: a red circle, centre: a gray square")
    assert placed.objects == (
        ObjectFact("circle", "red", place="top left"),
        ObjectFact("square", "grey", place="centre"),
    )
    assert parse_caption("a red circle, top left, a blue square, bottom right").objects == (
        ObjectFact("circle", "red", place="top left"),
        ObjectFact("square", "blue", place="bottom right"),
    )
    assert parse_caption("the background is white").background == "white"


def test_an_opposite_relation_is_another_claim() -> None:
    assert claims("a red circle right of a blue square") != canonical(LEFT)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a red dog",
        "a red blue circle",
        "a red",
        "left of a red circle",
        "a circle left of",
        "two circles above a square",
        "a red circle on a white background. the background is black.",
        "the circle in the top left. the circle in the top right.",
        "in the centre",
        "colourless green ideas sleep furiously",
        "一只红色的猫",
    ],
)
def test_what_is_no_caption_is_one_clear_error(text: str) -> None:
    with pytest.raises(DataError, match="cannot read"):
        parse_caption(text)


WORDS = (
    *("a", "the", "two", "red", "light blue", "small", "circle", "squares", "left of", "above"),
    *("top left", "centre", "in", "on", "background", "is", "and", ",", ".", ":", "one", "objects"),
    *("一个", "红色", "圆形", "在", "左边", "左上角", "背景", "有", "，", "两个", "大"),
)


@settings(max_examples=500)
@given(st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join))
def test_any_order_of_words_is_read_or_refused(text: str) -> None:
    try:
        facts = parse_caption(text)
    except DataError:
        return
    assert facts.objects or facts.background
    canonical(facts)


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    with suppress(DataError):
        parse_caption(text)
    with suppress(DataError):
        parse_layout(text, DEFAULT)


def test_relations_must_join_two_objects_of_the_facts() -> None:
    with pytest.raises(DataError):
        SceneFacts((RED,), (RelationFact(0, "above", 1),))
    with pytest.raises(DataError):
        SceneFacts((RED, BLUE), (RelationFact(1, "above", 1),))


def test_canonical_facts_do_not_depend_on_order_or_end() -> None:
    turned = SceneFacts((BLUE, RED), (RelationFact(0, "right of", 1),))
    assert canonical(turned) == canonical(LEFT)
    assert canonical(replace(turned, relations=())) != canonical(LEFT)


def test_alike_objects_are_counted_by_what_is_mentioned() -> None:
    scene = Scene(
        "white",
        (
            SceneObject("circle", "red", "large", (0, 0)),
            SceneObject("circle", "blue", "large", (0, 1)),
        ),
    )
    bare = facts_of(scene, DEFAULT, CaptionStyle(colour=False))
    assert bare.objects == (ObjectFact("circle", count=2),)
    assert caption(bare) == "two circles"
    full = facts_of(scene, DEFAULT, FULL_STYLE)
    assert caption(full) == (
        "a large red circle in the top left and a large blue circle in the top middle"
        " on a white background"
    )


def test_sizes_are_not_mentioned_where_there_is_one() -> None:
    scene = sample_scene(sample_rng(0, 0), PRESETS["easy"])
    assert all(f.size is None for f in facts_of(scene, PRESETS["easy"], FULL_STYLE).objects)


def test_a_reference_singles_its_object_out() -> None:
    hidden_count = 0
    for index in range(300):
        rng = sample_rng(6, index)
        scene = sample_scene(rng, DEFAULT)
        for placed in scene.objects:
            for hide in (None, "colour", "shape", "size", "place"):
                fact = reference(scene, DEFAULT, placed, rng, hide)
                if fact is None:
                    hidden_count += 1
                    continue
                assert matching(scene, DEFAULT, fact) == (placed,)
                assert hide is None or getattr(fact, hide) is None
    assert hidden_count > 0  # alike objects cannot be told apart once their place is hidden


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", PRESETS)
def test_layout_thoughts_are_read_back_to_the_scene(name: str, language: Language) -> None:
    config = PRESETS[name]
    for index in range(200):
        scene = sample_scene(sample_rng(7, index), config, split="any")
        centred = tuple(replace(placed, offset=(0.0, 0.0)) for placed in scene.objects)
        text = layout_text(scene, config, language)
        assert parse_layout(text, config) == Scene(scene.background, centred)


def test_a_layout_thought_is_compact() -> None:
    scene = Scene("white", (SceneObject("star", "red", "small", (1, 1)),))
    assert layout_text(scene, DEFAULT) == "background: white\nred star, small, centre"


@pytest.mark.parametrize(
    "text",
    [
        "red star, small, centre",
        "background: white\nred star, centre",
        "background: white\nred star, small, somewhere",
        "background: white\nred star, small, centre\nblue star, small, centre",
        "background: white\nwhite star, small, centre",
    ],
)
def test_broken_layout_thoughts_are_errors(text: str) -> None:
    with pytest.raises(DataError):
        parse_layout(text, DEFAULT)
