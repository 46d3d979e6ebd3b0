"""Cases of MotionBench: clips to generate, questions about clips, and clips to continue.

Case k of a category is the same in every run; every fourth shows a combination that is held out of
training, as in SceneBench.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from neounify.data.sample import DataError
from neounify.motion.world.language import MotionFacts, draw_facts, motion_caption
from neounify.motion.world.questions import (
    MOTION_QUESTIONS,
    MotionQuestion,
    MotionQuestionKind,
    ask_motion,
)
from neounify.motion.world.samples import CONTINUE_REQUESTS, first_frames, sample_decided
from neounify.motion.world.scene import (
    MOTION_KINDS,
    MotionConfig,
    MotionKind,
    MotionScene,
    sample_motion,
)
from neounify.scenes.bench.prompts import is_held_out_turn
from neounify.scenes.world.draw import pick, sample_rng
from neounify.scenes.world.scene import Split

MOTION_BENCH_TASKS = ("direction", "kind", "pair", "question", "continue")
"""Tasks: moves of one shape, other motions of one, two shapes, answers, next frames."""
STREAMS = {task: 800 + number for number, task in enumerate(MOTION_BENCH_TASKS)}
"""Random streams of cases and noise; those of questions are followed by their kinds'."""
_MAX_SEED = 2**32
_TRIES = 500


def bench_tasks(world: MotionConfig) -> tuple[str, ...]:
    """The tasks that a world has clips for."""
    return tuple(t for t in MOTION_BENCH_TASKS if world.max_shapes > 1 or t != "pair")


@dataclass(frozen=True, kw_only=True)
class MotionBenchConfig:
    """Tasks, cases and seed of a run. Raises DataError for values out of range.

    Args:
        world: where the clips come from.
        tasks: some of `MOTION_BENCH_TASKS`, each once, in the order they are to be measured.
        cases: per category, at least 1.
        seed: 0 to 2³² − 1; of the cases and of the noise.
        batch_size: cases asked at once, at least 1; it changes nothing but speed.
    """

    world: MotionConfig
    tasks: tuple[str, ...] = MOTION_BENCH_TASKS
    cases: int = 200
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        known = ", ".join(MOTION_BENCH_TASKS)
        unknown = sorted(set(self.tasks) - set(MOTION_BENCH_TASKS))
        if unknown:
            raise DataError(f"no task {', '.join(unknown)}; there are {known}")
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise DataError(f"tasks must be some of {known}, each once")
        if not set(self.tasks) <= set(bench_tasks(self.world)):
            raise DataError("the world has no clips of two shapes: leave out the task pair")
        if self.cases < 1 or self.batch_size < 1:
            raise DataError(
                f"cases and batch size must be at least 1, not {self.cases} and {self.batch_size}"
            )
        if not 0 <= self.seed < _MAX_SEED:
            raise DataError(f"the seed of the cases must be from 0 to 2^32 - 1, not {self.seed}")

    def noise_seed(self, task: str, case: int) -> int:
        """The seed of a case's noise, independent of its batch."""
        return (self.seed * 1000 + STREAMS[task]) * 1_000_003 + case

    @property
    def question_kinds(self) -> list[MotionQuestionKind]:
        """Kinds of questions that the world allows."""
        of_two = ("which", "colour")
        return [k for k in MOTION_QUESTIONS if self.world.max_shapes > 1 or k not in of_two]


@dataclass(frozen=True)
class MotionCase:
    """A prompt, the facts it states, a clip that shows them, and what the case asks for."""

    scene: MotionScene
    prompt: str
    facts: MotionFacts
    held_out: bool
    form: str


@dataclass(frozen=True)
class MotionQuestionCase:
    """A question about a clip."""

    scene: MotionScene
    question: MotionQuestion
    held_out: bool


@dataclass(frozen=True)
class ContinueCase:
    """A clip whose frames from `start` on are asked for."""

    scene: MotionScene
    start: int
    request: str
    held_out: bool

    @property
    def form(self) -> str:
        """The motion of its first shape."""
        return self.scene.movers[0].motion.kind


def motion_cases(task: str, config: MotionBenchConfig) -> list[MotionCase]:
    """The cases of "direction", "kind" or "pair"."""
    others = [kind for kind in MOTION_KINDS if kind != "move"]

    def draw(rng: np.random.Generator, split: Split, turn: int) -> MotionCase:
        kinds: Sequence[MotionKind] = MOTION_KINDS
        if task != "pair":
            kinds = ["move"] if task == "direction" else [others[turn % len(others)]]
        shapes = 2 if task == "pair" else 1
        scene = sample_motion(rng, config.world, split, kinds=kinds, shapes=shapes)
        facts = draw_facts(scene, rng)
        motion = scene.movers[0].motion
        form = str(motion.way) if task == "direction" else motion.kind
        return MotionCase(
            scene, motion_caption(facts, rng), facts, split == "held_out", form * (shapes == 1)
        )

    return _drawn(config, STREAMS[task], draw)


def motion_question_cases(
    kind: MotionQuestionKind, config: MotionBenchConfig
) -> list[MotionQuestionCase]:
    """Questions of a kind, each about its own clip."""

    def draw(rng: np.random.Generator, split: Split, turn: int) -> MotionQuestionCase | None:
        scene = sample_motion(rng, config.world, split)
        try:
            question = ask_motion(scene, rng, kind)
        except DataError:
            return None  # that clip has no such question
        return MotionQuestionCase(scene, question, split == "held_out")

    return _drawn(config, STREAMS["question"] + 100 + MOTION_QUESTIONS.index(kind), draw)


def continue_cases(config: MotionBenchConfig) -> list[ContinueCase]:
    """Clips whose first frames decide the others."""

    def draw(rng: np.random.Generator, split: Split, turn: int) -> ContinueCase:
        scene = sample_decided(rng, config.world, split)
        request = pick(rng, CONTINUE_REQUESTS)
        return ContinueCase(scene, first_frames(scene.frames), request, split == "held_out")

    return _drawn(config, STREAMS["continue"], draw)


Case = TypeVar("Case")


def _drawn(
    config: MotionBenchConfig,
    stream: int,
    draw: Callable[[np.random.Generator, Split, int], Case | None],
) -> list[Case]:
    """As many cases as the config says, every fourth from the held-out split."""
    cases: list[Case] = []
    index = 0
    while len(cases) < config.cases:
        turn = len(cases)
        split: Split = "held_out" if is_held_out_turn(turn) else "train"
        case = draw(sample_rng(config.seed, stream, index), split, turn)
        index += 1
        if case is not None:
            cases.append(case)
        elif index > _TRIES * config.cases:
            raise DataError(f"no case of stream {stream} was found: {config.world}")
    return cases
