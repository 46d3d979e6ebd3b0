"""Denoising job of one image: its state, and how a step updates it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from neounify.cache import SequenceCache
from neounify.flow.guidance import Branch, Guidance
from neounify.flow.noise import noise_scale
from neounify.flow.path import clean_from_velocity, velocity
from neounify.flow.sampling import ResolvedSampling
from neounify.flow.solvers import Solver, make_solver
from neounify.image.pixels import unpatchify
from neounify.model.layout import Grid
from neounify.model.neo import NeoUnify


@dataclass(eq=False)
class DenoiseJob:
    """One image being denoised. Prefixes are only read, so several jobs may share them.

    `z` [tokens, 3·C²] float32 is the current point, `times` the N + 1 times of its N
    steps, `noise_scale` σ.
    """

    z: Tensor
    grid: Grid
    prefixes: dict[Branch, SequenceCache]
    guidance: Guidance
    times: Sequence[float]
    noise_scale: float
    t_eps: float
    solver: Solver
    steps_done: int = 0
    _last: tuple[Tensor, Tensor, float] | None = None
    _last_branches: tuple[Branch, ...] = ()

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def done(self) -> bool:
        return self.steps_done == self.steps

    @property
    def t(self) -> float:
        return self.times[self.steps_done]

    @property
    def clean(self) -> Tensor:
        """The guided clean-image prediction of the last step, [tokens, 3·C²]."""
        if self._last is None:
            raise ValueError("no step has been taken yet, so there is no prediction")
        guided, z, t = self._last
        return clean_from_velocity(guided, z, t, self.t_eps)

    @property
    def longest(self) -> int:
        """Tokens that the next step attends to: the longest prefix and the image."""
        return self.z.shape[0] + max(self.prefixes[b].length for b in self.branches())

    def branches(self) -> tuple[Branch, ...]:
        """Guidance branches of the next step."""
        return self.guidance.branches() if self.guidance.acts_at(self.t) else ("cond",)

    def move(self, predictions: dict[Branch, Tensor]) -> None:
        """Take the next step, from the clean images predicted behind each prefix."""
        t, branches, first = self.t, self.branches(), self.steps_done == 0
        v = {b: velocity(x, self.z, t, self.t_eps) for b, x in predictions.items()}
        acts = len(branches) > 1
        guided = self.guidance.combine(v, first_step=first) if acts else v["cond"]
        if branches != self._last_branches:
            self.solver.reset()
        self._last, self._last_branches = (guided, self.z, t), branches
        self.z = self.solver.step(self.z, guided, t, self.times[self.steps_done + 1])
        if acts and self.guidance.zeroes(first_step=first):
            self.solver.reset()
        self.steps_done += 1


def make_job(
    model: NeoUnify,
    noise: Float[Tensor, "n ccc"],
    grid: Grid,
    prefixes: dict[Branch, SequenceCache],
    sampling: ResolvedSampling,
) -> DenoiseJob:
    """Denoising job of one image behind its prefixes, from noise scaled by σ."""
    return DenoiseJob(
        z=noise.to(model.device),
        grid=grid,
        prefixes=prefixes,
        guidance=sampling.guidance,
        times=sampling.times(),
        noise_scale=noise_scale(grid.length, model.config.flow),
        t_eps=sampling.effective_t_eps(),
        solver=make_solver(sampling.solver),
    )


@torch.inference_mode(False)
def to_pixels(
    tokens: Sequence[Float[Tensor, "n ccc"]], grid: Grid, token_size: int
) -> Float[Tensor, "b 3 h w"]:
    """Images [b, 3, height, width] of one size from their tokens, float32 on the CPU."""
    return unpatchify(torch.stack(list(tokens)), grid.rows, grid.columns, token_size).cpu()
