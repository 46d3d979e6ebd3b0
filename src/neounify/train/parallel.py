"""A run on many ranks: checks before it begins, the share of each rank, what it waits for."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from neounify.checkpoint.mapped import all_finite
from neounify.config import ModelConfig
from neounify.data.sample import ClipFile, DataError, SampleClip
from neounify.data.sources import SampleSource
from neounify.distributed.mesh import MeshShape, mesh_shape
from neounify.distributed.parallelize import Parallel, parallelize
from neounify.distributed.ranks import Ranks
from neounify.distributed.shards import local
from neounify.errors import ConfigError
from neounify.files import LOCK_FILE, file_sha256
from neounify.model.neo import NeoUnify
from neounify.train.method import MicroBatch
from neounify.train.recipe import Recipe, StageRecipe
from neounify.train.speed import peak_memory


def check_parallel(recipe: Recipe, ranks: int) -> MeshShape:
    """The mesh of a recipe on so many ranks, before anything is loaded.

    Raises ConfigError for degrees that do not fit, and stages that cannot use many ranks.
    """
    cut = all(stage.method.shards for stage in recipe.stages)
    shape = mesh_shape(recipe.parallel, ranks, cut=cut)
    if ranks == 1:
        return shape
    if recipe.streams % shape.packs and any(stage.data for stage in recipe.stages):
        change = "parallel.streams" if recipe.parallel else "workers, or give [parallel] streams,"
        raise ConfigError(
            f"{_packs(shape)} cannot share the {recipe.streams} data streams of the recipe: change "
            f"{change} to a multiple of {shape.packs}"
        )
    for stage in recipe.stages:
        _check_stage(stage, shape)
        if stage.compile and shape.expert > 1:
            raise ConfigError(
                f"stage {stage.name}: compile is not available with parallel.expert "
                f"({shape.expert}): leave one of them out"
            )
    if len(precisions := sorted({stage.precision for stage in recipe.stages})) > 1:
        raise ConfigError(
            f"on many ranks all stages need one precision, the recipe has {', '.join(precisions)}"
        )
    return shape


def _packs(shape: MeshShape) -> str:
    """The ranks that compute different packs, in words."""
    if shape.sequence == 1:
        return f"{shape.ranks} ranks"
    return f"{shape.packs} groups of {shape.sequence} ranks"


def _check_stage(stage: StageRecipe, shape: MeshShape) -> None:
    where = f"stage {stage.name}"
    if shape.cuts > 1 and not stage.method.shards:
        raise ConfigError(
            f"{where}: the method {stage.method.kind} needs the whole model on every rank; leave "
            "parallel.shard, expert and sequence out of a recipe that has such a stage"
        )
    if stage.lora is not None and shape.expert > 1:
        raise ConfigError(
            f"{where}: lora is not available with parallel.expert ({shape.expert}): leave it at 1"
        )
    if stage.lora is not None and stage.lora.dropout and shape.sequence > 1:
        raise ConfigError(
            f"{where}: lora.dropout ({stage.lora.dropout:g}) is not available with "
            f"parallel.sequence ({shape.sequence}), as ranks would drop other values than one; "
            "leave it at 0"
        )
    try:
        stage.method.check_ranks(shape.packs)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    if stage.packs_per_step % shape.packs:
        raise ConfigError(
            f"{where}: packs_per_step ({stage.packs_per_step}) must be a multiple of the "
            f"{_packs(shape)}, such as {shape.packs * -(-stage.packs_per_step // shape.packs)}"
        )


def check_model(config: ModelConfig, shape: MeshShape) -> None:
    """Raise ConfigError for a model that cannot use the axes of a mesh."""
    if shape.sequence > 1 and config.image_head == "pixel":
        raise ConfigError(
            f"parallel.sequence: {shape.sequence} ranks cannot share an image whose head is "
            '"pixel", which reads it as a whole; leave sequence at 1'
        )
    if shape.expert == 1:
        return
    counts = {mlp.num_experts for mlp in config.mlps.values() if any(mlp.sparse)}
    if not counts:
        raise ConfigError(
            f"parallel.expert is {shape.expert}, and the model has no experts: leave it at 1"
        )
    for count in sorted(counts):
        if count % shape.expert:
            raise ConfigError(
                f"parallel.expert is {shape.expert}, which does not divide the {count} experts of "
                "the model's layers"
            )


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Raise ConfigError where the folder that rank 0 has locked is not that of this rank.

    Collective. Network file systems may show a new file some seconds late.
    """
    owner = ranks.gather(os.getpid())[0]
    for _ in range(50):
        with suppress(OSError):
            if (folder / LOCK_FILE).read_text(encoding="utf-8").strip() == str(owner):
                return
        time.sleep(0.1)
    raise ConfigError(
        f"{folder.resolve()} is missing here or not the folder of rank 0: all ranks must write "
        "into one folder, which they share"
    )


