"""Noise scaled with the image size against noise of the trained size, at other sizes."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.experiments.bench import Bench, open_model, outcomes
from benchmarks.experiments.options import add_options, bench_of
from benchmarks.experiments.report import circumstances, table, write
from neounify.config import FlowConfig
from neounify.errors import ConfigError
from neounify.evaluate.intervals import Paired
from neounify.flow.path import noise_scale
from neounify.model.build import meta_model
from neounify.pipeline import Pipeline
from neounify.scenes.bench import (
    Outcome,
    PipelineSubject,
    Subject,
    contact_sheet,
)
from neounify.scenes.world import scene_config

TITLE = "noise scaled with the image size against fixed noise, at sizes beyond training"
CATEGORIES = ("paint/single_object", "paint/colours")
SHOWN = 6
"""Prompts of a category on the sheet, at most."""


@dataclass(frozen=True)
class Sized:
    """One category at one side in pixels, from scaled and from fixed noise."""

    category: str
    side: int
    sigmas: tuple[float, float]
    """Strength of the noise: scaled, fixed."""
    outcomes: tuple[Outcome, Outcome]
    """Likewise; the same prompts from the same draws."""

    @property
    def paired(self) -> Paired:
        """First scaled, second fixed."""
        return Paired.of(*([e.verdict.correct for e in o.examples] for o in self.outcomes))

    @property
    def seams(self) -> tuple[float | None, ...]:
        """Steps between pixels at token borders over steps elsewhere; None where nothing shows."""
        return tuple(outcome.measures.get("seam_ratio") for outcome in self.outcomes)

    def cells(self) -> list[object]:
        """A row of the table, without category and side."""
        cells: list[object] = [self.paired.number]
        for sigma, outcome, seam in zip(self.sigmas, self.outcomes, self.seams, strict=True):
            shown = "" if seam is None else f"{seam:.2f}"
            cells += [f"{sigma:.2f}", outcome.score.strict, shown]
        return cells + self.paired.cells()

    def to_json(self) -> dict[str, Any]:
        """Rates and difference as plain data."""
        return {
            "category": self.category,
            "side": self.side,
            "sigmas": self.sigmas,
            "seam_ratios": self.seams,
            **self.paired.to_json(),
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, world="default", cases=200)
    parser.add_argument("--model", type=Path, help="checkpoint folder; default: the bundled one")
    parser.add_argument("--trained-side", type=int, help="pixels; default: the checkpoint's")
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 96, 128])


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """Measure and write. Raises ConfigError, DataError, RequestError and the errors of `load`."""
    started, bench = time.monotonic(), bench_of(arguments)
    pipe, about = open_model(arguments.model)
    trained = arguments.trained_side or pipe.config.sampling.image_size[0]
    other = with_fixed_noise(pipe, trained)
    subjects = [
        PipelineSubject(p, steps=bench.steps, guidance=bench.guidance) for p in (pipe, other)
    ]
    compared = compare(
        (subjects[0], subjects[1]),
        (pipe.config.flow, other.config.flow),
        bench,
        arguments.sides,
        token_size=pipe.config.token_size,
    )
    report = {
        "experiment": "noise",
        "first": "scaled with the number of tokens",
        "second": f"as at {trained} pixels",
        "settings": asdict(bench) | {"sides": arguments.sides},
        "trained_side": trained,
        "sampling": subjects[0].sampling,
        "model": about,
        "sizes": [item.to_json() for item in compared],
    }
    write(folder, report | circumstances(started), markdown(compared))
    sheet(compared).save(folder / "sheet.png")


def with_fixed_noise(pipe: Pipeline, side: int) -> Pipeline:
    """The same weights with σ as at `side` pixels for every size.

    Raises ConfigError if the checkpoint's noise does not change with the size.
    """
    flow, model = pipe.config.flow, pipe.model
    if flow.noise_scale_mode == "fixed":
        raise ConfigError("this checkpoint's noise is fixed: there is nothing to compare")
    sigma = _sigma(flow, side, pipe.config.token_size)
    fixed = replace(flow, noise_scale_mode="fixed", noise_scale=sigma)
    other = meta_model(pipe.config.replace(flow=fixed))
    other.load_state_dict(model.state_dict(), assign=True)
    other.eval()
    return Pipeline(other, pipe.tokenizer, system_message=pipe.processor.system_message)


def compare(
    subjects: tuple[Subject, Subject],
    flows: tuple[FlowConfig, FlowConfig],
    bench: Bench,
    sides: Sequence[int],
    *,
    token_size: int,
) -> list[Sized]:
    """Generate every category at every side with both; the world of each side checks its images."""
    compared = []
    for side in sides:
        world = replace(scene_config(bench.world), side=side)
        config = bench.config(world, ("paint",), token_size=token_size)
        scaled, fixed = (
            outcomes(subject, config, CATEGORIES, f"{side} pixels, {label} noise:")
            for subject, label in zip(subjects, ("scaled", "fixed"), strict=True)
        )
        sigmas = _sigma(flows[0], side, token_size), _sigma(flows[1], side, token_size)
        compared += [Sized(c, side, sigmas, (scaled[c], fixed[c])) for c in CATEGORIES]
    return compared


def markdown(compared: Sequence[Sized]) -> str:
    """A row per category and side."""
    head = ["category", "side", "n"]
    for label in ("scaled", "fixed"):
        head += [f"σ {label}", f"{label}, % (95 %)", "seam ratio"]
    head += ["difference, points (95 %)", "right only scaled", "only fixed", "p"]
    rows = [
        [item.category, item.side, *item.cells()]
        for item in sorted(compared, key=lambda item: CATEGORIES.index(item.category))
    ]
    return table(head, rows)


def sheet(compared: Sequence[Sized]) -> Image.Image:
    """The first prompts of each category: a row each, every side from scaled and fixed noise."""
    by_category: Mapping[str, list[Sized]] = {
        category: [item for item in compared if item.category == category]
        for category in CATEGORIES
    }
    tiles = [
        (outcome.examples[number], f"{item.side} px, noise {sigma:.2f}")
        for items in by_category.values()
        for number in range(min(SHOWN, items[0].paired.number))
        for item in items
        for sigma, outcome in zip(item.sigmas, item.outcomes, strict=True)
    ]
    shown = [
        (example.image, f"{words}: {example.asked}", example.verdict.correct)
        for example, words in tiles
        if example.image is not None
    ]
    images, captions, passed = zip(*shown, strict=True)
    columns = 2 * len(next(iter(by_category.values())))
    return contact_sheet(images, captions, passed, columns=columns)


def _sigma(flow: FlowConfig, side: int, token_size: int) -> float:
    return noise_scale((side // token_size) ** 2, flow)
