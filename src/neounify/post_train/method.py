"""Base of the methods that learn from rewarded groups: rollouts, advantages, micro-batches, record.

An iteration samples `group` images of each of `prompts_per_iteration` prompts, rewards them, and
takes `updates` optimizer steps on them. A step's images are dealt to the stage's `packs_per_step`
micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from pydantic import AfterValidator
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor
from torch.nn import Parameter

from neounify.config.ranges import STRICT, Count, Fraction, NonNegativeInt, Range
from neounify.errors import CheckpointError, RequestError
from neounify.files import atomic_file
from neounify.flow.sampling import ImageSampling, ResolvedSampling
from neounify.image.contact_sheet import contact_sheet
from neounify.model.neo import NeoUnify
from neounify.post_train.advantage import Scope, group_advantages, informative
from neounify.post_train.policy import frozen_copy
from neounify.post_train.prompts import PromptCase, PromptConfig, build_prompts
from neounify.post_train.rewards import Pixels, RewardConfig, Rewarded, Rewards
from neounify.post_train.rollout import RandomSteps, Rollout, restored_rollout, sample_groups
from neounify.post_train.watch import RewardWatch, state_before
from neounify.tasks.program import Processor
from neounify.train.method import (
    Method,
    MethodConfig,
    MethodState,
    MicroBatch,
    StageContext,
    TrainingStopped,
    TrainStep,
)
from neounify.train.optim import OptimizerSet

if TYPE_CHECKING:
    from neounify.train.recipe import StageRecipe

MAX_GROUP = 256


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class SamplerConfig:
    """How a policy or student samples: `steps`, `guidance` (1 is none) and `shift`.

    None is the checkpoint's value. `edit_guidance` is the guidance of edits.
    """

    steps: Count | None = None
    guidance: float | None = 1.0
    edit_guidance: float | None = 1.0
    shift: float | None = None

    def __post_init__(self) -> None:
        self.sampling(editing=False)
        self.sampling(editing=True)

    def sampling(self, *, editing: bool) -> ImageSampling:
        """The request's form of it. Raises ValueError for values out of range."""
        try:
            return ImageSampling(
                steps=self.steps,
                guidance=self.edit_guidance if editing else self.guidance,
                shift=self.shift,
            )
        except RequestError as error:
            raise ValueError(str(error)) from error


class ImagePostTrainConfig(MethodConfig):
    """What all methods on images share: they train the generation stream only, without data."""

    needs_data: ClassVar[bool] = False

    def check_stage(self, stage: StageRecipe) -> None:
        """Raise ValueError where the understanding stream would be trained, or data is given."""
        if stage.data:
            raise ValueError(
                f"data: {self.kind} draws from method.prompts; give the stage data = []"
            )
        if stage.lora is not None and tuple(stage.lora.streams) != ("gen",):
            raise ValueError(
                f'lora.streams: {self.kind} trains the generation stream: streams = ["gen"]'
            )
        if stage.lora is None and not {"und", "shared"} <= set(stage.freeze):
            raise ValueError(
                f"freeze: {self.kind} keeps the keys and values of prompts, so the understanding "
                'stream must be frozen: freeze = ["und", "shared"]'
            )


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


class Means:
    """Means of metrics since the last report, weighted."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, value: float, weight: float = 1.0) -> None:
        """Count a value; NaN is left out."""
        if weight and not math.isnan(value):
            total, count = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (total + value * weight, count + weight)

    def take(self) -> dict[str, float]:
        """The means, and begin anew."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means


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


