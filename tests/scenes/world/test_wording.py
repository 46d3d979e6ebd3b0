"""Wider wordings: one meaning each, what is held out stays out, answers to what is not there."""

import re
from collections.abc import Iterable, Iterator
from itertools import islice

import pytest

from neounify.data import DataError, Sample, SampleImage, SampleText
from neounify.scenes.world import PRESETS, SceneDataset, parse_caption, sample_scene
from neounify.scenes.world import phrasebook as book
from neounify.scenes.world.draw import sample_rng
from neounify.scenes.world.edits import (
    EDIT_KINDS,
    SceneEdit,
    articles_may_go,
    instruct,
    sample_edit,
)
from neounify.scenes.world.facts import canonical, facts_of
from neounify.scenes.world.language import caption, prompt
from neounify.scenes.world.lexicon import LANGUAGES, Language, phrases
from neounify.scenes.world.questions import (
    QUESTION_KINDS,
    ask,
    ask_absent,
    ask_wide,
    check_answer,
    without_image,
)
from neounify.scenes.world.samples import draw_style
from neounify.scenes.world.scene import HELD_OUT_PAIRS
from neounify.scenes.world.wide import draw_wide_question, wide_prompt
from neounify.scenes.world.wording import (
    Surface,
    _intended,
    _usual_words,
    draw_surface,
    known_words,
    misspell,
    plain,
    punctuated,
)

DEFAULT = PRESETS["default"]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("forms", ["wide", "held_out"])
def test_prompts_in_every_form_read_back_to_the_same_facts(
    forms: book.FormSet, language: Language
) -> None:
    for n in range(200):
        rng = sample_rng(1, 7, n)
        scene = sample_scene(rng, DEFAULT)
        facts = facts_of(scene, DEFAULT, draw_style(rng), rng)
        text = prompt(facts, rng, language, forms)
        assert canonical(parse_caption(plain(text))) == canonical(facts), text


@pytest.mark.parametrize("world", ["default", "wide", "hard"])
def test_prompts_read_back_however_they_are_written(world: str) -> None:
    config = PRESETS[world]
    for n in range(250):
        rng = sample_rng(2, 7, n)
        scene = sample_scene(rng, config)
        facts = facts_of(scene, config, draw_style(rng), rng)
        language = LANGUAGES[n % 2]
        text = wide_prompt(rng, facts, language)
        assert canonical(parse_caption(plain(text))) == canonical(facts), text


@pytest.mark.parametrize(
    "surface",
    [
        Surface(case="upper"),
        Surface(case="title", end="!"),
        Surface(case="lower", spaces=2),
        Surface(digits=True, end="…"),
        Surface(typos=1),
        Surface(words=1.0),
        Surface(words=1.0, without=book.HELD_OUT_WORDS["paint"], typos=1, case="upper"),
    ],
)
def test_a_surface_changes_how_a_text_is_written_and_not_what_it_says(surface: Surface) -> None:
    for n in range(200):
        rng = sample_rng(3, 7, n)
        scene = sample_scene(rng, DEFAULT)
        facts = facts_of(scene, DEFAULT, draw_style(rng), rng)
        text = surface.write(caption(facts, rng), rng)
        assert canonical(parse_caption(plain(text))) == canonical(facts), text


def test_the_default_surface_changes_nothing() -> None:
    text = "Draw a red circle, please."
    assert Surface().write(text, sample_rng(0)) == text


def test_other_marks_change_the_end_alone() -> None:
    for n in range(20):
        text = punctuated(sample_rng(n)).write("Draw a red circle.", sample_rng(n))
        assert text.rstrip(".!…") == "Draw a red circle"
    assert Surface(end="none").write("Is it red?", sample_rng(0)) == "Is it red"


def test_a_synonym_takes_the_article_and_the_plural_that_it_needs() -> None:
    seen = set()
    for n in range(300):
        text = Surface(words=1.0).write("a purple square and two crosses", sample_rng(n))
        assert re.fullmatch(r"(a|an) \S+ .+ and two .+s", text), text
        assert ("an " in text) == (text.split()[1][0] in "aeiou"), text
        seen |= {text.split()[-1]}
    assert {"signs", "shapes", "pluses"} <= seen


