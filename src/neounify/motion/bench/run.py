"""Runs of MotionBench on a model: ask, generate, follow, count.

Case k of a category always has the same prompt and the same noise, whatever the batch size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from neounify.image.contact_sheet import strip
from neounify.motion.bench.cases import (
    MOTION_BENCH_TASKS,
    ContinueCase,
    MotionBenchConfig,
    MotionCase,
    MotionQuestionCase,
    continue_cases,
    motion_cases,
    motion_question_cases,
)
from neounify.motion.bench.checks import (
    MotionVerdict,
    check_continuation,
    check_motion,
    check_motion_vqa,
)
from neounify.motion.bench.follow import Clip
from neounify.motion.bench.subject import MotionSubject
from neounify.motion.world.questions import MOTION_QUESTIONS
from neounify.motion.world.render import render_motion
from neounify.scenes.bench.category import Category, Example


def motion_names(config: MotionBenchConfig) -> list[str]:
    """The categories that a run will measure, in order."""
    listed: list[str] = []
    for task in config.tasks:
        if task == "question":
            listed += [f"question/{kind}" for kind in config.question_kinds]
        else:
            listed.append(task if task == "continue" else f"clip/{task}")
    return listed


def known_motion_names() -> list[str]:
    """The categories of every run."""
    questions = [f"question/{kind}" for kind in MOTION_QUESTIONS]
    return [*(f"clip/{task}" for task in MOTION_BENCH_TASKS[:3]), *questions, "continue"]


def motion_plan(subject: MotionSubject, config: MotionBenchConfig) -> Iterator[Category]:
    """All categories of a run, in the order of `motion_names`."""
    for task in config.tasks:
        if task == "question":
            yield from _questions(subject, config)
        elif task == "continue":
            yield _continue(subject, config)
        else:
            yield _clips(subject, config, task)


def _clips(subject: MotionSubject, config: MotionBenchConfig, task: str) -> Category:
    cases = motion_cases(task, config)

    def judge(case: MotionCase, clip: Clip) -> Example:
        verdict = check_motion(case.facts, clip, config.world)
        return Example(case.prompt, verdict, strip(clip))

    def take(chunk: range) -> list[Example]:
        chosen = [cases[i] for i in chunk]
        clips = subject.film(
            [case.prompt for case in chosen],
            [case.scene.frames for case in chosen],
            config.world.side,
            [config.noise_seed(task, i) for i in chunk],
        )
        return [judge(case, clip) for case, clip in zip(chosen, clips, strict=True)]

    forms = [case.form for case in cases] if task != "pair" else []
    held_out = [case.held_out for case in cases]
    return Category(f"clip/{task}", held_out, take, mean_parts, config.batch_size, forms)


def _questions(subject: MotionSubject, config: MotionBenchConfig) -> Iterator[Category]:
    def take(cases: Sequence[MotionQuestionCase], chunk: range) -> list[Example]:
        questions = [cases[i].question for i in chunk]
        clips = [render_motion(cases[i].scene, config.world) for i in chunk]
        answers = subject.watch(clips, [question.text for question in questions])
        return [
            Example(
                f"{question.text} [{question.answer}]",
                check_motion_vqa(question, answer),
                strip(clip),
                answer=answer,
            )
            for question, clip, answer in zip(questions, clips, answers, strict=True)
        ]

    for kind in config.question_kinds:
        cases = motion_question_cases(kind, config)
        held_out = [case.held_out for case in cases]
        forms = [f"answer {case.question.answer}" for case in cases] if kind == "event" else []
        yield Category(
            f"question/{kind}",
            held_out,
            partial(take, cases),
            batch_size=config.batch_size,
            forms=forms,
        )


def _continue(subject: MotionSubject, config: MotionBenchConfig) -> Category:
    cases = continue_cases(config)

    def judge(case: ContinueCase, clip: Clip, rest: Clip) -> Example:
        verdict = check_continuation(case.scene, rest, case.start, config.world)
        return Example(case.request, verdict, strip(rest), strip(clip))

    def take(chunk: range) -> list[Example]:
        chosen = [cases[i] for i in chunk]
        firsts = [render_motion(case.scene, config.world)[: case.start] for case in chosen]
        rests = subject.extend(
            firsts,
            [case.request for case in chosen],
            [case.scene.frames - case.start for case in chosen],
            [config.noise_seed("continue", i) for i in chunk],
        )
        return [judge(*item) for item in zip(chosen, firsts, rests, strict=True)]

    return Category(
        "continue",
        [case.held_out for case in cases],
        take,
        mean_parts,
        config.batch_size,
        [case.form for case in cases],
    )


def mean_parts(examples: Sequence[Example]) -> dict[str, float]:
    """The mean of every part of the verdicts, over the cases that have it."""
    verdicts = [e.verdict for e in examples if isinstance(e.verdict, MotionVerdict)]
    names = dict.fromkeys(name for verdict in verdicts for name in verdict.parts)
    return {
        f"mean {name}": float(np.mean([v.parts[name] for v in verdicts if name in v.parts]))
        for name in names
    }
