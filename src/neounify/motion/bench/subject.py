"""Subjects of MotionBench: the protocol, and a pipeline as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from PIL import Image

from neounify.config import ModelConfig
from neounify.flow.sampling import ImageSampling
from neounify.motion.bench.follow import Clip
from neounify.motion.world.samples import SHOWN_FPS, frame_step
from neounify.motion.world.scene import FPS
from neounify.pipeline import Pipeline
from neounify.tasks.clips import Frames
from neounify.tasks.image import ImageRequest
from neounify.tasks.video import after_clip, clip_shape, in_tubes

MAX_ANSWER_TOKENS = 32


class MotionSubject(Protocol):
    """A model under test, or a stand-in that generates clips and answers questions about them.

    Every call takes several cases and gives back one result for each, in order. Clips are uint8
    [frames, height, width, 3]; `seeds` fix the noise of each generated clip.
    """

    def film(
        self, prompts: Sequence[str], frames: Sequence[int], side: int, seeds: Sequence[int]
    ) -> list[Clip]:
        """Generate a clip of each prompt with that many frames of `side` pixels."""

    def watch(self, clips: Sequence[Clip], questions: Sequence[str]) -> list[str]:
        """Answer one question about each clip."""

    def extend(
        self,
        clips: Sequence[Clip],
        requests: Sequence[str],
        frames: Sequence[int],
        seeds: Sequence[int],
    ) -> list[Clip]:
        """The next frames of each clip, as many as asked for."""


class PipelineMotionSubject:
    """Asks a pipeline in batches.

    `steps` and `guidance` None are the checkpoint's defaults for video. Texts are the likeliest
    ones, so that nothing but the seeds is drawn. Raises RequestError for settings out of range.
    """

    def __init__(
        self, pipe: Pipeline, *, steps: int | None = None, guidance: float | None = None
    ) -> None:
        self._pipe = pipe
        self._sampling = ImageSampling(steps=steps, guidance=guidance).resolve(
            pipe.config, editing=False, video=True
        )

    @property
    def sampling(self) -> dict[str, float | str]:
        """Sampling settings of clips, with the checkpoint's values where none are set."""
        sampling = self._sampling
        return {
            "steps": sampling.steps,
            "guidance": sampling.guidance.text,
            "shift": sampling.shift,
            "solver": sampling.solver,
        }

    def film(
        self, prompts: Sequence[str], frames: Sequence[int], side: int, seeds: Sequence[int]
    ) -> list[Clip]:
        asked = zip(prompts, frames, seeds, strict=True)
        return self._generated([self._request(p, None, n, side, seed) for p, n, seed in asked])

    def watch(self, clips: Sequence[Clip], questions: Sequence[str]) -> list[str]:
        asked = [
            [
                {
                    "role": "user",
                    "content": [
                        {"type": "video", "video": _shown(self._pipe.config, clip)},
                        {"type": "text", "text": question},
                    ],
                }
            ]
            for clip, question in zip(clips, questions, strict=True)
        ]
        answers = self._pipe.chat_batch(asked, max_new_tokens=MAX_ANSWER_TOKENS)
        return [result.text for result in answers]

    def extend(
        self,
        clips: Sequence[Clip],
        requests: Sequence[str],
        frames: Sequence[int],
        seeds: Sequence[int],
    ) -> list[Clip]:
        asked = zip(clips, requests, frames, seeds, strict=True)
        return self._generated(
            [self._request(text, clip, n, clip.shape[1], seed) for clip, text, n, seed in asked]
        )

    def _request(
        self, prompt: str, first: Clip | None, frames: int, side: int, seed: int
    ) -> ImageRequest:
        condition = [] if first is None else [Image.fromarray(frame) for frame in first]
        shape = clip_shape(self._pipe.config, (side, side), frames, FPS, condition)
        return ImageRequest(
            prompt=after_clip(shape.condition, prompt),
            width=side,
            height=side,
            frames=frames,
            fps=FPS,
            condition=shape.condition,
            sampling=self._sampling,
            seed=seed,
        )

    def _generated(self, requests: Sequence[ImageRequest]) -> list[Clip]:
        return [video.frames.numpy() for video in self._pipe.generate_requests(requests).videos]


def _shown(config: ModelConfig, clip: Clip) -> Frames:
    """A clip that questions are about: all frames in tubes, or every second one as an image."""
    step = 1 if config.sees_tubes else frame_step(SHOWN_FPS)
    numbers = range(0, len(clip), step)
    images, times = [Image.fromarray(clip[n]) for n in numbers], [n / FPS for n in numbers]
    return in_tubes(config, images, times) if config.sees_tubes else Frames(images, times)
