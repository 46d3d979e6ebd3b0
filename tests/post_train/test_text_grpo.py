"""GRPO on texts, alone and jointly with the image behind a thought."""

from __future__ import annotations

import json
from collections.abc import Iterable
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from neounify.engine.understanding import UnderstandingEngine
from neounify.errors import CheckpointError, ConfigError
from neounify.pipeline import load
from neounify.post_train.answers import (
    TOKENS,
    Answers,
    chat_prompts,
    draw_seed,
    sample_answers,
    thought_prefixes,
)
from neounify.post_train.base import Means
from neounify.post_train.grpo import FlowGrpo
from neounify.post_train.policy import TokenPrompt
from neounify.post_train.prompts import PromptCase, PromptConfig, build_prompts
from neounify.post_train.text_grpo import AnswerBatch, TextGrpo, TokenObjective, divergence
from neounify.text.template import after_think_ids, image_prompt
from neounify.train.method import TrainStep
from neounify.train.state import saved_states
from support.post_training import BASE, QUESTIONS, TEXT, built, described, metrics, run
from train.test_trainer import trainer

TEXTS = ("text", "story", "limit", "joint")
"""Methods that sample texts."""


def questions(numbers: Iterable[int]) -> list[PromptCase]:
    """Some cases for texts."""
    config = PromptConfig(categories={"question/where": 1.0, "caption": 1.0})
    source = build_prompts(config, (32, 32), 32, answers=True)
    return [source.case(number) for number in numbers]


# --- in the trainer ---


@pytest.mark.parametrize("name", TEXTS)
def test_the_ratio_is_one_in_the_first_update(tmp_path: Path, name: str) -> None:
    run(tmp_path, name, {"kl": 0.0})
    lines = [line for line in metrics(tmp_path) if "reward" in line or "ratio" in line]
    names = ["thought/ratio", "ratio"] if name == "joint" else ["ratio"]
    for ratio in names:
        assert lines[0][ratio] == pytest.approx(1, abs=1e-6)
        assert abs(lines[1][ratio] - 1) > 1e-9
    assert lines[0]["thought/mismatch" if name == "joint" else "mismatch"] < 1e-4


def test_sheets_list_texts_with_rewards_and_advantages(tmp_path: Path) -> None:
    run(tmp_path, "text", {"sheet_every": 1, "updates": 1}, steps=1)
    lines = (tmp_path / "rollouts" / "iteration-000000-0.jsonl").read_text("utf-8").splitlines()
    sheet = [json.loads(line) for line in lines]
    assert len(sheet) == TEXT["prompts_per_iteration"]
    assert {line["category"] for line in sheet} <= {"question/where", "caption"}
    for line in sheet:
        assert len(line["samples"]) == TEXT["group"]
        assert sum(sample["advantage"] for sample in line["samples"]) == pytest.approx(0, abs=1e-3)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert "Newest texts" in page
    assert escape(sheet[0]["samples"][0]["output"]) in page
    run(tmp_path / "joint", "joint", {"sheet_every": 1, "updates": 1}, steps=1)
    names = {path.suffix for path in (tmp_path / "joint" / "rollouts").iterdir()}
    assert names == {".png", ".jsonl"}


def test_a_state_of_another_shape(tmp_path: Path) -> None:
    trainer(tmp_path, described("text")).run(stop_after=1)
    again = trainer(tmp_path, described("text", {"group": 4}))
    again.resume(saved_states(again.states)[-1])
    with pytest.raises(CheckpointError, match=r"method\.group was 3 and is 4"):
        again.run()


# --- sampling and log-probabilities ---


