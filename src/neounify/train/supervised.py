"""Supervised training: text and images of samples, packed (`data/`), with the loss of `loss.py`."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator
from pydantic.dataclasses import dataclass
from torch import Tensor

from neounify.config import ModelConfig
from neounify.config.ranges import STRICT, AreaBounds, Count, Range
from neounify.data.draws import FrameTargets, GuidanceDropout
from neounify.data.encode import Encoder
from neounify.data.loader import LoaderConfig, Position, check_sources, load_packs
from neounify.data.sample import DataError
from neounify.image.pixels import fit_size
from neounify.model.build import computing_in
from neounify.model.parts import GEN, StreamName
from neounify.runtime.plan import plan_execution
from neounify.train.log import DivergenceWatch
from neounify.train.loss import Counts, LossConfig, Metrics, loss_of
from neounify.train.method import (
    Finding,
    Method,
    MethodConfig,
    MicroBatch,
    Size,
    StageContext,
    TrainStep,
)
from neounify.train.optim import OptimizerSet
from neounify.train.speed import StepOperations

if TYPE_CHECKING:
    from neounify.train.recipe import StageRecipe
    from neounify.train.setup import TrainSetup

MAX_NOISE_DRAWS = 2**16
MAX_TOKENS_PER_PACK = 2**24
GENERATING = {"t2i", "t2i_think", "edit", "edit_think", "interleave"}
"""Tasks with target images."""
FILMING = {"t2v", "next_frames"}
"""Tasks with target clips."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SupervisedConfig(MethodConfig):
    """Supervised training, `kind = "supervised"`, the default method.

    A micro-batch is a pack of `tokens_per_pack` tokens. `noise_draws` noisy copies of each target
    image share one pass over the text before them; `guidance_dropout` are the chances that a
    sample loses its prompt, `frame_targets` shares of the frames that are targets, of clips that
    are generated frame by frame. `target_pixels` and `input_pixels` bound the area of target and
    input images, by default as the checkpoint does; `target_buckets` are (width, height) pairs to
    crop targets to.
    """

    shards: ClassVar[bool] = True
    residuals: ClassVar[Sequence[str]] = ("float32", "bfloat16")
    kind: Literal["supervised"] = "supervised"
    tokens_per_pack: Annotated[int, AfterValidator(Range(1, MAX_TOKENS_PER_PACK))] = 4096
    loss: LossConfig = field(default_factory=LossConfig)
    noise_draws: Annotated[int, AfterValidator(Range(1, MAX_NOISE_DRAWS))] = 1
    guidance_dropout: GuidanceDropout = field(default_factory=GuidanceDropout)
    frame_targets: FrameTargets = field(default_factory=FrameTargets)
    target_pixels: AreaBounds | None = None
    target_buckets: tuple[tuple[Count, Count], ...] = ()
    input_pixels: AreaBounds | None = None

    def build(self, context: StageContext) -> Supervised:
        return Supervised(self, context)

    def check_data(self, context: StageContext) -> None:
        """Raise DataError for a source without usable samples."""
        check_sources(context.mixture, build_encoder(context.setup, self))

    def unused_streams(self, stage: StageRecipe) -> Collection[StreamName]:
        """The generation stream, if it is frozen and no data has images or clips to generate."""
        generates = any((GENERATING | FILMING) & set(data.tasks_drawn()) for data in stage.data)
        return (GEN,) if GEN in stage.freeze and not generates else ()

    def trained_sizes(
        self, stage: StageRecipe, config: ModelConfig
    ) -> tuple[list[Size], list[Size]]:
        """Buckets and data of known sizes as pairs, images of any shape as areas."""
        sizes: list[Size] = []
        areas: list[Size] = []
        for data in stage.data:
            if not GENERATING & set(data.tasks_drawn()):
                continue
            low, high = self._target_area(config)
            if self.target_buckets:
                sizes += self.target_buckets
            elif not data.image_sizes():
                areas.append((low, high))
            for size in [] if self.target_buckets else data.image_sizes():
                height, width = fit_size(
                    *size, multiple=config.token_size, min_pixels=low, max_pixels=high
                )
                sizes.append((width, height))
        return sizes, areas

    def examine(self, context: StageContext, seconds: float) -> Iterator[Finding]:
        from neounify.train.doctor import examine

        return examine(context, self, seconds)

    def _target_area(self, config: ModelConfig) -> Size:
        default = (config.sampling.edit_min_pixels, config.sampling.edit_max_pixels)
        return self.target_pixels or default


