"""Method protocol: what the training loop asks of a way to train.

The loop (`loop.py`) keeps the position, accumulation, clipping, the skip of steps that are not
finite, the EMA, saved states and the log. A method brings batches, their loss and optimizers.
Supervised training (`supervised.py`) is one. Reinforcement learning yields its rollouts as batches
and keeps reference models in its state; distillation returns one optimizer set per model, with
separate rates, clipping and turns; a method may shard its models before it builds optimizers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from neounify.data.loader import Skipped
from neounify.data.sources import Mixture
from neounify.train.optim import OptimizerSet

if TYPE_CHECKING:
    from neounify.train.recipe import Recipe, StageRecipe
    from neounify.train.setup import TrainSetup

NOISE, DROPOUT = 0, 1
"""Purposes of random numbers; their sequences are independent."""


def pack_seed(seed: int, step: int, pack: int, purpose: int = NOISE) -> int:
    """A seed in [0, 2^63) for one pack of one step, independent of those of all others."""
    sequence = np.random.SeedSequence((seed, step, pack, purpose))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's global generators, which dropout draws from; restored afterwards."""
    index = device.index if device.type == "cuda" else None
    with torch.random.fork_rng(devices=[] if index is None else [index]):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """One micro-batch: `content` is for the method's `loss`, the rest for the loop.

    `position` is a JSON value from which `batches` continues after this one. `samples` are ids for
    the record of steps that are not finite; `images` and `tokens` are counted; `operations` of
    forward and backward give the reported speed. `used` and `skipped` are the draws from the
    stage's mixture, per source, and its damaged samples.
    """

    content: Any
    position: Any
    samples: Sequence[str] = ()
    images: int = 0
    tokens: int = 0
    operations: float = 0.0
    used: Mapping[int, int] = field(default_factory=Counter)
    skipped: Sequence[Skipped] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class Step:
    """One optimizer step: its micro-batches, and the `index` of the one at hand.

    `number` counts the steps of the run before it, `stage_step` those of the stage.
    """

    number: int
    stage_step: int
    batches: Sequence[Batch]
    seed: int
    index: int = 0

    def batch_seed(self, purpose: int = NOISE) -> int:
        """The seed of the micro-batch at hand."""
        return pack_seed(self.seed, self.number, self.index, purpose)


@dataclass(frozen=True, eq=False, kw_only=True)
class StageContext:
    """Inputs of a method at the start of its stage. The model holds the weights of the stage
    before and the stage's adapters; frozen parameters need no gradient."""

    recipe: Recipe
    stage: StageRecipe
    setup: TrainSetup
    mixture: Mixture


@dataclass(frozen=True, eq=False, kw_only=True)
class MethodState:
    """The method's part of a saved state, beside model, EMA and optimizers.

    `tensors` by name; `facts` is a JSON object.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """A way to train. The loop calls `optimizers`, then `load` on a resume, then `batches`.

    Per step: all its batches are drawn, then `loss` and backward for each, then the active
    optimizers step, unless a gradient is not finite, then `end_step`. A subclass inherits the
    defaults of the last four methods: no metrics and no state.
    """

    def optimizers(self) -> Sequence[OptimizerSet]:
        """The optimizers, in an order that never changes; names of parameters differ in all."""
        ...

    def batches(self, position: Any) -> Iterator[Batch]:
        """Micro-batches without end from a position on; None is the beginning."""
        ...

    def loss(self, batch: Batch, step: Step) -> Tensor:
        """The share of one micro-batch in the step's loss, a scalar; gradients are summed."""
        ...

    def end_step(self, step: Step, taken: bool) -> None:
        """Called after every step; `taken` is False when a gradient was not finite."""
        return

    def report(self) -> dict[str, float]:
        """Metrics by name, means since the last report over steps that were taken."""
        return {}

    def state(self) -> MethodState:
        """State for a resume, beside model, EMA, optimizers and position."""
        return MethodState()

    def load(self, state: MethodState) -> None:
        """Restore `state`. Raises CheckpointError for one that does not fit."""
        return


class MethodConfig(Protocol):
    """The settings of a method, as a recipe's `method` table holds them."""

    @property
    def kind(self) -> str: ...

    def check_data(self, context: StageContext) -> None:
        """Raise DataError for data that cannot be used; called before any stage is trained."""
        ...

    def build(self, context: StageContext) -> Method: ...