@pytest.mark.parametrize("think", [False, True])
def test_answers_and_log_probabilities_are_those_of_chat(think: bool) -> None:
    pipe = load(BASE[0], dtype="float32")
    cases = questions(range(5))
    prompts = chat_prompts(pipe.model, pipe.processor, cases, think=think)
    answers = sample_answers(
        pipe.model, pipe.processor, cases, prompts, 3, 24, think=think, seed=5, iteration=2
    )
    batch = AnswerBatch(pipe.model, answers, range(answers.count))
    with torch.no_grad():
        scores = batch.scores(pipe.model)
    each = scores.log_probs.split(batch.lengths.tolist())
    for sample, (mine, theirs) in enumerate(zip(each, answers.sampled, strict=True)):
        torch.testing.assert_close(mine[: len(theirs)], theirs, atol=1e-5, rtol=1e-5)
        assert len(mine) - len(theirs) in (0, 1)  # the stop token
        case = cases[sample // 3]
        options: Any = {"temperature": 1.0, "seed": draw_seed(5, 2, TOKENS, sample)}
        chat = pipe.chat(case.prompt, case.images, max_new_tokens=24, think=think, **options)
        written = pipe.tokenizer.decode(answers.tokens[sample][: len(theirs)]).strip()
        assert chat.text == written
        assert think or answers.texts[sample] == written.partition("<think>")[0].strip()
    assert len({tuple(tokens) for tokens in answers.tokens}) > 10


def test_thoughts_are_those_of_generate() -> None:
    """The prefix behind a thought is that of inference, for the same tokens."""
    pipe = load(BASE[0], dtype="float32")
    thought = pipe.tokenizer.encode("a red circle")
    close = pipe.processor.token("</think>")
    prompt = image_prompt(pipe.tokenizer, "a circle", system="", think=True)
    read = TokenPrompt.of(pipe.model, prompt, [])
    for ending in ([close], [pipe.processor.token("<|im_end|>")], []):
        answers = Answers(
            cases=[],
            group=1,
            prompts=[read],
            tokens=[[*thought, *ending]],
            sampled=[torch.zeros(len(thought))],
        )
        [caches] = thought_prefixes(pipe.model, pipe.processor, answers)
        closed = [close] if ending == [close] else []
        behind = [*thought, *closed, *after_think_ids(pipe.tokenizer)]
        assert caches["cond"].length == read.length + len(behind)


def test_a_prompt_is_read_once_per_group(monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[UnderstandingEngine] = []

    class Recorded(UnderstandingEngine):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            engines.append(self)

    monkeypatch.setattr("neounify.post_train.answers.UnderstandingEngine", Recorded)
    pipe = load(BASE[0], dtype="float32")
    [case] = questions([3])
    [prompt] = chat_prompts(pipe.model, pipe.processor, [case], think=False)
    sample_answers(
        pipe.model, pipe.processor, [case], [prompt], 8, 2, think=False, seed=0, iteration=0
    )
    [engine] = engines
    shared = prompt.length // engine.plan.kv_block_size * engine.plan.kv_block_size
    assert shared > 0
    assert engine.counters["und_known_tokens"] == 8 * shared
    engine.check()


def test_a_rewarded_kind_of_token_becomes_likelier(tmp_path: Path) -> None:
    settings = {
        "rewards": [{"kind": "program", "name": "support.rewards:vowels"}],
        "max_new_tokens": 1,
        "prompts_per_iteration": 2,
        "group": 48,
        "updates": 1,
        "kl": 0.0,
    }
    optimizer = {"name": "adamw", "learning_rate": 1e-2, "weight_decay": 0.0}
    training = run(tmp_path, "text", settings, steps=30, packs_per_step=1, optimizer=optimizer)
    before, after = (vowel_probability(m) for m in (load(BASE[0]).model, training.model))
    assert before < 0.5 < 0.8 < after
    rewards = [line["reward"] for line in metrics(tmp_path) if "reward" in line]
    assert rewards[-1] > rewards[0] + 0.3


def vowel_probability(model: Any) -> float:
    """The chance that an answer begins with a vowel, over a few prompts."""
    pipe = load(BASE[0], dtype="float32")
    cases = questions(range(1000, 1004))
    prompts = chat_prompts(model, pipe.processor, cases, think=False)
    size = pipe.tokenizer.vocab_size
    texts = (pipe.tokenizer.decode([token]).strip() for token in range(size))
    vowels = [token for token, text in enumerate(texts) if text[:1].lower() in tuple("aeiou")]
    answers = Answers(
        cases=cases,
        group=len(vowels),
        prompts=prompts,
        tokens=[[token] for _ in cases for token in vowels],
        sampled=[torch.zeros(1)] * (len(vowels) * len(cases)),
    )
    with torch.no_grad():
        scores = AnswerBatch(model, answers, range(answers.count)).scores(model)
    return float(scores.log_probs.exp().sum()) / len(cases)


# --- the loss ---


def test_the_loss_is_a_mean_over_tokens_then_over_answers(tmp_path: Path) -> None:
    method: TextGrpo = built(tmp_path, "text", {"kl": 0.0})
    answers = method.rollout(method.cases(0, 4)[0], 0, 0)
    advantages = torch.linspace(-1, 1, answers.count)
    chosen = list(range(answers.count))
    plain = TokenObjective(metrics=Means(), clip=0.2)
    loss = plain.loss(method.model, answers, chosen, advantages)
    torch.testing.assert_close(loss, -advantages)  # every ratio is 1
    limited = TokenObjective(metrics=Means(), clip=0.2, limit=12)
    lengths = torch.tensor([len(tokens) for tokens in answers.tokens])
    loss = limited.loss(method.model, answers, chosen, advantages)
    torch.testing.assert_close(loss, -advantages * lengths / 12)


def test_clipped_tokens_have_no_gradient(tmp_path: Path) -> None:
    method: TextGrpo = built(tmp_path, "text", {"kl": 0.0})
    answers = method.rollout(method.cases(0, 4)[0], 0, 0)
    objective = TokenObjective(metrics=Means(), clip=0.2)
    objective.loss(method.model, answers, [0], torch.ones(1))
    parameter = method.model.embed_tokens.weight
    for step, advantage, learns in ((-0.5, 1.0, False), (-0.5, -1.0, True), (0.5, -1.0, False)):
        moved = Answers(
            cases=answers.cases,
            group=answers.group,
            prompts=answers.prompts,
            tokens=answers.tokens,
            sampled=answers.sampled,
            old={0: answers.old[0] + step},  # a ratio of exp(-step)
        )
        loss = objective.loss(method.model, moved, [0], torch.tensor([advantage]))
        [gradient] = torch.autograd.grad(loss.sum(), [parameter], allow_unused=True)
        assert (gradient is not None and bool(gradient.any())) is learns


def test_the_divergence_is_that_of_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, other = (torch.randn(6, generator=generator).log_softmax(0) for _ in range(2))
    expected = (policy.exp() * (policy - other)).sum()
    torch.testing.assert_close((policy.exp() * divergence(policy, other)).sum(), expected)
    assert bool((divergence(policy, other) >= 0).all())


def test_thought_and_image_share_one_advantage(tmp_path: Path) -> None:
    method: FlowGrpo = built(tmp_path, "joint", {"kl": 0.0, "thought_kl": 0.0})
    batches = list(islice(method.batches(None), 2))
    for index, batch in enumerate(batches):
        step = TrainStep(number=0, stage_step=0, batches=batches, seed=0, index=index)
        for share in batch.content.shares:
            assert share.rollout.thoughts.count == share.rollout.count
            loss: Tensor = method.share_loss(share, step)
            # Both ratios are 1: -A of the image and -A of its thought.
            torch.testing.assert_close(loss, -2 * share.advantages, atol=1e-5, rtol=1e-5)
    assert any(bool(s.advantages.any()) for batch in batches for s in batch.content.shares)


# --- configs that cannot work, and the doctor ---


@pytest.mark.parametrize(
    ("name", "method", "stage", "message"),
    [
        ("text", {}, {"freeze": []}, r"text-grpo trains the understanding stream alone: freeze"),
        ("text", {}, {"freeze": ["gen", "und"]}, r"so \['und'\] cannot be frozen"),
        ("text", {}, {"lora": {"rank": 2, "streams": ["gen"]}}, "lora.streams"),
        ("joint", {}, {"freeze": ["und", "shared"]}, r"so \['und'\] cannot be frozen"),
        ("joint", {}, {"lora": {"rank": 2, "streams": ["gen"]}}, "understanding and generation"),
        ("text", {"prompts": {"categories": {"two_object": 1}}}, {}, "no category two_object"),
        ("joint", {"prompts": QUESTIONS}, {}, "no category caption"),
        ("text", {"rewards": [{"kind": "ocr", "reader": "a:b"}]}, {}, "does not rate texts"),
        ("text", {"rewards": [{"kind": "answer"}]}, {}, "needs prompts of kind"),
        ("joint", {"rewards": [{"kind": "answer"}]}, {}, "does not rate images"),
        ("text", {"rewards": [{"world": "easy"}]}, {}, 'of the world "default"'),
        ("text", {"prompts": {"kind": "text", "path": "a"}, "rewards": [{}]}, {}, "which know"),
        ("text", {"clip": 0.0}, {}, "clip"),
        ("text", {"max_new_tokens": 0}, {}, "max_new_tokens"),
    ],
)
def test_recipes_that_cannot_work(
    name: str, method: dict[str, Any], stage: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        described(name, method, **stage)


@pytest.mark.parametrize("name", ["text", "joint"])
def test_the_doctor_wants_a_reward_to_rise(tmp_path: Path, name: str) -> None:
    training = trainer(tmp_path, described(name))
    stage = training.recipe.stages[0]
    findings = stage.method.examine(training._context(stage), 8)
    result = {finding.name: finding for finding in findings}
    assert result["rewards"].good
    assert result["gradients"].good
    assert "reward of one prompt" in result["learning"].what
