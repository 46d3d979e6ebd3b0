"""Denoising jobs of a pipeline, without a driver."""

from __future__ import annotations

import torch

import neounify
from neounify.engine.denoiser import DenoiseJob, Denoiser, make_job
from neounify.flow.sampling import ImageSampling
from neounify.tasks.image import ImageRequest, branch_prompt
from support.prefilling import as_cache, contiguous_engine, prefilled


def started(
    pipe: neounify.Pipeline, prompt: str, side: int, steps: int, **options: object
) -> DenoiseJob:
    """The job of a prompt's image, `side` pixels wide and high, whose prompts are prefilled."""
    sampling = ImageSampling(steps=steps, **options).resolve(pipe.config, editing=False)  # type: ignore[arg-type]
    request = ImageRequest(prompt=prompt, width=side, height=side, sampling=sampling, system="")
    branches = sampling.guidance.branches()
    prompts = [branch_prompt(pipe.processor, request, b) for b in branches]
    read = prefilled(contiguous_engine(pipe), prompts, [[]] * len(branches))
    prefixes = {b: as_cache(sequence) for b, sequence in zip(branches, read, strict=True)}
    noise = request.start(pipe.config)[0]
    return make_job(pipe.model, noise, request.grid(pipe.config), prefixes, sampling)


@torch.inference_mode()
def denoised(stepper: Denoiser, started: list[DenoiseJob], late: int = 0) -> list[torch.Tensor]:
    """The finished jobs; the first `late` of them join two steps after the others."""
    step = 0
    while running := [j for n, j in enumerate(started) if not j.done and (step > 1 or n >= late)]:
        stepper.step(running)
        step += 1
    return [j.z for j in started]