def build_encoder(setup: TrainSetup, config: SupervisedConfig) -> Encoder:
    """The encoder of a stage's samples."""
    return Encoder(
        config=setup.model.config,
        tokenizer=setup.tokenizer,
        system_message=setup.system_message,
        dropout=config.guidance_dropout,
        frame_targets=config.frame_targets,
        noise_draws=config.noise_draws,
        target_pixels=config.target_pixels,
        target_buckets=config.target_buckets,
        input_pixels=config.input_pixels,
        max_tokens=config.tokens_per_pack,
    )


class Supervised(Method):
    """Packs of samples, `loss_of` each pack, one optimizer set over the model."""

    headline: ClassVar = {"text": "text/loss", "image": "image/loss", "clean": "image/clean"}

    def __init__(self, config: SupervisedConfig, context: StageContext) -> None:
        self.config, self.context = config, context
        self.model = context.setup.model
        self.parallel = context.setup.parallel
        self.metrics = Metrics(self.model.device)
        self._step_metrics = Metrics(self.model.device)
        self._counts = Counts(0, 0, 0)
        self._plan = plan_execution(
            self.model.config,
            self.model.device,
            self.model.compute_dtype,
            attention=context.stage.attention,
        )
        self._watch = DivergenceWatch()
        self._unused = config.unused_streams(context.stage)

    def optimizers(self) -> list[OptimizerSet]:
        stage = self.context.stage
        parameters = dict(self.model.named_parameters())
        schedule = stage.schedule.over(stage.steps)
        return [OptimizerSet(parameters, stage.optimizer, clip=stage.clip, schedule=schedule)]

    def batches(self, position: Any) -> Iterator[MicroBatch]:
        """Packs from a position on. Raises DataError for a damaged position or unusable data."""
        context = self.context
        recipe = context.recipe
        start = Position.start(recipe.streams)
        if position is not None:
            start = Position.from_json(position)
        # Without a table in the recipe, a run keeps the data streams that it has.
        config = LoaderConfig(
            tokens_per_pack=self.config.tokens_per_pack,
            seed=recipe.seed,
            workers=recipe.workers,
            streams=recipe.streams if recipe.parallel else len(start.streams),
            rank=self.parallel.packs.rank,
            ranks=self.parallel.packs.size,
        )
        encoder = build_encoder(context.setup, self.config)
        operations = StepOperations(self.model)
        for loaded in load_packs(context.mixture, encoder, config, start):
            pack = loaded.pack
            yield MicroBatch(
                content=pack,
                position=loaded.position.to_json(),
                samples=pack.samples,
                images=len(pack.targets),
                tokens=pack.length,
                operations=operations.of(pack),
                cost=operations.cost(pack),
                used=loaded.used,
                skipped=loaded.skipped,
            )

    def loss(self, batch: MicroBatch, step: TrainStep) -> Tensor:
        """Sums over the pack, divided by the label and token counts of the whole step."""
        noise = torch.Generator(self.model.device).manual_seed(step.batch_seed())
        if batch.images and GEN in self._unused:
            raise DataError(
                f"stage {self.context.stage.name}: one of the samples {list(batch.samples)[:5]} "
                "has an image to generate, and the tasks of its data have none; correct task"
            )
        residual = getattr(torch, self.context.stage.residual)
        with computing_in(self.model, residual):
            loss: Tensor = self.parallel.objective(
                loss_of,
                batch.content,
                self.config.loss,
                self._counts,
                noise,
                self._step_metrics,
                self._plan,
                self.parallel.share(batch.content.layout, self._plan.attention),
            )
        return loss

    def begin_step(self, step: TrainStep) -> None:
        counts = Counts.of([batch.content for batch in step.batches])
        self._counts = Counts(*self.parallel.packs.total(list(counts)))
        self._step_metrics = Metrics(self.model.device)

    def join_positions(self, positions: Sequence[Any]) -> Any:
        if positions[0] is None:  # no pack is read yet
            return None
        return Position.merged([Position.from_json(one) for one in positions]).to_json()

    def end_step(self, step: TrainStep, taken: bool) -> None:
        if taken:
            self.metrics.merge(self._step_metrics)

    def report(self) -> dict[str, float]:
        self.parallel.ranks.add_(self.metrics.text, self.metrics.image)
        means = self.metrics.report()
        self.metrics = Metrics(self.model.device)
        return means

    def warnings(self, stage_step: int, report: Mapping[str, float]) -> list[str]:
        warning = self._watch.look(stage_step, report, self.context.stage)
        return [warning] if warning else []
