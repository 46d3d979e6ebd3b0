"""Rollouts: groups of images of each prompt, sampled by the policy and rewarded.

Images are denoised by the engine's `Denoiser` behind prompts that are prefilled once. All noise is
a function of (seed, iteration, image), so a resumed run samples what an uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from neounify.config import ModelConfig
from neounify.engine.denoiser import DenoiseJob, Denoiser, make_job
from neounify.engine.pixels import to_pixels
from neounify.flow.path import noise_scale
from neounify.flow.sampling import ResolvedSampling
from neounify.flow.sde import GaussianStep, RandomStep, StepKind, StochasticSolver, gaussian_step
from neounify.image.pixels import to_pil
from neounify.model.layout import Grid
from neounify.model.neo import NeoUnify
from neounify.post_train.answers import Answers, draw_seed
from neounify.post_train.policy import Prefixes, prefill
from neounify.post_train.prompts import PromptCase
from neounify.post_train.reward_kinds import Pixels
from neounify.runtime.plan import plan_execution
from neounify.tasks.image import ImageRequest
from neounify.tasks.program import Processor

START, STEP = 0, 1
"""Purposes of noise."""
THOUGHTS = "thoughts."
"""Prefix of the names of thoughts' tensors."""


@dataclass(frozen=True, eq=False, kw_only=True)
class RandomSteps:
    """Random steps of a rollout and their kind; `noise_per_group` gives a group one start."""

    kind: StepKind = "ode"
    eta: float = 0.0
    window: Sequence[int] = ()
    noise_per_group: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class ImageRollout:
    """Images of one size and one schedule: `count` = prompts · group, those of a prompt together.

    `prefixes` are the KV caches of each, `final` their tokens [count, n, token_width]; `random`
    holds z, x̂ and ε of that shape of the random steps, by step. `thoughts` come before the images,
    if any.
    """

    cases: Sequence[PromptCase]
    group: int
    grid: Grid
    times: Sequence[float]
    prefixes: Sequence[Prefixes]
    final: Float[Tensor, "count n ccc"]
    random: Mapping[int, RandomStep]
    steps: Mapping[int, GaussianStep]
    config: ModelConfig
    thoughts: Answers | None = None

    @property
    def count(self) -> int:
        return self.final.shape[0]

    def outputs(self) -> list[Pixels]:
        """The images, uint8 [height, width, channels]."""
        return pixels_of(self.final, self.grid, self.config)

    def tokens_of(self, chosen: Sequence[int]) -> int:
        """Tokens of some images, their thoughts included."""
        text = 0 if self.thoughts is None else self.thoughts.tokens_of(chosen)
        return self.grid.length * len(chosen) + text

    def tensors(self) -> dict[str, Tensor]:
        """Tensors by name that a saved state needs, as they cannot be computed again."""
        tensors = {"final": self.final}
        for k, step in self.random.items():
            tensors |= {f"{k}.z": step.z, f"{k}.clean": step.clean, f"{k}.noise": step.noise}
        if self.thoughts is not None:
            tensors |= {f"{THOUGHTS}{n}": t for n, t in self.thoughts.tensors().items()}
        return tensors

    def old_values(self, chosen: Sequence[int]) -> Any:
        """Predictions and log-probabilities of thoughts of some images, on the CPU."""
        clean = [taken.clean[list(chosen)].cpu() for taken in self.random.values()]
        return clean, self.thoughts and self.thoughts.old_values(chosen)

    def take_old(self, chosen: Sequence[int], values: Any) -> None:
        """Keep the `old_values` that another rank has computed."""
        clean, of_thoughts = values
        for taken, theirs in zip(self.random.values(), clean, strict=True):
            taken.clean[list(chosen)] = theirs.to(taken.clean.device)
        if self.thoughts is not None:
            self.thoughts.take_old(chosen, of_thoughts)

    def shown(self) -> Any:
        """What is shown of thoughts."""
        return None if self.thoughts is None else self.thoughts.shown()

    def with_shown(self, shown: Any) -> ImageRollout:
        """The rollout with what is shown of thoughts."""
        if self.thoughts is None:
            return self
        return replace(self, thoughts=self.thoughts.with_shown(shown))


