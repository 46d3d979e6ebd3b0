"""SceneBench on a model: ask, paint, judge, count.

Case k of a category always has the same prompt and the same noise, whatever the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from neounify.data.sample import DataError
from neounify.data.scenes.draw import sample_rng
from neounify.data.scenes.edits import KEEP_REQUESTS
from neounify.data.scenes.questions import QUESTION_KINDS
from neounify.data.scenes.render import render
from neounify.data.scenes.world import SceneConfig, sample_scene
from neounify.evaluate.scenebench.checks import (
    EditVerdict,
    Verdict,
    check_caption,
    check_edit,
    check_picture,
    check_story,
    check_thought,
    check_vqa,
)
from neounify.evaluate.scenebench.prompts import (
    caption_cases,
    categories,
    edit_cases,
    paint_cases,
    story_cases,
    vqa_cases,
)
from neounify.evaluate.scenebench.report import Score, score
from neounify.evaluate.scenebench.similarity import psnr, seam_ratio, ssim

Pixels = NDArray[np.uint8]

TASKS = ("paint", "vqa", "caption", "edit", "story", "reconstruction")
MAX_ANSWER_TOKENS = 96
MAX_STORY_TOKENS = 400


@dataclass(frozen=True)
class Painting:
    """A painted picture and the thought before it, if one was asked for."""

    picture: Pixels
    thought: str | None = None


class Subject(Protocol):
    """What is measured: a model, or anything that answers and paints in its place.

    `seeds` fix the noise of each picture; pictures are uint8 [height, width, 3].
    """

    def answer(self, pictures: Sequence[Pixels], questions: Sequence[str]) -> list[str]: ...

    def paint(
        self, prompts: Sequence[str], side: int, seeds: Sequence[int], *, think: bool
    ) -> list[Painting]: ...

    def edit(
        self,
        pictures: Sequence[Pixels],
        instructions: Sequence[str],
        seeds: Sequence[int],
        *,
        think: bool,
    ) -> list[Painting]: ...

    def tell(self, request: str, side: int, seed: int) -> list[Pixels]: ...


@dataclass(frozen=True)
class Example:
    """One case as it went: what was asked, what came back, what the checker said."""

    asked: str
    verdict: Verdict
    picture: Pixels | None = None
    source: Pixels | None = None
    answer: str | None = None


@dataclass(frozen=True)
class Outcome:
    """One category: its score, its measures (means of plain numbers), and all its cases."""

    score: Score
    examples: list[Example]
    measures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What to measure. `world` is its name's SceneConfig; `cases` per category."""

    world: SceneConfig
    tasks: tuple[str, ...] = TASKS
    cases: int = 200
    seed: int = 0
    batch_size: int = 64
    think: bool = False
    token_size: int = 16

    def __post_init__(self) -> None:
        unknown = set(self.tasks) - set(TASKS)
        if unknown or not self.tasks:
            raise DataError(f"unknown tasks {sorted(unknown)}; there are {', '.join(TASKS)}")
        if self.cases < 1 or self.batch_size < 1:
            raise DataError("cases and batch size must be at least 1")


Told = Callable[[str, int, int], None]
"""Progress: category, cases done, cases in all."""


def run_scenebench(
    subject: Subject, config: BenchConfig, progress: Told | None = None
) -> Iterator[Outcome]:
    """Measure category by category, so that what is done is kept when the rest is not."""
    told = progress or _silent
    runners: dict[str, Callable[..., Iterator[Outcome]]] = {
        "paint": _paint,
        "vqa": _vqa,
        "caption": _caption,
        "edit": _edit,
        "story": _story,
        "reconstruction": _reconstruction,
    }
    for task in config.tasks:
        yield from runners[task](subject, config, told)


def names(config: BenchConfig) -> list[str]:
    """The categories that `run_scenebench` will yield, in order."""
    found = []
    for task in config.tasks:
        if task == "paint":
            found += [f"paint/{c}" for c in categories(config.world)]
        elif task == "vqa":
            found += [f"vqa/{kind}" for kind in QUESTION_KINDS if _asks(config, kind)]
        else:
            found.append(task)
    return found


def _asks(config: BenchConfig, kind: Any) -> bool:
    try:
        vqa_cases(kind, config.world, 1, config.seed)
    except DataError:
        return False
    return True


def _paint(subject: Subject, config: BenchConfig, told: Told) -> Iterator[Outcome]:
    for place, category in enumerate(categories(config.world)):
        cases = paint_cases(category, config.world, config.cases, config.seed)
        name = f"paint/{category}"
        examples: list[Example] = []
        seams: list[float] = []
        for chunk in _chunks(range(len(cases)), config.batch_size):
            painted = subject.paint(
                [cases[i].prompt for i in chunk],
                config.world.side,
                [_seed(config, place, i) for i in chunk],
                think=config.think,
            )
            for i, item in zip(chunk, painted, strict=True):
                verdict = check_picture(cases[i].facts, item.picture, config.world)
                if item.thought is not None:
                    thought = check_thought(item.thought, cases[i].facts, config.world)
                    verdict = Verdict({**verdict.attributes})
                    answer = f"{item.thought}\n[thought {'right' if thought.correct else 'wrong'}]"
                else:
                    answer = None
                with suppress(DataError):  # nothing smooth in the picture: no seam to see
                    seams.append(seam_ratio(item.picture, config.token_size))
                examples.append(Example(cases[i].prompt, verdict, item.picture, answer=answer))
            told(name, len(examples), len(cases))
        measures = {"seam_ratio": float(np.mean(seams))} if seams else {}
        yield _outcome(name, examples, [c.held_out for c in cases], measures)


