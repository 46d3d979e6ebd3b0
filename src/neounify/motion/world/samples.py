"""Training samples of synthetic clips: an endless, randomly accessible data set.

Sample i of seed s is always the same, as in the scenes' data set. Tasks: "t2v" (a caption, then its
clip), "video_qa" (a clip, then questions about it turn by turn), "video_caption" (a clip, then all
that happens in it), "next_frames" (the first frames of a clip, then the others), "t2i" (what one
frame shows, then it as an image: shapes at any place are learned from it at a tenth of the tokens).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import numpy as np
from pydantic.dataclasses import dataclass

from neounify.config.ranges import STRICT, NonNegative, Seed, check_names, check_weights
from neounify.data.configs import DataConfig
from neounify.data.sample import DataError, Sample, SampleClip, SampleImage, SampleText, Turn
from neounify.data.sources import EndlessSource
from neounify.motion.world.language import (
    draw_facts,
    frame_caption,
    motion_caption,
    motion_facts,
)
from neounify.motion.world.questions import (
    MotionQuestionKind,
    allows_question,
    ask_several_motion,
)
from neounify.motion.world.render import render_motion
from neounify.motion.world.scene import (
    FPS,
    MOTION_KINDS,
    MOTION_PRESETS,
    MotionConfig,
    MotionKind,
    MotionScene,
    motion_config,
    sample_motion,
)
from neounify.scenes.world.draw import pick, pick_weighted, sample_rng
from neounify.scenes.world.scene import Split

MOTION_TASKS: dict[str, float] = {
    "t2v": 0.4,
    "video_qa": 0.3,
    "video_caption": 0.15,
    "next_frames": 0.15,
    "t2i": 0.0,
}
"""Tasks of the data set and their shares."""
MAX_QUESTIONS = 4
"""About one clip, turn by turn: a clip costs more tokens than a question."""
CAPTION_REQUESTS = ("Describe the clip.", "What happens in the clip?", "What does the clip show?")
CONTINUE_REQUESTS = ("Continue the clip.", "What happens next?", "Show the next frames.")
SHOWN_FPS = 4.0
"""Frames a second of clips that questions are about: every second one."""
_MAX_TRIES = 1000
DECIDED_KINDS: tuple[MotionKind, ...] = ("move", "grow", "shrink", "bounce", "stay")
"""Motions that the first frames of a clip decide."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MotionData(DataConfig):
    """`kind = "motion"`: synthetic clips of a preset `world`; the rest is as in `MotionDataset`.

    `shown_fps` 0 stands for None there.
    """

    kind: Literal["motion"] = "motion"
    world: str = "default"
    tasks: dict[str, float] | None = None
    tubes: bool = True
    shown_fps: float = SHOWN_FPS
    questions: dict[MotionQuestionKind, NonNegative] | None = None
    kinds: tuple[MotionKind, ...] = MOTION_KINDS
    seed: Seed = 0
    split: Split = "train"

    def __post_init__(self) -> None:
        check_names("world", [self.world], MOTION_PRESETS)
        if self.shown_fps:
            frame_step(self.shown_fps)
        if self.tasks is not None:
            check_weights("tasks", self.tasks, tuple(MOTION_TASKS))
            if not any(self.tasks.values()):
                raise ValueError(f"tasks: one share must be above 0, got {self.tasks}")
        if self.questions is not None and not any(self.questions.values()):
            raise ValueError(f"questions: one share must be above 0, got {self.questions}")
        if not self.kinds:
            raise ValueError(f"kinds: at least one of {', '.join(MOTION_KINDS)}")

    def build(self) -> MotionDataset:
        return MotionDataset(
            self.seed,
            motion_config(self.world),
            self.tasks,
            tubes=self.tubes,
            shown_fps=self.shown_fps or None,
            questions=self.questions,
            kinds=self.kinds,
            split=self.split,
        )

    def unseen(self, seed: int) -> MotionDataset:
        return MotionDataset(seed, motion_config(self.world))

    def tasks_drawn(self) -> Collection[str]:
        return self.tasks or MOTION_TASKS

    def image_sizes(self) -> list[tuple[int, int]]:
        side = motion_config(self.world).side
        return [(side, side)]


