"""Supervised training: text and images of samples, packed (`data/`), with the loss of `loss.py`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import AfterValidator
from pydantic.dataclasses import dataclass
from torch import Tensor

from neounify.config.ranges import STRICT, Range
from neounify.data.encode import Encoder, GuidanceDropout
from neounify.data.loader import LoaderConfig, Position, check_sources, load_packs
from neounify.runtime.plan import plan_execution
from neounify.train.loss import Counts, LossConfig, Metrics, loss_of
from neounify.train.method import Batch, Method, StageContext, Step
from neounify.train.optim import OptimizerSet
from neounify.train.speed import StepOperations

if TYPE_CHECKING:
    from neounify.train.recipe import StageRecipe
    from neounify.train.setup import TrainSetup

MAX_NOISE_DRAWS = 2**16


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SupervisedConfig:
    """Supervised training, `kind = "supervised"`, the default method.

    `noise_draws` noisy copies of each target image share one pass over the text before them;
    `guidance_dropout` are the chances that a sample loses its prompt.
    """

    kind: Literal["supervised"] = "supervised"
    loss: LossConfig = field(default_factory=LossConfig)
    noise_draws: Annotated[int, AfterValidator(Range(1, MAX_NOISE_DRAWS))] = 1
    guidance_dropout: GuidanceDropout = field(default_factory=GuidanceDropout)

    def check_data(self, context: StageContext) -> None:
        """Raise DataError for a source without usable samples."""
        check_sources(context.mixture, build_encoder(context.stage, context.setup, self))

    def build(self, context: StageContext) -> Supervised:
        return Supervised(self, context)


def build_encoder(stage: StageRecipe, setup: TrainSetup, config: SupervisedConfig) -> Encoder:
    """The encoder of a stage's samples."""
    return Encoder(
        config=setup.model.config,
        tokenizer=setup.tokenizer,
        system_message=setup.system_message,
        dropout=config.guidance_dropout,
        noise_draws=config.noise_draws,
        target_pixels=stage.target_pixels,
        target_buckets=stage.target_buckets,
        input_pixels=stage.input_pixels,
        max_tokens=stage.tokens_per_pack,
    )


class Supervised(Method):
    """Packs of samples, `loss_of` each pack, one optimizer set over the model."""

    def __init__(self, config: SupervisedConfig, context: StageContext) -> None:
        self.config, self.context = config, context
        self.model = context.setup.model
        self.metrics = Metrics(self.model.device)
        self._step_metrics = Metrics(self.model.device)
        self._counts = Counts(0, 0)
        self._plan = plan_execution(self.model.config, self.model.device, self.model.compute_dtype)

    def optimizers(self) -> list[OptimizerSet]:
        stage = self.context.stage
        parameters = dict(self.model.named_parameters())
        schedule = stage.schedule.over(stage.steps)
        return [OptimizerSet(parameters, stage.optimizer, clip=stage.clip, schedule=schedule)]

    def batches(self, position: Any) -> Iterator[Batch]:
        """Packs from a position on. Raises DataError for a damaged position or unusable data."""
        context = self.context
        config = LoaderConfig(
            tokens_per_pack=context.stage.tokens_per_pack,
            seed=context.recipe.seed,
            workers=context.recipe.workers,
        )
        encoder = build_encoder(context.stage, context.setup, self.config)
        start = None if position is None else Position.from_json(position)
        operations = StepOperations(self.model)
        for loaded in load_packs(context.mixture, encoder, config, start):
            pack = loaded.pack
            yield Batch(
                content=pack,
                position=loaded.position.to_json(),
                samples=pack.samples,
                images=len(pack.targets),
                tokens=pack.length,
                operations=operations.of(pack),
                used=loaded.used,
                skipped=loaded.skipped,
            )

    def loss(self, batch: Batch, step: Step) -> Tensor:
        """Sums over the pack, divided by the label and token counts of the whole step."""
        device = self.model.device
        if step.index == 0:
            self._counts = Counts.of([other.content for other in step.batches])
            self._step_metrics = Metrics(device)
        noise = torch.Generator(device).manual_seed(step.batch_seed())
        return loss_of(
            self.model,
            batch.content,
            self.config.loss,
            self._counts,
            noise,
            self._step_metrics,
            self._plan,
        )

    def end_step(self, step: Step, taken: bool) -> None:
        if taken:
            self.metrics.merge(self._step_metrics)

    def report(self) -> dict[str, float]:
        means = self.metrics.report()
        self.metrics = Metrics(self.model.device)
        return means
