"""Clips frame by frame: each frame sees those made before it, in training as in generation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

import neounify
from neounify.config import VideoConfig
from neounify.config.presets import TINY
from neounify.data.draws import FrameTargets, GuidanceDropout
from neounify.data.encode import Encoded, Encoder
from neounify.data.sample import DataError, Sample, SampleClip, SampleText
from neounify.errors import ConfigError, RequestError
from neounify.flow.sampling import ImageSampling
from neounify.model import NeoUnify
from neounify.model.layout import Image, Noise, Text
from neounify.motion.world import motion_config
from neounify.motion.world.samples import MotionDataset
from neounify.pipeline import ImageProgress
from neounify.tasks.frames import frame_prompt, image_program
from neounify.tasks.image import ImageRequest
from neounify.tasks.program import ClipFrames, FramesFinished
from neounify.tasks.video import after_clip, clip_shape
from neounify.text import byte_tokenizer
from neounify.text.clips import frame_order, time_stamp
from neounify.text.tokens import IMAGE_OPEN

SIZE: dict[str, Any] = {"width": 64, "height": 64, "steps": 3, "fps": 8}
PROMPT = "a star moves left"


@pytest.fixture(scope="module")
def clips() -> neounify.Pipeline:
    torch.manual_seed(0)
    able = (*TINY.capabilities, "generate_video", "continue_video")
    video = VideoConfig(tube_frames=1, image_weights=True, frame_by_frame=True)
    config = TINY.replace(video=video, capabilities=able)
    model = NeoUnify(config).eval()
    return neounify.Pipeline(model, byte_tokenizer(), system_message="You make clips.")


def frames_of(result: neounify.ImageResult) -> Tensor:
    return torch.stack([video.frames for video in result.videos]).int()


@pytest.mark.parametrize(
    ("frames", "follows", "order"),
    [
        (1, False, [0]),
        (2, False, [0, 1]),
        (5, False, [0, 4, 2, 1, 3]),
        (8, False, [0, 7, 3, 1, 5, 2, 4, 6]),
        (1, True, [0]),
        (4, True, [3, 1, 0, 2]),
    ],
)
def test_ends_come_first_then_middles(frames: int, follows: bool, order: list[int]) -> None:
    assert frame_order(frames, follows=follows) == order


@pytest.mark.parametrize("follows", [False, True])
def test_every_frame_comes_once(follows: bool) -> None:
    for frames in range(1, 70):
        assert sorted(frame_order(frames, follows=follows)) == list(range(frames))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_later_frames_change_nothing_before_them(clips: neounify.Pipeline, guidance: float) -> None:
    """The first frames in order of generation are those of a shorter clip with the same times."""
    long = frames_of(clips.generate(PROMPT, frames=5, seed=5, guidance=guidance, **SIZE))
    ends = SIZE | {"fps": SIZE["fps"] / 4}
    short = frames_of(clips.generate(PROMPT, frames=2, seed=5, guidance=guidance, **ends))
    assert long.shape == (1, 5, 64, 64, 3)
    assert (long[:, [0, 4]] - short).abs().max() <= 1
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
    video = VideoConfig(tube_frames=1, image_weights=True, frame_by_frame=True)
    with pytest.raises(ConfigError, match="prompts of the form 'neo', not 'pixelumm'"):
        TINY.replace(video=video, template="pixelumm")


def encoded(clips: neounify.Pipeline, sample: Sample, **settings: Any) -> Encoded:
    encode = Encoder(
        config=clips.config,
        tokenizer=clips.tokenizer,
        system_message=clips.processor.system_message,
        **{"dropout": GuidanceDropout(text=0.0, all=0.0), **settings},
    )
    return encode(sample, np.random.default_rng(0))


@pytest.mark.parametrize(("task", "before", "first"), [("t2v", 0, 0), ("next_frames", 4, 7)])
def test_training_shows_what_generation_shows(
    clips: neounify.Pipeline, task: str, before: int, first: int
) -> None:
    """The document of a sample is the prompt, then each frame behind its time, noisy and clean."""
    sample = MotionDataset(1, motion_config("easy"), {task: 1}, tubes=False)[0]
    document = encoded(clips, sample)
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
    frame = [*clips.tokenizer.encode(time_stamp(first / 8)), clips.processor.token(IMAGE_OPEN)]
    assert list(document.ids[: len(prompt) + len(frame)]) == prompt + frame
    kinds = [type(span) for span in document.document.spans]
    assert kinds[: 2 * before] == [Text, Image] * before
    frames = 8 - before
    assert kinds[2 * before :] == ([Text, Noise, Image] * frames)[:-1]
    (target,) = (p for p in sample.turns[1].parts if isinstance(p, SampleClip))
    order = frame_order(frames, follows=before > 0)
    for image, place in zip(document.targets, order, strict=True):
        assert (image == target.pixels()[place]).all()


@pytest.mark.parametrize(
    ("share", "kinds", "places"),
    [
        ("first", [Text, Noise], [0]),
        ("last", [Text, Image, Text, Noise], [7]),
        ("between", [Text, Image] * 3 + [Text, Noise], [1]),
    ],
)
def test_some_frames_are_targets_and_those_before_them_are_seen(
    clips: neounify.Pipeline, share: str, kinds: list[type], places: list[int]
) -> None:
    sample = MotionDataset(1, motion_config("easy"), {"t2v": 1}, tubes=False)[0]
    targets = FrameTargets(**{"all": 0.0, share: 1.0})
    document = encoded(clips, sample, frame_targets=targets)
    whole = encoded(clips, sample)
    assert document.ids == whole.ids[: len(document.ids)]
    assert [type(span) for span in document.document.spans] == kinds
    (clip,) = (p for p in sample.turns[1].parts if isinstance(p, SampleClip))
    for image, place in zip(document.targets, places, strict=True):
        assert (image == clip.pixels()[place]).all()
    for dropout in (GuidanceDropout(text=0.0, all=1.0), GuidanceDropout(text=1.0, all=0.0)):
        alone = encoded(clips, sample, frame_targets=targets, dropout=dropout)
        assert [type(span) for span in alone.document.spans] == [Text] + [Noise] * len(places)
        unconditional = clips.processor.unconditional_prompt("").ids([], context_id=-1)
        assert list(alone.ids) == unconditional


def test_a_clip_ends_its_sample(clips: neounify.Pipeline) -> None:
    sample = MotionDataset(1, motion_config("easy"), {"t2v": 1}, tubes=False)[0]
    with pytest.raises(DataError, match="a clip to generate ends its sample"):
        encoded(clips, replace(sample, task="interleave"))


def test_shares_of_frames_need_a_model_that_generates_them_one_by_one() -> None:
    with pytest.raises(DataError, match="frame_targets is for models that generate clips frame by"):
        Encoder(config=TINY, tokenizer=byte_tokenizer(), frame_targets=FrameTargets(last=1.0))


def test_frames_are_reported_as_they_are_made(clips: neounify.Pipeline) -> None:
    sampling = ImageSampling(steps=2).resolve(clips.config, editing=False, video=True)
    request = ImageRequest(prompt="x", width=64, height=64, frames=4, fps=8, sampling=sampling)
    driver = clips._driver(None)
    program = image_program(clips.processor, request, {}, 0)
    events = [event for batch in driver.run([program]) for _, event in batch]
    frames = [event for event in events if isinstance(event, FramesFinished)]
    assert [event.first for event in frames] == frame_order(4)
    clip = ClipFrames(4)
    for event in frames:
        clip.put(event)
    assert frames[-1].evaluations == 4 * frames[0].evaluations
    whole = frames_of(clips.generate("x", frames=4, width=64, height=64, steps=2, fps=8))
    assert (clip.whole().int() - whole[0]).abs().max() <= 1


def test_shares_of_targets_are_drawn_as_they_are_given() -> None:
    shares, rng = FrameTargets(all=0.0, first=1.0, last=3.0), np.random.default_rng(0)
    drawn = [shares.draw(rng, 8, follows=False) for _ in range(1000)]
    assert set(drawn) == {range(1), range(1, 2)}
    assert 0.7 < drawn.count(range(1, 2)) / 1000 < 0.8
    assert shares.draw(rng, 1, follows=False) == range(1)
    between = FrameTargets(all=0.0, between=1.0)
    drawn = [between.draw(rng, 6, follows=True) for _ in range(200)]
    assert set(drawn) == {range(place, place + 1) for place in range(1, 6)}
    assert between.draw(rng, 2, follows=False) == range(2)  # nothing is between: all
    with pytest.raises(ValueError, match="one share must be above 0"):
        FrameTargets(all=0.0)
