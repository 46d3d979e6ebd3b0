"""Joint training against each kind alone, at equal samples of that kind."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import neounify
from benchmarks.experiments.bench import Bench, outcomes
from benchmarks.experiments.options import add_options, bench_of
from benchmarks.experiments.report import circumstances, table, write
from benchmarks.experiments.training import JOINT, KINDS, Trained, Training, recipes, train
from neounify.evaluate.intervals import Difference, newcombe
from neounify.scenes.bench import PipelineSubject, Rate, Score, names
from neounify.scenes.world import scene_config

TITLE = "what joint training does for understanding and generation, against each alone"
EQUAL = (
    "Of one seed, all three runs start from the same weights and tokenizer.",
    "The joint run sees as many understanding samples as the understanding run and as many "
    "generation samples as the generation run, the same ones in the same order. A step is a number "
    "of tokens, so the counts are equal to one or two percent; the exact ones stand with each run.",
    "Every run sees the same mean number of samples a step: all of its kind alone, half of each "
    "kind jointly. So the joint run makes twice the steps, and costs as much as both others.",
    "Optimizer, weights of the losses, noise draws, precision and running mean are the same; the "
    "learning rate is the same function of the share of steps done.",
    "The tokens of a step differ, as samples of the two kinds differ in length.",
    "Rates of several seeds are pooled. Their intervals cover the choice of cases, not of seeds: "
    "all seeds are asked the same cases, so with several seeds look at each seed's difference too.",
)
PAINTED = ("paint/single_object", "paint/colours", "paint/position")


@dataclass(frozen=True)
class Measured:
    """A run and its scores by category."""

    run: Trained
    scores: Mapping[str, Score]
    about: Mapping[str, Any]
    """Fingerprint of the weights, and the sampling settings of images."""

    def to_json(self) -> dict[str, Any]:
        """Run and scores as plain data."""
        scores = [score.to_json() for score in self.scores.values()]
        return {**self.run.to_json(), **self.about, "scores": scores}

    def rates(self) -> dict[str, Rate]:
        """Strict rates by category; questions and images also in all."""
        rates = {name: score.strict for name, score in self.scores.items()}
        for task in ("vqa", "paint"):
            of_task = [rate for name, rate in rates.items() if name.startswith(f"{task}/")]
            if of_task:
                rates[f"{task}, all"] = pooled(of_task)
        return rates


@dataclass(frozen=True)
class Compared:
    """One category, jointly against alone: pooled over the seeds, and by seed."""

    category: str
    alone: Rate
    joint: Rate
    by_seed: tuple[Difference, ...]

    @property
    def difference(self) -> Difference:
        """Joint minus alone."""
        return newcombe(self.joint, self.alone)

    def to_json(self) -> dict[str, Any]:
        """Rates and differences as plain data."""
        return {
            "category": self.category,
            "alone": self.alone.to_json(),
            "joint": self.joint.to_json(),
            "difference": self.difference.to_json(),
            "difference_by_seed": [item.to_json() for item in self.by_seed],
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_options(parser, world="easy", cases=200)
    defaults = Training()
    parser.add_argument("--samples", type=int, default=defaults.samples, help="of each kind")
    parser.add_argument("--per-step", type=int, default=defaults.per_step, help="samples of a step")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions, from seed 0 on")
    parser.add_argument("--no-compile", action="store_true", help="for a few samples")


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """Train what is not there yet, measure, write. Raises what training and SceneBench raise."""
    training = Training(
        samples=arguments.samples,
        per_step=arguments.per_step,
        compile=not arguments.no_compile,
    )
    experiment(training, bench_of(arguments), arguments.seeds, folder)


def experiment(training: Training, bench: Bench, seeds: int, folder: Path) -> None:
    """All runs of all seeds, their scores, and the report in `folder`."""
    started = time.monotonic()
    runs = [
        train(kind, recipe, folder / "runs")
        for seed in range(seeds)
        for kind, recipe in recipes(training, bench.world, seed).items()
    ]
    measured = [measure(item, bench) for item in runs]
    compared = compare(measured)
    report = {
        "experiment": "joint",
        "equal": EQUAL,
        "training": asdict(training),
        "settings": asdict(bench),
        "seeds": seeds,
        "differences": [item.to_json() for item in compared],
        "runs": [item.to_json() for item in measured],
    }
    write(folder, report | circumstances(started), markdown(compared, runs))


def measure(trained: Trained, bench: Bench) -> Measured:
    """Score a run in what it was trained for."""
    pipe = neounify.load(trained.model, dtype="float32")
    subject = PipelineSubject(pipe, steps=bench.steps, guidance=bench.guidance)
    config = bench.config(
        scene_config(bench.world),
        tuple(task for kind in _kinds(trained.kind) for task in _TASKS[kind]),
        token_size=pipe.config.token_size,
    )
    asked = [name for name in names(config) if not name.startswith("paint/") or name in PAINTED]
    label = f"{trained.kind}, seed {trained.seed}:"
    by_category = outcomes(subject, config, asked, label)
    about = {"fingerprint": pipe.fingerprint, "sampling": subject.sampling}
    return Measured(trained, {name: outcome.score for name, outcome in by_category.items()}, about)


def compare(measured: Sequence[Measured]) -> list[Compared]:
    """Joint against alone, category by category."""
    seeds = sorted({item.run.seed for item in measured})
    rates = {(item.run.kind, item.run.seed): item.rates() for item in measured}
    compared = []
    for kind in KINDS:
        for category in () if kind == JOINT else rates[kind, seeds[0]]:
            alone = [rates[kind, seed][category] for seed in seeds]
            joint = [rates[JOINT, seed][category] for seed in seeds]
            by_seed = tuple(newcombe(j, a) for j, a in zip(joint, alone, strict=True))
            compared.append(Compared(category, pooled(alone), pooled(joint), by_seed))
    return compared


def pooled(rates: Sequence[Rate]) -> Rate:
    """All cases of several rates as one."""
    return Rate(sum(rate.correct for rate in rates), sum(rate.number for rate in rates))


def markdown(compared: Sequence[Compared], runs: Sequence[Trained]) -> str:
    """A table of the differences, and one of what each run saw."""
    head = ["category", "n", "alone, % (95 %)", "joint, % (95 %)", "joint - alone, points (95 %)"]
    head += ["by seed"]
    rows = [
        [c.category, c.joint.number, c.alone, c.joint, c.difference, _points(c.by_seed)]
        for c in compared
    ]
    seen_head = ["run", "seed", "understanding samples", "generation samples", "steps", "tokens"]
    seen = [
        [item.kind, item.seed]
        + [f"{item.counts[name.replace(' ', '_')]:,}" for name in seen_head[2:]]
        + [f"{item.counts['seconds']:,.0f}"]
        for item in runs
    ]
    return f"{table(head, rows)}\n{table([*seen_head, 'seconds'], seen)}"


def _points(differences: Sequence[Difference]) -> str:
    return ", ".join(f"{100 * item.value:+.1f}" for item in differences)


_TASKS = {"understanding": ("vqa", "caption"), "generation": ("paint", "edit")}


def _kinds(kind: str) -> tuple[str, ...]:
    return tuple(_TASKS) if kind == JOINT else (kind,)
