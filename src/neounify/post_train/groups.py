"""Base of the methods that learn from rewarded groups: rollouts, advantages, micro-batches, record.

An iteration samples `group` images or answers of each of `prompts_per_iteration` prompts, rewards
them, and takes `updates` optimizer steps on them. A step's samples are dealt to the stage's
`packs_per_step` micro-batches. How a rollout is sampled is the business of `ImageGroupMethod`
(`image_groups.py`) and `TextGrpo`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Generic

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from neounify.errors import CheckpointError, ConfigError
from neounify.model.neo import NeoUnify
from neounify.post_train.advantage import group_advantages, informative
from neounify.post_train.base import PromptMethod
from neounify.post_train.group_config import MAX_DRAWS, GroupConfig
from neounify.post_train.iteration import Iteration, MicroContent, R, Share, Unit
from neounify.post_train.prompts import PromptCase
from neounify.post_train.report import list_failures, update_report
from neounify.post_train.rewards import Rewarded, Rewards
from neounify.post_train.watch import BY, RewardWatch, state_before
from neounify.post_train.workers import RolloutWorkers, Sampled
from neounify.train.method import (
    MethodState,
    MicroBatch,
    StageContext,
    TrainingStopped,
    TrainStep,
    evaluation_mode,
)


class GroupMethod(PromptMethod, Generic[R]):
    """Sampling, rewards and bookkeeping, over rollouts of type R."""

    config: GroupConfig
    headline: ClassVar[Mapping[str, str]] = {
        "reward": "reward",
        "strict": "reward/strict",
        "equal": "equal",
    }

    def __init__(self, config: GroupConfig, context: StageContext) -> None:
        super().__init__(config, context)
        self.rewards = Rewards(config.rewards, config.max_failed_rewards, context.recipe.folder)
        self.watch = RewardWatch()
        self._sampled: dict[str, float] = {}
        self._iteration: Iteration[R] | None = None
        self._updates_done = config.updates
        self.generator = torch.Generator()
        self._workers: RolloutWorkers | None = None
        if config.rollout_workers and self.model.device.type != "cpu":
            raise ConfigError(
                f"method.rollout_workers must be 0 on {self.model.device}: workers share the "
                "processors' memory"
            )

    # --- what a method adds ---

    @property
    def sampler(self) -> NeoUnify:
        """The model that samples."""
        return self.model

    def measure(self, rollout: R) -> None:
        """Log what a rollout shows before it is rewarded."""

    @abstractmethod
    def rollout(self, cases: Sequence[PromptCase], number: int, index: int) -> R:
        """`group` samples of each case: rollout `index` of iteration `number`."""

    @abstractmethod
    def restored(
        self, cases: Sequence[PromptCase], number: int, tensors: Mapping[str, Tensor]
    ) -> R:
        """The rollout whose `tensors` were saved. Raises KeyError or ValueError for others."""

    @abstractmethod
    def save_sheet(self, iteration: Iteration[R], index: int) -> None:
        """Save what a rollout sampled, with rewards and advantages."""

    @abstractmethod
    def share_loss(self, share: Share[R], step: TrainStep) -> Float[Tensor, " n"]:
        """The loss of each sample."""

    def units(self, iteration: Iteration[R]) -> Sequence[Unit]:
        """What is dealt to micro-batches: every sample with a reward, of trained groups."""
        return [
            (index, (prompt * rollout.group + member,))
            for index, (rollout, rewards, trained) in enumerate(
                zip(iteration.rollouts, iteration.rewards, iteration.trained, strict=True)
            )
            for prompt in trained.nonzero().flatten().tolist()
            for member in range(rollout.group)
            if not rewards[prompt, member].isnan()
        ]

    def begin_update(self, iteration: Iteration[R], update: int) -> Iteration[R]:
        """The iteration as an update reads it; called with the weights before the update."""
        return iteration

    def end_iteration(self, number: int) -> None:
        """Called after the last update of an iteration; `number` of them are done."""

    # --- the trainer's protocol ---

    def batches(self, position: Any) -> Iterator[MicroBatch]:
        number, first = (0, 0) if position is None else _checked_position(position)
        try:
            while True:
                if self._iteration is None or self._iteration.number != number:
                    self._iteration = self.sample(number)
                for update in range(first, self.config.updates):
                    self._iteration = self.begin_update(self._iteration, update)
                    yield from self._update(self._iteration, update)
                number, first = number + 1, 0
        finally:
            if self._workers is not None:
                self._workers.close()

    def _update(self, iteration: Iteration[R], update: int) -> Iterator[MicroBatch]:
        """The micro-batches of one step."""
        parts = self.context.stage.packs_per_step
        units = self.units(iteration)
        rng = np.random.default_rng((self.config.seed, iteration.number, update))
        last = update + 1 == self.config.updates
        after = [iteration.number + 1, 0] if last else [iteration.number, update + 1]
        total = sum(len(samples) for _, samples in units)
        sampled = sum(rollout.count for rollout in iteration.rollouts)
        ranks = self.context.ranks
        for part, dealt in enumerate(np.array_split(rng.permutation(len(units)), parts)):
            if part % ranks.size != ranks.rank:
                continue
            chosen = sorted(units[index] for index in dealt)
            rollouts = sorted({number for number, _ in chosen})
            shares = [self._share(iteration, number, chosen) for number in rollouts]
            samples = [sample for _, several in chosen for sample in several]
            # Images that were sampled, not those that are trained on.
            fresh = 0 if update or self.config.answers else sampled
            tokens = sum(s.rollout.tokens_of(s.chosen.tolist()) for s in shares)
            yield MicroBatch(
                content=MicroContent(iteration.number, update, shares, total),
                position=after if part + 1 == parts else [iteration.number, update],
                samples=[f"iteration {iteration.number} sample {sample}" for sample in samples],
                images=fresh * (part + 1) // parts - fresh * part // parts,
                tokens=tokens,
                cost=tokens,
            )

    def _share(self, iteration: Iteration[R], index: int, units: Sequence[Unit]) -> Share[R]:
        chosen = torch.tensor([i for other, samples in units if other == index for i in samples])
        advantages = iteration.advantages[index].flatten()[chosen]
        device = self.model.device
        return Share(iteration.rollouts[index], chosen.to(device), advantages.to(device))

    def loss(self, batch: MicroBatch, step: TrainStep) -> Tensor:
        """The mean of the step's samples, this micro-batch's share of it."""
        content: MicroContent[R] = batch.content
        self.generator = torch.Generator().manual_seed(step.batch_seed())
        losses = [self.share_loss(share, step).sum() for share in content.shares]
        if not losses:
            return torch.zeros((), device=self.model.device)
        return torch.stack(losses).sum() / content.step_samples

    def end_step(self, step: TrainStep, taken: bool) -> None:
        content: MicroContent[R] = step.batches[-1].content
        if content.update == 0 and self.config.updates > 1:
            self._exchange_old(step)
        self._updates_done = content.update + 1
        if self._updates_done == self.config.updates:
            self.watch.add(self._sampled, step.number + 1)
            self.end_iteration(content.iteration + 1)
            if self.watch.has_collapsed(self.config.collapse):
                raise TrainingStopped(self._collapse(step))

    def _exchange_old(self, step: TrainStep) -> None:
        """Give all ranks what each kept in an iteration's first update; collective."""
        ranks = self.context.ranks
        if ranks.size == 1:
            return
        assert self._iteration is not None
        rollouts = self._iteration.rollouts
        numbers = {id(rollout): number for number, rollout in enumerate(rollouts)}
        shares: list[Share[R]] = [s for batch in step.batches for s in batch.content.shares]
        chosen = [(share, share.chosen.tolist()) for share in shares]
        mine = [(numbers[id(s.rollout)], some, s.rollout.old_values(some)) for s, some in chosen]
        for number, some, values in chain(*ranks.gather(mine)):
            rollouts[number].take_old(some, values)

    def state(self) -> MethodState:
        """The iteration's rollouts, while some of its updates are to come."""
        kept = super().state()
        facts: dict[str, Any] = {
            **kept.facts,
            "failed_rewards": self.rewards.failed,
            "watch": self.watch.to_json(),
            "sampled": dict(self._sampled),
        }
        tensors = dict(kept.tensors)
        if self._iteration is not None and self._updates_done < self.config.updates:
            facts["iteration"] = self._iteration.number
            facts["draws"] = self._iteration.draws
            for index, rollout in enumerate(self._iteration.rollouts):
                tensors |= {f"rollout{index}.{n}": t for n, t in rollout.tensors().items()}
                tensors[f"rollout{index}.rewards"] = self._iteration.rewards[index]
        return MethodState(tensors=tensors, facts=facts)

    def load(self, state: MethodState) -> None:
        super().load(state)
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
            if changes := self.changed_settings(state, self.config.rollout_settings):
                raise CheckpointError(
                    f"the state's rollouts were sampled with other settings: {changes}. Give the "
                    "recipe those it had, or start a new run"
                )
            draws = state.facts.get("draws", 1)
            self._iteration = self._saved_iteration(number, draws, state.tensors)
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

    def sample(self, number: int) -> Iteration[R]:
        """Sample and reward an iteration's groups. Raises RewardFailure."""
        config = self.config
        rollouts: list[R] = []
        measured: list[Rewarded] = []
        differ, draws = 0, 0
        while draws < config.max_draws and differ < config.prompts_per_iteration:
            drawn = self._rollouts(number, draws, len(rollouts))
            for rollout in drawn:
                self.measure(rollout)
            rewarded = self._rewarded(drawn)
            if self.context.ranks.first:
                list_failures(self.context.folder, number, rewarded.failures)
            differ += int(informative(_by_group(rewarded, config.group)).sum())
            rollouts, measured, draws = [*rollouts, *drawn], [*measured, rewarded], draws + 1
        rewarded = Rewarded.joined(measured)
        total = _by_group(rewarded, config.group)
        cases = [case for r in rollouts for case in r.cases for _ in range(r.group)]
        self._count(rewarded, cases, total)
        counts = [len(rollout.cases) for rollout in rollouts]
        iteration = self._with_advantages(number, draws, rollouts, total.split(counts))
        if config.max_draws > 1:
            self.metrics.add("draws", draws)
            self.metrics.add("groups", sum(int(trained.sum()) for trained in iteration.trained))
        every = self.config.sheet_every
        if every and number % every == 0 and self.context.ranks.first:
            for index in range(len(rollouts)):
                self.save_sheet(iteration, index)
            update_report(self.context)
        return iteration

    def sheet_of(self, iteration: Iteration[R], index: int, suffix: str) -> Path:
        """The file for a sheet of a rollout."""
        return self.sheet(f"iteration-{iteration.number:06d}-{index}{suffix}")

    def _rollouts(self, number: int, draw: int, first: int) -> list[R]:
        """Rollouts of one draw of prompts, the `first` of which has that index; collective.

        Each rank samples some, here or by workers, and has all. Raises RolloutFailure.
        """
        cases, ranks = self.rollout_cases(number, draw), self.context.ranks
        if ranks.size == 1 and not self.config.rollout_workers:
            with evaluation_mode(self.model):
                return [self.rollout(some, number, i) for i, some in enumerate(cases, first)]
        mine = ranks.share(len(cases))
        sampled = ranks.together(
            lambda: self._sampled_elsewhere(cases, mine, (number, draw, first))
        )
        return [
            self.restored(some, number, tensors).with_shown(shown)
            for some, (tensors, shown) in zip(cases, chain(*ranks.gather(sampled)), strict=True)
        ]

    def _sampled_elsewhere(
        self, cases: Sequence[Sequence[PromptCase]], mine: range, place: tuple[int, int, int]
    ) -> list[Sampled]:
        """Some rollouts of a draw, as they are sent from one process to another."""
        number, draw, first = place
        if self.config.rollout_workers:
            if self._workers is None:
                count = self.config.rollout_workers
                self._workers = RolloutWorkers(count, self.context, self.sampler)
            return self._workers.sample([(number, draw, first, i) for i in mine])
        with evaluation_mode(self.model):
            rollouts = [self.rollout(cases[i], number, first + i) for i in mine]
        return [({n: t.cpu() for n, t in r.tensors().items()}, r.shown()) for r in rollouts]

    def _rewarded(self, rollouts: Sequence[R]) -> Rewarded:
        """The rewards of all samples of some rollouts, each rank measuring some; collective."""
        ranks = self.context.ranks
        mine = ranks.share(len(rollouts))
        some = rollouts[mine.start : mine.stop]
        outputs = [output for rollout in some for output in rollout.outputs()]
        cases = [case for r in some for case in r.cases for _ in range(r.group)]
        measured = ranks.together(lambda: self.rewards.measure(outputs, cases))
        rewarded = Rewarded.joined(ranks.gather(measured))
        ranks.together(lambda: self.rewards.check(rewarded))
        return rewarded

    def rollout_cases(self, number: int, draw: int) -> list[list[PromptCase]]:
        """The cases of each rollout of a draw of prompts."""
        count = self.config.prompts_per_iteration
        limit = self.config.prompts_per_rollout or count
        alike = self.cases((number * self.config.max_draws + draw) * count, count)
        return [group[i : i + limit] for group in alike for i in range(0, len(group), limit)]

    def _with_advantages(
        self,
        number: int,
        draws: int,
        rollouts: Sequence[R],
        rewards: Sequence[Float[Tensor, "prompts group"]],
    ) -> Iteration[R]:
        config, every = self.config, torch.cat(list(rewards))
        trained = informative(every)
        if config.max_draws > 1:
            trained &= trained.cumsum(0) <= config.prompts_per_iteration
            every = every.masked_fill(~trained[:, None], torch.nan)
        advantages = group_advantages(every, config.advantage)
        counts = [len(rollout.cases) for rollout in rollouts]
        return Iteration(
            number, draws, rollouts, advantages.split(counts), rewards, trained.split(counts)
        )

    def _saved_iteration(
        self, number: Any, draws: Any, tensors: Mapping[str, Tensor]
    ) -> Iteration[R]:
        """The iteration of a saved state. Raises CheckpointError."""
        if type(number) is not int or number < 0:
            raise CheckpointError(f"iteration must be a number from 0 up, got {number!r}")
        if type(draws) is not int or not 1 <= draws <= MAX_DRAWS:
            raise CheckpointError(f"draws must be from 1 to {MAX_DRAWS}, got {draws!r}")
        rollouts, rewards = [], []
        drawn = [cases for draw in range(draws) for cases in self.rollout_cases(number, draw)]
        for index, cases in enumerate(drawn):
            prefix = f"rollout{index}."
            of_rollout = {
                n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)
            }
            try:
                rewards.append(of_rollout.pop("rewards"))
                rollouts.append(self.restored(cases, number, of_rollout))
            except (KeyError, ValueError) as error:
                raise CheckpointError(f"the state's rollouts do not fit: {error}") from error
        return self._with_advantages(number, draws, rollouts, rewards)

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


def _by_group(rewarded: Rewarded, group: int) -> Float[Tensor, "prompts group"]:
    return torch.from_numpy(rewarded.total).float().view(-1, group)


def _checked_position(position: Any) -> tuple[int, int]:
    if (
        not isinstance(position, list)
        or len(position) != 2
        or not all(type(value) is int and value >= 0 for value in position)
    ):
        raise CheckpointError(f"position must be [iteration, update], got {position!r}")
    return position[0], position[1]
