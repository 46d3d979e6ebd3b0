"""Base of the methods that learn from rewarded groups: rollouts, advantages, micro-batches, record.

An iteration samples `group` images of each of `prompts_per_iteration` prompts, rewards them, and
takes `updates` optimizer steps on them. A step's images are dealt to the stage's `packs_per_step`
micro-batches.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from pydantic import AfterValidator
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor

from neounify.config.ranges import STRICT, Count, Fraction, NonNegativeInt, Range
from neounify.errors import CheckpointError
from neounify.files import atomic_file
from neounify.image.contact_sheet import contact_sheet
from neounify.model.neo import NeoUnify
from neounify.post_train.advantage import Scope, group_advantages, informative
from neounify.post_train.base import ImagePostTrainConfig, PromptMethod, SamplerConfig
from neounify.post_train.prompts import PromptCase, PromptConfig
from neounify.post_train.report import list_failures, update_report
from neounify.post_train.rewards import Pixels, RewardConfig, Rewarded, Rewards
from neounify.post_train.rollout import RandomSteps, Rollout, restored_rollout, sample_groups
from neounify.post_train.watch import BY, RewardWatch, state_before
from neounify.train.method import (
    Finding,
    MethodState,
    MicroBatch,
    StageContext,
    TrainingStopped,
    TrainStep,
    evaluation_mode,
)

MAX_GROUP = 256
Unit = tuple[int, tuple[int, ...]]
"""A rollout and images of it that stay together in a micro-batch."""


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class RolloutConfig(ImagePostTrainConfig):
    """Rollouts and rewards of an iteration, for all methods that learn from groups.

    `advantage` is what the standard deviation of rewards is taken over. `sheet_every` is in
    iterations; 0 saves no sheets of groups. The run stops when more than `max_failed_rewards` of an
    iteration's images have no reward, or when the running mean of the reward falls below `collapse`
    times its best.
    """

    prompts: PromptConfig = field(default_factory=PromptConfig)
    rewards: tuple[RewardConfig, ...] = field(default_factory=lambda: (RewardConfig(),))
    prompts_per_iteration: Count = 16
    group: Annotated[int, AfterValidator(Range(2, MAX_GROUP))] = 8
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    updates: Count = 1
    advantage: Scope = "iteration"
    max_failed_rewards: Fraction = 0.2
    collapse: Fraction = 0.5
    sheet_every: NonNegativeInt = 20
    seed: NonNegativeInt = 0

    @abstractmethod
    def build(self, context: StageContext) -> RolloutMethod: ...

    def examine(self, context: StageContext, seconds: float) -> Iterator[Finding]:
        from neounify.post_train.doctor import examine_rewards

        return examine_rewards(context, self, seconds)


@dataclass(frozen=True, eq=False)
class Iteration:
    """Rollouts by image size, and [prompts, group] rewards and advantages of each."""

    number: int
    rollouts: Sequence[Rollout]
    advantages: Sequence[Float[Tensor, "prompts group"]]
    rewards: Sequence[Float[Tensor, "prompts group"]]


@dataclass(frozen=True, eq=False)
class Share:
    """Images of one rollout in a micro-batch, and their advantages [images]."""

    rollout: Rollout
    images: Tensor
    advantages: Float[Tensor, " images"]


@dataclass(frozen=True, eq=False)
class MicroContent:
    """A micro-batch: shares of the rollouts, and the images of the whole step."""

    iteration: int
    update: int
    shares: Sequence[Share]
    step_images: int


class RolloutMethod(PromptMethod):
    """Sampling, rewards and bookkeeping; a subclass gives `random_steps` and `share_loss`."""

    headline: ClassVar[Mapping[str, str]] = {
        "reward": "reward",
        "strict": "reward/strict",
        "equal": "equal",
    }

    def __init__(self, config: RolloutConfig, context: StageContext) -> None:
        super().__init__(config.prompts, context)
        self.config = config
        self.rewards = Rewards(config.rewards, config.max_failed_rewards)
        self.watch = RewardWatch()
        self._sampled: dict[str, float] = {}
        self._iteration: Iteration | None = None
        self._updates_done = config.updates
        self.generator = torch.Generator()

    # --- what a method adds ---

    @property
    def sampler(self) -> NeoUnify:
        """The model that samples."""
        return self.model

    def random_steps(self, iteration: int) -> RandomSteps:
        """Which steps of an iteration's rollouts are random."""
        return RandomSteps()

    def share_loss(self, share: Share, step: TrainStep) -> Float[Tensor, " images"]:
        """The loss of each image."""
        raise NotImplementedError

    def units(self, iteration: Iteration) -> Sequence[Unit]:
        """What is dealt to micro-batches: here every image with a reward, of groups that differ."""
        return [
            (index, (prompt * rollout.group + member,))
            for index, (rollout, rewards) in enumerate(
                zip(iteration.rollouts, iteration.rewards, strict=True)
            )
            for prompt, differs in enumerate(informative(rewards).tolist())
            if differs
            for member in range(rollout.group)
            if not rewards[prompt, member].isnan()
        ]

    def end_iteration(self, number: int) -> None:
        """Called after the last update of an iteration; `number` of them are done."""

    # --- the trainer's protocol ---

    def batches(self, position: Any) -> Iterator[MicroBatch]:
        number, first = (0, 0) if position is None else _checked_position(position)
        while True:
            if self._iteration is None or self._iteration.number != number:
                self._iteration = self.sample(number)
            for update in range(first, self.config.updates):
                yield from self._update(self._iteration, update)
            number, first = number + 1, 0

    def _update(self, iteration: Iteration, update: int) -> Iterator[MicroBatch]:
        """The micro-batches of one step."""
        parts = self.context.stage.packs_per_step
        units = self.units(iteration)
        rng = np.random.default_rng((self.config.seed, iteration.number, update))
        last = update + 1 == self.config.updates
        after = [iteration.number + 1, 0] if last else [iteration.number, update + 1]
        total = sum(len(images) for _, images in units)
        sampled = sum(rollout.count for rollout in iteration.rollouts)
        for part, dealt in enumerate(np.array_split(rng.permutation(len(units)), parts)):
            chosen = sorted(units[index] for index in dealt)
            rollouts = sorted({number for number, _ in chosen})
            shares = [self._share(iteration, number, chosen) for number in rollouts]
            images = [image for _, images in chosen for image in images]
            yield MicroBatch(
                content=MicroContent(iteration.number, update, shares, total),
                position=after if part + 1 == parts else [iteration.number, update],
                samples=[f"iteration {iteration.number} image {image}" for image in images],
                # Images that were sampled, not those that are trained on.
                images=0 if update else sampled * (part + 1) // parts - sampled * part // parts,
                tokens=sum(s.rollout.grid.length * len(s.images) for s in shares),
            )

    def _share(self, iteration: Iteration, index: int, units: Sequence[Unit]) -> Share:
        images = torch.tensor([i for other, images in units if other == index for i in images])
        advantages = iteration.advantages[index].flatten()[images]
        device = self.model.device
        return Share(iteration.rollouts[index], images.to(device), advantages.to(device))

    def loss(self, batch: MicroBatch, step: TrainStep) -> Tensor:
        """The mean of the step's images, this micro-batch's share of it."""
        content: MicroContent = batch.content
        self.generator = torch.Generator().manual_seed(step.batch_seed())
        losses = [self.share_loss(share, step).sum() for share in content.shares]
        if not losses:
            return torch.zeros((), device=self.model.device)
        return torch.stack(losses).sum() / content.step_images

    def end_step(self, step: TrainStep, taken: bool) -> None:
        content: MicroContent = step.batches[-1].content
        self._updates_done = content.update + 1
        if self._updates_done == self.config.updates:
            self.watch.add(self._sampled, step.number + 1)
            self.end_iteration(content.iteration + 1)
            if self.watch.has_collapsed(self.config.collapse):
                raise TrainingStopped(self._collapse(step))

    def state(self) -> MethodState:
        """The iteration's rollouts, while some of its updates are to come."""
        facts: dict[str, Any] = {
            "failed_rewards": self.rewards.failed,
            "watch": self.watch.to_json(),
            "sampled": dict(self._sampled),
        }
        tensors: dict[str, Tensor] = {}
        if self._iteration is not None and self._updates_done < self.config.updates:
            facts["iteration"] = self._iteration.number
            for index, rollout in enumerate(self._iteration.rollouts):
                tensors |= {f"rollout{index}.{n}": t for n, t in rollout.tensors().items()}
                tensors[f"rollout{index}.rewards"] = self._iteration.rewards[index]
        return MethodState(tensors=tensors, facts=facts)

    def load(self, state: MethodState) -> None:
        failed = state.facts.get("failed_rewards", 0)
        if type(failed) is not int or failed < 0:
            raise CheckpointError(f"failed_rewards must be a number from 0 up, got {failed!r}")
        self.rewards.failed = failed
        try:
            self.watch = RewardWatch.from_json(state.facts["watch"])
            self._sampled = dict(state.facts["sampled"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the state of {self.config.kind} does not fit: {error}"
            ) from error
        if (number := state.facts.get("iteration")) is not None:
            self._iteration = self._saved_iteration(number, state.tensors)
            self._updates_done = 0

    def warnings(self, stage_step: int, report: Mapping[str, float]) -> Sequence[str]:
        return self.watch.warnings(report)

    def _collapse(self, step: TrainStep) -> str:
        watch = self.watch
        states = self.context.folder / "states"
        names = [path.name for path in states.glob("step-*")] if states.is_dir() else []
        good = state_before(names, watch.best_step)
        return (
            f"the policy collapsed: at step {step.number + 1:,} the mean reward is "
            f"{watch.mean['reward']:.3f}, below {self.config.collapse:g} times its best of "
            f"{watch.best:.3f} (method.collapse). The last good state is {good or 'none'} of "
            f"{states}; lower optimizer.learning_rate or raise method.kl"
        )

    # --- an iteration ---

    def sample(self, number: int) -> Iteration:
        """Sample and reward an iteration's groups. Raises RewardFailure."""
        with evaluation_mode(self.model):
            rollouts = [
                self._rollout(cases, number, index)
                for index, cases in enumerate(self._cases(number))
            ]
        return self._rewarded(number, rollouts)

    def _cases(self, number: int) -> list[list[PromptCase]]:
        count = self.config.prompts_per_iteration
        return self.cases(number * count, count)

    def _rollout(self, cases: Sequence[PromptCase], number: int, index: int) -> Rollout:
        return sample_groups(
            self.sampler,
            self.processor,
            cases,
            self.config.group,
            self.resolve(self.config.sampler, cases),
            self.random_steps(number),
            seed=self.config.seed + index,
            iteration=number,
        )

    def _saved_iteration(self, number: Any, tensors: Mapping[str, Tensor]) -> Iteration:
        """The iteration of a saved state. Raises CheckpointError."""
        if type(number) is not int or number < 0:
            raise CheckpointError(f"iteration must be a number from 0 up, got {number!r}")
        rollouts, rewards = [], []
        for index, cases in enumerate(self._cases(number)):
            prefix = f"rollout{index}."
            of_rollout = {
                n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)
            }
            try:
                rewards.append(of_rollout.pop("rewards"))
                rollouts.append(
                    restored_rollout(
                        self.sampler,
                        self.processor,
                        cases,
                        self.config.group,
                        self.resolve(self.config.sampler, cases),
                        self.random_steps(number),
                        of_rollout,
                    )
                )
            except (KeyError, ValueError) as error:
                raise CheckpointError(f"the state's rollouts do not fit: {error}") from error
        counts = [len(rollout.cases) for rollout in rollouts]
        advantages = group_advantages(torch.cat(rewards), self.config.advantage)
        return Iteration(number, rollouts, advantages.split(counts), rewards)

    def _rewarded(self, number: int, rollouts: Sequence[Rollout]) -> Iteration:
        pixels = [rollout.pixels(self.model.config) for rollout in rollouts]
        cases = [case for r in rollouts for case in r.cases for _ in range(r.group)]
        rewarded = self.rewards([image for images in pixels for image in images], cases)
        list_failures(self.context.folder, number, rewarded.failures)
        total = torch.from_numpy(rewarded.total).float()
        advantages = group_advantages(total.view(-1, self.config.group), self.config.advantage)
        counts = [len(rollout.cases) for rollout in rollouts]
        rewards = total.view(-1, self.config.group).split(counts)
        iteration = Iteration(number, rollouts, advantages.split(counts), rewards)
        self._count(rewarded, cases, total.view(-1, self.config.group))
        every = self.config.sheet_every
        if every and number % every == 0:
            for index, images in enumerate(pixels):
                self._save_sheet(iteration, index, images)
            update_report(self.context)
        return iteration

    def _save_sheet(self, iteration: Iteration, index: int, images: Sequence[Pixels]) -> None:
        """Save groups as rows, each image over its reward, advantage and prompt."""
        rollout = iteration.rollouts[index]
        rewards = iteration.rewards[index].flatten().tolist()
        advantages = iteration.advantages[index].flatten().tolist()
        prompts = [case.prompt for case in rollout.cases for _ in range(rollout.group)]
        captions = [
            f"{reward:.2f} A {advantage:+.1f} {prompt}"
            for reward, advantage, prompt in zip(rewards, advantages, prompts, strict=True)
        ]
        sheet = contact_sheet(
            images, captions, [a >= 0 for a in advantages], columns=rollout.group, side=96
        )
        folder = self.context.folder / "rollouts"
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / f"iteration-{iteration.number:06d}-{index}.png") as aside:
            sheet.save(aside, "PNG")

    def _count(
        self,
        rewarded: Rewarded,
        cases: Sequence[PromptCase],
        rewards: Float[Tensor, "prompts group"],
    ) -> None:
        add = self.metrics.add
        present = ~np.isnan(rewarded.total)
        self._sampled = {"reward": float(rewarded.total[present].mean())} if present.any() else {}
        for name, values in {"reward": rewarded.total, **rewarded.parts}.items():
            key = name if name == "reward" else f"reward/{name}"
            known = values[~np.isnan(values)]
            if len(known):
                add(key, float(known.mean()), len(known))
        for category in dict.fromkeys(case.category for case in cases if case.category):
            chosen = np.array([case.category == category for case in cases]) & present
            if chosen.any():
                mean = float(rewarded.total[chosen].mean())
                self._sampled[f"{BY}{category}"] = mean
                add(f"{BY}{category}", mean, int(chosen.sum()))
        add("reward/failed", float(1 - present.mean()), len(present))
        differ = informative(rewards)
        add("equal", float(1 - differ.float().mean()), len(differ))


def _checked_position(position: Any) -> tuple[int, int]:
    if (
        not isinstance(position, list)
        or len(position) != 2
        or not all(type(value) is int and value >= 0 for value in position)
    ):
        raise CheckpointError(f"position must be [iteration, update], got {position!r}")
    return position[0], position[1]
