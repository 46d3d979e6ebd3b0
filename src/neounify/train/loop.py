"""The training loop: take packs, step, log, save. One loop for every stage and model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neounify.checkpoint.config_json import write_config
from neounify.checkpoint.finite import all_finite
from neounify.data.loader import Loaded, LoaderConfig, Position, check_sources, load_packs
from neounify.data.sources import FileSource, Mixture
from neounify.errors import CheckpointError, NeounifyError
from neounify.lora.layers import add_lora, merge_lora
from neounify.lora.peft import save_lora
from neounify.model.compile import compile_streams
from neounify.pipeline import Pipeline
from neounify.train.ema import Ema
from neounify.train.log import DivergenceWatch, Log, settings_against_divergence
from neounify.train.loss import Counts, Metrics, loss_of
from neounify.train.model import checkpoint_layers, freeze
from neounify.train.optim import Optimizers
from neounify.train.recipe import Recipe, StageRecipe
from neounify.train.seeds import DROPOUT, pack_seed, seeded
from neounify.train.setup import StageSources, Start, build_encoder
from neounify.train.speed import Meter
from neounify.train.stages import Progress, stages_to_run
from neounify.train.state import (
    flatten_optimizer,
    load_state,
    prune_states,
    save_state,
    unflatten_optimizer,
)
from neounify.train.tally import Tally


class TrainingStopped(NeounifyError):
    """Training cannot go on: too many steps in a row were not finite."""


Evaluate = Callable[[Pipeline, Progress], dict[str, float]]


class Trainer:
    """One run of a recipe in a folder.

    `evaluate` is called with the averaged model every `sample_every` steps; what it returns
    is logged.
    """

    def __init__(
        self,
        recipe: Recipe,
        start: Start,
        folder: Path,
        log: Log,
        evaluate: Evaluate | None = None,
        sources: StageSources | None = None,
    ) -> None:
        self.recipe, self.start, self.folder = recipe, start, folder
        self.model = start.model
        self.log, self.evaluate = log, evaluate
        self.sources = sources or StageSources(recipe)
        self.progress = Progress()
        self._counted: Any = None
        self._position: Position | None = None
        self._resumed: Path | None = None
        self._compiled = False
        self._adapted = False

    @property
    def states(self) -> Path:
        return self.folder / "states"

    def resume(self, state: Path) -> None:
        """Go on from a saved state of the same recipe. Raises CheckpointError."""
        tensors, facts = load_state(state)
        if facts.get("config") != _plain(write_config(self.model.config)):
            raise CheckpointError(f"{state} is the state of another model than the recipe's")
        try:
            self.progress = Progress(**facts["progress"])
            self._adapt(self.recipe.stages[self.progress.stage])
            self._position = facts["position"] and Position.from_json(facts["position"])
            self._counted = facts.get("sources")
            self.model.load_state_dict(tensors["model"])
        except (KeyError, TypeError, RuntimeError, IndexError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
            raise CheckpointError(
                f"{state} does not fit this run: {' '.join(lines[:2])}{more}. Give the recipe the "
                "settings it had (stages, model, lora), or start anew"
            ) from error
        self._resumed = state

    def run(self, stop_after: int | None = None, only: Collection[str] = ()) -> None:
        """Train all stages that are left, or those of them that `only` names.

        `stop_after` ends earlier, after that many steps. The data of all these stages is looked at
        first. Raises ConfigError when the stages before the named ones are not trained, and
        DataError when a source holds nothing usable.
        """
        numbers = stages_to_run(self.recipe, self.progress, only)
        for number in numbers:
            stage = self.recipe.stages[number]
            check_sources(self.sources.of(stage), build_encoder(stage, self.start))
        self.log.rewind(self.progress.step)
        with self.log.live():
            for number in numbers:
                stage = self.recipe.stages[number]
                if number != self.progress.stage:
                    self.progress.stage, self.progress.stage_step = number, 0
                    self._position = self._counted = None
                ended = self._run_stage(stage, stop_after)
                if not ended:
                    return

    def _run_stage(self, stage: StageRecipe, stop_after: int | None) -> bool:
        self._adapt(stage)
        if stage.lora is None:
            freeze(self.model, stage.freeze)
        optimizers = Optimizers(self.model, stage.optimizer)
        ema = Ema(self.model, stage.ema)
        if self._resumed is not None:
            self._restore(optimizers, ema, self._resumed)
            self._resumed = None
        if stage.compile != self._compiled:
            compile_streams(self.model, stage.compile)
            self._compiled = stage.compile
        checkpoint_layers(self.model, stage.checkpoint_activations)
        metrics = Metrics(self.model.device)
        mixture = self.sources.of(stage)
        tally, watch = Tally(mixture), DivergenceWatch()
        tally.load(self._counted)
        packs = self._packs(stage, mixture)
        self.log.stage(stage, self.progress, Meter(self.model, stage.precision, self.progress))
        self.log.damaged(d for s in mixture.sources if isinstance(s, FileSource) for d in s.damage)
        in_a_row = 0
        clock = time.monotonic()
        while self.progress.stage_step < stage.steps:
            if stop_after is not None and self.progress.step >= stop_after:
                self._save(stage, optimizers, ema, tally)
                return False
            loaded = list(islice(packs, stage.packs_per_step))
            rate, norm = self._step(stage, optimizers, loaded, metrics)
            p = self.progress
            if torch.isfinite(norm):
                ema.update()
                in_a_row = 0
            else:
                in_a_row += 1
                self._nonfinite(loaded, in_a_row, stage)
            self._count(loaded, tally)
            p.seconds += time.monotonic() - clock
            clock = time.monotonic()
            self.log.step(p, stage, [item.pack for item in loaded])
            if p.stage_step % stage.log_every == 0 or p.stage_step == stage.steps:
                means = metrics.report()
                self.log.report(p, stage, means, rate, float(norm), tally.by_source())
                if warning := watch.look(p.stage_step, means, stage):
                    self.log.warn(warning)
                metrics = Metrics(self.model.device)
            # Weights that give no finite loss must not take the place of earlier ones.
            due = p.stage_step % stage.save_every == 0 and not in_a_row
            if due or p.stage_step == stage.steps:
                self._save(stage, optimizers, ema, tally)
            if p.stage_step % stage.sample_every == 0 or p.stage_step == stage.steps:
                self._evaluate(ema)
            clock = time.monotonic()
        if in_a_row:
            self.log.warn(
                f"the last {in_a_row} steps were not finite: the model is likely damaged. "
                f"{settings_against_divergence(stage)}"
            )
        self.log.sources(tally.summary())
        self._adopt(ema)
        if stage.lora is not None:
            base = str(self.recipe.model.checkpoint or "")
            save_lora(self.model, stage.lora, self.folder / "adapter", base)
            merge_lora(self.model)
            self._adapted = False
        self.export(self.folder / "model")
        return True

    def _adapt(self, stage: StageRecipe) -> None:
        """Put a stage's adapters on, once."""
        if stage.lora is not None and not self._adapted:
            add_lora(self.model, stage.lora, self.recipe.seed)
            self._adapted = True

    def _adopt(self, ema: Ema) -> None:
        """The next stage starts from the averaged weights, which are what was exported."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in ema.mean:
                    parameter.copy_(ema.mean[name])

    def _step(
        self, stage: StageRecipe, optimizers: Optimizers, loaded: list[Loaded], metrics: Metrics
    ) -> tuple[float, Tensor]:
        """One optimizer step; (learning rate, gradient norm).

        When the norm is not finite, the weights and `metrics` are as before.
        """
        p = self.progress
        rate = optimizers.set_factor(stage.schedule.at(p.stage_step, stage.steps))
        counts = Counts.of([item.pack for item in loaded])
        device = self.model.device
        sums = Metrics(device)
        for number, item in enumerate(loaded):
            noise = torch.Generator(device)
            noise.manual_seed(pack_seed(self.recipe.seed, p.step, number))
            autocast = torch.autocast(
                device.type, dtype=torch.bfloat16, enabled=stage.precision == "bfloat16"
            )
            with self._dropout(stage, number):
                with autocast:
                    loss = loss_of(self.model, item.pack, stage.objective, counts, noise, sums)
                if loss.requires_grad:
                    loss.backward()
        trained = [q for q in self.model.parameters() if q.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(trained, stage.clip)
        if torch.isfinite(norm):
            optimizers.step()
            metrics.merge(sums)
        optimizers.zero_grad()
        return rate, norm

    def _dropout(self, stage: StageRecipe, pack: int) -> AbstractContextManager[None]:
        """Dropout of adapters draws from torch's global generators: seeded for one pack."""
        if stage.lora is None or not stage.lora.dropout:
            return nullcontext()
        step = self.progress.step
        return seeded(self.model.device, pack_seed(self.recipe.seed, step, pack, DROPOUT))

    def _count(self, loaded: list[Loaded], tally: Tally) -> None:
        p = self.progress
        p.step += 1
        p.stage_step += 1
        for item in loaded:
            p.samples += len(item.pack.samples)
            p.images += len(item.pack.targets)
            p.tokens += item.pack.length
            p.damaged += len(item.skipped)
        new = tally.add(loaded)
        p.damaged_samples += len(new)
        self.log.damaged(skipped.message for skipped in new)
        self._position = loaded[-1].position

    def _nonfinite(self, loaded: list[Loaded], in_a_row: int, stage: StageRecipe) -> None:
        p = self.progress
        p.nonfinite += 1
        samples = [name for item in loaded for name in item.pack.samples]
        self.log.nonfinite(p, samples)
        if in_a_row >= stage.most_nonfinite:
            raise TrainingStopped(
                f"training diverges: {in_a_row} steps in a row had a loss or gradient that is not "
                f"finite (most_nonfinite {stage.most_nonfinite}). "
                f"{settings_against_divergence(stage)} The samples of each of these steps are "
                f"listed in {self.log.nonfinite_file}"
            )

    def _packs(self, stage: StageRecipe, mixture: Mixture) -> Iterator[Loaded]:
        config = LoaderConfig(
            budget=stage.budget, seed=self.recipe.seed, workers=self.recipe.workers
        )
        return load_packs(mixture, build_encoder(stage, self.start), config, self._position)

    def _check_finite(self, stage: StageRecipe) -> None:
        """Raise TrainingStopped for weights that are NaN or infinite: no state holds them."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and not all_finite(parameter.detach()):
                raise TrainingStopped(
                    f"training diverges: {name} is NaN or infinite after step "
                    f"{self.progress.step:,}, which is not saved; earlier states in {self.states} "
                    f"are unchanged. {settings_against_divergence(stage)}"
                )

    def _save(self, stage: StageRecipe, optimizers: Optimizers, ema: Ema, tally: Tally) -> None:
        self._check_finite(stage)
        position = self._position.to_json() if self._position else None
        facts = {
            "recipe": self.recipe.name,
            "stage": stage.name,
            "progress": asdict(self.progress),
            "position": position,
            "ema_updates": ema.updates,
            "sources": tally.to_json(),
            "optimizer_parameters": optimizers.names(),
            "config": write_config(self.model.config),
        }
        tensors = {
            "model": dict(self.model.state_dict()),
            "ema": ema.mean,
            "optimizer": flatten_optimizer(optimizers.state()),
        }
        save_state(self.states, self.progress.step, tensors, facts)
        prune_states(self.states, self.recipe.keep, self.progress.step)

    def _restore(self, optimizers: Optimizers, ema: Ema, state: Path) -> None:
        tensors, facts = load_state(state)
        optimizers.load_state(
            unflatten_optimizer(tensors["optimizer"]), facts.get("optimizer_parameters")
        )
        try:
            ema.load(tensors["ema"], int(facts["ema_updates"]))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{state} does not fit this run: its mean lacks {error}"
            ) from error

    def _evaluate(self, ema: Ema) -> None:
        if self.evaluate is None:
            return
        training = self.model.training
        self.model.eval()
        try:
            with ema.in_place():
                found = self.evaluate(self._pipeline(), self.progress)
        except NeounifyError as error:
            self.log.warn(f"step {self.progress.step:,}: no evaluation: {error}")
        else:
            self.log.evaluation(self.progress, found)
        finally:
            self.model.train(training)

    def _pipeline(self) -> Pipeline:
        return Pipeline(self.model, self.start.tokenizer, system_message=self.start.system_message)

    def export_state(self, state: Path, folder: Path, dtype: torch.dtype) -> None:
        """Write the averaged weights of a saved state as a checkpoint of the published layout."""
        self.resume(state)
        tensors, _ = load_state(state)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in tensors["ema"]:
                    parameter.copy_(tensors["ema"][name])
        merge_lora(self.model)
        self.model.to(dtype)
        self.export(folder)

    def export(self, folder: Path) -> None:
        """Write the weights as they are now as a checkpoint of the published layout."""
        self._pipeline().save(folder, overwrite=True)


def _plain(document: dict[str, Any]) -> Any:
    return json.loads(json.dumps(document))