def test_a_typo_is_one_edit_of_one_word_and_means_one_word() -> None:
    for n in range(500):
        rng = sample_rng(4, 7, n)
        text = "please draw a small purple triangle below an orange star"
        typo = misspell(text, rng)
        changed = [(a, b) for a, b in zip(text.split(), typo.split(), strict=True) if a != b]
        assert len(changed) == 1
        word, wrong = changed[0]
        assert wrong not in known_words()
        assert len(word) >= 4
        assert abs(len(word) - len(wrong)) <= 1
        assert plain(typo) == plain(text)


def test_words_too_short_for_a_typo_stay() -> None:
    assert misspell("a red box", sample_rng(0)) == "a red box"


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("forms", ["plain", "wide", "held_out"])
def test_no_instruction_has_two_meanings(forms: book.FormSet, language: Language) -> None:
    """The same words around the slots belong to one kind of edit, also without articles.

    An addition names its object with "a" and a move with "the", so both may say "put".
    """
    meant: dict[str, set[str]] = {}
    for kind in EDIT_KINDS:
        name = {"add": "a star", "background": ""}.get(kind, "the star")
        if language == "zh":
            name = {"add": "一个五角星"}.get(kind, "五角星")
        shapes = list(book.EDIT_FORMS[forms][language][kind])
        if forms == "wide":
            shapes += book.EDIT_STATEMENTS[language][kind]
        for form in shapes:
            text = form.format(name=name, new="red", place="top left")
            meant.setdefault(text.lower().rstrip("."), set()).add(kind)
            edit = next(e for e in _edits() if e.kind == kind)
            if articles_may_go(edit, text):
                bare = re.sub(r"\b(?:a|an|the) ", "", text.lower())
                meant.setdefault(bare.rstrip("."), set()).add(kind)
    assert {text: kinds for text, kinds in meant.items() if len(kinds) > 1} == {}


def _edits() -> Iterator[SceneEdit]:
    return (sample_edit(sample_rng(0, 1, n), DEFAULT, kind) for n, kind in enumerate(EDIT_KINDS))


@pytest.mark.parametrize("language", LANGUAGES)
def test_instructions_name_what_the_edit_changes(language: Language) -> None:
    for n in range(200):
        rng = sample_rng(5, 7, n)
        edit = sample_edit(rng, DEFAULT, None, language)
        forms: book.FormSet = "wide" if n % 2 else "held_out"
        text = instruct(edit, DEFAULT, rng, language, forms)
        assert "{" not in text
        if edit.kind in ("add", "move") and language == "en":
            come = next(o for o in edit.target.objects if o not in edit.source.objects)
            row, column = ("top", "bottom")[come.cell[0]], ("left", "right")[come.cell[1]]
            assert f"{row} {column}" in text
        if edit.kind == "background" and language == "en":
            assert edit.target.background in text


def test_yes_or_no_questions_are_true_in_half_of_the_cases_and_check_themselves() -> None:
    answers: dict[str, list[str]] = {}
    for n in range(1200):
        rng = sample_rng(6, 7, n)
        kind = QUESTION_KINDS[n % len(QUESTION_KINDS)]
        if kind == "exists":
            continue
        scene = sample_scene(rng, DEFAULT)
        question = ask_wide(scene, DEFAULT, rng, kind, LANGUAGES[n % 3 % 2], yes_no=True)
        if question is None:
            continue
        assert check_answer(question, question.answer)
        answers.setdefault(kind, []).append(question.value)
    assert set(answers) == set(QUESTION_KINDS) - {"exists"}
    for asked, said in answers.items():
        assert 0.3 < said.count("yes") / len(said) < 0.7, asked


def test_a_yes_or_no_question_of_a_relation_is_answered_from_the_cells() -> None:
    for n in range(200):
        rng = sample_rng(8, 7, n)
        scene = sample_scene(rng, DEFAULT, "pair")
        question = ask_wide(scene, DEFAULT, rng, "relation", yes_no=True)
        assert question is not None
        hit = re.search(
            r"the (.+?) (?:is |lie )?(left of|right of|above|below) the (\w+ ?\w*)", question.text
        )
        assert hit is not None, question.text
        one, two = (
            next(o for o in scene.objects if {o.shape, o.colour} & set(name.split()[-1:]))
            for name in (hit[1], hit[3].removesuffix(", right"))
        )
        (r1, c1), (r2, c2) = one.cell, two.cell
        holds = {"left of": c1 < c2, "right of": c1 > c2, "above": r1 < r2, "below": r1 > r2}
        assert question.value == ("yes" if holds[hit[2]] else "no")


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_is_not_there_is_said_not_to_be_there(language: Language) -> None:
    for n in range(300):
        rng = sample_rng(9, 7, n)
        scene = sample_scene(rng, DEFAULT)
        question = ask_absent(scene, DEFAULT, rng, language)
        assert question is not None
        assert check_answer(question, question.answer)
        for wrong in ("red", "top left", "no", "there is no image", "没有", "small"):
            assert not check_answer(question, wrong)
        blind = without_image(question)
        assert check_answer(blind, blind.answer)
        assert not check_answer(blind, question.answer)


