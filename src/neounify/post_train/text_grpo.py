"""GRPO on text: policy gradients over the tokens of answers and thoughts.

Per token ρ = exp(ℓ_θ - ℓ_old) and max(-Aρ, -A·clip(ρ, 1 - c, 1 + c)), averaged over the tokens of
an answer, then over answers, as GRPO has it (arXiv 2402.03300); Dr. GRPO (2503.20783) divides by
the limit of tokens in place of each answer's own number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import AfterValidator
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor

from neounify.attention import select_for
from neounify.config.ranges import STRICT, Count, NonNegative, Positive, Range
from neounify.files import atomic_file
from neounify.model.layout import Document, Layout
from neounify.model.neo import Logits, ModelBatch, NeoUnify
from neounify.model.parts import UND, StreamName
from neounify.post_train.advantage import clipped_objective
from neounify.post_train.answers import (
    Answers,
    chat_prompts,
    restored_answers,
    rollout_seed,
    sample_answers,
)
from neounify.post_train.base import Means, SamplerConfig
from neounify.post_train.group_config import GroupConfig
from neounify.post_train.groups import GroupMethod
from neounify.post_train.iteration import Iteration, Share
from neounify.post_train.policy import TokenPrompt
from neounify.post_train.prompts import PromptCase
from neounify.post_train.stories import image_marks, sample_stories, story_prompts
from neounify.runtime.plan import plan_execution
from neounify.tasks.interleave import MAX_IMAGES
from neounify.tasks.program import Processor
from neounify.train.loss import score_in_pieces
from neounify.train.method import StageContext, TrainStep

MAX_MISMATCH = 0.02
"""Mean difference of log-probabilities of sampling and update above which a run is warned."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Log-probabilities and entropies (nats) of all tokens of some answers, one after another."""

    log_probs: Float[Tensor, " tokens"]
    entropy: Float[Tensor, " tokens"]


class AnswerBatch:
    """Some answers behind their prompts, packed for one call of any model."""

    def __init__(self, model: NeoUnify, answers: Answers, chosen: Sequence[int]) -> None:
        plan = plan_execution(model.config, model.device, model.compute_dtype)
        device = model.device
        tokens = [answers.tokens[i] for i in chosen]
        followed = [answers.followed(model, i) for i in chosen]
        inputs = [prompt.model_input(model, 0) for prompt, _ in followed]
        layout = Layout(Document(item.spans) for item in inputs)
        rows = [
            torch.tensor(places) + start
            for (start, _), (_, places) in zip(layout[UND].ranges, followed, strict=True)
        ]
        self.lengths = torch.tensor([len(ids) for ids in tokens], device=device)
        self.owners = torch.arange(len(tokens), device=device).repeat_interleave(self.lengths)
        self._ids = torch.tensor([i for ids in tokens for i in ids], device=device)
        self._logits_rows = plan.logits_rows
        self._batch = ModelBatch(
            layout=layout,
            attend=select_for(model, plan.attention).plan(layout),
            ids=torch.tensor([i for item in inputs for i in item.ids], device=device),
            images=[image.to(device) for item in inputs for image in item.images],
            logit_rows=torch.cat(rows).to(device),
        )

    def scores(self, model: NeoUnify) -> Scores:
        """Scores of every token, float32; differentiable."""
        score = partial(_token_scores, ids=self._ids, rows=self._logits_rows)
        return model(self._batch, score).text

    def means(self, values: Float[Tensor, " tokens"], limit: int | None = None) -> Tensor:
        """The mean of each answer's tokens; their sum over `limit` where one is named."""
        sums = torch.zeros(len(self.lengths), device=values.device)
        sums = sums.index_add(0, self.owners, values)
        return sums / (self.lengths if limit is None else limit)


