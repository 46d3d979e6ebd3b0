"""Config of a SceneBench run: tasks, cases and seeds."""

from __future__ import annotations

from dataclasses import dataclass

from neounify.data.sample import DataError
from neounify.scenes.bench.prompts import vqa_cases
from neounify.scenes.world.questions import QUESTION_KINDS, QuestionKind
from neounify.scenes.world.scene import SceneConfig

TASKS = ("paint", "vqa", "caption", "edit", "story", "reconstruction")
"""What a run measures by default."""
PARTS = ("wording", "sizes")
"""What it measures besides, where it is asked to."""
EDIT_SEEDS, STORY_SEEDS, COPY_SEEDS = 50, 60, 70
"""Random streams besides those of image categories, which are their indices."""
RELATION_YES_NO = "relation_yes_no"
"""Questions of relation in a form that training never shows, beside the kinds it has."""
_MAX_SEED = 2**32


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Tasks, cases and settings of a benchmark run. Raises DataError for values out of range.

    Args:
        world: where the scenes come from.
        tasks: some of `TASKS` and `PARTS`, each once, in the order they are to be measured.
        cases: per category, at least 1.
        seed: 0 to 2³² − 1; of the cases and of the noise.
        batch_size: cases asked at once, at least 1; it changes nothing but speed.
        think: whether the subject writes a thought before images and edits.
        token_size: side of the subject's image tokens in pixels, for seams at their borders.
    """

    world: SceneConfig
    tasks: tuple[str, ...] = TASKS
    cases: int = 200
    seed: int = 0
    batch_size: int = 64
    think: bool = False
    token_size: int = 16

    def __post_init__(self) -> None:
        known = ", ".join((*TASKS, *PARTS))
        unknown = sorted(set(self.tasks) - {*TASKS, *PARTS})
        if unknown:
            raise DataError(f"no task {', '.join(unknown)}; there are {known}")
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise DataError(f"tasks must be some of {known}, each once")
        if self.cases < 1 or self.batch_size < 1:
            raise DataError(
                f"cases and batch size must be at least 1, not {self.cases} and {self.batch_size}"
            )
        if not 0 <= self.seed < _MAX_SEED:
            raise DataError(f"the seed of the cases must be from 0 to 2^32 - 1, not {self.seed}")
        if self.token_size < 1 or self.world.side % self.token_size:
            raise DataError(
                f"the world's images of {self.world.side} pixels do not divide into tokens of "
                f"{self.token_size}: this model cannot paint them"
            )


def question_kinds(config: BenchConfig) -> list[QuestionKind]:
    """The kinds of questions that can be asked in the world (no sizes where there is one)."""
    return [kind for kind in QUESTION_KINDS if _is_asked(config, kind)]


def noise_seed(config: BenchConfig, stream: int, case: int) -> int:
    """The seed of a case's noise, independent of its batch."""
    return (config.seed * 1000 + stream) * 1_000_003 + case


def _is_asked(config: BenchConfig, kind: QuestionKind) -> bool:
    try:
        vqa_cases(kind, config.world, 1, config.seed)
    except DataError:
        return False
    return True
