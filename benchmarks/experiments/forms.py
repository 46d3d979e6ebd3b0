"""Forms of prompts, instructions and questions: the same cases and noise, put into other words."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.experiments.bench import Bench, open_model
from benchmarks.experiments.options import add_checkpoint_options, bench_of
from benchmarks.experiments.report import circumstances, table, write
from benchmarks.experiments.wordings import EDITS, PROMPTS, QUESTIONS, Wording
from neounify.evaluate.intervals import Paired
from neounify.scenes.bench import (
    PipelineSubject,
    Rate,
    Subject,
    check_edit,
    check_image,
    check_vqa,
    edit_cases,
    paint_cases,
    vqa_cases,
)
from neounify.scenes.bench.plan import EDIT_SEEDS, BenchConfig, noise_seed, question_kinds
from neounify.scenes.world import render, sample_rng, scene_config
from neounify.scenes.world.language import caption

TITLE = "forms of prompts, instructions and questions on paired cases"
CATEGORIES = ("colours", "position", "attribution", "counting", "size")
"""Of prompts: each gives an equal share of the cases."""

Judge = Callable[[Mapping[int, str]], list[bool]]
"""Asks some cases, by number, in the given words; which went right."""


@dataclass(frozen=True)
class Form:
    """One form of one kind of request, against the first form of that kind."""

    kind: str
    name: str
    example: str
    paired: Paired
    """First this form, second the first one, on the cases whose words this form changes."""

    def to_json(self) -> dict[str, Any]:
        """All figures as plain data."""
        fields = {"kind": self.kind, "form": self.name, "example": self.example}
        return {**fields, "n": self.paired.number, **self.paired.to_json()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_checkpoint_options(parser)


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """Measure and write. Raises DataError, RequestError and the errors of `load`."""
    started, bench = time.monotonic(), bench_of(arguments)
    pipe, about = open_model(arguments.model)
    subject = PipelineSubject(pipe, steps=bench.steps, guidance=bench.guidance)
    compared = compare(subject, bench, token_size=pipe.config.token_size)
    around = circumstances(started)
    report = {
        "experiment": "forms",
        "date": date.today().isoformat(),
        "settings": asdict(bench),
        "sampling": subject.sampling,
        "model": about,
        "forms": [form.to_json() for form in compared],
    }
    write(folder, report | around, markdown(compared))


def compare(subject: Subject, bench: Bench, **fields: Any) -> list[Form]:
    """Ask prompts, instructions and questions in every form; `fields` are of BenchConfig."""
    config = bench.config(scene_config(bench.world), ("paint", "vqa", "edit"), **fields)
    kinds: Mapping[str, tuple[Mapping[str, Wording], tuple[list[str], Judge]]] = {
        "prompt": (PROMPTS, _prompts(subject, config)),
        "edit": (EDITS, _edits(subject, config)),
        "question": (QUESTIONS, _questions(subject, config)),
    }
    compared: list[Form] = []
    for kind, (wordings, (texts, judge)) in kinds.items():
        compared += _forms(kind, wordings, texts, judge, config.seed)
    return compared


def _forms(
    kind: str, wordings: Mapping[str, Wording], texts: list[str], judge: Judge, seed: int
) -> list[Form]:
    compared: list[Form] = []
    first: list[bool] = []
    for name, wording in wordings.items():
        worded = {n: wording(text, sample_rng(seed, 900, n)) for n, text in enumerate(texts)}
        if first:
            worded = {n: text for n, text in worded.items() if text != texts[n]}
        if not worded:
            continue  # no case of these has such a word
        correct = judge(worded)
        first = first or correct
        example = next(iter(worded.values()))
        compared.append(Form(kind, name, example, Paired.of(correct, [first[n] for n in worded])))
        print(f"{kind}: {name}: {Rate(sum(correct), len(correct))}", file=sys.stderr, flush=True)
    return compared


def _prompts(subject: Subject, config: BenchConfig) -> tuple[list[str], Judge]:
    each = -(-config.cases // len(CATEGORIES))
    cases = [
        (case.facts, noise_seed(config, number, index))
        for number, category in enumerate(CATEGORIES)
        for index, case in enumerate(paint_cases(category, config.world, each, config.seed))
    ][: config.cases]

    def judge(texts: Mapping[int, str]) -> list[bool]:
        correct: list[bool] = []
        for chunk in _chunks(texts, config.batch_size):
            generated = subject.paint(
                [texts[i] for i in chunk],
                config.world.side,
                [cases[i][1] for i in chunk],
                think=False,
            )
            for i, item in zip(chunk, generated, strict=True):
                correct.append(check_image(cases[i][0], item.image, config.world).correct)
        return correct

    return [caption(facts) for facts, _ in cases], judge


def _edits(subject: Subject, config: BenchConfig) -> tuple[list[str], Judge]:
    edits = [case.edit for case in edit_cases(config.world, config.cases, config.seed)]
    sources = [render(edit.source, config.world) for edit in edits]

    def judge(texts: Mapping[int, str]) -> list[bool]:
        correct: list[bool] = []
        for chunk in _chunks(texts, config.batch_size):
            generated = subject.edit(
                [sources[i] for i in chunk],
                [texts[i] for i in chunk],
                [noise_seed(config, EDIT_SEEDS, i) for i in chunk],
                think=False,
            )
            for i, item in zip(chunk, generated, strict=True):
                verdict = check_edit(edits[i], sources[i], item.image, config.world)
                correct.append(verdict.correct)
        return correct

    return [edit.instruction for edit in edits], judge


def _questions(subject: Subject, config: BenchConfig) -> tuple[list[str], Judge]:
    kinds = question_kinds(config)
    each = -(-config.cases // len(kinds))
    cases = [case for kind in kinds for case in vqa_cases(kind, config.world, each, config.seed)][
        : config.cases
    ]
    images = [render(case.scene, config.world) for case in cases]

    def judge(texts: Mapping[int, str]) -> list[bool]:
        correct: list[bool] = []
        for chunk in _chunks(texts, config.batch_size):
            answers = subject.answer([images[i] for i in chunk], [texts[i] for i in chunk])
            for i, answer in zip(chunk, answers, strict=True):
                correct.append(check_vqa(cases[i].question, answer).correct)
        return correct

    return [case.question.text for case in cases], judge


def _chunks(texts: Mapping[int, str], size: int) -> list[list[int]]:
    """The numbers of the cases, `size` at a time."""
    numbers = list(texts)
    return [numbers[start : start + size] for start in range(0, len(numbers), size)]


def markdown(compared: Sequence[Form]) -> str:
    """One table per kind of request: rates, and differences to the first form."""
    tables = []
    for kind in dict.fromkeys(form.kind for form in compared):
        rows: list[list[object]] = []
        of_kind = [form for form in compared if form.kind == kind]
        for form in of_kind:
            against = "" if form is of_kind[0] else form.paired.difference
            example = form.example.replace("|", r"\|")
            rows.append(
                [f"{form.name}: `{example}`", form.paired.number, form.paired.first, against]
            )
        head = [f"{kind}: form and example", "n", "right, % (95 %)", "difference, points (95 %)"]
        tables.append(table(head, rows))
    return "\n".join(tables)
