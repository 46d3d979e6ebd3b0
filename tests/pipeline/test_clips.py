"""Generated clips: batches, seeds, previews, frames before them, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import neounify
from neounify.config import VideoConfig
from neounify.config.presets import TINY
from neounify.config.sampling import SolverName
from neounify.errors import NeounifyError, PromptError, RequestError
from neounify.flow.sampling import ImageSampling
from neounify.image.clips import rows_to_frames
from neounify.model import NeoUnify
from neounify.pipeline import ImageProgress
from neounify.pipeline.videos import read_condition
from neounify.tasks.chat import chat_images, make_chat_request, prompt_of
from neounify.tasks.image import ImageRequest
from neounify.tasks.video import in_tubes
from neounify.text import Message, byte_tokenizer, chat_prompt
from neounify.text.clips import clip_text
from neounify.video.clip import Video
from support.clips import clip_bytes, numbered, numbers_of
from support.golden_steps import Steps

SIZE: dict[str, Any] = {"width": 64, "height": 32, "steps": 3, "frames": 8, "fps": 16}
PROMPTS = ["a star moves left", "two circles", "x"]


@pytest.fixture(scope="module")
def clips() -> neounify.Pipeline:
    torch.manual_seed(0)
    able = (*TINY.capabilities, "generate_video", "continue_video")
    config = TINY.replace(video=VideoConfig(tube_frames=4, und=True), capabilities=able)
    return neounify.Pipeline(NeoUnify(config).eval(), byte_tokenizer())


def frames_of(result: neounify.ImageResult) -> Tensor:
    return torch.stack([video.frames for video in result.videos]).int()


@pytest.mark.parametrize("solver", ["unipc", "dpm2m", "euler"])
def test_a_clip_does_not_depend_on_its_batch(clips: neounify.Pipeline, solver: SolverName) -> None:
    together = clips.generate(PROMPTS, seed=[5, 6, 7], solver=solver, **SIZE)
    assert together.pixels.shape == (0, 3, 32, 64)
    for number, (prompt, seed) in enumerate(zip(PROMPTS, [5, 6, 7], strict=True)):
        alone = clips.generate(prompt, seed=seed, solver=solver, **SIZE)
        assert (frames_of(alone)[0] - frames_of(together)[number]).abs().max() <= 1


def test_clips_and_images_share_engines(clips: neounify.Pipeline) -> None:
    """Clips of other sizes and rates, and images, do not change a clip."""
    sampling = ImageSampling(steps=3).resolve(clips.config, editing=False, video=True)
    clip = ImageRequest(prompt="x", width=64, height=32, frames=8, fps=16, sampling=sampling)
    image = replace(clip, frames=0)
    mixed = clips.generate_requests([clip, image, replace(clip, fps=24.0)])
    alone = [clips.generate_requests([one]) for one in (clip, image, replace(clip, fps=24.0))]
    assert torch.allclose(mixed.pixels, alone[1].pixels, atol=1e-5)
    assert [video.fps for video in mixed.videos] == [16, 24]
    for number, one in enumerate((alone[0], alone[2])):
        assert (frames_of(one)[0] - frames_of(mixed)[number]).abs().max() <= 1
    assert not torch.equal(frames_of(alone[0]), frames_of(alone[2]))


def test_frames_are_those_of_the_last_point(
    clips: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ImageProgress] = []
    steps = Steps(monkeypatch)
    out = clips.generate("a star", callback=seen.append, **SIZE)
    (video,) = out.videos
    assert video.frames.shape == (8, 32, 64, 3)
    assert video.fps == 16
    assert video.frames.dtype == torch.uint8
    assert [(p.step, p.steps) for p in seen] == [(1, 3), (2, 3), (3, 3)]
    # The last step goes to t = 1, where the point is the prediction: a preview is its middle frame.
    middle = ((seen[-1].clean[0].movedim(0, -1) + 1) / 2).clamp(0, 1) * 255
    assert (middle - video.frames[4]).abs().max() <= 0.51
    first = rows_to_frames(steps.z[0], 1, 2, 32, 4)
    assert first.shape == (8, 3, 32, 64)
    assert out.evaluations == [6.0]


def test_defaults_are_those_of_videos(
    clips: neounify.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = clips.config.sampling.of_video()
    assert (defaults.steps, defaults.guidance, defaults.shift) == (35, 6.0, 10.0)
    assert (defaults.solver, defaults.image_size) == ("unipc", (832, 480))
    steps = Steps(monkeypatch)
    (video,) = clips.generate("x", frames=4, width=32, height=32, steps=2).videos
    assert video.fps == 24
    assert len(steps.z) == 2


def test_a_negative_prompt_and_a_seed_matter(clips: neounify.Pipeline) -> None:
    plain = frames_of(clips.generate("a star", **SIZE))
    assert torch.equal(plain, frames_of(clips.generate("a star", **SIZE)))
    assert not torch.equal(plain, frames_of(clips.generate("a star", seed=1, **SIZE)))
    away = clips.generate("a star", negative_prompt="blurry", **SIZE)
    assert not torch.equal(plain, frames_of(away))
    several = clips.generate("a star", images_per_prompt=2, **SIZE)
    assert len(several.videos) == 2


def test_frames_before_a_clip_are_its_condition(clips: neounify.Pipeline) -> None:
    first = clips.generate("a star", **SIZE).videos[0].images
    one = clips.generate("a star", condition=first[:4], **SIZE)
    other = clips.generate("a star", condition=first[4:], **SIZE)
    assert not torch.equal(frames_of(one), frames_of(other))


def test_a_clip_is_continued_as_the_list_of_its_frames_is(clips: neounify.Pipeline) -> None:
    # At 8 frames a second 7 frames of 10 a second are 6, of which the last 4 fill a tube.
    clip = Video(torch.from_numpy(np.stack(numbered(7))), fps=Fraction(10))
    taken = read_condition(clip, clips.config, 8)
    assert numbers_of(taken) == [2, 3, 5, 6]
    assert numbers_of(read_condition(clip_bytes(numbered(7)), clips.config, 8)) == [2, 3, 5, 6]
    settings = SIZE | {"fps": 8}
    whole = clips.generate("a star", condition=clip, **settings)
    listed = clips.generate("a star", condition=taken, **settings)
    assert torch.equal(frames_of(whole), frames_of(listed))
    images = Video(torch.from_numpy(np.stack(numbered(7))), fps=Fraction(8)).images
    assert numbers_of(read_condition(images, clips.config, 8)) == [3, 4, 5, 6]
    matroska = clip_bytes(numbered(24), format="matroska", fps=24)  # its times are milliseconds
    assert numbers_of(read_condition(matroska, clips.config, 24)) == list(range(24))
    # Fewer frames a second than are generated stay as long as they were shown.
    twice = [number for number in range(1, 7) for _ in range(2)]
    assert numbers_of(read_condition(clip, clips.config, 20)) == twice


def test_the_rate_of_a_clip_is_taken_as_it_is(clips: neounify.Pipeline) -> None:
    clip = Video(torch.from_numpy(np.stack(numbered(4))), fps=Fraction(24000, 1001))
    (out,) = clips.generate("x", condition=clip, **SIZE | {"fps": clip.fps}).videos
    assert abs(float(out.fps - clip.fps)) < 1e-9


def test_clips_that_cannot_be_continued_are_refused(clips: neounify.Pipeline) -> None:
    with pytest.raises(NeounifyError, match="a clip of 3 frames at 10 a second is too short"):
        read_condition(clip_bytes(numbered(3)), clips.config, 10)
    few = Video(torch.from_numpy(np.stack(numbered(3))), fps=Fraction(10)).images
    with pytest.raises(NeounifyError, match="a clip of 3 frames is too short to be continued"):
        clips.generate("x", condition=few, **SIZE)
    with pytest.raises(NeounifyError, match=r"5\.0 s at 24 frames a second are more than the 96"):
        read_condition(clip_bytes(numbered(25), fps=5), clips.config)
    with pytest.raises(NeounifyError, match="fps must be a finite number above 0"):
        read_condition(
            Video(torch.zeros(4, 32, 32, 3, dtype=torch.uint8), Fraction(10)), clips.config, 0
        )
    able = tuple(n for n in clips.config.capabilities if n != "continue_video")
    with pytest.raises(NeounifyError, match="was not trained to continue videos; it can answer"):
        read_condition([], clips.config.replace(capabilities=able))
    with pytest.raises(NeounifyError, match="the clip to continue has no frames"):
        clips.generate("x", condition=[], **SIZE)
    with pytest.raises(NeounifyError, match="the clip: is empty"):
        clips.generate("x", condition=b"", **SIZE)
    with pytest.raises(NeounifyError, match="the prompt is empty; describe the next frames"):
        clips.generate(" ", condition=Video(torch.zeros(4, 32, 32, 3).byte(), Fraction(16)), **SIZE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 6}, "multiple of 4, at least 4, got 6"),
        ({"frames": 0}, "multiple of 4, at least 4, got 0"),
        ({"frames": -4}, "got -4"),
        ({"frames": "8"}, "at least 4, got 8"),
        ({"images_per_prompt": 1.5}, "images_per_prompt must be from 1 to"),
        ({"fps": "24"}, "fps must be above 0"),
        ({"fps": 10**400}, "fps must be above 0"),
        ({"fps": 1e-310}, "end at position inf, the model has 8,192"),
        ({"fps": 0}, "fps must be above 0 and at most 240, got 0"),
        ({"fps": float("nan")}, "fps must be above 0"),
        ({"frames": 400_000}, "tokens, this model generates"),
        ({"fps": 0.001}, "end at position 48,000, the model has 8,192"),
        ({"width": 60}, "multiples of 32"),
        ({"height": None}, "give both width and height"),
        ({"noise": torch.zeros(1, 3, 32, 64)}, "a clip has a seed"),
        ({"frames": None}, "give frames too"),
    ],
)
def test_clips_that_cannot_be_are_refused(
    clips: neounify.Pipeline, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(NeounifyError, match=message):
        clips.generate("a star", **(SIZE | changes))


@pytest.mark.parametrize("is_clip", [True, False])
@pytest.mark.parametrize(
    "texts", [{"prompt": "a <video>"}, {"prompt": "a star", "negative_prompt": "a <video>"}]
)
def test_marks_of_clips_are_refused(
    clips: neounify.Pipeline, texts: dict[str, Any], is_clip: bool
) -> None:
    before = Video(torch.zeros(4, 32, 64, 3, dtype=torch.uint8), Fraction(16))
    size = SIZE | {"condition": before} if is_clip else {"width": 64, "height": 32, "steps": 3}
    with pytest.raises(NeounifyError, match="the text has a <video> mark without a clip"):
        clips.generate(**texts, guidance=3.0, **size)


def test_a_model_without_tubes_refuses_clips(pipe: neounify.Pipeline) -> None:
    with pytest.raises(RequestError, match="not trained to generate videos"):
        pipe.generate("a star", **SIZE)


@pytest.mark.parametrize("prompt", [None, 5, [None], ["a star", 5], []])
def test_prompts_that_are_no_text_are_refused(clips: neounify.Pipeline, prompt: Any) -> None:
    with pytest.raises(RequestError, match=r"prompt must be text|list of prompts is empty"):
        clips.generate(prompt, **SIZE)


def test_numbers_of_numpy_are_numbers(clips: neounify.Pipeline) -> None:
    plain = clips.generate("x", **SIZE)
    numbers: Any = {"frames": np.int64(8), "fps": np.float32(16)}
    assert torch.equal(frames_of(clips.generate("x", **(SIZE | numbers))), frames_of(plain))


def test_rates_are_kept_as_fractions(clips: neounify.Pipeline) -> None:
    video = clips.generate("x", **(SIZE | {"fps": 29.97, "steps": 1})).videos[0]
    assert video.fps == Fraction(2997, 100)


def test_questions_take_clips_in_tubes(clips: neounify.Pipeline, pipe: neounify.Pipeline) -> None:
    frames = clips.generate("a star", **SIZE).videos[0].images[:6]
    times = [2 + n / 4 for n in range(6)]
    clip = in_tubes(clips.config, frames, times)
    assert list(clip.times) == [0.0, 1.0]
    request = make_chat_request("Where?", (), [clip])
    prompt = prompt_of(clips.processor, request)
    wanted = chat_prompt(clips.tokenizer, [Message("user", clip_text([0.0, 1.0]) + "Where?")])
    assert prompt == wanted
    first, last = chat_images(clips.processor, request)
    assert (first.shape, last.shape) == ((4, 3, 32, 64), (4, 3, 32, 64))
    # The last frame fills the tube.
    assert torch.equal(last[1], last[2])
    assert not torch.equal(last[0], last[1])
    answer = clips.chat("Where?", video=clip, max_new_tokens=4)
    assert answer.prompt_tokens == len(prompt.ids([2, 2], -1))
    again = clips.chat("Where?", video=in_tubes(clips.config, frames, times), max_new_tokens=4)
    assert again.token_ids == answer.token_ids
    with pytest.raises(RequestError, match="no embedding of tubes"):
        in_tubes(pipe.config, frames, times)
    with pytest.raises(PromptError, match="5 times for 6 frames"):
        in_tubes(clips.config, frames, times[:5])
