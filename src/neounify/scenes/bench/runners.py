"""Tasks of SceneBench as categories: the requests, and how answers are judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial

import numpy as np

from neounify.errors import ImageError
from neounify.evaluate.metrics import seam_ratio
from neounify.scenes.bench.category import Category, Example, Pixels
from neounify.scenes.bench.checks import (
    MIN_EDIT_PSNR,
    EditVerdict,
    Verdict,
    check_caption,
    check_edit,
    check_image,
    check_story,
    check_thought,
    check_vqa,
)
from neounify.scenes.bench.plan import (
    COPY_SEEDS,
    EDIT_SEEDS,
    PARTS,
    RELATION_YES_NO,
    STORY_SEEDS,
    BenchConfig,
    noise_seed,
    question_kinds,
)
from neounify.scenes.bench.prompts import (
    CaptionCase,
    EditCase,
    PaintCase,
    StoryCase,
    VqaCase,
    caption_cases,
    categories,
    edit_cases,
    paint_cases,
    relation_yes_no_cases,
    story_cases,
    vqa_cases,
)
from neounify.scenes.bench.reconstruction import (
    CopyCase,
    check_copy,
    copy_cases,
    likeness,
)
from neounify.scenes.bench.subject import Painting, Subject
from neounify.scenes.bench.wider import wider_names, wider_plan
from neounify.scenes.world.facts import FULL_STYLE, SceneFacts, facts_of
from neounify.scenes.world.render import render
from neounify.scenes.world.scene import Scene


def names(config: BenchConfig) -> list[str]:
    """The categories that a run will measure, in order."""
    listed: list[str] = []
    for task in config.tasks:
        if task == "paint":
            listed += [f"paint/{category}" for category in categories(config.world)]
        elif task == "vqa":
            kinds = question_kinds(config)
            listed += [f"vqa/{kind}" for kind in kinds]
            listed += [f"vqa/{RELATION_YES_NO}"] * ("relation" in kinds)
        elif task in PARTS:
            listed += wider_names(task)
        else:
            listed.append(task)
    return listed


def plan(subject: Subject, config: BenchConfig) -> Iterator[Category]:
    """All categories of a run, in the order of `names`; cases are drawn one category at a time."""
    runners: dict[str, Callable[[Subject, BenchConfig], Iterator[Category]]] = {
        "paint": _paint,
        "vqa": _vqa,
        "caption": _caption,
        "edit": _edit,
        "story": _story,
        "reconstruction": _reconstruction,
    }
    for task in config.tasks:
        if task in PARTS:
            yield from wider_plan(subject, config, task)
        else:
            yield from runners[task](subject, config)


def _paint(subject: Subject, config: BenchConfig) -> Iterator[Category]:
    def take(cases: Sequence[PaintCase], stream: int, chunk: range) -> list[Example]:
        painted = subject.paint(
            [cases[i].prompt for i in chunk],
            config.world.side,
            _seeds(config, stream, chunk),
            think=config.think,
        )
        return [_painted(cases[i], item, config) for i, item in zip(chunk, painted, strict=True)]

    for number, name in enumerate(categories(config.world)):
        cases = paint_cases(name, config.world, config.cases, config.seed)
        yield Category(
            f"paint/{name}",
            [case.held_out for case in cases],
            partial(take, cases, number),
            partial(_seams, token_size=config.token_size),
            config.batch_size,
        )


def _painted(case: PaintCase, item: Painting, config: BenchConfig) -> Example:
    return Example(
        case.prompt,
        check_image(case.facts, item.image, config.world),
        item.image,
        thought=item.thought,
        thought_verdict=_thought(item, case.facts, config),
    )


def _vqa(subject: Subject, config: BenchConfig) -> Iterator[Category]:
    def take(cases: Sequence[VqaCase], chunk: range) -> list[Example]:
        questions = [cases[i].question for i in chunk]
        images, answers = _answers(
            subject, config, [cases[i].scene for i in chunk], [q.text for q in questions]
        )
        return [
            Example(f"{q.text} [{q.answer}]", check_vqa(q, answer), image, answer=answer)
            for q, image, answer in zip(questions, images, answers, strict=True)
        ]

    def category(name: str, cases: Sequence[VqaCase], forms: Sequence[str] = ()) -> Category:
        held_out = [case.held_out for case in cases]
        return Category(
            f"vqa/{name}", held_out, partial(take, cases), batch_size=config.batch_size, forms=forms
        )

    kinds = question_kinds(config)
    for kind in kinds:
        cases = vqa_cases(kind, config.world, config.cases, config.seed)
        yield category(kind, cases, _relation_forms(cases) if kind == "relation" else ())
    if "relation" in kinds:
        cases = relation_yes_no_cases(config.world, config.cases, config.seed)
        yield category(RELATION_YES_NO, cases, [f"answer {c.question.answer}" for c in cases])


def _relation_forms(cases: Sequence[VqaCase]) -> list[str]:
    sides = ("left", "right")
    return [
        "left or right?" if case.question.value in sides else "above or below?" for case in cases
    ]


def _caption(subject: Subject, config: BenchConfig) -> Iterator[Category]:
    cases = caption_cases(config.world, config.cases, config.seed)

    def judge(case: CaptionCase, image: Pixels, answer: str) -> Example:
        verdict = check_caption(answer, case.scene, config.world, case.style)
        return Example(case.request, verdict, image, answer=answer)

    def take(chunk: range) -> list[Example]:
        images, answers = _answers(
            subject, config, [cases[i].scene for i in chunk], [cases[i].request for i in chunk]
        )
        chosen = [cases[i] for i in chunk]
        return [judge(*item) for item in zip(chosen, images, answers, strict=True)]

    held_out = [case.held_out for case in cases]
    yield Category("caption", held_out, take, batch_size=config.batch_size)


def _edit(subject: Subject, config: BenchConfig) -> Iterator[Category]:
    cases = edit_cases(config.world, config.cases, config.seed)

    def judge(case: EditCase, source: Pixels, item: Painting) -> Example:
        verdict = check_edit(case.edit, source, item.image, config.world)
        wanted = facts_of(case.edit.target, config.world, FULL_STYLE)
        return Example(
            case.edit.instruction,
            verdict,
            item.image,
            source,
            thought=item.thought,
            thought_verdict=_thought(item, wanted, config),
        )

    def take(chunk: range) -> list[Example]:
        chosen = [cases[i] for i in chunk]
        sources = [render(case.edit.source, config.world) for case in chosen]
        instructions = [case.edit.instruction for case in chosen]
        seeds = _seeds(config, EDIT_SEEDS, chunk)
        painted = subject.edit(sources, instructions, seeds, think=config.think)
        return [judge(*item) for item in zip(chosen, sources, painted, strict=True)]

    held_out = [case.held_out for case in cases]
    forms = [case.edit.kind for case in cases]
    yield Category("edit", held_out, take, _elsewhere, config.batch_size, forms)


def _story(subject: Subject, config: BenchConfig) -> Iterator[Category]:
    cases = story_cases(config.world, config.cases, config.seed)

    def tell(case: StoryCase, seed: int) -> Example:
        images = subject.tell(case.story.request, config.world.side, seed)
        verdict = check_story(case.story, images, config.world)
        strip = np.concatenate(images, axis=1) if images else None
        return Example(case.story.request, verdict, strip)

    def take(chunk: range) -> list[Example]:
        seeds = _seeds(config, STORY_SEEDS, chunk)
        return [tell(cases[i], seed) for i, seed in zip(chunk, seeds, strict=True)]

    yield Category("story", [case.held_out for case in cases], take)


def _reconstruction(subject: Subject, config: BenchConfig) -> Iterator[Category]:
    cases = copy_cases(config.world, config.cases, config.seed)

    def judge(case: CopyCase, source: Pixels, item: Painting) -> Example:
        return Example(case.request, check_copy(source, item.image), item.image, source)

    def take(chunk: range) -> list[Example]:
        chosen = [cases[i] for i in chunk]
        sources = [render(case.scene, config.world) for case in chosen]
        seeds = _seeds(config, COPY_SEEDS, chunk)
        painted = subject.edit(sources, [case.request for case in chosen], seeds, think=False)
        return [judge(*item) for item in zip(chosen, sources, painted, strict=True)]

    held_out = [case.held_out for case in cases]
    yield Category("reconstruction", held_out, take, likeness, config.batch_size)


def _answers(
    subject: Subject, config: BenchConfig, scenes: Sequence[Scene], questions: Sequence[str]
) -> tuple[list[Pixels], list[str]]:
    """The scenes' images and what is answered about them."""
    images: list[Pixels] = [render(scene, config.world) for scene in scenes]
    return images, subject.answer(images, questions)


