"""`python -m benchmarks.evaluations`: fewer evaluations of the network against full sampling.

Every rule paints the same cases from the same noise. Of SceneBench, the cases lost and won against
the first rule are counted (paired); for models that do not know its scenes, images are compared
with a fine solution of the same equation.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import neounify
from benchmarks.timing import describe_machine
from neounify.bundled import bundled_model
from neounify.config.sampling import SolverName
from neounify.evaluate.intervals import Difference, Paired
from neounify.evaluate.metrics import Rate, psnr, wilson_interval
from neounify.flow.sampling import ImageSampling, fast_steps
from neounify.pipeline import Pipeline
from neounify.runtime import keep_freed_memory
from neounify.scenes.bench import BenchConfig, Painting
from neounify.scenes.bench.runners import plan
from neounify.scenes.bench.subject import PipelineSubject, Side
from neounify.scenes.world import scene_config

CATEGORIES = ("single_object", "two_object", "position", "attribution")
PROMPTS = (
    "a red boat on a calm lake",
    "a wooden chair beside a window",
    "two cats on a blue sofa",
    "a street with yellow houses at night",
)
FINE = 4
"""Steps of the fine solution, as a multiple of the checkpoint's."""


def rules(steps: int, solver: SolverName = "euler") -> dict[str, dict[str, Any]]:
    """Sampling settings by name, for a checkpoint with `steps` and `solver`.

    The first is the checkpoint's full sampling. Every rule names its solver, whatever the
    checkpoint's is.
    """
    half, third = fast_steps("half", steps), fast_steps("third", steps)
    few = max(1, round(steps / 5))
    fastest: SolverName = "ab2" if solver == "euler" else solver
    ab2 = {"steps": half, "solver": "ab2"}
    cache = {"step_cache": 0.15, "step_cache_most": 2, "step_cache_warm": 3}
    return {
        f"{_shown(solver)} {steps} (reference)": {"solver": solver},
        f"fast half: {_shown(solver)} {half}": {"fast": "half", "solver": solver},
        f"ab2 {half}": ab2,
        f"ab2 {half}, guided up to t = 0.5": ab2 | {"guidance_interval": (0.0, 0.5)},
        f"ab2 {half}, reuse every 2nd": ab2 | {"guidance_reuse": 2},
        f"ab2 {half}, guidance stops at 0.05": ab2 | {"guidance_stop": 0.05},
        f"ab2 {half}, step cache 0.15": ab2 | cache,
        f"fast third: {_shown(fastest)} {third}": {"fast": "third", "solver": fastest},
        f"Euler {third}": {"steps": third, "solver": "euler"},
        f"dpm2m {third}": {"steps": third, "solver": "dpm2m"},
        f"ab2 {half}, guided from 0.2 to 0.9": ab2 | {"guidance_interval": (0.2, 0.9)},
        f"ab2 {half}, no guidance": ab2 | {"guidance": 1.0},
        f"Euler {few}": {"steps": few, "solver": "euler"},
        f"ab2 {few}": {"steps": few, "solver": "ab2"},
        f"dpm2m {few}": {"steps": few, "solver": "dpm2m"},
    }


def _shown(solver: SolverName) -> str:
    return "Euler" if solver == "euler" else solver


@dataclass(frozen=True)
class Row:
    """A rule, the mean evaluations per image, and what its images got case by case.

    `right` of the cases of SceneBench, or `decibels` against the fine solution.
    """

    rule: str
    evaluations: float
    right: tuple[bool, ...] = ()
    decibels: tuple[float, ...] = ()


class Painter(PipelineSubject):
    """Paints with any settings of ImageSampling, and keeps the evaluations of every image."""

    def __init__(self, pipe: Pipeline, settings: dict[str, Any]) -> None:
        super().__init__(pipe)
        self.settings = settings
        self.evaluations: list[float] = []
        self._painting = pipe

    def paint(
        self, prompts: Sequence[str], side: Side, seeds: Sequence[int], *, think: bool
    ) -> list[Painting]:
        width, height = (side, side) if isinstance(side, int) else side
        result = self._painting.generate(
            list(prompts),
            width=width,
            height=height,
            seed=list(seeds),
            think=think,
            **self.settings,
        )
        self.evaluations += result.evaluations
        return [Painting(np.array(image)) for image in result.images]


def on_scenes(pipe: Pipeline, name: str, settings: dict[str, Any], config: BenchConfig) -> Row:
    """The strict verdicts of the image categories of SceneBench."""
    subject = Painter(pipe, settings)
    right: list[bool] = []
    for category in plan(subject, config):
        if category.name.removeprefix("paint/") in CATEGORIES:
            right += [example.verdict.correct for example in category.run().examples]
    return Row(name, statistics.fmean(subject.evaluations), right=tuple(right))


def on_prompts(
    pipe: Pipeline, name: str, settings: dict[str, Any], asked: Asked, fine: list[Painting]
) -> Row:
    """PSNR of the images of prompts against their fine solutions."""
    subject = Painter(pipe, settings)
    images = asked.paint(subject)
    decibels = tuple(psnr(a.image, b.image) for a, b in zip(images, fine, strict=True))
    return Row(name, statistics.fmean(subject.evaluations), decibels=decibels)


