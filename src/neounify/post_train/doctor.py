"""Checks of post-training stages: one prompt's reward must rise, one batch must be distilled."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count, islice
from typing import TYPE_CHECKING

from neounify.post_train.advantage import informative
from neounify.post_train.prompts import PromptCase
from neounify.train.method import (
    NO_TIME,
    Finding,
    Method,
    MicroBatch,
    StageContext,
    TrainingStopped,
    TrainStep,
)
from neounify.train.optim import constant, take_step
from neounify.train.setup import prepare_parameters

if TYPE_CHECKING:
    from neounify.post_train.distill import DistillConfig
    from neounify.post_train.group_config import GroupConfig

TRIED_PROMPTS = 16
"""Prompts that are searched for one whose samples differ in reward."""
MIN_ITERATIONS = 6
MAX_ITERATIONS = 60
RISE = 0.02
"""Least rise of one prompt's mean reward, of the last third of the iterations over the first."""
LOSS_SHARE = 0.5
"""Share of its first loss that distillation of one batch must fall below."""
ENOUGH_STEPS = 60


class _OnePrompt:
    """The same case for every number."""

    def __init__(self, case: PromptCase) -> None:
        self._case = case

    def case(self, number: int) -> PromptCase:
        return self._case


def examine_rewards(
    context: StageContext, config: GroupConfig, seconds: float
) -> Iterator[Finding]:
    """Train on one prompt; the model's weights are changed."""
    prepare_parameters(context.setup.model, context.stage, context.recipe.seed)
    one = replace(config, prompts_per_iteration=1, max_draws=1, rollout_workers=0, sheet_every=0)
    method = one.build(context)
    samples = "answers" if config.answers else "images"
    started, sampled = time.monotonic(), None
    for number in range(TRIED_PROMPTS):
        iteration = method.sample(number)
        if bool(informative(iteration.rewards[0]).any()):
            sampled = iteration
            break
    if sampled is None:
        yield Finding(
            "rewards",
            False,
            f"all {samples} of each of {TRIED_PROMPTS} prompts have one reward",
            "draw other prompts (prompts.categories), a larger group, or more noise (eta)",
        )
        return
    case = sampled.rollouts[0].cases[0]
    yield Finding("rewards", True, f"{samples} of {case.prompt!r} differ in reward")
    method.prompts = _OnePrompt(case)
    means: list[float] = []
    batches, steps = method.batches(None), _Steps(method, context)
    for _ in range(MAX_ITERATIONS):
        for _ in range(config.updates):
            yield from steps.take(list(islice(batches, steps.micro_batches)))
        means.append(method.report().get("reward", 0.0))
        if steps.stopped or steps.seconds_since(started) > seconds:
            break
    third = max(1, len(means) // 3)
    first, last = (sum(part) / third for part in (means[:third], means[-third:]))
    done = len(means) >= MIN_ITERATIONS
    verdict = True if last > first + RISE or first > 1 - RISE else False if done else None
    advice = "" if verdict else NO_TIME if not done else "raise optimizer.learning_rate, or clip"
    yield Finding(
        "learning",
        verdict,
        f"reward of one prompt {first:.3f} at first, {last:.3f} after {len(means)} iterations",
        advice,
    )


def examine_distillation(
    context: StageContext, config: DistillConfig, seconds: float
) -> Iterator[Finding]:
    """Overfit the states of one step; the model's weights are changed."""
    prepare_parameters(context.setup.model, context.stage, context.recipe.seed)
    method = config.build(context)
    steps = _Steps(method, context)
    drawn = list(islice(method.batches(None), steps.micro_batches))
    started = time.monotonic()
    losses: list[float] = []
    for number in count():
        yield from steps.take(drawn)
        losses.append(method.report()["loss"])
        fallen = losses[-1] < LOSS_SHARE * losses[0]
        if fallen or number >= MAX_ITERATIONS or steps.seconds_since(started) > seconds:
            break
    enough = len(losses) >= ENOUGH_STEPS
    nothing = losses[0] < 1e-8
    verdict = True if fallen or nothing else False if enough else None
    advice = "" if verdict else NO_TIME if not enough else "raise optimizer.learning_rate"
    if nothing:
        advice = "the teacher equals its student: give it guidance, or teacher_steps above 1"
    yield Finding(
        "distillation",
        None if nothing else verdict,
        f"loss of one batch {losses[0]:.2e} at first, {losses[-1]:.2e} after {len(losses)} steps",
        advice,
    )


def examine_turns(context: StageContext, config: DistillConfig, turns: int) -> Iterator[Finding]:
    """Take some steps of methods with several models, whose losses do not say how well they do."""
    prepare_parameters(context.setup.model, context.stage, context.recipe.seed)
    method = config.build(context)
    steps, batches = _Steps(method, context), method.batches(None)
    for _ in range(turns):
        yield from steps.take(list(islice(batches, steps.micro_batches)))
    yield Finding("turns", None, f"{turns} steps of {len(steps.sets)} optimizer sets were taken")


class _Steps:
    """Optimizer steps of a method, over all ranks."""

    def __init__(self, method: Method, context: StageContext) -> None:
        self.method, self.sets = method, method.optimizers()
        self.number = 0
        self.stopped = False
        # Schedules with a warm-up would leave too few steps.
        for one in self.sets:
            one.schedule = constant
            one.set_rate(0)
        self.parallel = context.setup.parallel
        self.micro_batches = context.stage.packs_per_step // context.ranks.size
        """Those of this rank in a step."""

    def seconds_since(self, started: float) -> float:
        """The seconds since a time, on the first rank, so that all end together; collective."""
        return self.parallel.ranks.gather(time.monotonic() - started)[0]

    def take(self, drawn: Sequence[MicroBatch]) -> Iterator[Finding]:
        """One step; a finding for the first one, and for gradients that are not finite."""
        step = TrainStep(
            number=self.number,
            stage_step=self.number,
            batches=drawn,
            seed=0,
            ranks=self.parallel.packs,
        )
        active = [one for one in self.sets if one.active(self.number)]
        for index, batch in enumerate(drawn):
            loss = self.method.loss(batch, replace(step, index=index))
            if loss.requires_grad:
                loss.backward()
        self.parallel.add_gradients(p for one in active for p in one.parameters)
        norms, _, finite = take_step(active)
        if self.number == 0 or not finite:
            shown = ", ".join(f"{float(norm):.2g}" for norm in norms)
            moving = finite and any(float(norm) > 0 for norm in norms)
            advice = "nothing would be trained: no gradient reaches what is trained"
            yield Finding("gradients", moving, f"gradient norm {shown}", "" if moving else advice)
        for one in self.sets:
            one.zero_grad()
        self.number += 1
        try:
            self.method.end_step(step, finite)
        except TrainingStopped as error:
            yield Finding("collapse", False, str(error))
            self.stopped = True