def restored_rollout(
    model: NeoUnify,
    processor: Processor,
    cases: Sequence[PromptCase],
    group: int,
    sampling: ResolvedSampling,
    steps: RandomSteps,
    tensors: Mapping[str, Tensor],
    *,
    prefixes: Sequence[Prefixes] | None = None,
) -> ImageRollout:
    """The rollout whose `tensors` were saved. Raises KeyError or ValueError for others.

    `prefixes` are the caches of each image, None for those of the cases' prompts.
    """
    requests = [image_request(case, sampling) for case in cases]
    grid = requests[0].grid(model.config)
    shape = (len(cases) * group, grid.length, model.config.token_width)
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)}, not {shape}")
    moved = {name: tensor.to(model.device) for name, tensor in tensors.items()}
    if prefixes is None:
        prefixes = [p for p in prefill(model, processor, cases, requests) for _ in range(group)]
    times, sigma = sampling.times(), noise_scale(grid.length, model.config.flow)
    gaussians = {
        k: gaussian_step(steps.kind, steps.eta, times, k, sigma) for k in sorted(steps.window)
    }
    random = {k: step for k, step in gaussians.items() if step.is_random}
    return ImageRollout(
        cases=cases,
        group=group,
        grid=grid,
        times=times,
        prefixes=prefixes,
        final=moved["final"],
        random={
            k: RandomStep(z=moved[f"{k}.z"], clean=moved[f"{k}.clean"], noise=moved[f"{k}.noise"])
            for k in random
        },
        steps=random,
        config=model.config,
    )


def pixels_of(final: Float[Tensor, "count n ccc"], grid: Grid, config: ModelConfig) -> list[Pixels]:
    """The images of clean tokens, uint8 [height, width, channels]."""
    images = torch.stack([to_pixels(tokens, grid, config) for tokens in final])
    return [np.asarray(image) for image in to_pil(images)]


def initial_noise(
    seed: int, iteration: int, image: int, grid: Grid, config: ModelConfig
) -> Float[Tensor, "n ccc"]:
    """Scaled noise that an image of an iteration begins with, on the CPU."""
    generator = noise_generator(seed, iteration, START, image)
    noise = torch.randn((grid.length, config.token_width), generator=generator)
    return noise * noise_scale(grid.length, config.flow)


def noise_generator(
    seed: int, iteration: int, purpose: int, image: int, step: int = 0
) -> torch.Generator:
    """A CPU generator for one draw of noise, independent of all others."""
    return torch.Generator().manual_seed(draw_seed(seed, iteration, purpose, image, step))


@torch.no_grad()
def sample_groups(
    model: NeoUnify,
    processor: Processor,
    cases: Sequence[PromptCase],
    group: int,
    sampling: ResolvedSampling,
    steps: RandomSteps,
    *,
    seed: int,
    iteration: int,
    prefixes: Sequence[Prefixes] | None = None,
    attention: str = "auto",
) -> ImageRollout:
    """`group` images of each case, which all have one size; `prefixes` as in `restored_rollout`.

    `attention` is the name of a backend.

    Raises RequestError for sampling that a case cannot have (edits need their guidance formula).
    """
    requests = [image_request(case, sampling) for case in cases]
    if prefixes is None:
        prefixes = [p for p in prefill(model, processor, cases, requests) for _ in range(group)]
    grid = requests[0].grid(model.config)
    shape = (grid.length, model.config.token_width)
    sigma = noise_scale(grid.length, model.config.flow)
    times = sampling.times()
    jobs: list[DenoiseJob] = []
    solvers: list[StochasticSolver] = []
    for number, caches in enumerate(prefixes):
        start = number // group if steps.noise_per_group else number
        noise = initial_noise(seed, iteration, start, grid, model.config)
        job = make_job(model, noise, grid, dict(caches), sampling)
        # A checkpoint may clamp velocities earlier, from which the solver could not find x̂.
        job.t_eps = min(job.t_eps, 1 - times[-2])
        solver = StochasticSolver(
            steps.kind,
            steps.eta,
            times,
            sigma,
            random_steps=steps.window,
            sample_noise=partial(_step_noise, seed, iteration, number, shape, model.device),
        )
        job.solver = solver
        jobs.append(job)
        solvers.append(solver)
    dtype = model.compute_dtype
    plan = plan_execution(model.config, model.device, dtype, attention=attention)
    denoiser = Denoiser(model, plan)
    while not jobs[0].done:
        denoiser.step(jobs)
    return ImageRollout(
        cases=cases,
        group=group,
        grid=grid,
        times=times,
        prefixes=prefixes,
        final=torch.stack([job.z for job in jobs]),
        random={k: _stacked([s.record[k] for s in solvers]) for k in sorted(solvers[0].record)},
        steps={k: gaussian_step(steps.kind, steps.eta, times, k, sigma) for k in solvers[0].record},
        config=model.config,
    )


def image_request(case: PromptCase, sampling: ResolvedSampling) -> ImageRequest:
    """The request for an image of a case."""
    return ImageRequest(
        prompt=case.prompt,
        width=case.width,
        height=case.height,
        images=case.images,
        sampling=sampling,
    )


def _step_noise(
    seed: int, iteration: int, image: int, shape: tuple[int, int], device: torch.device, step: int
) -> Tensor:
    generator = noise_generator(seed, iteration, STEP, image, step)
    return torch.randn(shape, generator=generator).to(device)


def _stacked(steps: Sequence[RandomStep]) -> RandomStep:
    return RandomStep(
        z=torch.stack([s.z for s in steps]),
        clean=torch.stack([s.clean for s in steps]),
        noise=torch.stack([s.noise for s in steps]),
    )