@dataclass(frozen=True)
class Asked:
    """Prompts, the size of their images (width, height) in pixels, and a seed for each."""

    prompts: Sequence[str]
    size: tuple[int, int]
    batch_size: int

    def paint(self, subject: Painter) -> list[Painting]:
        """The images of all prompts, in batches."""
        images: list[Painting] = []
        for start in range(0, len(self.prompts), self.batch_size):
            chunk = self.prompts[start : start + self.batch_size]
            seeds = range(start, start + len(chunk))
            images += subject.paint(chunk, self.size, seeds, think=False)
        return images


# --- tables ---


def verdict(difference: Difference) -> str:
    """Whether at most one point is lost, by the 95 % interval of what the rule gains: or open."""
    if difference.low >= -0.01:
        return "yes"
    return "no" if difference.high < -0.01 else "open"


def scene_table(rows: Sequence[Row]) -> str:
    """Markdown of what SceneBench says; the first row is the reference."""
    lines = [
        "| rule | NFE | strict, 95 % | cases | lost, won | points, 95 % | at most 1 lost |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate = Rate(sum(row.right), len(row.right))
        low, high = wilson_interval(rate.correct, rate.number)
        strict = f"{100 * rate.value:.1f} ({100 * low:.1f}–{100 * high:.1f})"
        cells = ["", "", ""]
        if row is not rows[0]:
            pairs = Paired.of(row.right, rows[0].right)
            lost_won = f"{pairs.second_only}, {pairs.first_only}"
            cells = [lost_won, str(pairs.difference), verdict(pairs.difference)]
        shown = [row.rule, f"{row.evaluations:.1f}", strict, str(rate.number), *cells]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def psnr_table(rows: Sequence[Row]) -> str:
    """Markdown of the distances from the fine solution."""
    lines = [
        "| rule | NFE | PSNR, median (least–greatest) | images | worse than the reference |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        median, least, most = statistics.median(row.decibels), min(row.decibels), max(row.decibels)
        worse = sum(b < a for a, b in zip(rows[0].decibels, row.decibels, strict=True))
        shown = [
            row.rule,
            f"{row.evaluations:.1f}",
            f"{median:.1f} dB ({least:.1f}–{most:.1f})",
            str(len(row.decibels)),
            str(worse),
        ]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Parse the command line, run every rule, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluations", description=__doc__)
    parser.add_argument("--model", type=Path, help="folder or file; default: the bundled model")
    parser.add_argument("--config", type=Path, help="folder with config.json and tokenizer")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--world", help="a world of SceneBench the model knows (bundled: default)")
    parser.add_argument("--cases", type=int, default=200, help="per category of SceneBench")
    parser.add_argument("--seed", type=int, default=0, help="of the cases and of their noise")
    parser.add_argument("--prompts", type=Path, help="a prompt per line, for PSNR")
    parser.add_argument("--size", help="WIDTHxHEIGHT of the images of prompts")
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--rules", nargs="+", metavar="WORD", help="only rules that hold a word")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="also write every case's result to this file")
    arguments = parser.parse_args(words)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    pipe = neounify.load(
        arguments.model or bundled_model(),
        config=arguments.config,
        dtype=arguments.dtype,
        device=arguments.device,
    )
    world = arguments.world or ("default" if arguments.model is None else None)
    defaults = pipe.config.sampling
    wanted = list(rules(defaults.steps, defaults.solver).items())
    if arguments.rules:
        chosen = [any(word in name for word in arguments.rules) for name, _ in wanted]
        wanted = [rule for n, rule in enumerate(wanted) if not n or chosen[n]]
    rows = _run(pipe, wanted, arguments, world)
    print(", ".join(f"{key} {value}" for key, value in describe_machine().items()), "\n")
    print(psnr_table(rows) if world is None else scene_table(rows))
    if arguments.json:
        record = [
            {"rule": r.rule, "evaluations": r.evaluations, "right": r.right, "psnr": r.decibels}
            for r in rows
        ]
        arguments.json.write_text(json.dumps({"fingerprint": pipe.fingerprint, "rows": record}))


def _run(
    pipe: Pipeline,
    wanted: Sequence[tuple[str, dict[str, Any]]],
    arguments: argparse.Namespace,
    world: str | None,
) -> list[Row]:
    rows: list[Row] = []
    config = asked = None
    fine: list[Painting] = []
    if world is not None:
        config = BenchConfig(
            world=scene_config(world),
            tasks=("paint",),
            cases=arguments.cases,
            seed=arguments.seed,
            batch_size=arguments.batch_size,
            token_size=pipe.config.token_size,
        )
    else:
        asked = _asked(pipe, arguments)
        steps = FINE * pipe.config.sampling.steps
        fine = asked.paint(Painter(pipe, {"steps": steps, "solver": "ab2"}))
    for name, settings in wanted:
        ImageSampling(**settings)
        if config is not None:
            rows.append(on_scenes(pipe, name, settings, config))
        elif asked is not None:
            rows.append(on_prompts(pipe, name, settings, asked, fine))
        print(f"{name}: {rows[-1].evaluations:.1f} evaluations", file=sys.stderr)
    return rows


def _asked(pipe: Pipeline, arguments: argparse.Namespace) -> Asked:
    prompts: Sequence[str] = PROMPTS
    if arguments.prompts:
        lines = arguments.prompts.read_text(encoding="utf-8").splitlines()
        prompts = [line for line in lines if line.strip()]
    width, height = pipe.config.sampling.image_size
    if arguments.size:
        width, height = map(int, arguments.size.split("x"))
    return Asked(prompts, (width, height), arguments.batch_size)


if __name__ == "__main__":
    main()
