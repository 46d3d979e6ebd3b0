"""Base of all post-training methods: prompts, trained streams, metrics, copies of the model."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor
from torch.nn import Parameter

from neounify.config import ModelConfig
from neounify.config.ranges import STRICT, Count, NonNegativeInt
from neounify.distributed.ranks import ONE, Ranks
from neounify.errors import CheckpointError
from neounify.flow.sampling import ImageSampling, ResolvedSampling
from neounify.model.neo import NeoUnify
from neounify.model.parts import GEN, UND, StreamName
from neounify.post_train.policy import frozen_copy
from neounify.post_train.prompts import (
    PromptCase,
    PromptConfig,
    PromptSource,
    build_prompts,
    scene_categories,
)
from neounify.post_train.report import plain, update_report
from neounify.tasks.program import Processor
from neounify.train.method import (
    Method,
    MethodConfig,
    MethodState,
    StageContext,
)
from neounify.train.optim import OptimizerSet

if TYPE_CHECKING:
    from neounify.train.recipe import StageRecipe


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class SamplerConfig:
    """Sampling of a policy or student: `steps`, `guidance` (1 is none) and `shift`.

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
        """The request's form of it. Raises RequestError for values out of range."""
        return ImageSampling(
            steps=self.steps,
            guidance=self.edit_guidance if editing else self.guidance,
            image_guidance=None if self.edit_guidance is None else 1.0,
            shift=self.shift,
        )

    def check_unguided(self, name: str) -> None:
        """Check that guidance is 1 for images and edits. Raises ValueError."""
        if self.guidance != 1 or self.edit_guidance != 1:
            raise ValueError(
                f"{name}.guidance and {name}.edit_guidance must be 1, got {self.guidance} and "
                f"{self.edit_guidance}: its samples and gradients are those of one branch, without "
                "guidance"
            )


@checked_dataclass(frozen=True, kw_only=True, config=STRICT)
class PromptMethodConfig(MethodConfig):
    """What all methods share: they draw from `prompts` in place of data, and train `streams`."""

    needs_data: ClassVar[bool] = False
    answers: ClassVar[bool] = False
    """Whether the prompts ask for texts, not for images."""

    prompts: PromptConfig = field(default_factory=PromptConfig)
    seed: NonNegativeInt = 0

    @property
    def drawn(self) -> PromptConfig:
        """The prompts, with the categories that the method draws."""
        return self.prompts

    @property
    def streams(self) -> tuple[StreamName, ...]:
        """The streams that are trained; the others are frozen."""
        return (GEN,)

    def check_stage(self, stage: StageRecipe) -> None:
        """Raise ValueError for prompts that do not exist, other trained streams, or data."""
        if self.drawn.kind == "scenes":
            scene_categories(self.drawn, answers=self.answers)
        if stage.data:
            raise ValueError(
                f"data: {self.kind} draws from method.prompts; give the stage data = []"
            )
        if stage.lora is not None:
            if set(stage.lora.streams) != set(self.streams):
                listed = ", ".join(f'"{name}"' for name in self.streams)
                raise ValueError(
                    f"lora.streams: {self.kind} trains {_named(self.streams)}: streams = [{listed}]"
                )
            if stage.lora.dropout:
                raise ValueError(
                    f"lora.dropout must be 0, got {stage.lora.dropout}: {self.kind} compares what "
                    "is trained with what was sampled, which has no dropout"
                )
            return
        if UND not in self.streams and not {UND, "shared"} <= set(stage.freeze):
            raise ValueError(
                f"freeze: {self.kind} keeps the keys and values of prompts, so the understanding "
                'stream must be frozen: freeze = ["und", "shared"]'
            )
        if GEN not in self.streams and GEN not in stage.freeze:
            raise ValueError(
                f'freeze: {self.kind} trains {_named(self.streams)} alone: freeze = ["gen"]'
            )
        if frozen := sorted(set(self.streams) & set(stage.freeze)):
            raise ValueError(
                f"freeze: {self.kind} trains {_named(self.streams)}, so {frozen} cannot be frozen"
            )

    def check_data(self, context: StageContext) -> None:
        """Raise DataError or ConfigError for prompts that cannot be used."""
        self.build_prompts(context.setup.model.config)

    def build_prompts(self, model: ModelConfig) -> PromptSource:
        """The source of the prompts, for a model. Raises DataError or ConfigError."""
        size, token = model.sampling.image_size, model.token_size
        return build_prompts(self.drawn, size, token, answers=self.answers)


def _named(streams: Sequence[StreamName]) -> str:
    words = {UND: "understanding", GEN: "generation"}
    named = " and ".join(words[name] for name in streams)
    return f"the {named} stream{'s' if len(streams) > 1 else ''}"


