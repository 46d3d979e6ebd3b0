"""Batched denoising: images at different steps, sizes and prompts share calls of the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from neounify.attention import AttentionBackend, backends, select_for
from neounify.engine.denoise import DenoiseJob
from neounify.engine.grouping import groups
from neounify.flow.guidance import Branch
from neounify.model.layout import Layout, Noise
from neounify.model.neo import NeoUnify
from neounify.model.parts import GEN
from neounify.runtime.plan import ExecutionPlan, plan_execution

Run = tuple[DenoiseJob, Branch]
"""A job behind one of its prefixes."""


class Denoiser:
    """Runs denoising steps of any jobs, each at any step.

    The layouts and attention plans of a step are kept for the next, mostly of the same jobs.
    """

    def __init__(self, model: NeoUnify, plan: ExecutionPlan | None = None) -> None:
        self.model = model
        self.plan = plan or plan_execution(model.config, model.device, model.compute_dtype)
        self.backend = select_for(model, self.plan.attention)
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
            calls[runs] = self._calls.get(runs) or _Call(runs, self.backend)
            yield from self._move(group, calls[runs])
        self._calls = calls

    def forget(self) -> None:
        """Drop the kept layouts and plans."""
        self._calls = {}

    def _grouped(self, jobs: Sequence[DenoiseJob]) -> Iterator[list[DenoiseJob]]:
        """Jobs that share a call of the model: short ones apart from long ones.

        That depends on a job alone, so that its numbers do not depend on the batch.
        """
        short = [job for job in jobs if job.longest <= backends.MAX_PREFIX]
        max_runs = self.plan.prefix_rows // backends.MAX_PREFIX
        yield from groups(short, lambda job: len(job.branches()), max_runs)
        long = [job for job in jobs if job.longest > backends.MAX_PREFIX]
        rows = self.plan.denoise_rows
        yield from groups(long, lambda job: job.z.shape[0] * len(job.branches()), rows)

    def _move(self, jobs: Sequence[DenoiseJob], call: _Call) -> Iterator[None]:
        model = self.model
        embedded = model.embed_noisy(
            [job.grid for job in jobs],
            torch.cat([job.z for job in jobs]),
            torch.tensor([job.t for job in jobs], dtype=torch.float32, device=model.device),
            torch.tensor(
                [job.noise_scale for job in jobs], dtype=torch.float32, device=model.device
            ),
        ).split([job.z.shape[0] for job in jobs])
        # The noisy image is the same behind every prefix, so it is embedded once per job.
        by_job = dict(zip(jobs, embedded, strict=True))
        x = torch.cat([by_job[job] for job, _ in call.runs])
        hidden = (yield from model.layer_by_layer(call.layout, {GEN: x}, call.attend))[GEN]
        yield
        clean = model.clean_prediction(hidden, call.layout.noise_grids).float().split(call.lengths)
        predictions: dict[DenoiseJob, dict[Branch, Tensor]] = {job: {} for job in jobs}
        for (job, branch), prediction in zip(call.runs, clean, strict=True):
            predictions[job][branch] = prediction
        for job in jobs:
            job.move(predictions[job])


class _Call:
    """Layout and attention plan of a call of the model, the same in every step."""

    def __init__(self, runs: tuple[Run, ...], backend: AttentionBackend) -> None:
        self.runs = runs
        self.lengths = [job.z.shape[0] for job, _ in runs]
        caches = [job.prefixes[branch] for job, branch in runs]
        self.layout = Layout(
            cache.document(Noise.of(job.grid)) for (job, _), cache in zip(runs, caches, strict=True)
        )
        self.attend = backend.plan(self.layout, caches)