class PromptMethod(Method):
    """Model, prompts and one optimizer set over what the stage trains."""

    def __init__(self, prompts: PromptConfig, context: StageContext) -> None:
        self.context = context
        self.model = context.setup.model
        self.processor = Processor(
            self.model.config,
            context.setup.tokenizer,
            context.setup.system_message,
            self.model.compute_dtype,
        )
        self.prompts = build_prompts(
            prompts, self.model.config.sampling.image_size, self.model.config.token_size
        )
        self.metrics = Means()

    def optimizers(self) -> Sequence[OptimizerSet]:
        stage = self.context.stage
        parameters = dict(self.model.named_parameters())
        schedule = stage.schedule.over(stage.steps)
        return [OptimizerSet(parameters, stage.optimizer, clip=stage.clip, schedule=schedule)]

    def cases(self, first: int, count: int) -> list[list[PromptCase]]:
        """`count` cases from `first` on, those of one size and guidance formula together."""
        alike: dict[tuple[int, int, bool], list[PromptCase]] = {}
        for case in (self.prompts.case(first + i) for i in range(count)):
            alike.setdefault((case.width, case.height, bool(case.images)), []).append(case)
        return list(alike.values())

    def resolve(self, sampler: SamplerConfig, cases: Sequence[PromptCase]) -> ResolvedSampling:
        """Sampling of cases that are all edits, or all not."""
        editing = bool(cases[0].images)
        return sampler.sampling(editing=editing).resolve(self.model.config, editing=editing)

    def report(self) -> dict[str, float]:
        return self.metrics.take()


