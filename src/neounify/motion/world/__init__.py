"""Synthetic clips, generated from a seed: moving shapes, texts about them, and samples.

`scene` draws what each shape does, `render` the pixels of every frame with the renderer of scenes,
`language` and `questions` write about them, `samples` turns all of it into training samples.
"""

from neounify.motion.world.language import MotionFacts, MoverFact, motion_caption, motion_facts
from neounify.motion.world.questions import (
    MOTION_QUESTIONS,
    MotionQuestion,
    ask_motion,
    check_motion_answer,
)
from neounify.motion.world.render import render_motion
from neounify.motion.world.scene import (
    DIRECTIONS,
    EDGES,
    MOTION_KINDS,
    MOTION_PRESETS,
    Motion,
    MotionConfig,
    MotionScene,
    Mover,
    Place,
    is_held_out,
    motion_config,
    sample_motion,
)

__all__ = [
    "DIRECTIONS",
    "EDGES",
    "MOTION_KINDS",
    "MOTION_PRESETS",
    "MOTION_QUESTIONS",
    "Motion",
    "MotionConfig",
    "MotionFacts",
    "MotionQuestion",
    "MotionScene",
    "Mover",
    "MoverFact",
    "Place",
    "ask_motion",
    "check_motion_answer",
    "is_held_out",
    "motion_caption",
    "motion_config",
    "motion_facts",
    "render_motion",
    "sample_motion",
]
