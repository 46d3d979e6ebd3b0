"""Batched denoising: jobs of one image each, at any step, size and prompt, share model calls."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from neounify.attention import AttentionBackend, select_for
from neounify.attention.gathered import SpreadImageAttention
from neounify.cache import SequenceCache
from neounify.engine.graphs import DenoisingGraphs, recordable
from neounify.flow.guidance import Branch, Guidance, GuidanceRun
from neounify.flow.path import clean_from_velocity, noise_scale, velocity
from neounify.flow.sampling import ResolvedSampling, Solver, StepCache, make_solver
from neounify.image.clips import join_rows
from neounify.model.layout import Document, Grid, Layout, Noise, to_device
from neounify.model.neo import NeoUnify
from neounify.model.parts import GEN
from neounify.model.stream import Attend
from neounify.runtime import memory_plan
from neounify.runtime.plan import ExecutionPlan, branches_apart, plan_execution

if TYPE_CHECKING:
    from neounify.engine.spread import Spread

Item = TypeVar("Item")


# --- one image ---


@dataclass(eq=False)
class DenoiseJob:
    """One image being denoised. Prefixes are only read, so several jobs may share them.

    `z` [tokens, token_width] float32 is the current point, `times` the N + 1 times of its N
    steps, `network_times` those at which the network and the velocity take them (by default the
    same), `noise_scale` σ. Without `restarts` the solver keeps its history where guidance begins or
    ends. `layers_run` counts layers over all steps and branches: over the number of the model's
    layers, it is the number of evaluations of the network. `places` are the ranks that have the
    `residuals` of each branch, in a group.

    A clip moves in pieces of PIECE_BYTES (`runtime.memory_plan`), each with its solver: the results
    are those of one piece, and what the solver works with is no larger. `clean` [tokens,
    token_width] is the guided clean image that the last step predicted, kept for the steps of
    `previews` alone, where that is not None. `cuts_levels`: the levels of the finished pixels are
    cut (`cut_levels`), not rounded.
    """

    z: Tensor
    grid: Grid
    prefixes: dict[Branch, SequenceCache]
    guidance: Guidance
    times: Sequence[float]
    noise_scale: float
    t_eps: float
    solver: Solver
    network_times: Sequence[float] = ()
    restarts: bool = True
    cache: StepCache = field(default_factory=StepCache)
    steps_done: int = 0
    layers_run: int = 0
    residuals: dict[Branch, Residuals] = field(default_factory=dict)
    places: dict[Branch, int] = field(default_factory=dict)
    previews: frozenset[int] | None = None
    cuts_levels: bool = False
    clean: Tensor | None = None
    _last_guided: bool | None = None

    def __post_init__(self) -> None:
        self._guidance_run = GuidanceRun(self.guidance)
        self.network_times = self.network_times or self.times
        self._solvers: list[Solver] = []

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def done(self) -> bool:
        return self.steps_done == self.steps

    @property
    def t(self) -> float:
        return self.network_times[self.steps_done]

    @property
    def longest(self) -> int:
        """Tokens that the next step attends to: the longest prefix and the image."""
        return self.z.shape[0] + max(self.prefixes[b].length for b in self.branches())

    def branches(self) -> tuple[Branch, ...]:
        """Guidance branches that the next step evaluates."""
        return self._guidance_run.branches(self.t)

    def reuses(self, branch: Branch, first: Tensor, spread: Spread | None = None) -> Tensor | None:
        """Whether the next step may keep what the layers after the first added in an earlier one.

        A boolean on the device, None where it may not whatever the values. `first` is the first
        layer's residual now, of the rows of this rank.
        """
        last, cache = self.residuals.get(branch), self.cache
        if last is None or self.steps_done < cache.warm or last.reused == cache.most:
            return None
        change, size = (x.float().abs().mean() for x in (first - last.first, last.first))
        if spread is not None:
            change, size = spread.mean_of_rows(change, size, first.shape[0])
        return change < cache.threshold * size

    def move(self, predictions: dict[Branch, Tensor]) -> None:
        """Take the next step, from the clean images predicted behind each evaluated prefix."""
        first, acts = self.steps_done == 0, self._guidance_run.acts_at(self.t)
        clean = self._guidance_run.complete(self.t, predictions) if acts else predictions
        pieces, solvers = self._pieces()
        restarts = acts != self._last_guided and self.restarts
        for solver in solvers if restarts else ():
            solver.reset()
        self._last_guided = acts
        self._advance(clean, pieces, solvers)
        if acts and self.guidance.zeroes(first_step=first):
            for solver in solvers:
                solver.reset()
        self.steps_done += 1

    def _advance(
        self, clean: dict[Branch, Tensor], pieces: Sequence[slice], solvers: Sequence[Solver]
    ) -> None:
        """Move z piece by piece; `clean` are the clean images of all branches of the step."""
        t, (start, end) = self.t, self.times[self.steps_done : self.steps_done + 2]
        keeps = self.previews is None or self.steps_done + 1 in self.previews
        whole = None if self.guidance.by_row else self._guided(clean, self.z)
        moved = torch.empty_like(self.z)
        self.clean = torch.empty_like(self.z) if keeps else None
        for rows, solver in zip(pieces, solvers, strict=True):
            # A solver may keep the point, and a view of it would keep all of it.
            z = self.z[rows].clone() if len(pieces) > 1 else self.z
            if whole is not None:
                guided = whole[rows]
            else:
                guided = self._guided({b: x[rows] for b, x in clean.items()}, z)
            if self.clean is not None:
                self.clean[rows] = clean_from_velocity(guided, z, t, self.t_eps)
            moved[rows] = solver.step(z, guided, start, end)
        self.z = moved

    def _guided(self, clean: dict[Branch, Tensor], z: Tensor) -> Tensor:
        """The velocity at z towards the clean images, guided where guidance acts."""
        v = {b: velocity(x, z, self.t, self.t_eps) for b, x in clean.items()}
        if not self._last_guided:
            return v["cond"]
        return self.guidance.combine(v, first_step=self.steps_done == 0)

    def _pieces(self) -> tuple[list[slice], list[Solver]]:
        """Rows that move together, of an image all, and the solver of each."""
        if not self.grid.tubes:
            return [slice(None)], [self.solver]
        rows = max(1, memory_plan.PIECE_BYTES // self.z[0].nbytes)
        if self.steps_done == 0:
            self._solvers = [deepcopy(self.solver) for _ in range(0, len(self.z), rows)]
        return [slice(start, start + rows) for start in range(0, len(self.z), rows)], self._solvers


@dataclass(eq=False)
class Residuals:
    """What the layers added to an image behind one prefix in the last step that computed them all.

    `first` by the first layer, `rest` by the others, [tokens, D] each; `reused` counts the steps
    that have kept `rest` since.
    """

    first: Tensor
    rest: Tensor
    reused: int = 0


def make_job(
    model: NeoUnify,
    noise: Float[Tensor, "n ccc"],
    grid: Grid,
    prefixes: dict[Branch, SequenceCache],
    sampling: ResolvedSampling,
    previews: frozenset[int] | None = None,
) -> DenoiseJob:
    """Denoising job of one image behind its prefixes, from noise scaled by σ.

    `previews` are the steps whose predicted clean image is kept, None for all.
    """
    return DenoiseJob(
        z=to_device(noise, model.device),
        grid=grid,
        prefixes=prefixes,
        guidance=sampling.guidance,
        times=sampling.times(),
        network_times=sampling.network_times(),
        restarts=sampling.flow.restart_solver,
        noise_scale=noise_scale(grid.length, model.config.flow),
        t_eps=sampling.effective_t_eps(),
        solver=make_solver(sampling.solver, published=sampling.published_solver),
        cache=sampling.cache,
        previews=previews,
        cuts_levels=sampling.published_solver,
    )


# --- many images ---

Run = tuple[DenoiseJob, Branch]
"""A job behind one of its prefixes."""


class Denoiser:
    """Runs denoising steps of any jobs, each at any step.

    The layouts and attention plans of a step are kept for the next one of the same jobs; those of
    earlier steps as well, where steps of different jobs alternate, up to `plan.prefix_rows`. On the
    ranks of a group, `spread` says which runs and rows are this rank's; all ranks take the same
    steps, with the same number of pauses, and hold the same jobs.
    """

    def __init__(
        self, model: NeoUnify, plan: ExecutionPlan | None = None, spread: Spread | None = None
    ) -> None:
        self.model, self.spread = model, spread
        self.plan = plan or plan_execution(model.config, model.device, model.compute_dtype)
        self.backend = select_for(model, self.plan.attention)
        alone = spread is None and self.backend.recorded and recordable(model)
        self._graphs = DenoisingGraphs(model) if alone else None
        self._calls: dict[tuple[Run, ...], _Call] = {}

    def step(self, jobs: Sequence[DenoiseJob]) -> None:
        """Advance every job one step; guidance branches of all jobs run as one batch."""
        for _ in self.slices(jobs):
            pass

    def slices(self, jobs: Sequence[DenoiseJob]) -> Iterator[None]:
        """`step` as an iterator that pauses between the layers of the model.

        Abandoned early, it has advanced some jobs by their step and the others not at all.
        """
        calls: dict[tuple[Run, ...], _Call] = {}
        for group in self._grouped(jobs):
            runs = tuple((job, branch) for job in group for branch in job.branches())
            parts = self._parts(runs) if self.spread is None else [self.spread.mine(runs)]
            for part in parts:
                if part and part not in calls:
                    calls[part] = self._calls.get(part) or self._new_call(part)
            yield from self._move(runs, [calls[part] for part in parts if part])
        self._calls = self._earlier(calls) | calls

    def _parts(self, runs: tuple[Run, ...]) -> list[tuple[Run, ...]]:
        """The runs of each call: of all, or of one where a large image has no memory for them."""
        lengths = [job.grid.length for job, _ in runs]
        if branches_apart(min(lengths), sum(lengths), self.plan.branch_rows):
            return [(run,) for run in runs]
        return [runs]

    def forget(self) -> None:
        """Drop the kept layouts and plans."""
        self._calls = {}

    def _new_call(self, runs: tuple[Run, ...]) -> _Call:
        return _Call(runs, self.backend, self.spread)

    def _earlier(self, calls: Iterable[tuple[Run, ...]]) -> dict[tuple[Run, ...], _Call]:
        """The latest kept calls of jobs that take no part in these."""
        taken = {job for runs in calls for job, _ in runs}
        kept: dict[tuple[Run, ...], _Call] = {}
        rows = 0
        for runs, call in reversed(self._calls.items()):
            if any(job.done or job in taken for job, _ in runs):
                continue
            rows += call.rows
            if rows > self.plan.prefix_rows:
                break
            kept[runs] = call
        return dict(reversed(kept.items()))

    def _grouped(self, jobs: Sequence[DenoiseJob]) -> Iterator[list[DenoiseJob]]:
        """Jobs that share a call of the model, within the limits of the plan."""

        def share_of(job: DenoiseJob) -> float:
            """Of one call's limits, how much a job takes."""
            rows = job.z.shape[0] / self.plan.denoise_rows
            copied = self.backend.copied_rows(job.longest)
            share = max(rows, copied / min(self.plan.prefix_rows, self.plan.denoise_rows))
            return len(job.branches()) * share

        # Rows of images and of clips differ in width.
        for tubes in (False, True):
            of_kind = [job for job in jobs if bool(job.grid.tubes) == tubes]
            yield from groups(of_kind, share_of, 1)

    def _move(self, runs: tuple[Run, ...], calls: Sequence[_Call]) -> Iterator[None]:
        """Move the jobs of runs by a step; `calls` are those of this rank's runs."""
        work = self._predict_all(calls)
        if self.spread is None:
            predicted = yield from work
        else:
            part = yield from self.spread.evenly(work, self.model.config.num_layers)
            predicted = self.spread.gather(runs, part)
        predictions: dict[DenoiseJob, dict[Branch, Tensor]] = {}
        for (job, branch), prediction in zip(runs, predicted.clean, strict=True):
            predictions.setdefault(job, {})[branch] = prediction
        for run in runs:
            self._count(run, run in predicted.reused, predicted.residuals.get(run))
        for job, clean in predictions.items():
            job.move(clean)

    def _predict_all(self, calls: Sequence[_Call]) -> Generator[None, None, Predicted]:
        """What the network predicts for the runs of some calls, one after the other."""
        clean: list[Tensor] = []
        reused: frozenset[Run] = frozenset()
        residuals: dict[Run, Residuals] = {}
        for call in calls:
            part = yield from self._predict(call)
            clean += part.clean
            reused |= part.reused
            residuals |= part.residuals
        return Predicted(clean, reused, residuals)

    def _predict(self, call: _Call) -> Generator[None, None, Predicted]:
        """What the network predicts for the runs of a call."""
        model, cached = self.model, any(job.cache.threshold for job in call.jobs)
        inputs = (
            join_rows([job.z for job in call.jobs]),
            torch.stack([call.times[job][job.steps_done] for job in call.jobs]),
            call.noise_scale,
        )
        if self._graphs is not None and not cached and self._graphs.serves(call.layout):
            clean = self._graphs.step(call.layout, call.caches, call.numbers, *inputs)
            return Predicted(clean.split(call.lengths), frozenset(), {})
        embedded = model.embed_noisy(call.images, *inputs)
        embedded = embedded.split([job.z.shape[0] for job in call.jobs])
        # The noisy image is the same behind every prefix, so it is embedded once per job.
        by_job = dict(zip(call.jobs, embedded, strict=True))
        x = call.own(torch.cat([by_job[job] for job, _ in call.runs]))
        residuals: dict[Run, Residuals] = {}
        reused: frozenset[Run] = frozenset()
        if cached:
            hidden, residuals = yield from self._cached_layers(call, x)
            reused = frozenset(call.runs) - residuals.keys()
        else:
            hidden = (yield from model.layer_by_layer(call.layout, {GEN: x}, call.attend))[GEN]
        yield
        clean = model.clean_prediction(call.joined(hidden), call.grids).float()
        return Predicted(clean.split(call.lengths), reused, residuals)

    def _cached_layers(
        self, call: _Call, x: Tensor
    ) -> Generator[None, None, tuple[Tensor, dict[Run, Residuals]]]:
        """States behind all layers, the later ones only of runs that reuse nothing.

        Also the residuals of the runs that computed them, and changes no job.
        """
        model, layers = self.model, self.model.config.num_layers
        hidden = yield from model.some_layers(call.layout, {GEN: x}, call.attend, range(1))
        inputs = dict(zip(call.runs, x.split(call.own_lengths), strict=True))
        first = dict(zip(call.runs, hidden[GEN].split(call.own_lengths), strict=True))
        yield
        changes = {
            run: run[0].reuses(run[1], first[run] - inputs[run], self.spread) for run in call.runs
        }
        small = {run: change for run, change in changes.items() if change is not None}
        # What is computed depends on values here: the host waits for them once, for all runs.
        kept = torch.stack(list(small.values())).tolist() if small else []
        reusing = {run for run, keeps in zip(small, kept, strict=True) if keeps}
        computed = tuple(run for run in call.runs if run not in reusing)
        last = {
            run: first[run] + run[0].residuals[run[1]].rest
            for run in call.runs
            if run not in computed
        }
        if computed:
            part = call
            if last:
                part = self._new_call(computed)
                hidden = {GEN: torch.cat([first[run] for run in computed])}
            later = range(1, layers)
            hidden = yield from model.some_layers(part.layout, hidden, part.attend, later)
            last |= zip(computed, hidden[GEN].split(part.own_lengths), strict=True)
        states = model.gen_norm(torch.cat([last[run] for run in call.runs]))
        return states, {
            run: Residuals(first[run] - inputs[run], last[run] - first[run]) for run in computed
        }

    def _count(self, run: Run, reused: bool, residuals: Residuals | None) -> None:
        """Count a run's layers in this step, and keep its residuals for the next ones."""
        job, branch = run
        if job.cache.threshold and reused:
            job.layers_run += 1
            if branch in job.residuals:
                job.residuals[branch].reused += 1
            return
        job.layers_run += self.model.config.num_layers
        if job.cache.threshold and residuals is not None:
            job.residuals[branch] = residuals


