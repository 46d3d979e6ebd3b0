"""An iteration of the methods that learn from groups: its rollouts, and shares of micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Self

from neounify.post_train.prompts import PromptCase
from neounify.post_train.reward_kinds import Output

Unit = tuple[int, tuple[int, ...]]
"""A rollout and samples of it that stay together in a micro-batch."""


class Rollout(Protocol):
    """Samples of some prompts: `count` = prompts · group, those of a prompt together."""

    @property
    def cases(self) -> Sequence[PromptCase]:
        """The prompts."""

    @property
    def group(self) -> int:
        """Samples of a prompt."""

    @property
    def count(self) -> int:
        """Samples."""

    def outputs(self) -> Sequence[Output]:
        """What is rewarded, for each sample."""

    def tokens_of(self, chosen: Sequence[int]) -> int:
        """Tokens of some samples that are trained on."""

    def tensors(self) -> dict[str, Tensor]:
        """What cannot be computed again, by name."""

    def old_values(self, chosen: Sequence[int]) -> Any:
        """What the first update kept of some samples for later ones, on the CPU."""

    def take_old(self, chosen: Sequence[int], values: Any) -> None:
        """Keep the `old_values` that another rank has computed."""

    def shown(self) -> Any:
        """What rewards and sheets read of it that `tensors` do not hold, as pipes pass it."""

    def with_shown(self, shown: Any) -> Self:
        """The rollout with that of another process."""


R = TypeVar("R", bound=Rollout)


@dataclass(frozen=True, eq=False)
class Iteration(Generic[R]):
    """Rollouts of `draws` draws of prompts; [prompts, group] rewards and advantages of each.

    `trained` says of each prompt whether its group is trained on.
    """

    number: int
    draws: int
    rollouts: Sequence[R]
    advantages: Sequence[Float[Tensor, "prompts group"]]
    rewards: Sequence[Float[Tensor, "prompts group"]]
    trained: Sequence[Bool[Tensor, " prompts"]]


@dataclass(frozen=True, eq=False)
class Share(Generic[R]):
    """Samples `chosen` [n] of one rollout in a micro-batch, and their advantages [n]."""

    rollout: R
    chosen: Tensor
    advantages: Float[Tensor, " n"]


@dataclass(frozen=True, eq=False)
class MicroContent(Generic[R]):
    """A micro-batch: shares of the rollouts, and the number of samples of the whole step."""

    iteration: int
    update: int
    shares: Sequence[Share[R]]
    step_samples: int
