"""Questions about clips have one right answer, which is read in any words."""

from collections import Counter

import pytest

from neounify.data import DataError
from neounify.motion.world import (
    DIRECTIONS,
    MOTION_PRESETS,
    MOTION_QUESTIONS,
    Motion,
    MotionQuestion,
    MotionScene,
    Mover,
    Place,
    ask_motion,
    check_motion_answer,
    sample_motion,
)
from neounify.motion.world.questions import (
    MotionQuestionKind,
    ask_several_motion,
    read_motion_answer,
)
from neounify.scenes.world import sample_rng

DEFAULT = MOTION_PRESETS["default"]
STILL = (Place(0.3, 0.3, 0.15),) * 8
ABSENT = (None,) * 4


def clip(*motions: Motion) -> MotionScene:
    looks = zip(("star", "circle"), ("red", "blue"), motions, strict=False)
    paths = {"appear": ABSENT + STILL[4:], "vanish": STILL[4:] + ABSENT}
    movers = [Mover(s, c, m, paths.get(m.kind, STILL)) for s, c, m in looks]
    return MotionScene("white", tuple(movers))


def asked(scene: MotionScene, kind: MotionQuestionKind) -> dict[str, str]:
    """Answers by text of all questions of a kind that 80 draws ask."""
    questions = [ask_motion(scene, sample_rng(0, n), kind) for n in range(80)]
    return {question.text: question.answer for question in questions}


def test_every_answer_is_right_and_no_other_is() -> None:
    kinds, values = Counter[str](), Counter[tuple[str, str]]()
    for index in range(400):
        rng = sample_rng(1, index)
        scene = sample_motion(rng, DEFAULT)
        questions = ask_several_motion(scene, rng, 3)
        assert len({question.kind for question in questions}) == len(questions) == 3
        for question in questions:
            kinds[question.kind] += 1
            values[question.kind, question.value] += 1
            assert check_motion_answer(question, question.answer)
            assert not check_motion_answer(question, "I do not know.")
    assert set(kinds) == set(MOTION_QUESTIONS)
    assert {value for kind, value in values if kind == "direction"} == set(DIRECTIONS)
    yes, no = values["event", "yes"], values["event", "no"]
    assert abs(yes - no) < 0.25 * (yes + no)


def test_questions_about_what_moves() -> None:
    scene = clip(Motion("move", "up left"), Motion("grow"))
    assert set(asked(scene, "direction").values()) == {"up and to the left"}
    assert "Which way does the red star go?" in asked(scene, "direction")
    which = asked(scene, "which")
    assert which["Which shape moves?"] == "the star"
    assert which["What shape grows?"] == "the circle"
    assert asked(scene, "colour")["What colour is the shape that grows?"] == "blue"
    event = asked(scene, "event")
    assert event["Does anything grow?"] == "yes"
    assert event["Is there a shape that vanishes?"] == "no"
    assert asked(scene, "what")["What happens to the circle?"] == "it grows"


def test_shapes_are_counted_at_both_ends() -> None:
    counts = asked(clip(Motion("appear"), Motion("stay")), "count")
    assert counts["How many shapes are there at the start?"] == "one"
    assert counts["How many shapes are there at the end?"] == "two"
    assert asked(clip(Motion("vanish")), "count")["How many shapes can be seen at the end?"] == (
        "zero"
    )


def test_a_bounce_is_no_answer_to_what_moves() -> None:
    scene = clip(Motion("move", "left"), Motion("bounce", "top"))
    assert set(asked(scene, "which").values()) == {"the circle"}
    alone = asked(clip(Motion("bounce", "top")), "event")
    assert not any("move" in text for text in alone)
    assert set(asked(scene, "edge").values()) == {"top"}


def test_questions_that_a_clip_does_not_allow_are_refused() -> None:
    kinds: tuple[MotionQuestionKind, ...] = ("direction", "edge", "which", "colour")
    for kind in kinds:
        with pytest.raises(DataError, match=f"no question of kind {kind}"):
            ask_motion(clip(Motion("grow")), sample_rng(0, 0), kind)
    with pytest.raises(DataError, match="kind which"):
        ask_motion(clip(Motion("grow"), Motion("grow")), sample_rng(0, 0), "which")


@pytest.mark.parametrize(
    ("kind", "answer", "values"),
    [
        ("direction", "It moves up and to the left.", {"up left"}),
        ("direction", "to the left and upwards", {"up left"}),
        ("direction", "Left", {"left"}),
        ("direction", "left or right", {"left right"}),
        ("direction", "it stays", set()),
        ("edge", "the top edge", {"top"}),
        ("edge", "top or left", {"top", "left"}),
        ("what", "The star gets bigger.", {"grow"}),
        ("what", "it disappears", {"vanish"}),
        ("what", "It does not move.", {"stay"}),
        ("what", "it moves and grows", {"move", "grow"}),
        ("which", "The blue star.", {"star"}),
        ("colour", "light blue", {"light blue"}),
        ("colour", "It is blue!", {"blue"}),
        ("event", "Yes, the star does.", {"yes"}),
        ("event", "yes and no", {"yes", "no"}),
        ("count", "2", {"two"}),
        ("count", "none", {"zero"}),
        ("count", "There is one shape, not two", {"one", "two"}),
    ],
)
def test_answers_are_read(kind: MotionQuestionKind, answer: str, values: set[str]) -> None:
    assert read_motion_answer(kind, answer) == values
    if len(values) == 1:
        assert check_motion_answer(MotionQuestion(kind, "?", "", min(values)), answer)
