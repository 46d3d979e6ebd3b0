"""What `neounify eval` does."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import neounify
from neounify.cli.display import Display
from neounify.cli.errors import CliError
from neounify.cli.options import ModelOptions, ReportOptions
from neounify.cli.session import open_session
from neounify.data.scenes import scene_config
from neounify.evaluate.scenebench.checks import Verdict
from neounify.evaluate.scenebench.report import Report, contact_sheet
from neounify.evaluate.scenebench.run import BenchConfig, Example, Outcome, names, run_scenebench
from neounify.evaluate.scenebench.subject import PipelineSubject

SHOWN = 24
"""Pictures on a contact sheet, at most."""


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """What to measure, and how to sample."""

    world: str
    tasks: tuple[str, ...]
    cases: int
    steps: int | None
    guidance: float | None
    think: bool
    seed: int
    batch_size: int


def run_evaluation(
    model: ModelOptions, settings: EvalSettings, out: Path, overwrite: bool, report: ReportOptions
) -> None:
    """Measure, tell, and write report.json, report.md and sheets of pictures."""
    world = scene_config(settings.world)
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not overwrite:
        raise CliError(f"{out} is not empty; choose another --out, or add --overwrite")
    display = Display(quiet=report.quiet, json=report.json)
    session = open_session(model, display)
    side = session.pipe.config.token_size
    if world.side % side:
        raise CliError(f"pictures of {world.side} pixels do not fit tokens of {side}")
    config = BenchConfig(
        world=world,
        tasks=settings.tasks,
        cases=settings.cases,
        seed=settings.seed,
        batch_size=settings.batch_size,
        think=settings.think,
        token_size=side,
    )
    subject = PipelineSubject(session.pipe, steps=settings.steps, guidance=settings.guidance)
    started = time.monotonic()
    outcomes: list[Outcome] = []
    categories = names(config)
    try:
        with display.bar("measuring", total=len(categories), unit="category") as tick:
            for outcome in run_scenebench(subject, config):
                outcomes.append(outcome)
                tick(len(outcomes))
                display.say(f"{outcome.score.category:22} {outcome.score.strict}")
    finally:
        if outcomes:
            about = {
                **asdict(settings),
                "model": session.description,
                "categories_left": len(categories) - len(outcomes),
                "seconds": round(time.monotonic() - started, 1),
                "threads": torch.get_num_threads(),
                "cpus": os.cpu_count(),
                "torch": torch.__version__,
                "neounify": neounify.__version__,
            }
            document = write_report(outcomes, about, out)
            display.emit(document)
    display.result(f"saved {out}", out)


def write_report(outcomes: list[Outcome], about: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write the report's files; the JSON document."""
    out.mkdir(parents=True, exist_ok=True)
    found = Report(tuple(outcome.score for outcome in outcomes), about)
    document = found.to_json()
    document["measures"] = {o.score.category: o.measures for o in outcomes if o.measures}
    (out / "report.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    lines = [found.to_markdown(), "\n| measure | value |\n| --- | --: |\n"]
    for category, measures in document["measures"].items():
        lines += [f"| {category}: {name} | {value:.3f} |\n" for name, value in measures.items()]
    (out / "report.md").write_text("".join(lines), encoding="utf-8")
    for outcome in outcomes:
        _sheets(outcome, out)
    return document


def _sheets(outcome: Outcome, out: Path) -> None:
    """The first successes and the first failures of a category, as pictures."""
    shown = [e for e in outcome.examples if e.picture is not None]
    for label, passed in (("right", True), ("wrong", False)):
        chosen = [e for e in shown if e.verdict.correct == passed][:SHOWN]
        if chosen:
            sheet = contact_sheet(
                [e.picture for e in chosen if e.picture is not None],
                [_words(e) for e in chosen],
                [passed] * len(chosen),
            )
            sheet.save(out / f"{outcome.score.category.replace('/', '-')}-{label}.png")


def _words(example: Example) -> str:
    answer = f" → {example.answer}" if example.answer else ""
    return f"{example.asked}{answer}{_wrong(example.verdict)}"


def _wrong(verdict: Verdict) -> str:
    wrong = [name for name, right in verdict.attributes.items() if not right]
    return f" (wrong: {', '.join(wrong)})" if wrong else ""