def _vqa(subject: Subject, config: BenchConfig, told: Told) -> Iterator[Outcome]:
    for kind in QUESTION_KINDS:
        if not _asks(config, kind):
            continue
        cases = vqa_cases(kind, config.world, config.cases, config.seed)
        examples: list[Example] = []
        for chunk in _chunks(range(len(cases)), config.batch_size):
            pictures = [render(cases[i].scene, config.world) for i in chunk]
            answers = subject.answer(pictures, [cases[i].question.text for i in chunk])
            for i, picture, answer in zip(chunk, pictures, answers, strict=True):
                verdict = check_vqa(cases[i].question, answer)
                asked = f"{cases[i].question.text} [{cases[i].question.answer}]"
                examples.append(Example(asked, verdict, picture, answer=answer))
            told(f"vqa/{kind}", len(examples), len(cases))
        yield _outcome(f"vqa/{kind}", examples, [c.held_out for c in cases])


def _caption(subject: Subject, config: BenchConfig, told: Told) -> Iterator[Outcome]:
    cases = caption_cases(config.world, config.cases, config.seed)
    examples: list[Example] = []
    for chunk in _chunks(range(len(cases)), config.batch_size):
        pictures = [render(cases[i].scene, config.world) for i in chunk]
        answers = subject.answer(pictures, [cases[i].request for i in chunk])
        for i, picture, answer in zip(chunk, pictures, answers, strict=True):
            verdict = check_caption(answer, cases[i].scene, config.world, cases[i].style)
            examples.append(Example(cases[i].request, verdict, picture, answer=answer))
        told("caption", len(examples), len(cases))
    yield _outcome("caption", examples, [c.held_out for c in cases])


def _edit(subject: Subject, config: BenchConfig, told: Told) -> Iterator[Outcome]:
    cases = edit_cases(config.world, config.cases, config.seed)
    examples: list[Example] = []
    elsewhere: list[float] = []
    for chunk in _chunks(range(len(cases)), config.batch_size):
        sources = [render(cases[i].edit.source, config.world) for i in chunk]
        painted = subject.edit(
            sources,
            [cases[i].edit.instruction for i in chunk],
            [_seed(config, 50, i) for i in chunk],
            think=config.think,
        )
        for i, source, item in zip(chunk, sources, painted, strict=True):
            verdict: EditVerdict = check_edit(cases[i].edit, source, item.picture, config.world)
            if verdict.psnr_elsewhere is not None:
                elsewhere.append(verdict.psnr_elsewhere)
            asked = cases[i].edit.instruction
            examples.append(Example(asked, verdict, item.picture, source, item.thought))
        told("edit", len(examples), len(cases))
    measures = {"median_psnr_elsewhere": float(np.median(elsewhere))} if elsewhere else {}
    yield _outcome("edit", examples, [c.held_out for c in cases], measures)


def _story(subject: Subject, config: BenchConfig, told: Told) -> Iterator[Outcome]:
    cases = story_cases(config.world, config.cases, config.seed)
    examples: list[Example] = []
    for i, case in enumerate(cases):
        pictures = subject.tell(case.story.request, config.world.side, _seed(config, 60, i))
        verdict = check_story(case.story, pictures, config.world)
        strip = np.concatenate(pictures, axis=1) if pictures else None
        examples.append(Example(case.story.request, verdict, strip))
        told("story", len(examples), len(cases))
    yield _outcome("story", examples, [c.held_out for c in cases])


def _reconstruction(subject: Subject, config: BenchConfig, told: Told) -> Iterator[Outcome]:
    """What the understanding stream keeps of a picture: it is asked for the same one again."""
    examples: list[Example] = []
    errors: list[float] = []
    likeness: list[float] = []
    for chunk in _chunks(range(config.cases), config.batch_size):
        rngs = [sample_rng(config.seed, 500, i) for i in chunk]
        scenes = [sample_scene(rng, config.world) for rng in rngs]
        sources = [render(scene, config.world) for scene in scenes]
        requests = [KEEP_REQUESTS["en"][i % len(KEEP_REQUESTS["en"])] for i in chunk]
        seeds = [_seed(config, 70, i) for i in chunk]
        painted = subject.edit(sources, requests, seeds, think=False)
        for source, request, item in zip(sources, requests, painted, strict=True):
            errors.append(psnr(source, item.picture))
            likeness.append(ssim(source, item.picture))
            verdict = Verdict({"psnr >= 30 dB": errors[-1] >= 30})
            examples.append(Example(request, verdict, item.picture, source))
        told("reconstruction", len(examples), config.cases)
    finite = [min(value, 100.0) for value in errors]
    measures = {"psnr": float(np.mean(finite)), "ssim": float(np.mean(likeness))}
    yield _outcome("reconstruction", examples, [False] * len(examples), measures)


def _outcome(
    name: str,
    examples: list[Example],
    held_out: Sequence[bool],
    measures: dict[str, float] | None = None,
) -> Outcome:
    found = score(name, [e.verdict for e in examples], held_out)
    return Outcome(found, examples, measures or {})


def _seed(config: BenchConfig, category: int, case: int) -> int:
    return (config.seed * 1000 + category) * 1_000_003 + case


def _chunks(items: range, size: int) -> Iterator[range]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _silent(name: str, done: int, total: int) -> None:
    """No progress is shown."""


def quick_scores(
    subject: Subject, world: SceneConfig, cases: int = 32, seed: int = 1
) -> dict[str, float]:
    """Strict rates of a few cases per category, for a look during training."""
    tasks = ("paint", "vqa", "caption", "edit")
    config = BenchConfig(world=world, tasks=tasks, cases=cases, seed=seed)
    found: dict[str, float] = {}
    for outcome in run_scenebench(subject, config):
        found[f"bench/{outcome.score.category}"] = outcome.score.strict.value
    return found
