"""Settings of the methods that learn from rewarded groups: rollouts, rewards, updates."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import AfterValidator
from pydantic.dataclasses import dataclass as checked_dataclass

from neounify.config.ranges import STRICT, Count, Fraction, NonNegativeInt, Range
from neounify.post_train.advantage import Scope
from neounify.post_train.base import PromptMethodConfig
from neounify.post_train.rewards import IMAGES_ONLY, TEXTS_ONLY, RewardConfig, check_programs
from neounify.train.method import Finding, StageContext

if TYPE_CHECKING:
    from neounify.post_train.groups import GroupMethod
    from neounify.train.recipe import StageRecipe

MAX_PROMPTS = 2**16
MAX_GROUP = 256
MAX_DRAWS = 100
MAX_ROLLOUT_WORKERS = 256


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class GroupConfig(PromptMethodConfig):
    """Rollouts and rewards of an iteration, for all methods that learn from groups.

    Samples are drawn in rollouts of at most `prompts_per_rollout` prompts, by default of all that
    fit one batch; `rollout_workers` processes draw them on a CPU, 0 the trainer itself.

    `advantage` is what the standard deviation of rewards is taken over. `sheet_every` is in
    iterations; 0 saves no sheets of groups. The run stops when more than `max_failed_rewards` of
    the samples of a draw have no reward, or when the running mean of the reward falls below
    `collapse` times its best.

    Groups of one reward teach nothing. With `max_draws` above 1 an iteration continues to draw
    `prompts_per_iteration` prompts, so many times in all at most, until as many groups differ
    (dynamic sampling, DAPO, arXiv 2503.14476). The first of these are trained on, and advantages
    are theirs alone.
    """

    rollout_settings: ClassVar[tuple[str, ...]] = (
        *("prompts", "prompts_per_iteration"),
        *("group", "max_draws", "prompts_per_rollout", "seed"),
    )
    """Settings that rollouts of a saved state must have been sampled with."""

    rewards: tuple[RewardConfig, ...] = field(default_factory=lambda: (RewardConfig(),))
    prompts_per_iteration: Annotated[int, AfterValidator(Range(1, MAX_PROMPTS))] = 16
    group: Annotated[int, AfterValidator(Range(2, MAX_GROUP))] = 8
    max_draws: Annotated[int, AfterValidator(Range(1, MAX_DRAWS))] = 1
    prompts_per_rollout: Count | None = None
    rollout_workers: Annotated[int, AfterValidator(Range(0, MAX_ROLLOUT_WORKERS))] = 0
    updates: Count = 1
    advantage: Scope = "iteration"
    max_failed_rewards: Fraction = 0.2
    collapse: Fraction = 0.5
    sheet_every: NonNegativeInt = 20

    @abstractmethod
    def build(self, context: StageContext) -> GroupMethod[Any]: ...

    def check_stage(self, stage: StageRecipe) -> None:
        """Raise ValueError for prompts and rewards that do not fit each other or the method."""
        super().check_stage(stage)
        if self.rollout_workers > 1 and self.prompts_per_rollout is None:
            share = -(-self.prompts_per_iteration // self.rollout_workers)
            raise ValueError(
                f"rollout_workers: {self.rollout_workers} processes share an iteration's rollouts; "
                f"give prompts_per_rollout, such as {share}"
            )
        rollouts = -(-self.prompts_per_iteration // (self.prompts_per_rollout or 1))
        if self.rollout_workers > max(1, rollouts):
            raise ValueError(
                f"rollout_workers: {self.rollout_workers} processes for {rollouts} rollouts of an "
                "iteration; lower it, or prompts_per_rollout"
            )
        if self.rollout_workers and stage.compile:
            raise ValueError(
                "rollout_workers: processes sample without compilation, which may change bits; "
                "leave compile out"
            )
        if not self.rewards:
            raise ValueError(f"rewards: {self.kind} needs at least one reward")
        wrong = IMAGES_ONLY if self.answers else TEXTS_ONLY
        for reward in self.rewards:
            if reward.kind in wrong:
                outputs = "texts" if self.answers else "images"
                raise ValueError(f'rewards: "{reward.kind}" does not rate {outputs}')
            if reward.kind == "scenes" and self.prompts.kind != "scenes":
                raise ValueError(
                    'rewards: "scenes" needs prompts of kind "scenes", which know what is right; '
                    f'these are of kind "{self.prompts.kind}"'
                )
            if reward.kind == "scenes" and reward.world != self.prompts.world:
                raise ValueError(
                    f'rewards: the prompts are of the world "{self.prompts.world}", the reward is '
                    f'of "{reward.world}"'
                )
            of_record = {"answer": "an answer", "ocr": "a text"}.get(reward.kind)
            if of_record is not None and self.prompts.kind != "jsonl":
                raise ValueError(
                    f'rewards: "{reward.kind}" needs prompts of kind "jsonl" with {of_record}'
                )

    def check_ranks(self, ranks: int) -> None:
        """Raise ValueError for fewer rollouts than ranks."""
        count = self.prompts_per_iteration
        rollouts = -(-count // (self.prompts_per_rollout or count))
        if rollouts < ranks:
            raise ValueError(
                f"{ranks} ranks share the rollouts of an iteration, {rollouts} of "
                f"{self.prompts_per_rollout or count} prompts; give method.prompts_per_rollout, "
                f"such as {max(1, count // ranks)}, and prompts_per_iteration of {ranks} at least"
            )

    def check_data(self, context: StageContext) -> None:
        """Raise DataError or ConfigError for prompts or programs that cannot be used."""
        super().check_data(context)
        check_programs(self.rewards, context.recipe.folder)

    def examine(self, context: StageContext, seconds: float) -> Iterator[Finding]:
        from neounify.post_train.doctor import examine_rewards

        return examine_rewards(context, self, seconds)
