"""Clips frame by frame: each frame sees those before it, in training as in generation."""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

import neounify
from neounify.config import VideoConfig
from neounify.config.presets import TINY
from neounify.data.encode import Encoder, GuidanceDropout
from neounify.data.sample import SampleClip, SampleText
from neounify.errors import ConfigError, RequestError
from neounify.flow.sampling import ImageSampling
from neounify.model import NeoUnify
from neounify.model.layout import Image, Noise, Text
from neounify.motion.world import motion_config
from neounify.motion.world.samples import MotionDataset
from neounify.pipeline import ImageProgress
from neounify.tasks.frames import frame_prompt
from neounify.tasks.image import ImageRequest
from neounify.tasks.video import after_clip, clip_shape
from neounify.text import byte_tokenizer
from neounify.text.clips import time_stamp
from neounify.text.tokens import IMAGE_OPEN

SIZE: dict[str, Any] = {"width": 64, "height": 64, "steps": 3, "fps": 8}
PROMPT = "a star moves left"


@pytest.fixture(scope="module")
def clips() -> neounify.Pipeline:
    torch.manual_seed(0)
    able = (*TINY.capabilities, "generate_video", "continue_video")
    video = VideoConfig(tube_frames=1, image_weights=True, frame_by_frame=True)
    config = TINY.replace(video=video, capabilities=able)
    return neounify.Pipeline(NeoUnify(config).eval(), byte_tokenizer())


def frames_of(result: neounify.ImageResult) -> Tensor:
    return torch.stack([video.frames for video in result.videos]).int()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_later_frames_change_nothing_before_them(clips: neounify.Pipeline, guidance: float) -> None:
    long = frames_of(clips.generate(PROMPT, frames=4, seed=5, guidance=guidance, **SIZE))
    short = frames_of(clips.generate(PROMPT, frames=2, seed=5, guidance=guidance, **SIZE))
    assert long.shape == (1, 4, 64, 64, 3)
    assert (long[:, :2] - short).abs().max() <= 1
    assert (long[:, 1:] != long[:, :1]).any()


def test_a_frame_sees_the_ones_before_it(clips: neounify.Pipeline) -> None:
    """The same noise behind other frames gives another frame."""
    black, white = ([PIL.Image.new("RGB", (64, 64), colour)] * 2 for colour in ("black", "white"))
    after_black, after_white = (
        frames_of(clips.generate(PROMPT, frames=1, seed=5, condition=before, **SIZE))
        for before in (black, white)
    )
    assert (after_black != after_white).any()


def test_a_clip_does_not_depend_on_its_batch(clips: neounify.Pipeline) -> None:
    prompts = [PROMPT, "two circles", "x"]
    together = frames_of(clips.generate(prompts, frames=3, seed=[5, 6, 7], **SIZE))
    for number, prompt in enumerate(prompts):
        alone = frames_of(clips.generate(prompt, frames=3, seed=5 + number, **SIZE))
        assert (alone[0] - together[number]).abs().max() <= 1


def test_several_clips_of_a_prompt_differ(clips: neounify.Pipeline) -> None:
    result = clips.generate(PROMPT, frames=2, images_per_prompt=2, seed=5, **SIZE)
    one, two = frames_of(result)
    assert (one != two).any()
    assert len(result.evaluations) == 2


def test_progress_and_evaluations_count_all_frames(clips: neounify.Pipeline) -> None:
    seen: list[ImageProgress] = []
    result = clips.generate(PROMPT, frames=2, guidance=1.0, callback=seen.append, **SIZE)
    assert [(one.step, one.steps) for one in seen] == [(n, 6) for n in range(1, 7)]
    assert result.evaluations == [6]


def test_thoughts_are_refused(clips: neounify.Pipeline) -> None:
    with pytest.raises(RequestError, match="think is not for clips that are made frame by frame"):
        clips.generate(PROMPT, frames=2, think=True, **SIZE)


def test_frames_must_be_images() -> None:
    with pytest.raises(ConfigError, match="image_weights must be true"):
        VideoConfig(frame_by_frame=True)


@pytest.mark.parametrize(("task", "before"), [("t2v", 0), ("next_frames", 4)])
def test_training_shows_what_generation_shows(
    clips: neounify.Pipeline, task: str, before: int
) -> None:
    """The document of a sample is the prompt, then each frame behind its time, noisy and clean."""
    data = MotionDataset(1, motion_config("easy"), {task: 1}, tubes=False, frame_by_frame=True)
    sample = data[0]
    assert sample.task == "interleave"
    encode = Encoder(
        config=clips.config,
        tokenizer=clips.tokenizer,
        dropout=GuidanceDropout(text=0.0, all=0.0),
    )
    encoded = encode(sample, np.random.default_rng(0))
    shown = [
        PIL.Image.fromarray(frame)
        for part in sample.turns[0].parts
        if isinstance(part, SampleClip)
        for frame in part.pixels()
    ]
    (words,) = (part.text for part in sample.turns[0].parts if isinstance(part, SampleText))
    shape = clip_shape(clips.config, (64, 64), 8 - before, 8.0, shown)
    request = ImageRequest(
        prompt=after_clip(shape.condition, words),
        width=64,
        height=64,
        frames=shape.frames,
        fps=shape.fps,
        condition=shape.condition,
        sampling=ImageSampling().resolve(clips.config, editing=False, video=True),
    )
    prompt = frame_prompt(clips.processor, request, "cond").ids([0] * before, context_id=-1)
    frame = [*clips.tokenizer.encode(time_stamp(before / 8)), clips.processor.token(IMAGE_OPEN)]
    assert list(encoded.ids[: len(prompt) + len(frame)]) == prompt + frame
    kinds = [type(span) for span in encoded.document.spans]
    assert kinds[: 2 * before] == [Text, Image] * before
    assert kinds[2 * before :][:6] == [Text, Noise, Image] * 2