class MotionDataset(EndlessSource):
    """Samples of clips without end, the same in any process.

    Args:
        seed: at least 0; samples of two seeds have nothing in common but chance.
        config: shapes, colours, motions and lengths of the clips.
        task_weights: share of each task, any positive scale; `MOTION_TASKS` by default.
        tubes: whether the first frames of a clip to continue are seen in tubes of several, else
            each as an image.
        shown_fps: frames a second of a clip that questions are about, each seen as an image; a
            divisor of `FPS`. None: all frames, in tubes.
        questions: shares of the kinds that the first question about a clip has; None draws a clip
            first and then any kind that it allows, which seldom is one of `which` and `colour`.
        kinds: motions of the first shape of clips that are generated or captioned.
        split: "train" never shows held-out combinations, "held_out" always, "any" as they come.
    """

    def __init__(
        self,
        seed: int,
        config: MotionConfig,
        task_weights: Mapping[str, float] | None = None,
        *,
        tubes: bool = True,
        shown_fps: float | None = SHOWN_FPS,
        questions: Mapping[MotionQuestionKind, float] | None = None,
        kinds: Sequence[MotionKind] = MOTION_KINDS,
        split: Split = "train",
    ) -> None:
        weights = dict(task_weights if task_weights is not None else MOTION_TASKS)
        if not set(weights) <= set(MOTION_TASKS):
            raise DataError(f"tasks of clips are {', '.join(MOTION_TASKS)}; got {sorted(weights)}")
        if seed < 0 or min(weights.values(), default=0) < 0 or not sum(weights.values()) > 0:
            raise DataError(
                f"seed {seed} and all task weights must be at least 0, one above 0: {weights}"
            )
        self.seed, self.config, self.task_weights = seed, config, weights
        self.tubes, self.shown_fps = tubes, shown_fps
        self.questions, self.kinds = questions, kinds
        self._step = 1 if shown_fps is None else frame_step(shown_fps)
        self.split: Split = split

    def draw(self, index: int) -> Sample:
        rng = sample_rng(self.seed, index)
        task = pick_weighted(rng, self.task_weights)
        makers = {
            "t2v": self._t2v,
            "video_qa": self._video_qa,
            "video_caption": self._video_caption,
            "next_frames": self._next_frames,
            "t2i": self._t2i,
        }
        turns = makers[task](rng)
        return Sample(task, turns, id=f"motion-{self.seed}-{index}")

    def _scene(self, rng: np.random.Generator) -> MotionScene:
        return sample_motion(rng, self.config, self.split, kinds=self.kinds)

    def _t2v(self, rng: np.random.Generator) -> tuple[Turn, ...]:
        scene = self._scene(rng)
        prompt = SampleText(motion_caption(draw_facts(scene, rng), rng))
        clip = render_motion(scene, self.config)
        return Turn("user", (prompt,)), Turn("assistant", (SampleClip(clip, "target", FPS),))

    def _t2i(self, rng: np.random.Generator) -> tuple[Turn, ...]:
        scene = self._scene(rng)
        frame = int(rng.integers(scene.frames))
        prompt = SampleText(frame_caption(scene, frame, rng))
        image = SampleImage(render_motion(scene, self.config)[frame], "target")
        return Turn("user", (prompt,)), Turn("assistant", (image,))

    def _video_qa(self, rng: np.random.Generator) -> tuple[Turn, ...]:
        scene, first = self._asked_scene(rng)
        count = int(rng.integers(1, MAX_QUESTIONS + 1))
        turns: list[Turn] = []
        for question in ask_several_motion(scene, rng, count, first):
            shown = () if turns else (self._watched(render_motion(scene, self.config)),)
            turns += [
                Turn("user", (*shown, SampleText(question.text))),
                Turn("assistant", (SampleText(question.answer, loss=True),)),
            ]
        return tuple(turns)

    def _asked_scene(
        self, rng: np.random.Generator
    ) -> tuple[MotionScene, MotionQuestionKind | None]:
        """A clip and the kind of its first question. Raises DataError where no clip allows it."""
        if self.questions is None:
            return sample_motion(rng, self.config, self.split), None
        kind = pick_weighted(rng, self.questions)
        for _ in range(_MAX_TRIES):
            scene = sample_motion(rng, self.config, self.split)
            if allows_question(scene, rng, kind):
                return scene, kind
        raise DataError(f"no clip in {_MAX_TRIES} allows a question of kind {kind!r}")

    def _video_caption(self, rng: np.random.Generator) -> tuple[Turn, ...]:
        scene = self._scene(rng)
        clip = self._watched(render_motion(scene, self.config))
        caption = motion_caption(motion_facts(scene), rng)
        return (
            Turn("user", (clip, SampleText(pick(rng, CAPTION_REQUESTS)))),
            Turn("assistant", (SampleText(caption, loss=True),)),
        )

    def _next_frames(self, rng: np.random.Generator) -> tuple[Turn, ...]:
        scene = sample_decided(rng, self.config, self.split)
        clip, start = render_motion(scene, self.config), first_frames(scene.frames)
        request = SampleText(pick(rng, CONTINUE_REQUESTS))
        return (
            Turn("user", (SampleClip(clip[:start], "input", FPS, tubes=self.tubes), request)),
            Turn("assistant", (SampleClip(clip[start:], "target", FPS),)),
        )

    def _watched(self, clip: np.ndarray) -> SampleClip:
        if self.shown_fps is None:
            return SampleClip(clip, "input", FPS)
        return SampleClip(clip[:: self._step], "input", self.shown_fps, tubes=False)


def frame_step(fps: float) -> int:
    """Distance of the frames that are shown at `fps` a second. Raises DataError."""
    step = FPS / fps if fps > 0 else 0.0
    if step < 1 or step != int(step):
        raise DataError(f"shown_fps {fps} must be {FPS:g} divided by a whole number")
    return int(step)


def first_frames(frames: int) -> int:
    """Frames of a clip that its continuation is asked from: 4, of 16 frames 8."""
    return 4 * (frames // 8)


def sample_decided(
    rng: np.random.Generator, config: MotionConfig, split: Split = "train"
) -> MotionScene:
    """A clip whose first frames decide the others, and in which something changes."""
    while True:
        scene = sample_motion(rng, config, split, kinds=[k for k in DECIDED_KINDS if k != "stay"])
        if all(mover.motion.kind in DECIDED_KINDS for mover in scene.movers):
            return scene
