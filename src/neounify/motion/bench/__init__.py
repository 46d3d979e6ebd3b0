"""MotionBench: models measured on synthetic clips, every claim checked by a program.

`cases` draws what is asked, `follow` finds the shapes of a clip and their motions, `checks` gives
verdicts, `run` asks a model (`subject`) and counts with the categories of SceneBench, and
`validation` measures the checker itself.
"""

from neounify.motion.bench.cases import (
    MOTION_BENCH_TASKS,
    MotionBenchConfig,
    bench_tasks,
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
from neounify.motion.bench.follow import follow
from neounify.motion.bench.run import (
    known_motion_names,
    motion_names,
    motion_plan,
)
from neounify.motion.bench.subject import MotionSubject, PipelineMotionSubject

__all__ = [
    "MOTION_BENCH_TASKS",
    "MotionBenchConfig",
    "MotionSubject",
    "MotionVerdict",
    "PipelineMotionSubject",
    "bench_tasks",
    "check_continuation",
    "check_motion",
    "check_motion_vqa",
    "continue_cases",
    "follow",
    "known_motion_names",
    "motion_cases",
    "motion_names",
    "motion_plan",
    "motion_question_cases",
]