def _seeds(config: BenchConfig, stream: int, chunk: range) -> list[int]:
    return [noise_seed(config, stream, case) for case in chunk]


def _thought(item: Painting, wanted: SceneFacts, config: BenchConfig) -> Verdict | None:
    return None if item.thought is None else check_thought(item.thought, wanted, config.world)


def _seams(examples: Sequence[Example], token_size: int) -> dict[str, float]:
    """The mean seam ratio of the images that have a smooth place to see seams at."""
    ratios = []
    for example in examples:
        with suppress(ImageError):
            if example.image is not None:
                ratios.append(seam_ratio(example.image, token_size))
    return {"seam_ratio": float(np.mean(ratios))} if ratios else {}


def _elsewhere(examples: Sequence[Example]) -> dict[str, float]:
    """PSNR in dB outside the edited region: its median, and the share that is high enough."""
    verdicts = [e.verdict for e in examples if isinstance(e.verdict, EditVerdict)]
    psnrs = [v.psnr_elsewhere for v in verdicts if v.psnr_elsewhere is not None]
    if not psnrs:
        return {}
    return {
        "median_psnr_elsewhere": float(np.median(psnrs)),
        "share_unchanged": float(np.mean([psnr >= MIN_EDIT_PSNR for psnr in psnrs])),
    }
