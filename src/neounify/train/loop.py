"""Training loop: draw batches, step, log, save. One loop for every stage, model and method."""

from __future__ import annotations

import gc
import time
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from neounify.checkpoint.config_json import write_config
from neounify.data.sources import FileSource
from neounify.errors import CheckpointError, NeounifyError
from neounify.lora.layers import HALVES
from neounify.lora.peft import save_lora
from neounify.model.build import compile_streams
from neounify.train.expert_counts import ExpertCounts, balance
from neounify.train.export import export_model
from neounify.train.keeping import merge_adapters, setup_for
from neounify.train.log import Log, settings_against_divergence
from neounify.train.method import (
    DROPOUT,
    Method,
    MicroBatch,
    StageContext,
    TrainingStopped,
    TrainStep,
    evaluation_mode,
    repeatable,
    seeded,
)
from neounify.train.optim import (
    Ema,
    OptimizerSet,
    all_names,
    checked_names,
    load_ema,
    load_optimizers,
    states_like,
    take_step,
)
from neounify.train.parallel import RankWork, first_not_finite
from neounify.train.progress import Evaluate, Progress, Tally, sampling_of, stages_to_run
from neounify.train.recipe import Recipe, StageRecipe
from neounify.train.saving import StateWriter
from neounify.train.setup import StageSources, TrainSetup, checkpoint_layers, prepare_parameters
from neounify.train.speed import Meter
from neounify.train.state import (
    METHOD_FILE,
    config_of,
    flatten_optimizer,
    load_state,
    method_state,
    unflatten_optimizer,
)


@dataclass(eq=False)
class _Running:
    """One stage while it is trained."""

    stage: StageRecipe
    method: Method
    optimizers: Sequence[OptimizerSet]
    of_model: Sequence[OptimizerSet]
    """Those that train the model itself, whose steps the EMA follows."""
    ema: Ema
    tally: Tally
    nonfinite_in_a_row: int = 0
    unreported: int = 0
    """Steps since the last report."""
    of_sets: dict[str, float | Tensor] = field(default_factory=dict)
    """Learning rate and gradient norm of each set that moved since the last report, where there
    are several."""