class Predicted(NamedTuple):
    """The clean images that are predicted for some runs, [tokens, token_width] each.

    `reused` are the runs that kept their later layers, `residuals` those of the others.
    """

    clean: Sequence[Tensor]
    reused: frozenset[Run]
    residuals: Mapping[Run, Residuals]


class _Call:
    """Layouts, attention plan and tensors of a call of the model, the same in every step.

    `layout` has an image for every run, `images` one for every job; `times` [steps + 1] of each job
    and `noise_scale` [jobs] are on the model's device. Of the `lengths` tokens of each run,
    `own_lengths` are this rank's, and `layout` and `attend` are for those.
    """

    def __init__(
        self, runs: tuple[Run, ...], backend: AttentionBackend, spread: Spread | None = None
    ) -> None:
        self.runs = runs
        jobs = self.jobs = list(dict.fromkeys(job for job, _ in runs))
        self.images = Layout(Document((Noise.of(job.grid),)) for job in jobs)
        scales = np.array([job.noise_scale for job in jobs], dtype=np.float32)
        self.noise_scale = to_device(scales, backend.device)
        self.times = {
            job: to_device(np.array(job.network_times, dtype=np.float32), backend.device)
            for job in jobs
        }
        self.numbers = [jobs.index(job) for job, _ in runs]
        self.lengths = [job.z.shape[0] for job, _ in runs]
        self.caches = caches = [job.prefixes[branch] for job, branch in runs]
        self.layout = Layout(
            cache.document(Noise.of(job.grid)) for (job, _), cache in zip(runs, caches, strict=True)
        )
        self.grids = self.layout[GEN].grids
        self.rows = sum(self.lengths) + sum(cache.length for cache in caches)
        self.own_lengths = self.lengths
        self._rows = None if spread is None else spread.rows(self.lengths)
        self._backend = backend
        self._shared: Attend | None = None
        if self._rows is not None:
            self.own_lengths = self._rows.own_lengths
            self._shared = SpreadImageAttention(
                self.layout, caches, self.own_lengths, self._rows.joined
            )
            self.layout = self.layout.part(GEN, self._rows.own)

    @cached_property
    def attend(self) -> Attend:
        """The attention plan, made by the first step that needs it."""
        return self._shared or self._backend.plan(self.layout, self.caches)

    def own(self, x: Tensor) -> Tensor:
        """The rows of all runs that are this rank's."""
        return x if self._rows is None else self._rows.cut(x)

    def joined(self, x: Tensor) -> Tensor:
        """All rows of the runs from those of the ranks that share them."""
        return x if self._rows is None else self._rows.joined(x)


def groups(
    items: Iterable[Item], rows: Callable[[Item], float], limit: float
) -> Iterator[list[Item]]:
    """Consecutive items whose `rows` add up to at most `limit`; a larger item stands alone."""
    group: list[Item] = []
    total = 0.0
    for item in items:
        new = rows(item)
        if group and total + new > limit:
            yield group
            group, total = [], 0.0
        group.append(item)
        total += new
    if group:
        yield group
