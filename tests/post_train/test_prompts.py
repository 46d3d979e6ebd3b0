"""Prompts as a function of their number, and files that cannot be used."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from neounify.data.sample import DataError
from neounify.errors import ConfigError
from neounify.post_train.prompts import ANSWER_CATEGORIES, PromptConfig, build_prompts
from neounify.post_train.reward_kinds import SceneReward
from neounify.scenes.world.scene import in_split, scene_config


def test_scenes_are_a_function_of_the_number() -> None:
    config = PromptConfig(categories={"two_object": 1.0, "attribution": 2.0, "edit": 1.0})
    one, two = (build_prompts(config, (64, 64), 32) for _ in range(2))
    cases = [one.case(number) for number in range(40)]
    assert [two.case(n).prompt for n in reversed(range(40))] == [c.prompt for c in cases[::-1]]
    counts = Counter(case.category for case in cases)
    assert set(counts) == {"two_object", "attribution", "edit"}
    assert counts["attribution"] > counts["two_object"]
    assert all(bool(case.images) == (case.category == "edit") for case in cases)


def test_scenes_of_another_seed_and_unknown_categories() -> None:
    one, two = (build_prompts(PromptConfig(seed=seed), (64, 64), 32) for seed in (0, 1))
    assert [one.case(n).prompt for n in range(9)] != [two.case(n).prompt for n in range(9)]
    with pytest.raises(ConfigError, match="no category beauty; there are single_object"):
        build_prompts(PromptConfig(categories={"beauty": 1.0}), (64, 64), 32)
    with pytest.raises(ConfigError, match="multiples of 32"):
        build_prompts(PromptConfig(width=70), (64, 64), 32)


def test_scenes_for_texts_are_of_the_train_split() -> None:
    config = PromptConfig(categories={"question/where": 2.0, "caption": 1.0})
    one, two = (build_prompts(config, (64, 64), 32, answers=True) for _ in range(2))
    cases = [one.case(number) for number in range(40)]
    assert [two.case(n).prompt for n in range(40)] == [case.prompt for case in cases]
    assert set(Counter(case.category for case in cases)) == {"question/where", "caption"}
    assert all(case.images[0].size == (64, 64) for case in cases)
    assert all(in_split(case.target.scene, "train") for case in cases)
    every = build_prompts(PromptConfig(), (64, 64), 32, answers=True)
    assert {every.case(n).category for n in range(150)} == set(ANSWER_CATEGORIES)
    for answers, wrong in ((True, "edit"), (False, "caption")):
        with pytest.raises(ConfigError, match=f"no category {wrong}"):
            build_prompts(PromptConfig(categories={wrong: 1.0}), (64, 64), 32, answers=answers)


def test_scenes_in_several_sizes_wordings_and_languages() -> None:
    sizes = ((64, 64, 1.0), (128, 64, 1.0), (64, 96, 1.0))
    config = PromptConfig(
        categories={"attribution": 2.0, "edit": 1.0}, sizes=sizes, wording=0.5, chinese=0.5
    )
    source = build_prompts(config, (64, 64), 32)
    cases = [source.case(number) for number in range(60)]
    assert {(case.width, case.height) for case in cases} == {size[:2] for size in sizes}
    assert 15 < sum(not case.prompt.isascii() for case in cases) < 45
    reward = SceneReward(scene_config("default"))
    for case in cases:
        assert case.real is not None
        real = case.real()
        assert real.size == (case.width, case.height)
        assert reward([np.asarray(real)], [case])[0]["strict"] == 1.0, case.prompt
    plain = replace(config, wording=0.0, chinese=0.0)
    assert all(build_prompts(plain, (64, 64), 32).case(n).prompt.isascii() for n in range(20))
    with pytest.raises(ValidationError, match="sizes, or width and height"):
        PromptConfig(sizes=sizes, width=64)
    with pytest.raises(ValidationError, match="of prompts of scenes alone"):
        PromptConfig(kind="text", path="a.txt", chinese=0.5)
    with pytest.raises(ConfigError, match="a side of 70 pixels"):
        build_prompts(PromptConfig(sizes=((64, 70, 1.0),)), (64, 64), 32)


def test_text_files_are_shuffled_anew_in_each_epoch(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n three \n", encoding="utf-8")
    source = build_prompts(PromptConfig(kind="text", path=str(file)), (64, 96), 32)
    prompts = [source.case(number).prompt for number in range(30)]
    for epoch in range(10):
        assert sorted(prompts[3 * epoch : 3 * epoch + 3]) == ["one", "three", "two"]
    assert len({tuple(prompts[3 * e : 3 * e + 3]) for e in range(10)}) > 1
    assert (source.case(0).width, source.case(0).height) == (64, 96)


def test_json_lines_with_shares_of_categories(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    records = [
        {"prompt": "a sign", "category": "text", "text": "Open", "width": 96},
        {"prompt": "a boat", "category": "objects"},
        {"prompt": "a tree", "category": "objects"},
    ]
    file.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    config = PromptConfig(kind="jsonl", path=str(file), categories={"text": 9.0, "objects": 1.0})
    source = build_prompts(config, (64, 64), 32)
    cases = [source.case(number) for number in range(50)]
    counts = Counter(case.category for case in cases)
    assert counts["text"] > 35
    sign = next(case for case in cases if case.category == "text")
    assert (sign.width, sign.record["text"]) == (96, "Open")
    with pytest.raises(DataError, match="no prompt of category music"):
        build_prompts(
            PromptConfig(kind="jsonl", path=str(file), categories={"music": 1.0}), (64, 64), 32
        )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 is no JSON"),
        ("[]", 'expected an object with a text "prompt"'),
        ('{"prompt": " "}', "line 1: the prompt is empty"),
        ('{"prompt": "a", "width": 33}', "width must be a multiple of 32 up to 16384, got 33"),
        ('{"prompt": "a", "images": ["../secret.png"]}', "lies outside the folder"),
        ('{"prompt": "a", "images": "x.png"}', "must be a list"),
        ('{"prompt": "a", "images": ["x.png"]}', "line 1: there is no image 'x.png' in "),
        ('{"prompt": "a", "image": "x.png"}', "line 1: there is no image 'x.png' in "),
        ('{"prompt": "a", "answer": 7}', "answer must be a text, got 7"),
        ("", "holds no prompts"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        build_prompts(PromptConfig(kind="jsonl", path=str(file)), (64, 64), 32)