class Trainer:
    """One run of a recipe in a folder.

    `evaluate` is called with the EMA in the model every `sample_every` steps, on all ranks, with
    what opens the pipeline; its results are logged.
    """

    def __init__(
        self,
        recipe: Recipe,
        setup: TrainSetup,
        folder: Path,
        log: Log,
        evaluate: Evaluate | None = None,
        sources: StageSources | None = None,
    ) -> None:
        self.recipe, self.setup, self.folder = recipe, setup, folder
        self.model, self.parallel, self.ranks = setup.model, setup.parallel, setup.ranks
        self.work = RankWork(self.parallel, setup.model.device)
        self.experts = ExpertCounts(setup.model)
        self.writer = StateWriter(self.states, recipe.keep, self.ranks)
        self.log, self.evaluate = log, evaluate
        self.sources = sources or StageSources(recipe)
        self.progress = Progress()
        self._tally_record: Any = None
        self._position: Any = None
        self._resumed: Path | None = None
        self._compiled = False
        self._adapters: dict[str, Tensor] = {}

    @property
    def states(self) -> Path:
        return self.folder / "states"

    def resume(self, state: Path) -> None:
        """Continue from a saved state of the same recipe. Raises CheckpointError."""
        like = {"model": self.model.state_dict()}
        tensors, facts = load_state(state, like, ("model",), self.ranks)
        self.ranks.together(lambda: self._adopt(state, tensors["model"], facts))
        self._resumed = state

    def _adopt(self, state: Path, weights: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Take progress, config and weights of a state."""
        self.model.config = config_of(state, facts, self.model.config)
        try:
            self.progress = Progress(**facts["progress"])
            stage = self.recipe.stages[self.progress.stage]
            if self.parallel.cut and stage.lora is not None:  # which has adapters when it begins
                self._adapters = {n: x for n, x in weights.items() if n.endswith(HALVES)}
                weights = {n: x for n, x in weights.items() if n not in self._adapters}
            else:
                prepare_parameters(self.model, stage, self.recipe.seed)
            self._position = facts["position"]
            self._tally_record = facts.get("sources")
            self.model.load_state_dict(weights)
        except (KeyError, TypeError, RuntimeError, IndexError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            more = f" (and {len(lines) - 2} more)" if len(lines) > 2 else ""
            raise CheckpointError(
                f"{state} does not fit this run: {' '.join(lines[:2])}{more}. Give the recipe the "
                "settings it had (stages, model, lora), or start a new run"
            ) from error

    def run(self, stop_after: int | None = None, only: Collection[str] = ()) -> None:
        """Train all stages that are left, or those of them that `only` names.

        `stop_after` ends earlier, after that many steps. The data of all these stages is checked
        first. Raises ConfigError when the stages before the named ones are not trained, and
        DataError when a source holds nothing usable.
        """
        numbers = stages_to_run(self.recipe, self.progress, only)
        for number in numbers:
            stage = self.recipe.stages[number]
            self.ranks.together(partial(stage.method.check_data, self._context(stage)))
        self.log.rewind(self.progress.step)
        with self.log.live(), repeatable(self.model.device):
            try:
                self._run_stages(numbers, stop_after)
            except BaseException:
                self.writer.abandon()
                raise
            self.writer.wait()

    def _run_stages(self, numbers: Iterable[int], stop_after: int | None) -> None:
        for number in numbers:
            if number != self.progress.stage:
                self.progress.stage, self.progress.stage_step = number, 0
                self.progress.ended = False
                self._position = self._tally_record = None
            if not self._run_stage(self.recipe.stages[number], stop_after):
                return

    # --- a stage ---

    def _run_stage(self, stage: StageRecipe, stop_after: int | None) -> bool:
        """Train one stage; False when `stop_after` ended it."""
        running = self._begin(stage)
        batches = running.method.batches(self._position)
        try:
            if not self._run_steps(running, batches, stop_after):
                return False
        finally:
            if isinstance(batches, Generator):
                batches.close()
        self._finish(running)
        return True

    def _run_steps(
        self, running: _Running, batches: Iterator[MicroBatch], stop_after: int | None
    ) -> bool:
        """The steps that are left of a stage; False when `stop_after` ended them."""
        stage, p = running.stage, self.progress
        clock = time.monotonic()
        while p.stage_step < stage.steps and not p.ended:
            if stop_after is not None and p.step >= stop_after:
                self._save(running)
                return False
            self.work.operations = 0.0
            share = stage.packs_per_step // self.parallel.packs.size
            drawn = list(islice(batches, share))
            self.work.data_seconds += time.monotonic() - clock
            if len(drawn) < share:
                self._end_early(running, len(drawn))
            rate, norm = self._next_step(running, drawn) if drawn else (0.0, torch.zeros(()))
            p.seconds += time.monotonic() - clock
            self.log.step(p, stage, self.work.operations)
            last = p.ended or p.stage_step == stage.steps
            if running.unreported and (p.stage_step % stage.log_every == 0 or last):
                self._report(running, rate, float(norm))
            # Weights that give no finite loss must not take the place of earlier ones.
            if last or (p.stage_step % stage.save_every == 0 and not running.nonfinite_in_a_row):
                self._save(running)
            if p.stage_step % stage.sample_every == 0 or last:
                self._evaluate(running.ema)
            clock = time.monotonic()
        return True

    def _end_early(self, running: _Running, drawn: int) -> None:
        """Mark a stage as ended whose batches ended, `drawn` of them in its last step."""
        stage, p = running.stage, self.progress
        p.ended = True
        steps = p.stage_step + (drawn > 0)
        self.log.warn(
            f"stage {stage.name}: the batches of its method ({stage.method.kind}) ended after "
            f"{steps:,} of {stage.steps:,} steps, so the stage ends here"
        )

    def _report(self, running: _Running, rate: float, norm: float) -> None:
        """Log the means since the last report, and what the method warns of."""
        p, method = self.progress, running.method
        running.unreported = 0
        means = method.report()
        tokens = self.experts.read(self.ranks)
        of_sets = {name: float(value) for name, value in running.of_sets.items()}
        metrics = {**means, **of_sets, **balance(tokens)}
        self.log.experts(p, tokens)
        running.of_sets.clear()
        skipped, work = running.tally.by_source(), self.work.read()
        self.log.report(p, running.stage, metrics, rate, norm, skipped, method.headline, work)
        for warning in method.warnings(p.stage_step, means):
            self.log.warning(p, warning)
        running.tally.check()

    def _begin(self, stage: StageRecipe) -> _Running:
        """Prepare model, method, optimizers and EMA of a stage, from a state on a resume."""
        self.setup = setup_for(stage, self.setup, self.recipe.seed)
        if self.model is not self.setup.model:
            self.model, self.parallel = self.setup.model, self.setup.parallel
            self.work.parallel = self.parallel
            self.experts = ExpertCounts(self.model)
            self._compiled = False
            gc.collect()  # the model before, whose units and hooks hold each other
        prepare_parameters(self.model, stage, self.recipe.seed)
        method = stage.method.build(self._context(stage))
        sources = self.sources.list(stage)
        tally = Tally(sources, stage.data)
        tally.load(self._tally_record)
        optimizers = method.optimizers()
        of_model = [one for one in optimizers if one.trains(self.model)]
        ema = Ema(self.model, stage.ema, on_host=stage.ema_memory == "host")
        running = _Running(stage, method, optimizers, of_model, ema, tally)
        if self._resumed is not None:
            self._restore(running, self._resumed)
            self._resumed = None
        if stage.compile != self._compiled:
            compile_streams(self.model, stage.compile)
            self._compiled = stage.compile
        checkpoint_layers(self.model, stage.checkpoint_activations)
        meter = Meter(self.model.device, stage.precision, self.progress, self.ranks.size)
        self.log.stage(stage, self.progress, meter)
        self.log.files(self.progress, [s for s in sources if isinstance(s, FileSource)])
        return running

    def _finish(self, running: _Running) -> None:
        """Log, adopt the EMA, merge adapters and export at the end of a stage."""
        stage = running.stage
        if running.nonfinite_in_a_row:
            self.log.warn(
                f"the last {running.nonfinite_in_a_row} steps were not finite: the model is likely "
                f"damaged. {settings_against_divergence(stage)}"
            )
        self.log.sources(running.tally.summary())
        load_ema(self.model, running.ema.mean)
        if stage.lora is not None:
            base = str(self.recipe.model.checkpoint or "")
            save = partial(save_lora, self.model, stage.lora, self.folder / "adapter", base)
            self.ranks.together(lambda: save() if self.ranks.first else None)
            merge_adapters(self.model)
        self.model.config = stage.method.checkpoint_config(self.model.config)
        self.export(self.folder / "model")
        running.method.end_stage()

    def _context(self, stage: StageRecipe) -> StageContext:
        return StageContext(
            recipe=self.recipe,
            stage=stage,
            setup=self.setup,
            sources=self.sources,
            folder=self.folder,
        )

    # --- a step ---

    def _next_step(self, running: _Running, drawn: Sequence[MicroBatch]) -> tuple[float, Tensor]:
        """Take or skip the step of some batches and count it; (learning rate, gradient norm).

        Without an active optimizer the step is counted and changes nothing.
        """
        p = self.progress
        step = TrainStep(
            number=p.step,
            stage_step=p.stage_step,
            batches=drawn,
            seed=self.recipe.seed,
            ranks=self.parallel.packs,
        )
        everyone = self.work.share(drawn, stop=self.writer.failed)
        if self.work.stop:
            self.writer.wait()
        active = [one for one in running.optimizers if one.active(step.stage_step)]
        rate, norm, taken = 0.0, torch.zeros(()), False
        if active:
            rate, norm, taken = self._step(running, step, active)
            running.nonfinite_in_a_row = 0 if taken else running.nonfinite_in_a_row + 1
        running.method.end_step(step, taken)
        if active and not taken:
            self._nonfinite(everyone, running)
        self._count(everyone, running.tally)
        self._position = drawn[-1].position
        running.unreported += 1
        return rate, norm

    def _step(
        self, running: _Running, step: TrainStep, active: Sequence[OptimizerSet]
    ) -> tuple[float, Tensor, bool]:
        """One step of the active optimizers; (learning rate, gradient norm, whether it was taken).

        When the norm is not finite, weights, optimizers and EMA are as before.
        """
        stage = running.stage
        rates = [one.set_rate(step.stage_step) for one in active]
        device = self.model.device.type
        bfloat16 = stage.precision == "bfloat16"
        running.method.begin_step(step)
        order = self.work.order(step.batches)
        for index in order:
            current = replace(step, index=index)
            self.parallel.last_of_step(index == order[-1])
            with self._dropout(stage, current):
                autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=bfloat16)
                with autocast, self.experts.counting():
                    loss = running.method.loss(step.batches[index], current)
                if loss.requires_grad:
                    loss.backward()
        self.parallel.add_gradients(p for one in active for p in one.parameters)
        norms, norm, taken = take_step(active)
        if len(running.optimizers) > 1:
            for one, rate, of_set in zip(active, rates, norms, strict=True):
                running.of_sets[f"learning_rate/{one.name}"] = rate
                running.of_sets[f"gradient_norm/{one.name}"] = of_set
        if taken and any(one in running.of_model for one in active):
            running.ema.update()
        self.model.zero_grad(set_to_none=True)
        for one in running.optimizers:
            one.zero_grad()
        return rates[0], norm, taken

    def _dropout(self, stage: StageRecipe, step: TrainStep) -> AbstractContextManager[None]:
        """Dropout of adapters draws from torch's global generators: seeded for one batch."""
        if stage.lora is None or not stage.lora.dropout:
            return nullcontext()
        return seeded(self.model.device, step.batch_seed(DROPOUT))

    def _count(self, batches: Sequence[MicroBatch], tally: Tally) -> None:
        p = self.progress
        p.step += 1
        p.stage_step += 1
        for batch in batches:
            p.samples += len(batch.samples)
            p.images += batch.images
            p.tokens += batch.tokens
            p.damaged += len(batch.skipped)
        new = tally.add(batches)
        p.damaged_samples += len(new)
        self.log.damaged(skipped.message for skipped in new)

    def _nonfinite(self, batches: Sequence[MicroBatch], running: _Running) -> None:
        p, stage = self.progress, running.stage
        p.nonfinite += 1
        self.log.nonfinite(p, [sample for batch in batches for sample in batch.samples])
        if running.nonfinite_in_a_row >= stage.max_nonfinite:
            raise TrainingStopped(
                f"training diverges: {running.nonfinite_in_a_row} steps in a row had a loss or "
                f"gradient that is not finite (max_nonfinite {stage.max_nonfinite}). "
                f"{settings_against_divergence(stage)} The samples of each of these steps are "
                f"listed in {self.log.nonfinite_file}"
            )

    # --- states ---

    def _check_finite(self, stage: StageRecipe) -> None:
        """Raise TrainingStopped for weights that are NaN or infinite: no state holds them."""
        if name := first_not_finite(self.model, self.ranks):
            raise TrainingStopped(
                f"training diverges: {name} is NaN or infinite after step "
                f"{self.progress.step:,}, which is not saved; earlier states in {self.states} "
                f"are unchanged. {settings_against_divergence(stage)}"
            )

    def _save(self, running: _Running) -> None:
        self._check_finite(running.stage)
        method = running.method.state()
        facts = {
            "recipe": self.recipe.name,
            "stage": running.stage.name,
            "progress": asdict(self.progress),
            "position": running.method.join_positions(self.parallel.packs.gather(self._position)),
            "ema_updates": running.ema.updates,
            "sources": running.tally.to_json(),
            "optimizer_parameters": all_names(running.optimizers),
            "method": {
                "kind": running.stage.method.kind,
                "facts": dict(method.facts),
            },
            "config": write_config(self.model.config),
        }
        tensors = {
            "model": dict(self.model.state_dict()),
            "ema": running.ema.mean,
            "optimizer": flatten_optimizer(
                {name: state for one in running.optimizers for name, state in one.state().items()}
            ),
            "method": method.tensors,
        }
        self.writer.save(self.progress.step, tensors, facts)

    def _restore(self, running: _Running, state: Path) -> None:
        like = {"ema": running.ema.mean, "optimizer": states_like(running.optimizers)}
        parts = ("ema", "optimizer", METHOD_FILE)
        tensors, facts = load_state(state, like, parts, self.ranks)
        self.ranks.together(lambda: self._take_over(running, state, tensors, facts))

    def _take_over(
        self,
        running: _Running,
        state: Path,
        tensors: dict[str, dict[str, Tensor]],
        facts: dict[str, Any],
    ) -> None:
        """Continue method, optimizers and EMA of a stage from a state."""
        kind = running.stage.method.kind
        running.method.load(method_state(state, kind, tensors, facts))
        names = facts.get("optimizer_parameters")
        before = checked_names(names) or all_names(running.optimizers)
        states = unflatten_optimizer(tensors["optimizer"], before)
        load_optimizers(running.optimizers, states, names)
        try:
            self.model.load_state_dict(self._adapters, strict=False)
            running.ema.load(tensors["ema"], int(facts["ema_updates"]))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{state} does not fit this run: its EMA lacks {error}"
            ) from error

    # --- evaluation and export ---

    def _evaluate(self, ema: Ema) -> None:
        if self.evaluate is None:
            return
        stage = self.recipe.stages[self.progress.stage]
        if self.parallel.cut and stage.method.unused_streams(stage):
            return  # a part of the model is in host memory, in shards
        try:
            with evaluation_mode(self.model), ema.in_place():
                scores = self.evaluate(partial(sampling_of, self.setup, stage), self.progress)
        except NeounifyError as error:
            self.log.warn(f"step {self.progress.step:,}: no evaluation: {error}")
        else:
            self.log.evaluation(self.progress, scores)

    def export(self, folder: Path) -> None:
        """Write the weights as they are now as a checkpoint of the published layout."""
        export_model(self.setup, folder, torch.float32)
