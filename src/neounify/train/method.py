"""Method protocol: what the training loop asks of a way to train, and the table of the methods.

The loop (`loop.py`) keeps the position, accumulation, clipping, the skip of steps that are not
finite, the EMA, saved states and the log. A method brings batches, their loss and optimizers.
Supervised training (`supervised.py`) is one. Reinforcement learning yields its rollouts as batches
and keeps reference models in its state; distillation returns one optimizer set per model, with
separate rates, clipping and turns; a method may shard its models before it builds optimizers.

A new method is a file with a `MethodConfig` and a `Method`, and a line in `METHODS`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from neounify.config import ModelConfig
from neounify.config.ranges import read_kind
from neounify.data.loader import Skipped
from neounify.data.sources import Mixture
from neounify.distributed.ranks import ONE, Ranks
from neounify.errors import NeounifyError
from neounify.model.parts import StreamName
from neounify.train.optim import OptimizerSet

if TYPE_CHECKING:
    from neounify.train.recipe import Recipe, StageRecipe
    from neounify.train.setup import StageSources, TrainSetup

METHODS = {
    "supervised": "neounify.train.supervised:SupervisedConfig",
    "flow-grpo": "neounify.post_train.grpo:FlowGrpoConfig",
    "text-grpo": "neounify.post_train.text_grpo:TextGrpoConfig",
    "nft": "neounify.post_train.nft:NftConfig",
    "dpo": "neounify.post_train.dpo:DpoConfig",
    "trajectory": "neounify.post_train.distill:TrajectoryConfig",
    "dmd2": "neounify.post_train.dmd2:Dmd2Config",
    "mopd": "neounify.post_train.mopd:MopdConfig",
}
"""The `MethodConfig` of every kind, as "module:class"; imported when a recipe names it."""
DEFAULT_METHOD = "supervised"

NOISE, DROPOUT = 0, 1
"""Purposes of random numbers; their sequences are independent."""

NO_TIME = "not enough time to tell"
"""Begin of the advice of a finding that had too little time for a verdict."""

Size = tuple[int, int]


class TrainingStopped(NeounifyError):
    """Training cannot continue: steps that are not finite, or a policy that collapsed."""


def pack_seed(seed: int, step: int, pack: int, purpose: int = NOISE) -> int:
    """A seed in [0, 2^63) for one pack of one step, independent of those of all others."""
    sequence = np.random.SeedSequence((seed, step, pack, purpose))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's global generators, which dropout draws from; restored afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def repeatable(device: torch.device) -> Iterator[None]:
    """Kernels that give the same bits in every run; torch's settings before are restored.

    Sums of some CUDA kernels depend on the order in which threads end. A CPU needs no setting.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode of a model, without dropout; its mode before is restored."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@dataclass(frozen=True, eq=False, kw_only=True)
class MicroBatch:
    """One micro-batch: `content` is for the method's `loss`, the rest for the loop.

    `position` is a JSON value from which `batches` continues after this one. `samples` are ids for
    the record of steps that are not finite; `images` and `tokens` are counted; `operations` of
    forward and backward give the reported speed, and batches of like `cost` take as long. `used`
    and `skipped` are the draws from the stage's mixture, per source, and its damaged samples.
    """

    content: Any
    position: Any
    samples: Sequence[str] = ()
    images: int = 0
    tokens: int = 0
    operations: float = 0.0
    cost: float = 0.0
    used: Mapping[int, int] = field(default_factory=Counter)
    skipped: Sequence[Skipped] = ()


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainStep:
    """One optimizer step: its micro-batches, and the `index` of the one at hand.

    `number` counts the steps of the run before it, `stage_step` those of the stage. `batches` are
    those of this rank: of R ranks, rank r has every R-th from the r-th on.
    """

    number: int
    stage_step: int
    batches: Sequence[MicroBatch]
    seed: int
    index: int = 0
    ranks: Ranks = ONE

    def batch_seed(self, purpose: int = NOISE) -> int:
        """The seed of the micro-batch at hand, the same on any number of ranks."""
        return pack_seed(self.seed, self.number, self.pack, purpose)

    @property
    def pack(self) -> int:
        """The number of the micro-batch at hand among those of all ranks."""
        return self.index * self.ranks.size + self.ranks.rank


@dataclass(frozen=True, eq=False, kw_only=True)
class StageContext:
    """Inputs of a method at the start of its stage.

    The model holds the weights of the stage before and the stage's adapters; frozen parameters need
    no gradient. On a resume it holds the saved weights already: what a method copied from the
    model at the start of the stage (a teacher, a reference) must be in its state. A method may
    write files of its own into `folder`, the run's folder, under names that the loop does not use
    (states, model, adapter, samples, tokenizer, tensorboard, log.jsonl, warnings.jsonl,
    experts.jsonl, skipped.txt, nonfinite.jsonl).
    """

    recipe: Recipe
    stage: StageRecipe
    setup: TrainSetup
    sources: StageSources
    folder: Path

    @property
    def ranks(self) -> Ranks:
        """The ranks that share the micro-batches of a step."""
        return self.setup.parallel.packs

    @property
    def mixture(self) -> Mixture:
        """The stage's data. Raises DataError where it cannot be read, or there is none."""
        return self.sources.of(self.stage)