class SavedPart(Protocol):
    """A part of a method that is saved with its state."""

    def tensors(self) -> dict[str, Tensor]:
        """Tensors of a saved state, under names that no other part has."""

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore them. Raises CheckpointError."""


Part = TypeVar("Part", bound=SavedPart)


class PromptMethod(Method):
    """Model, prompts and one optimizer set over what the stage trains."""

    config: PromptMethodConfig

    def __init__(self, config: PromptMethodConfig, context: StageContext) -> None:
        self.config, self.context = config, context
        self.attention = context.stage.attention
        self._kept: list[SavedPart] = []
        self.model = context.setup.model
        self.processor = Processor(
            self.model.config,
            context.setup.tokenizer,
            context.setup.system_message,
            self.model.compute_dtype,
        )
        self.prompts = config.build_prompts(self.model.config)
        self.metrics = Means()

    def keep(self, part: Part) -> Part:
        """Save a part with the method's state, and restore it on a resume."""
        self._kept.append(part)
        return part

    def reference_copy(self, needed: bool) -> TwinState | None:
        """A copy of the weights at the start of the stage, None if none is needed."""
        return self.keep(TwinState("reference", self.model)) if needed else None

    def state(self) -> MethodState:
        tensors: dict[str, Tensor] = {}
        for part in self._kept:
            tensors |= part.tensors()
        return MethodState(tensors=tensors, facts={"settings": self._settings()})

    def load(self, state: MethodState) -> None:
        try:
            for part in self._kept:
                part.load(state.tensors)
        except CheckpointError as error:
            changes = self.changed_settings(state)
            since = f"; the recipe has changed since: {changes}" if changes else ""
            raise CheckpointError(f"{error}{since}") from error

    def changed_settings(self, state: MethodState, names: Collection[str] | None = None) -> str:
        """Settings of the method that differ from those of a state, of `names` alone or of all."""
        now, saved = self._settings(), state.facts.get("settings")
        if not isinstance(saved, Mapping):  # of an earlier version
            return ""
        if names is not None:
            now = {name: now[name] for name in names}
            saved = {name: saved.get(name) for name in names}
        return "; ".join(differences(saved, now, "method"))

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = plain(asdict(self.context.stage))["method"]
        return settings

    def optimizers(self) -> Sequence[OptimizerSet]:
        stage = self.context.stage
        parameters = dict(self.model.named_parameters())
        schedule = stage.schedule.over(stage.steps)
        return [OptimizerSet(parameters, stage.optimizer, clip=stage.clip, schedule=schedule)]

    def cases(self, first: int, count: int) -> list[list[PromptCase]]:
        """`count` cases from `first` on, those that are sampled in one batch together.

        Images of one size and guidance formula are; so are all texts, and interleaved answers
        with images of one size.
        """
        return self.alike(self.prompts.case(first + i) for i in range(count))

    def alike(self, cases: Iterable[PromptCase]) -> list[list[PromptCase]]:
        """Cases by what can be sampled in one batch."""
        groups: dict[tuple[int, int, bool] | None, list[PromptCase]] = {}
        for case in cases:
            alone = self.config.answers and case.preceding is None
            key = None if alone else (case.width, case.height, case.editing)
            groups.setdefault(key, []).append(case)
        return list(groups.values())

    def resolve(
        self, sampler: SamplerConfig, cases: Sequence[PromptCase], model: NeoUnify | None = None
    ) -> ResolvedSampling:
        """Sampling of cases that are all edits, or all not; defaults are those of `model`."""
        editing = cases[0].editing
        config = (model or self.model).config
        return sampler.sampling(editing=editing).resolve(config, editing=editing)

    def sheet(self, name: str) -> Path:
        """The file of a sheet of samples in the run's folder."""
        folder = self.context.folder / "rollouts"
        folder.mkdir(parents=True, exist_ok=True)
        stages = self.context.recipe.stages
        # Steps and iterations begin anew with every stage.
        stage = f"stage-{stages.index(self.context.stage)}-" if len(stages) > 1 else ""
        return folder / f"{stage}{name}"

    def report(self) -> dict[str, float]:
        return self.metrics.take(self.context.ranks)

    def end_stage(self) -> None:
        update_report(self.context)


def differences(before: Any, now: Any, name: str) -> list[str]:
    """Settings that differ, each with its name and both values."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        names = dict.fromkeys((*before, *now))
        return [
            line for n in names for line in differences(before.get(n), now.get(n), f"{name}.{n}")
        ]
    return [] if before == now else [f"{name} was {before!r:.80} and is {now!r:.80}"]


class Means:
    """Means of metrics since the last report, weighted."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, value: float, weight: float = 1.0) -> None:
        """Count a value; NaN is left out."""
        if weight and not math.isnan(value):
            total, count = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = (total + value * weight, count + weight)

    def take(self, ranks: Ranks = ONE) -> dict[str, float]:
        """The means over all ranks, and begin anew; collective."""
        sums: dict[str, tuple[float, float]] = {}
        for part in ranks.gather(self._sums):
            for name, (total, count) in part.items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + total, before[1] + count)
        self._sums = {}
        return {name: total / count for name, (total, count) in sums.items()}


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
