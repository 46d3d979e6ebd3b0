"""Stories as prompts: their text for GRPO on text, their images behind what precedes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from neounify.bundled import bundled_model
from neounify.engine.understanding import UnderstandingEngine
from neounify.flow.guidance import Branch
from neounify.flow.sampling import ImageSampling, ResolvedSampling
from neounify.pipeline import ImagePart, Pipeline, TextPart, load
from neounify.post_train.answers import TOKENS, Answers, draw_seed, restored_answers
from neounify.post_train.base import SamplerConfig
from neounify.post_train.grpo import FlowGrpoConfig
from neounify.post_train.policy import interleaved_prompt, prefill
from neounify.post_train.prompts import PromptCase, PromptConfig, build_prompts
from neounify.post_train.reward_kinds import SceneReward
from neounify.post_train.rollout import image_request
from neounify.post_train.stories import image_marks, sample_stories, story_prompts
from neounify.post_train.text_grpo import AnswerBatch
from neounify.scenes.world.facts import SceneFacts
from neounify.scenes.world.render import render
from neounify.scenes.world.scene import scene_config

GROUP, LIMIT = 2, 120
WORLD = scene_config("default")


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return load(bundled_model(), dtype="float32")


def drawn(numbers: range, *, answers: bool) -> list[PromptCase]:
    """Some cases of stories."""
    source = build_prompts(PromptConfig(categories={"story": 1.0}), (64, 64), 16, answers=answers)
    return [source.case(number) for number in numbers]


def resolved(pipe: Pipeline, **fields: Any) -> ResolvedSampling:
    return ImageSampling(**fields).resolve(pipe.config, editing=True)


def sampled(
    pipe: Pipeline, cases: list[PromptCase], limit: int = LIMIT, max_images: int = 4
) -> Answers:
    sampling = resolved(pipe, steps=2, guidance=1.0, image_guidance=1.0)
    prompts = story_prompts(pipe.model, pipe.processor, cases, sampling, "cond", think=False)
    return sample_stories(
        pipe.model, pipe.processor, cases, prompts, GROUP, sampling,
        max_new_tokens=limit, max_images=max_images, think=False, seed=5, iteration=2,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cases() -> list[PromptCase]:
    return drawn(range(2), answers=True)


@pytest.fixture(scope="module")
def stories(pipe: Pipeline, cases: list[PromptCase]) -> Answers:
    return sampled(pipe, cases)


# --- prompts ---


def test_a_story_is_its_request_or_all_before_one_of_its_images() -> None:
    for case in drawn(range(6), answers=True):
        assert (case.preceding, case.editing, case.images) == ((), True, ())
        assert len(case.target.steps) in (2, 3)
    reward = SceneReward(WORLD)
    lengths = set()
    for case, whole in zip(
        drawn(range(12), answers=False), drawn(range(12), answers=True), strict=True
    ):
        assert case.prompt == whole.prompt
        assert case.preceding is not None
        assert case.real is not None
        lengths.add(len(case.preceding))
        wanted = len(case.preceding) // 2
        assert [isinstance(part, str) for part in case.preceding] == [True, *[False, True] * wanted]
        assert str(case.preceding[-1]).strip() == whole.target.steps[wanted].text
        assert isinstance(case.target, SceneFacts)
        assert reward([np.asarray(case.real())], [case])[0]["strict"] == 1.0
        if wanted:
            assert reward([np.asarray(case.preceding[-2])], [case])[0]["strict"] == 0.0
    assert lengths == {1, 3, 5}


def test_the_reward_of_a_story_is_that_of_the_benchmark(cases: list[PromptCase]) -> None:
    case = cases[0]
    images = [np.asarray(render(step.scene, WORLD)) for step in case.target.steps]
    parts = [part for image in images for part in ("text", image)]
    wrong = parts.copy()
    wrong[-1] = images[0]
    rewards = SceneReward(WORLD)([tuple(parts), tuple(wrong), ("text",)], [case] * 3)
    count = len(images)
    assert rewards[0] == {"strict": 1.0, "share": 1.0}
    assert rewards[1] == {"strict": 0.0, "share": pytest.approx(count / (count + 1))}
    assert rewards[2] == {"strict": 0.0, "share": 0.0}


@pytest.mark.parametrize("branch", ["cond", "image"])
def test_what_was_told_is_read_as_in_training(pipe: Pipeline, branch: Branch) -> None:
    case = next(c for c in drawn(range(12), answers=False) if len(c.preceding or ()) == 3)
    preceding = case.preceding
    assert preceding is not None
    assert not isinstance(preceding[1], str)
    sampling = resolved(pipe, steps=2, guidance=2.0, image_guidance=1.5)
    request = image_request(case, sampling)
    assert sampling.guidance.branches() == ("cond", "image", "uncond")
    caches = prefill(pipe.model, pipe.processor, [case], [request])[0]
    tokenizer, token = pipe.tokenizer, pipe.processor.token
    prompt = interleaved_prompt(pipe.model, pipe.processor, case, request, branch)
    ids = [i for piece in prompt.pieces for i in piece.ids]
    opens, closes = image_marks(pipe.processor)
    empty_thought = [
        i for mark in ("<think>", "</think>") for i in (token(mark), *tokenizer.encode("\n\n"))
    ]

    def turn(role: str, text: str) -> list[int]:
        return [token("<|im_start|>"), *tokenizer.encode(f"{role}\n{text}")]

    end = [token("<|im_end|>"), *tokenizer.encode("\n")]
    start = [*turn("user", case.prompt if branch == "cond" else ""), *end, *turn("assistant", "")]
    first, last = (tokenizer.encode(str(preceding[i])) for i in (0, 2))
    expected = {
        "cond": [*start, *empty_thought, *first, opens, closes, *last, opens],
        "image": [*start, opens, closes, opens],
    }[branch]
    assert ids == expected
    grids = [piece.grid.length for piece in prompt.pieces if piece.grid is not None]
    assert grids == [16]
    assert caches[branch].length == prompt.length
    assert caches["uncond"].length == len([*turn("user", ""), *end, *turn("assistant", ""), opens])


# --- text ---


def test_log_probabilities_of_stories_are_those_of_the_update(
    pipe: Pipeline, stories: Answers
) -> None:
    batch = AnswerBatch(pipe.model, stories, range(stories.count))
    with torch.no_grad():
        scores = batch.scores(pipe.model).log_probs.split(batch.lengths.tolist())
    opens, _ = image_marks(pipe.processor)
    for sample, values in enumerate(scores):
        tokens, images = stories.tokens[sample], stories.images[sample]
        sampled_here = stories.sampled[sample]
        assert len(images) == list(tokens).count(opens) > 1
        assert sampled_here.isnan().tolist() == [token == opens for token in tokens[:-1]]
        known = ~sampled_here.isnan()
        assert torch.allclose(values[:-1][known], sampled_here[known], atol=2e-4)
    alone = AnswerBatch(pipe.model, stories, [1])
    with torch.no_grad():
        assert torch.allclose(alone.scores(pipe.model).log_probs, scores[1], atol=2e-4)


def test_images_are_inputs_of_the_text_behind_them(pipe: Pipeline, stories: Answers) -> None:
    other = Answers(
        cases=stories.cases,
        group=GROUP,
        prompts=stories.prompts,
        tokens=stories.tokens,
        sampled=stories.sampled,
        images=[[image * -1 for image in images] for images in stories.images],
        marks=stories.marks,
    )
    with torch.no_grad():
        one, two = (AnswerBatch(pipe.model, a, [0]).scores(pipe.model) for a in (stories, other))
    differ = (one.log_probs != two.log_probs).nonzero().flatten()
    opens, _ = image_marks(pipe.processor)
    assert int(differ[0]) > list(stories.tokens[0]).index(opens)


def test_stories_are_those_of_the_pipeline(
    pipe: Pipeline, cases: list[PromptCase], stories: Answers
) -> None:
    for sample in range(stories.count):
        case = cases[sample // GROUP]
        seed = draw_seed(5, 2, TOKENS, sample)
        parts = list(
            pipe.interleave(
                case.prompt, width=64, height=64, seed=seed, max_images=4, max_new_tokens=LIMIT,
                steps=2, guidance=1.0, image_guidance=1.0, temperature=1.0,
            )
        )  # fmt: skip
        texts = [""]
        for part in parts:
            if isinstance(part, ImagePart):
                texts.append("")
            elif isinstance(part, TextPart):
                texts[-1] += part.text
        preceding = [str(part) for part in stories.parts[sample][::2]]
        assert [text.strip() for text in texts] == preceding
    seen = [stories.parts[sample][1] for sample in (0, 1)]
    assert not np.array_equal(seen[0], seen[1])


def test_a_story_does_not_depend_on_what_is_told_beside_it(
    pipe: Pipeline, cases: list[PromptCase], stories: Answers
) -> None:
    alone = sampled(pipe, cases[:1])
    for sample in range(GROUP):
        assert alone.tokens[sample] == stories.tokens[sample]
        for one, two in zip(alone.images[sample], stories.images[sample], strict=True):
            assert torch.allclose(one, two, atol=1e-3)


def test_a_story_ends_at_its_limit_of_tokens(pipe: Pipeline, cases: list[PromptCase]) -> None:
    whole = sampled(pipe, cases[:1])
    first = list(whole.tokens[0]).index(image_marks(pipe.processor)[0]) + 1
    cut = sampled(pipe, cases[:1], limit=first + 2)  # the mark of an image is no text
    assert len(cut.tokens[0]) == first + 3
    assert (len(cut.images[0]), len(cut.sampled[0])) == (1, first + 3)
    none = sampled(pipe, cases[:1], limit=first - 1)
    assert (len(none.tokens[0]), len(none.images[0])) == (first - 1, 0)
    assert none.outputs()[0] == (none.texts[0],)


def test_a_story_ends_where_it_opens_too_many_images(
    pipe: Pipeline, cases: list[PromptCase]
) -> None:
    one = sampled(pipe, cases[:1], max_images=1)
    marks, device = image_marks(pipe.processor), pipe.model.device
    assert (one.tokens[0][-1], len(one.images[0]), len(one.parts[0])) == (marks[0], 1, 3)
    assert len(one.sampled[0]) == len(one.tokens[0]) - 1
    batch = AnswerBatch(pipe.model, one, [0])
    with torch.no_grad():
        assert len(batch.scores(pipe.model).log_probs) == len(one.tokens[0])
    again = restored_answers(one.cases, one.prompts, GROUP, one.tensors(), device, marks)
    assert again.tokens == one.tokens


def test_saved_stories_are_restored(pipe: Pipeline, stories: Answers) -> None:
    marks = image_marks(pipe.processor)
    tensors = stories.tensors()

    def restored(tensors: dict[str, torch.Tensor]) -> Answers:
        device = pipe.model.device
        return restored_answers(stories.cases, stories.prompts, GROUP, tensors, device, marks)

    again = restored(tensors).tensors()
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[n].nan_to_num(7), t.nan_to_num(7)) for n, t in tensors.items())
    with pytest.raises(ValueError, match="other numbers of images"):
        restored({**tensors, "image_counts": tensors["image_counts"].flip(0) + 1})
    with pytest.raises(ValueError, match=r"there are \d images of answers, not \d"):
        restored({**tensors, "images": tensors["images"][1:]})
    with pytest.raises(KeyError):
        restored({n: t for n, t in tensors.items() if n != "images"})


def test_thoughts_before_images_of_a_story_are_refused() -> None:
    prompts = PromptConfig(categories={"story": 1.0})
    with pytest.raises(ValidationError, match="images of a story follow no thought"):
        FlowGrpoConfig(prompts=prompts, think=True, sampler=SamplerConfig(steps=4))


def test_a_request_is_read_once_per_group(
    pipe: Pipeline, cases: list[PromptCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[UnderstandingEngine] = []

    class Recorded(UnderstandingEngine):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            engines.append(self)

    monkeypatch.setattr("neounify.post_train.answers.UnderstandingEngine", Recorded)
    stories = sampled(pipe, cases[:1], limit=1)
    [engine] = engines
    shared = stories.prompts[0].length // engine.plan.kv_block_size * engine.plan.kv_block_size
    assert shared > 0
    assert engine.counters["und_known_tokens"] == GROUP * shared
    engine.check()