@dataclass(frozen=True, eq=False, kw_only=True)
class MethodState:
    """The method's part of a saved state, beside model, EMA and optimizers.

    `tensors` by name; `facts` is a JSON object.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """A way to train. The loop calls `optimizers`, then `load` on a resume, then `batches`.

    Per step: all its batches are drawn, then `begin_step`, then `loss` and backward for each, then
    the active optimizers step, unless a gradient is not finite, then `end_step`. In a step without
    an active optimizer batches are drawn and counted, no loss is computed. The stage ends after its
    steps, or when the batches end. Subclasses inherit the defaults of all but the first three
    methods: no metrics, warnings or state.
    """

    headline: ClassVar[Mapping[str, str]] = {}
    """Label → name of the metrics that the console shows; the first four where there are none."""

    def optimizers(self) -> Sequence[OptimizerSet]:
        """The optimizers, in an order that never changes; names of parameters differ in all.

        Sets of other models than the trained one have a `prefix`, which also names their learning
        rate and gradient norm in the log.
        """
        ...

    def batches(self, position: Any) -> Iterator[MicroBatch]:
        """Micro-batches from a position on; None is the beginning.

        It is called once per run of the stage and read between steps, so it may sample from the
        weights as they are. A generator is closed when the stage ends, also by an error.
        """
        ...

    def begin_step(self, step: TrainStep) -> None:
        """Called before the first loss of a step; `step.index` is not of a batch yet."""
        return

    def join_positions(self, positions: Sequence[Any]) -> Any:
        """One position of the run from those of its ranks, the last of which has the last batch."""
        return positions[-1]

    def loss(self, batch: MicroBatch, step: TrainStep) -> Tensor:
        """The share of one micro-batch in the step's loss, a scalar; gradients are summed."""
        ...

    def end_step(self, step: TrainStep, taken: bool) -> None:
        """Called after every step; `taken` is False when no optimizer was active or a gradient was
        not finite. May raise TrainingStopped."""
        return

    def report(self) -> dict[str, float]:
        """Metrics by name, means since the last report over steps that were taken."""
        return {}

    def warnings(self, stage_step: int, report: Mapping[str, float]) -> Sequence[str]:
        """Warnings after a report: what is wrong, and which setting to change."""
        return ()

    def end_stage(self) -> None:
        """Called after the stage's checkpoint is exported, to close or write files of its own."""
        return

    def state(self) -> MethodState:
        """State for a resume, beside model, EMA, optimizers and position."""
        return MethodState()

    def load(self, state: MethodState) -> None:
        """Restore `state`. Raises CheckpointError for one that does not fit."""
        return


@dataclass(frozen=True)
class Finding:
    """Result of one check of the doctor. `good` None: no verdict, or a remark; `advice`: what to
    change."""

    name: str
    good: bool | None
    what: str
    advice: str = ""


class MethodConfig(ABC):
    """The settings of a method: a frozen pydantic dataclass, as a recipe's `method` table holds it.

    Its `kind` is its name in `METHODS`. Fields are checked when the recipe is read; the checks
    below have defaults that find nothing wrong.
    """

    kind: str
    needs_data: ClassVar[bool] = True
    """Whether a stage must have data; with False, `data = []` is allowed."""
    residuals: ClassVar[Sequence[str]] = ("float32",)
    """Dtypes that the residual stream may have."""
    shards: ClassVar[bool] = False
    """Whether parameters, and rows of a pack, may be cut over ranks; else each rank needs the whole
    model."""

    @abstractmethod
    def build(self, context: StageContext) -> Method:
        """The method at the start of a stage."""

    def check_stage(self, stage: StageRecipe) -> None:
        """Raise ValueError for a stage that cannot be trained so; before anything is loaded."""
        return

    def check_ranks(self, ranks: int) -> None:
        """Raise ValueError where so many ranks cannot share the packs of a step."""
        return

    def check_data(self, context: StageContext) -> None:
        """Raise DataError for data that cannot be used; called before any stage is trained."""
        return

    def unused_streams(self, stage: StageRecipe) -> Collection[StreamName]:
        """Frozen streams that no batch of the stage calls: their weights may leave the devices."""
        return ()

    def trained_sizes(
        self, stage: StageRecipe, config: ModelConfig
    ) -> tuple[Sequence[Size], Sequence[Size]]:
        """Image sizes of a stage for the checkpoint's config.

        (width, height) pairs, and (least, greatest) areas of images of any shape.
        """
        return (), ()

    def checkpoint_config(self, config: ModelConfig) -> ModelConfig:
        """The model's config after the stage, such as the steps of a distilled model.

        It may change the sampling defaults, which a checkpoint and later stages then have.
        """
        return config

    def examine(self, context: StageContext, seconds: float) -> Iterator[Finding]:
        """The doctor's checks of a stage, in about `seconds`; the model's weights may change."""
        yield Finding("method", None, f"the method {self.kind} has no checks of its own")


def read_method(value: Any) -> MethodConfig:
    """A recipe's `method` table by its `kind`; a config is taken as it is. Raises ValueError."""
    if isinstance(value, MethodConfig):
        return value
    config: MethodConfig = read_kind(value, METHODS, DEFAULT_METHOD, "method")
    return config