def _token_scores(
    logits: Logits, states: Float[Tensor, "n d"], ids: Int[Tensor, " n"], rows: int
) -> Scores:
    def score(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits(states).float().log_softmax(-1)
        with torch.no_grad():
            entropy = -(scores.exp() * scores).sum(-1)
        return scores.gather(1, ids[:, None]).squeeze(1), entropy

    return Scores(*score_in_pieces(score, states, ids, rows))


def divergence(log_probs: Float[Tensor, " n"], other: Float[Tensor, " n"]) -> Tensor:
    """k3, an estimate of KL(policy, other) of tokens that the policy sampled: e^d - d - 1 ≥ 0.

    d = ℓ_other - ℓ_policy (Schulman 2020).
    """
    difference = other - log_probs
    return difference.exp() - difference - 1


@dataclass(frozen=True, eq=False, kw_only=True)
class TokenObjective:
    """The GRPO loss of texts: clip range c, β of the divergence from a reference, and its log.

    `limit` is what Dr. GRPO divides sums over tokens by, None for the number of an answer's tokens.
    Names in the log begin with `prefix`.
    """

    metrics: Means
    clip: float
    kl: float = 0.0
    limit: int | None = None
    prefix: str = ""

    def loss(
        self,
        model: NeoUnify,
        answers: Answers,
        chosen: Sequence[int],
        advantages: Float[Tensor, " n"],
        reference: NeoUnify | None = None,
    ) -> Float[Tensor, " n"]:
        """The loss of each chosen answer. The first call for an answer stores its old values."""
        batch = AnswerBatch(model, answers, chosen)
        now = batch.scores(model)
        each = now.log_probs.detach().split(batch.lengths.tolist())
        for i, values in zip(chosen, each, strict=True):
            if i not in answers.old:
                answers.old[i] = values
                sampled = answers.sampled[i].to(values)
                difference = values[: len(sampled)] - sampled
                self._log("mismatch", difference[~difference.isnan()])
        old = torch.cat([answers.old[i].to(now.log_probs.device) for i in chosen])
        ratio = (now.log_probs - old).exp()
        loss, clipped = clipped_objective(ratio, advantages[batch.owners], self.clip)
        if reference is not None:
            with torch.no_grad():
                there = batch.scores(reference).log_probs
            distance = divergence(now.log_probs, there)
            self._log("kl_reference", distance)
            loss = loss + self.kl * distance
        self._log("kl", divergence(old, now.log_probs))
        self._log("ratio", ratio)
        self._log("clipped", clipped.float())
        self._log("entropy", now.entropy)
        return batch.means(loss, self.limit)

    def _log(self, name: str, values: Float[Tensor, " tokens"]) -> None:
        """Log the mean of |values|, which are positive but for differences."""
        if len(values):
            mean = float(values.detach().abs().mean())
            self.metrics.add(f"{self.prefix}{name}", mean, len(values))

    def warnings(self, report: Mapping[str, float]) -> list[str]:
        """Warnings of a report: values that differ between sampling and update."""
        mismatch = report.get(f"{self.prefix}mismatch", 0.0)
        if mismatch <= MAX_MISMATCH:
            return []
        return [
            f"log-probabilities of tokens differ by {mismatch:.3f} between sampling and update: "
            'the model is trained on other values than it samples with; use precision = "float32"'
        ]


# --- the method ---


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class TextGrpoConfig(GroupConfig):
    """GRPO on answers, `kind = "text-grpo"`; it trains the understanding stream.

    With `think` an answer begins with a thought, whose tokens are trained as well and which rewards
    do not see. `max_new_tokens` bounds both together. `clip` is c, `kl` β of the divergence from
    the weights at the start. `length` is what the sum over an answer's tokens is divided by: its
    "own" number of tokens, or the "limit" max_new_tokens, which does not favour short answers.

    Of stories the text is trained. `sampler` paints their images, which are inputs of the text that
    follows, at most `max_images` a story.
    """

    answers: ClassVar[bool] = True
    rollout_settings: ClassVar[tuple[str, ...]] = (
        *GroupConfig.rollout_settings,
        *("think", "sampler", "max_new_tokens", "max_images"),
    )

    kind: Literal["text-grpo"] = "text-grpo"
    think: bool = False
    max_new_tokens: Count = 128
    clip: Positive = 0.2
    kl: NonNegative = 0.0
    length: Literal["own", "limit"] = "own"
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    max_images: Annotated[int, AfterValidator(Range(1, MAX_IMAGES))] = 4

    @property
    def streams(self) -> tuple[StreamName, ...]:
        return (UND,)

    def build(self, context: StageContext) -> TextGrpo:
        return TextGrpo(self, context)


class TextGrpo(GroupMethod[Answers]):
    """`TokenObjective` on answers as `Pipeline.chat` samples them at temperature 1."""

    config: TextGrpoConfig

    def __init__(self, config: TextGrpoConfig, context: StageContext) -> None:
        super().__init__(config, context)
        self.reference = self.reference_copy(bool(config.kl))
        limit = config.max_new_tokens if config.length == "limit" else None
        self.objective = TokenObjective(
            metrics=self.metrics, clip=config.clip, kl=config.kl, limit=limit
        )

    def rollout(self, cases: Sequence[PromptCase], number: int, index: int) -> Answers:
        config = self.config
        if cases[0].preceding is not None:
            return sample_stories(
                self.model,
                self.processor,
                cases,
                self._prompts(cases),
                config.group,
                self.resolve(config.sampler, cases),
                max_new_tokens=config.max_new_tokens,
                max_images=config.max_images,
                think=config.think,
                seed=rollout_seed(config.seed, index),
                iteration=number,
                attention=self.attention,
            )
        return sample_answers(
            self.model,
            self.processor,
            cases,
            self._prompts(cases),
            config.group,
            config.max_new_tokens,
            think=config.think,
            seed=rollout_seed(config.seed, index),
            iteration=number,
        )

    def measure(self, rollout: Answers) -> None:
        log_length(self.metrics, rollout, "")

    def restored(
        self, cases: Sequence[PromptCase], number: int, tensors: Mapping[str, Tensor]
    ) -> Answers:
        marks = None if cases[0].preceding is None else image_marks(self.processor)
        group, device = self.config.group, self.model.device
        return restored_answers(cases, self._prompts(cases), group, tensors, device, marks)

    def _prompts(self, cases: Sequence[PromptCase]) -> list[TokenPrompt]:
        """Prompts of cases that are all stories, or all not."""
        think = self.config.think
        if cases[0].preceding is None:
            return chat_prompts(self.model, self.processor, cases, think=think)
        sampling = self.resolve(self.config.sampler, cases)
        return story_prompts(self.model, self.processor, cases, sampling, "cond", think=think)

    def share_loss(self, share: Share[Answers], step: TrainStep) -> Float[Tensor, " n"]:
        reference = None if self.reference is None else self.reference.model
        return self.objective.loss(
            self.model, share.rollout, share.chosen.tolist(), share.advantages, reference
        )

    def save_sheet(self, iteration: Iteration[Answers], index: int) -> None:
        """Save groups as lines of JSON."""
        save_texts(self, self.processor, iteration, index, iteration.rollouts[index])

    def warnings(self, stage_step: int, report: Mapping[str, float]) -> Sequence[str]:
        return [*super().warnings(stage_step, report), *self.objective.warnings(report)]


def log_length(metrics: Means, answers: Answers, prefix: str) -> None:
    """Log the mean length in tokens, and the share that the limit cut off."""
    lengths = [len(tokens) for tokens in answers.tokens]
    cut = [len(s) == n for s, n in zip(answers.sampled, lengths, strict=True)]
    metrics.add(f"{prefix}length", sum(lengths) / len(lengths), len(lengths))
    metrics.add(f"{prefix}cut_off", sum(cut) / len(cut), len(cut))


def save_texts(
    method: GroupMethod[Any],
    processor: Processor,
    iteration: Iteration[Any],
    index: int,
    answers: Answers,
) -> None:
    """Save groups of texts as lines of JSON: prompt, and output, reward, advantage of each."""
    rewards = iteration.rewards[index].tolist()
    advantages = iteration.advantages[index].tolist()
    decode = partial(processor.tokenizer.decode, skip_special=False)
    lines = []
    for number, case in enumerate(answers.cases):
        first = number * answers.group
        samples = [
            {
                "text": answers.texts[first + i],
                "output": decode(answers.tokens[first + i]),
                "reward": None if math.isnan(reward) else round(reward, 4),
                "advantage": round(advantages[number][i], 4),
            }
            for i, reward in enumerate(rewards[number])
        ]
        line = {"prompt": case.prompt, "category": case.category, "samples": samples}
        lines.append(json.dumps(line, ensure_ascii=False))
    with atomic_file(method.sheet_of(iteration, index, ".jsonl")) as aside:
        aside.write_text("\n".join(lines) + "\n", encoding="utf-8")