PROBED = 4
"""Samples of each source that ranks compare."""


def fingerprint(sources: Iterable[SampleSource]) -> str:
    """SHA-256 of sizes and of some samples, their texts and images."""
    digest = hashlib.sha256()
    for source in sources:
        size = source.size
        digest.update(repr(size).encode())
        for number in range(PROBED if size is None else min(size, PROBED)):
            index = number if size is None else number * size // PROBED
            try:
                sample = source[index]
                digest.update(repr((sample.task, sample.id, sample.text())).encode())
                for image in sample.images:
                    digest.update(image.pixels().tobytes())
                for clip in sample.clips:
                    digest.update(_content(clip))
            except DataError:  # the loader counts damaged samples
                digest.update(b"damaged")
    return digest.hexdigest()


def _content(clip: SampleClip | ClipFile) -> bytes:
    """The frames of a clip, or the digest of its file. Raises DataError."""
    if isinstance(clip, SampleClip):
        return clip.pixels().tobytes()
    if isinstance(clip.file, bytes):
        return clip.file
    try:
        return file_sha256(clip.file).encode()
    except OSError as error:
        raise DataError(f"{clip.name}: {error}") from error


def parallelize_run(
    recipe: Recipe, model: NeoUnify, ranks: Ranks, device: torch.device
) -> Parallel:
    """Spread the model of a run, which has no values yet, over its ranks. Raises ConfigError."""
    shape = check_parallel(recipe, ranks.size)
    ranks.together(partial(check_model, model.config, shape))
    bfloat16 = recipe.stages[0].precision == "bfloat16"
    return parallelize(model, ranks, shape, device=device, bfloat16=bfloat16)


def first_not_finite(model: NeoUnify, ranks: Ranks) -> str | None:
    """A trained parameter that is NaN or infinite on some rank; collective."""
    trained = ((name, p.detach()) for name, p in model.named_parameters() if p.requires_grad)
    here = next((name for name, value in trained if not all_finite(local(value))), None)
    return next((name for name in ranks.gather(here) if name is not None), None)


@dataclass
class RankWork:
    """The share of one rank in the steps since the last report.

    `operations` are those of the last step on all ranks.
    """

    parallel: Parallel
    device: torch.device
    operations: float = 0.0
    data_seconds: float = 0.0
    others_seconds: float = 0.0
    slowest: float = 0.0
    mean: float = 0.0
    stop: bool = False
    """Whether some rank asked for a stop in the last step."""

    def order(self, drawn: Sequence[MicroBatch]) -> list[int]:
        """The order in which a rank takes its packs of a step.

        On many ranks that of falling cost: they wait for each other after every pack, and so
        equals meet.
        """
        numbers = list(range(len(drawn)))
        if self.parallel.packs.size > 1:
            numbers.sort(key=lambda n: -drawn[n].cost)
        return numbers

    def share(self, drawn: Sequence[MicroBatch], stop: bool) -> list[MicroBatch]:
        """The batches of all ranks in the order of the run, without their content; collective."""
        clock = time.monotonic()
        plain = [replace(batch, content=None, position=None) for batch in drawn]
        gathered = self.parallel.ranks.gather((plain, stop))
        self.stop = any(asked for _, asked in gathered)
        # Ranks of one pack have the same.
        parts = [part for part, _ in gathered][:: self.parallel.sequence.size]
        self.others_seconds += time.monotonic() - clock
        for meeting in zip(*(sorted(b.cost for b in part) for part in parts), strict=True):
            self.slowest += max(meeting)
            self.mean += sum(meeting) / len(meeting)
        everyone = [batch for together in zip(*parts, strict=True) for batch in together]
        self.operations = sum(batch.operations for batch in everyone)
        return everyone

    def read(self) -> dict[str, float | list[float]]:
        """Since the last reading, for the log; collective.

        `slowest_over_mean` is by cost, over the packs that ranks compute at the same time.
        `wait_data_seconds` and `wait_others_seconds` are means over the ranks.
        """
        each = self.parallel.ranks.gather(
            (self.data_seconds, self.others_seconds, peak_memory(self.device) / 2**30)
        )
        data, others, memory = zip(*each, strict=True)
        read: dict[str, float | list[float]] = {
            "slowest_over_mean": self.slowest / self.mean if self.mean else 1.0,
            "wait_data_seconds": sum(data) / len(data),
            "wait_others_seconds": sum(others) / len(others),
            "rank_memory_gb": [round(one, 3) for one in memory],
        }
        self.data_seconds = self.others_seconds = self.slowest = self.mean = 0.0
        return read