class RolloutMethod(PromptMethod):
    """Sampling, rewards and bookkeeping; a subclass gives `random_steps` and `share_loss`."""

    headline: Mapping[str, str] = {"reward": "reward", "strict": "reward/strict", "equal": "equal"}

    def __init__(self, config: RolloutConfig, context: StageContext) -> None:
        super().__init__(config.prompts, context)
        self.config = config
        self.rewards = Rewards(config.rewards, config.max_failed_rewards)
        self.watch = RewardWatch()
        self._sampled: dict[str, float] = {}
        self._iteration: Iteration | None = None
        self._updates_done = config.updates

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

    def units(self, iteration: Iteration) -> list[tuple[int, tuple[int, ...]]]:
        """What is dealt to micro-batches: (rollout, images that stay together).

        Here every image that has a reward, of groups whose rewards differ.
        """
        return [
            (place, (prompt * rollout.group + member,))
            for place, (rollout, rewards) in enumerate(
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
        for part, dealt in enumerate(np.array_split(rng.permutation(len(units)), parts)):
            chosen = sorted(units[index] for index in dealt)
            places = sorted({place for place, _ in chosen})
            shares = [self._share(iteration, place, chosen) for place in places]
            images = [image for _, images in chosen for image in images]
            yield MicroBatch(
                content=MicroContent(iteration.number, update, shares, total),
                position=after if part + 1 == parts else [iteration.number, update],
                samples=[f"iteration {iteration.number} image {image}" for image in images],
                images=len(images),
                tokens=sum(s.rollout.grid.length * len(s.images) for s in shares),
            )

    def _share(
        self, iteration: Iteration, place: int, units: Sequence[tuple[int, tuple[int, ...]]]
    ) -> Share:
        images = torch.tensor([i for other, images in units if other == place for i in images])
        advantages = iteration.advantages[place].flatten()[images]
        device = self.model.device
        return Share(iteration.rollouts[place], images.to(device), advantages.to(device))

    def loss(self, batch: MicroBatch, step: TrainStep) -> Tensor:
        """The mean of the step's images, this micro-batch's share of it."""
        content: MicroContent = batch.content
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
            for place, rollout in enumerate(self._iteration.rollouts):
                tensors |= {f"rollout{place}.{n}": t for n, t in rollout.tensors().items()}
                tensors[f"rollout{place}.rewards"] = self._iteration.rewards[place]
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
        training = self.model.training
        self.model.eval()
        try:
            rollouts = [
                self._rollout(cases, number, place)
                for place, cases in enumerate(self._cases(number))
            ]
        finally:
            self.model.train(training)
        return self._rewarded(number, rollouts)

    def _cases(self, number: int) -> list[list[PromptCase]]:
        count = self.config.prompts_per_iteration
        return self.cases(number * count, count)

    def _rollout(self, cases: Sequence[PromptCase], number: int, place: int) -> Rollout:
        return sample_groups(
            self.sampler,
            self.processor,
            cases,
            self.config.group,
            self.resolve(self.config.sampler, cases),
            self.random_steps(number),
            seed=self.config.seed + place,
            iteration=number,
        )

    def _saved_iteration(self, number: Any, tensors: Mapping[str, Tensor]) -> Iteration:
        """The iteration of a saved state. Raises CheckpointError."""
        if type(number) is not int or number < 0:
            raise CheckpointError(f"iteration must be a number from 0 up, got {number!r}")
        rollouts, rewards = [], []
        for place, cases in enumerate(self._cases(number)):
            prefix = f"rollout{place}."
            own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            try:
                rewards.append(own.pop("rewards"))
                rollouts.append(
                    restored_rollout(
                        self.sampler,
                        self.processor,
                        cases,
                        self.config.group,
                        self.resolve(self.config.sampler, cases),
                        self.random_steps(number),
                        own,
                    )
                )
            except (KeyError, ValueError) as error:
                raise CheckpointError(f"the state's rollouts do not fit: {error}") from error
        counts = [len(rollout.cases) for rollout in rollouts]
        advantages = group_advantages(torch.cat(rewards), self.config.advantage)
        return Iteration(number, rollouts, advantages.split(counts), rewards)

    def _rewarded(self, number: int, rollouts: Sequence[Rollout]) -> Iteration:
        token_size = self.model.config.token_size
        pixels = [rollout.pixels(token_size) for rollout in rollouts]
        cases = [case for r in rollouts for case in r.cases for _ in range(r.group)]
        rewarded = self.rewards([image for images in pixels for image in images], cases)
        total = torch.from_numpy(rewarded.total).float()
        advantages = group_advantages(total.view(-1, self.config.group), self.config.advantage)
        counts = [len(rollout.cases) for rollout in rollouts]
        rewards = total.view(-1, self.config.group).split(counts)
        iteration = Iteration(number, rollouts, advantages.split(counts), rewards)
        self._count(rewarded, cases, total.view(-1, self.config.group))
        every = self.config.sheet_every
        if every and number % every == 0:
            for place, images in enumerate(pixels):
                self._save_sheet(iteration, place, images)
        return iteration

    def _save_sheet(self, iteration: Iteration, place: int, images: Sequence[Pixels]) -> None:
        """Save groups as rows, each image over its reward, advantage and prompt."""
        rollout = iteration.rollouts[place]
        rewards = iteration.rewards[place].flatten().tolist()
        advantages = iteration.advantages[place].flatten().tolist()
        prompts = [case.prompt for case in rollout.cases for _ in range(rollout.group)]
        captions = [
            f"{reward:.2f} A {advantage:+.1f} {prompt}"
            for reward, advantage, prompt in zip(rewards, advantages, prompts, strict=True)
        ]
        sheet = contact_sheet(
            images, captions, [a > 0 for a in advantages], columns=rollout.group, side=96
        )
        folder = self.context.folder / "rollouts"
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / f"iteration-{iteration.number:06d}-{place}.png") as aside:
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
                add(
                    f"reward/by/{category}", float(rewarded.total[chosen].mean()), int(chosen.sum())
                )
        add("reward/failed", float(1 - present.mean()), len(present))
        differ = informative(rewards)
        add("equal", float(1 - differ.float().mean()), len(differ))


class TwinState:
    """A copy of what is trained: a reference, an old policy, a fake. It is saved with the method.

    Its tensors are frozen, or with `trained` parameters of a second optimizer set.
    """

    def __init__(self, name: str, model: NeoUnify, *, trained: bool = False) -> None:
        self.name = name
        self.model = frozen_copy(model)
        names = {n for n, p in model.named_parameters() if p.requires_grad}
        self._parameters = {n: p for n, p in self.model.named_parameters() if n in names}
        for parameter in self._parameters.values():
            parameter.requires_grad_(trained)

    def parameters(self) -> dict[str, Parameter]:
        """Its own parameters, by the names they have in the model."""
        return dict(self._parameters)

    def tensors(self) -> dict[str, Tensor]:
        """Its own tensors for a saved state."""
        return {f"{self.name}.{n}": p.detach() for n, p in self._parameters.items()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore them. Raises CheckpointError."""
        for name, tensor in self.tensors().items():
            saved = tensors.get(name)
            if saved is None or saved.shape != tensor.shape:
                raise CheckpointError(f"the state has no {name} of shape {list(tensor.shape)}")
            tensor.copy_(saved)


def _checked_position(position: Any) -> tuple[int, int]:
    if (
        not isinstance(position, list)
        or len(position) != 2
        or not all(type(value) is int and value >= 0 for value in position)
    ):
        raise CheckpointError(f"position must be [iteration, update], got {position!r}")
    return position[0], position[1]
