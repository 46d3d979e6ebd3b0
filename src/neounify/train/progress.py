"""Progress of a run: counters, stages that are left, samples per data source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from neounify.data.configs import DataConfig, FileData
from neounify.data.loader import LoadedPack, Skipped
from neounify.data.reasons import counted, too_many_skipped
from neounify.data.sample import DataError
from neounify.data.sources import FileSource, SampleSource, source_name
from neounify.errors import ConfigError
from neounify.pipeline import Pipeline
from neounify.train.method import MicroBatch
from neounify.train.recipe import Recipe, StageRecipe
from neounify.train.setup import TrainSetup


@dataclass
class Progress:
    """Counters of a run. `step` counts all stages, `stage_step` the current one.

    `damaged` counts how often a damaged sample was skipped, `damaged_samples` how many different
    ones there were in each stage. `ended`: the stage's batches ended before its steps.
    """

    stage: int = 0
    stage_step: int = 0
    step: int = 0
    samples: int = 0
    images: int = 0
    tokens: int = 0
    damaged: int = 0
    damaged_samples: int = 0
    nonfinite: int = 0
    seconds: float = 0.0
    ended: bool = False


def stages_to_run(recipe: Recipe, progress: Progress, only: Collection[str]) -> range:
    """Numbers of the stages to train, the current one first.

    All that are left, or up to the last that `only` names. A run that starts from a checkpoint may
    begin with any stage; any other run needs the stages before. Raises ConfigError for a stage that
    is unknown, trained already, or needs others first.
    """
    stages = recipe.stages
    if not only:
        return range(progress.stage, len(stages))
    names = [stage.name for stage in stages]
    if unknown := set(only) - set(names):
        listed = ", ".join(names)
        raise ConfigError(f"no stage {', '.join(sorted(unknown))}; the recipe has {listed}")
    numbers = sorted(names.index(name) for name in only)
    first, last = numbers[0], numbers[-1]
    current = stages[progress.stage]
    finished = progress.ended or progress.stage_step >= current.steps
    if left_out := [name for name in names[first : last + 1] if name not in only]:
        raise ConfigError(f"between the stages named, {', '.join(left_out)} is left out")
    if last < progress.stage:
        raise ConfigError(f"{names[last]} is trained already; the run is in {current.name}")
    if not progress.step and recipe.model.checkpoint is not None:
        return range(first, last + 1)
    if first > progress.stage + finished:
        raise ConfigError(
            f"{names[first]} starts from the result of {names[first - 1]}, and the run has "
            f"{progress.stage_step} of {current.steps} steps of {current.name}. Train that first "
            "(then --resume auto), or name a checkpoint to start from (model.checkpoint)"
        )
    return range(progress.stage, last + 1)


MAX_REASONS = 50
"""Reasons of a source that are counted one by one."""
OTHER_REASONS, PARTS = "other reasons", "files or parts of files that cannot be read"
MIN_SEEN = 50
"""Samples of a source before its share of damaged ones is judged."""


class Tally:
    """Counts per data source of a stage; part of a training state.

    `used` and `skipped` count draws, `damaged` holds the numbers of different damaged samples,
    `reasons` counts these by the kind of their error. `data` are the settings of the sources.
    """

    def __init__(self, sources: Sequence[SampleSource], data: Sequence[DataConfig] = ()) -> None:
        self.sources, self.data = sources, data
        self.used: Counter[int] = Counter()
        self.skipped: Counter[int] = Counter()
        self.damaged: list[set[int]] = [set() for _ in sources]
        self.reasons: list[Counter[str]] = [Counter() for _ in sources]

    def add(self, batches: Sequence[MicroBatch | LoadedPack]) -> list[Skipped]:
        """Count batches; the damaged samples among them that are new."""
        new = []
        for batch in batches:
            self.used.update(batch.used)
            for skipped in batch.skipped:
                self.skipped[skipped.source] += 1
                if skipped.number not in self.damaged[skipped.source]:
                    self.damaged[skipped.source].add(skipped.number)
                    self._count_reason(self.reasons[skipped.source], skipped.reason)
                    new.append(skipped)
        return new

    @staticmethod
    def _count_reason(reasons: Counter[str], reason: str) -> None:
        known = reason in reasons or len(reasons) < MAX_REASONS
        reasons[reason if known else OTHER_REASONS] += 1

    def by_source(self) -> dict[str, dict[str, int]]:
        """Different damaged samples by source and reason, the most frequent first.

        Parts of files that could not be indexed are a reason too.
        """
        counts: dict[str, Counter[str]] = {}
        for source, reasons in zip(self.sources, self.reasons, strict=True):
            of_source = counts.setdefault(source_name(source), Counter())
            of_source.update(reasons)
            if isinstance(source, FileSource) and source.damage:
                of_source[PARTS] += len(source.damage)
        return {name: dict(reasons.most_common()) for name, reasons in counts.items() if reasons}

    def check(self) -> None:
        """Raise DataError for a source with a larger share of damaged samples than it may have."""
        for number, (source, data) in enumerate(zip(self.sources, self.data, strict=False)):
            limit = data.max_skipped if isinstance(data, FileData) else 1.0
            seen, damaged = self._seen(number), len(self.damaged[number])
            if damaged > limit * seen and (seen >= MIN_SEEN or seen == source.size):
                name = source_name(source)
                raise DataError(too_many_skipped(name, seen, self.reasons[number], limit))

    def _seen(self, number: int) -> int:
        """Different samples of a source that were drawn so far; every epoch takes each once."""
        drawn = self.used[number] + self.skipped[number]
        return max(len(self.damaged[number]), min(self.sources[number].size or drawn, drawn))

    def summary(self) -> list[str]:
        """A line per source of files: the usable share of the samples drawn so far."""
        lines = []
        for number, source in enumerate(self.sources):
            if not isinstance(source, FileSource):
                continue
            drawn, damaged = self.used[number] + self.skipped[number], len(self.damaged[number])
            size, seen = source.size or drawn, self._seen(number)
            share = 100 * (seen - damaged) / seen if seen else 100.0
            epochs = f", {drawn / size:.1f} epochs" if size else ""
            lines.append(
                f"{source.name}: {seen - damaged:,} of {seen:,} samples usable ({share:.0f} %)"
                + (f", {damaged:,} listed in skipped.txt" if damaged else "")
                + epochs
                + (f": {counted(self.reasons[number])}" if damaged else "")
            )
        return lines

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {
                "used": self.used[number],
                "skipped": self.skipped[number],
                "damaged": sorted(numbers),
                "reasons": dict(self.reasons[number]),
            }
            for number, numbers in enumerate(self.damaged)
        ]

    def load(self, record: Any) -> None:
        """Restore `to_json`; a record that is absent or of other sources is ignored."""
        if not isinstance(record, list) or len(record) != len(self.damaged):
            return
        with suppress(KeyError, TypeError, ValueError):  # counts only: nothing else depends on them
            for number, item in enumerate(record):
                self.used[number] = int(item["used"])
                self.skipped[number] = int(item["skipped"])
                self.damaged[number] = {int(n) for n in item["damaged"]}
                reasons = item.get("reasons", {})  # states of earlier versions have none
                self.reasons[number] = Counter({str(k): int(n) for k, n in reasons.items()})


Sampling = Callable[[], AbstractContextManager[Pipeline]]
Evaluate = Callable[[Sampling, Progress], dict[str, float]]


@contextmanager
def sampling_of(setup: TrainSetup, stage: StageRecipe) -> Iterator[Pipeline]:
    """The model as it is now, for each rank by itself; entering and leaving are collective."""
    with setup.parallel.sampling() as model:
        message, attention = setup.system_message, stage.attention
        yield Pipeline(model, setup.tokenizer, system_message=message, attention=attention)