def test_an_answer_about_a_missing_object_must_name_that_object() -> None:
    rng = sample_rng(0)
    scene = sample_scene(rng, DEFAULT, "single")
    question = next(
        q for n in range(99) if (q := ask_absent(scene, DEFAULT, sample_rng(n))) and " " in q.value
    )
    colour = next(w for w in question.value.split() if w in DEFAULT.colours)
    shape = next(w for w in question.value.split() if w != colour)
    assert check_answer(question, f"There is no {colour} {shape}.")
    assert not check_answer(question, f"there is no {shape}")


def _texts(sample: Sample) -> list[str]:
    return [
        part.text
        for turn in sample.turns
        if turn.role == "user"
        for part in turn.parts
        if isinstance(part, SampleText)
    ]


_TASK_OF: dict[str, book.WordTask] = {
    "t2i": "paint",
    "t2i_think": "paint",
    "vqa": "question",
    "caption": "question",
    "text": "question",
    "edit": "edit",
    "edit_think": "edit",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_training_sample_uses_a_held_out_wording(language: Language) -> None:
    """Neither a synonym nor a form that is held out of its task, in any writing."""
    forms = {task: _held_out_forms(task, language) for task in set(_TASK_OF.values())}
    words = {task: _held_out_words(task, language) for task in set(_TASK_OF.values())}
    tasks = dict.fromkeys(_TASK_OF, 1.0)
    data = SceneDataset(21, DEFAULT, tasks, chinese=float(language == "zh"), wording=1.0)
    for sample in islice(iter(data), 6000):
        task = _TASK_OF[sample.task]
        for text in _texts(sample):
            spelt = _spelt(text)
            hits = [p.pattern for p in words[task] if p.search(spelt)]
            usual = _usual_words(spelt, language)
            hits += [p.pattern for p in forms[task] if p.search(usual)]
            assert not hits, text


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_search_for_held_out_wordings_finds_them(language: Language) -> None:
    forms = {task: _held_out_forms(task, language) for task in set(_TASK_OF.values())}
    for n in range(200):
        rng = sample_rng(22, n)
        scene = sample_scene(rng, DEFAULT)
        facts = facts_of(scene, DEFAULT, draw_style(rng), rng)
        edit = sample_edit(rng, DEFAULT, None, language)
        kind = QUESTION_KINDS[n % len(QUESTION_KINDS)]
        yes_no = kind != "exists" and n % 3 == 0
        asked = ask_wide(
            scene, DEFAULT, rng, kind, language, forms="held_out", yes_no=yes_no
        ) or ask_wide(scene, DEFAULT, rng, "background", language, forms="held_out")
        assert asked is not None
        texts: dict[book.WordTask, str] = {
            "paint": prompt(facts, rng, language, "held_out"),
            "edit": instruct(edit, DEFAULT, rng, language, "held_out"),
            "question": asked.text,
        }
        for task, text in texts.items():
            usual = _usual_words(_spelt(text), language)
            assert any(p.search(usual) for p in forms[task]), text


def _spelt(text: str) -> str:
    """Small letters, single spaces, no typos; the same words."""
    text = re.sub(r"\s+", " ", text.lower())
    return re.sub(r"[a-z]+", lambda m: _intended().get(m[0], m[0]), text)


def _one_of(words: Iterable[str]) -> str:
    return "(?:" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + ")"


def _slots(language: Language) -> dict[str, str]:
    """What may stand in each slot of a form, in usual words."""
    shapes, colours, places, sizes = (
        _one_of(phrases(kind, language)) for kind in ("shape", "colour", "place", "size")
    )
    if language == "en":
        count = r"(?:(?:an?|the|one|two|three|four|\d) )?"
        noun = rf"{count}(?:{sizes} )?(?:{colours} )?{shapes}(?: in (?:the )?{places})?"
        relation = _one_of(phrases("relation", "en"))
    else:
        noun = rf"(?:{places}的)?(?:[一两三四1-4]个)?(?:{sizes})?的?(?:{colours})?{shapes}"
        relation = _one_of(phrases("relation", "zh"))
    slots = dict.fromkeys(("t", "n", "ns", "n1", "a", "b", "name"), noun)
    slots |= {"rel": relation, "new": colours, "place": places}
    slots |= {"claim": f"(?:{noun}|{colours}|{sizes}|{places})"}
    return slots | dict.fromkeys("cxq", ".+")


def _held_out_forms(task: book.WordTask, language: Language) -> list[re.Pattern[str]]:
    if task == "question":
        forms = [f for some in book.QUESTION_FORMS["held_out"][language].values() for f in some]
        return [_pattern(f, language, r"(?:^|[:,.，] ?|请问)") for f in forms] + [
            _pattern(f, language, "^") for f in book.ASKED["held_out"][language]
        ]
    polite = [_pattern(f, language, "^") for f in book.POLITE["held_out"][language]]
    if task == "edit":
        inside = [f for some in book.EDIT_FORMS["held_out"][language].values() for f in some]
        return polite + [_pattern(f, language, "") for f in inside]
    inside = [*book.PROMPT_REQUESTS["held_out"][language]]
    return [
        *polite,
        *(_pattern(f, language, "") for f in inside),
        *(_pattern(f, language, "^") for f in book.PROMPT_STATEMENTS["held_out"][language]),
    ]


def _pattern(form: str, language: Language, start: str) -> re.Pattern[str]:
    slots = _slots(language)
    pattern = ""
    for part in re.split(r"(\{\w+\})", _usual_words(form.lower().rstrip(".?！？。"), language)):
        if part.startswith("{"):
            pattern += slots[part[1:-1]]
        else:
            pattern += re.sub(r"(?:an|a|the)\\ ", r"(?:(?:an?|the)\\ )?", re.escape(part))
    return re.compile(start + (r"\b" if language == "en" else "") + pattern + r"(?![a-z])")


def _held_out_words(task: book.WordTask, language: Language) -> list[re.Pattern[str]]:
    words = [w for w in book.HELD_OUT_WORDS[task] if w.isascii() == (language == "en")]
    if language == "zh":
        return [re.compile(f"(?<!正){word}") for word in words]
    # "plus" alone may be held out where "plus sign" is not.
    return [re.compile(rf"\b{re.escape(word)}\b(?! sign)") for word in words]


def test_samples_in_wider_wordings_are_repeatable_and_well_formed() -> None:
    one = SceneDataset(7, DEFAULT, chinese=0.3, wording=0.7, sizes={(64, 64): 2, (128, 64): 1})
    two = SceneDataset(7, DEFAULT, chinese=0.3, wording=0.7, sizes={(64, 64): 2, (128, 64): 1})
    shapes = set()
    for n in range(200):
        assert one[n].text() == two[n].text()
        images = [p for t in one[n].turns for p in t.parts if isinstance(p, SampleImage)]
        shapes |= {p.pixels().shape for p in images}
        assert len({p.pixels().shape for p in images}) <= 1
    assert shapes == {(64, 64, 3), (64, 128, 3)}


def test_no_question_of_training_names_a_held_out_pair() -> None:
    for n in range(800):
        rng = sample_rng(10, 7, n)
        scene = sample_scene(rng, DEFAULT)
        question = draw_wide_question(rng, scene, DEFAULT, "en", "train")
        said = _usual_words(_spelt(question.text), "en")
        for shape, colour in HELD_OUT_PAIRS:
            assert f"{colour} {shape}" not in said, question.text


@pytest.mark.parametrize(
    "arguments",
    [
        {"wording": 1.5},
        {"sizes": {}},
        {"sizes": {(64, 64): 0}},
        {"sizes": {(64, 64): 1}, "side": 64},
        {"sizes": {(16, 64): 1}},
    ],
)
def test_settings_out_of_range_are_refused(arguments: dict[str, object]) -> None:
    with pytest.raises(DataError):
        SceneDataset(0, DEFAULT, **arguments)  # type: ignore[arg-type]


def test_plain_data_is_what_it_was_without_wider_wordings() -> None:
    assert ask(sample_scene(sample_rng(0), DEFAULT), DEFAULT, sample_rng(0)).text[-1] == "?"
    drawn = {draw_surface(sample_rng(n), "paint", "en").case for n in range(60)}
    assert {"", "upper", "lower"} <= drawn
