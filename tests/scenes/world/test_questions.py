"""Questions have the answer the scene gives, and only right answers pass."""

import re
from collections import Counter
from typing import Any

import pytest

from neounify.data.sample import DataError
from neounify.scenes.world import (
    PRESETS,
    QUESTION_KINDS,
    Question,
    Scene,
    SceneObject,
    ask,
    check_answer,
    sample_rng,
    sample_scene,
)
from neounify.scenes.world.draw import pick
from neounify.scenes.world.lexicon import Language
from neounify.scenes.world.questions import QuestionKind, ask_relation_yes_no
from neounify.scenes.world.scene import HELD_OUT_PAIRS

DEFAULT = PRESETS["wide"]
SCENE = Scene(
    "grey",
    (
        SceneObject("circle", "red", "small", (0, 0)),
        SceneObject("square", "blue", "large", (0, 2)),
    ),
)
TRUTHS = {
    "shape": {"red": "circle", "blue": "square", "top left": "circle", "top right": "square"},
    "colour": {"circle": "red", "square": "blue"},
    "size": {"circle": "small", "square": "large"},
    "where": {"circle": "top left", "square": "top right"},
}


@pytest.mark.parametrize("kind", TRUTHS)
def test_attribute_questions_have_the_scenes_answer(kind: Any) -> None:
    for index in range(60):
        question = ask(SCENE, DEFAULT, sample_rng(0, index), kind)
        truths = {value for word, value in TRUTHS[kind].items() if word in question.text}
        assert truths == {question.answer}


def test_background_count_exists_and_relation() -> None:
    for index in range(60):
        rng = sample_rng(1, index)
        assert ask(SCENE, DEFAULT, rng, "background").answer == "grey"
        counted = ask(SCENE, DEFAULT, rng, "count")
        if "objects" in counted.text:
            expected = "two"
        elif "circles" in counted.text or "squares" in counted.text:
            expected = "one"
        else:
            expected = "zero"
        assert counted.answer == expected
        exists = ask(SCENE, DEFAULT, rng, "exists")
        there = "red circle" in exists.text or "blue square" in exists.text
        assert exists.answer == ("yes" if there else "no")
        relation = ask(SCENE, DEFAULT, rng, "relation")
        circle_first = relation.text.index("circle") < relation.text.index("square")
        assert relation.answer == ("left" if circle_first else "right")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_kind_is_asked_and_its_own_answer_passes(language: Language) -> None:
    kinds: Counter[str] = Counter()
    for index in range(600):
        rng = sample_rng(2, index)
        scene = sample_scene(rng, PRESETS["hard"], split="any")
        question = ask(scene, PRESETS["hard"], rng, None, language)
        kinds[question.kind] += 1
        assert check_answer(question, question.answer), question
    assert set(kinds) == set(QUESTION_KINDS)
    assert min(kinds.values()) >= 20


def question(kind: Any, value: str) -> Question:
    return Question(kind, "?", value, value)


@pytest.mark.parametrize(
    ("kind", "value", "answer", "right"),
    [
        ("colour", "red", "Red.", True),
        ("colour", "red", "The circle is red.", True),
        ("colour", "red", "blue", False),
        ("colour", "red", "red or blue", False),
        ("colour", "red", "", False),
        ("colour", "grey", "gray", True),
        ("colour", "red", "reddish", False),
        ("background", "light blue", "light blue", True),
        ("background", "light blue", "blue", False),
        ("count", "2", "2", True),
        ("count", "2", "There are two circles", True),
        ("count", "2", "three", False),
        ("where", "top left", "In the top left.", True),
        ("where", "centre", "in the middle", True),
        ("where", "top left", "top right", False),
        ("exists", "yes", "Yes, there is.", True),
        ("exists", "no", "yes", False),
        ("relation", "left", "left", True),
        ("relation", "left", "right", False),
        ("size", "small", "It is small", True),
        ("shape", "star", "stars", True),
        ("shape", "star", "a star and a circle", False),
        ("colour", "red", "红色", True),
        ("background", "light blue", "蓝色", False),
        ("exists", "no", "没有", True),
        ("relation", "above", "上面", True),
        ("exists", "no", "There is not.", True),
        ("exists", "no", "It isn't there", True),
        ("exists", "no", "I do not see a red circle.", True),
        ("exists", "no", "No. I do not know why.", True),
        ("exists", "no", "I do not know", False),
        ("exists", "no", "I'm not sure.", False),
        ("exists", "no", "It is NOT possible to say", False),
        ("exists", "no", "I have no idea.", False),
        ("exists", "no", "没有把握", False),
        ("exists", "yes", "Yes, but I am not sure", False),
    ],
)
def test_answers_in_free_words(kind: Any, value: str, answer: str, right: bool) -> None:
    assert check_answer(question(kind, value), answer) == right


def test_yes_and_no_are_about_as_frequent() -> None:
    answers: Counter[str] = Counter()
    for index in range(400):
        rng = sample_rng(3, index)
        answers[ask(sample_scene(rng, DEFAULT), DEFAULT, rng, "exists").answer] += 1
    assert 0.4 < answers["yes"] / 400 < 0.6


def test_training_questions_name_no_held_out_pair() -> None:
    held_out = [f"{colour} {shape}" for shape, colour in HELD_OUT_PAIRS]
    named_at_all = 0
    for index in range(1500):
        rng = sample_rng(4, index)
        scene = sample_scene(rng, PRESETS["easy"])
        kinds: tuple[QuestionKind, ...] = ("exists", "count", "colour", "shape")
        kind = pick(rng, kinds)
        text = ask(scene, PRESETS["easy"], rng, kind).text
        named_at_all += "red circle" in text
        assert not any(name in text for name in held_out), text
    assert named_at_all > 0


def test_a_question_the_scene_does_not_allow_is_an_error() -> None:
    alone = Scene("white", (SceneObject("star", "red", "small", (0, 0)),))
    with pytest.raises(DataError, match="relation"):
        ask(alone, DEFAULT, sample_rng(0, 0), "relation")
    with pytest.raises(DataError, match="size"):
        ask(alone, PRESETS["easy"], sample_rng(0, 0), "size")


def test_relations_for_yes_and_no() -> None:
    seen = set()
    for index in range(60):
        question = ask_relation_yes_no(SCENE, DEFAULT, sample_rng(7, index))
        assert question is not None
        subject, relation, other = re.split(" (left of|right of) ", question.text)
        assert ("circle" in subject, "square" in subject) == ("square" in other, "circle" in other)
        right = ("circle" in subject) == (relation == "left of")
        assert question.answer == ("yes" if right else "no"), question
        assert check_answer(question, question.answer)
        assert not check_answer(question, "no" if right else "yes")
        seen.add((("circle" in subject), relation))
    assert len(seen) == 4
    alone = Scene("grey", SCENE.objects[:1])
    assert ask_relation_yes_no(alone, DEFAULT, sample_rng(7, 0)) is None
