"""Chat about clips: frames with their times, marks, choices, models that see none."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

import neounify
from neounify.config import VideoConfig
from neounify.config.presets import TINY
from neounify.errors import PromptError, RequestError, VideoError
from neounify.image.pixels import prepare_image
from neounify.model import NeoUnify
from neounify.pipeline.videos import read_frames
from neounify.tasks.chat import chat_images, make_chat_request
from neounify.tasks.clips import Frames, frame_bounds
from neounify.tasks.video import in_tubes
from neounify.text.forms import TEMPLATES
from neounify.video.clip import Video
from support.clips import clip_bytes, numbered


def example_image(seed: int = 0) -> PIL.Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    return PIL.Image.fromarray(pixels)


def frames(count: int, start: int = 0) -> Frames:
    images = [example_image(start + number) for number in range(count)]
    return Frames(images, [number / 2 for number in range(count)])


def texts(*arguments: Any) -> list[str]:
    return [message.text for message in make_chat_request(*arguments).messages]


def test_frames_stand_in_front_each_after_its_time() -> None:
    request = make_chat_request("what moves?", [], [frames(3)])
    assert [message.text for message in request.messages] == [
        "<0.0 seconds><image><0.5 seconds><image><1.0 seconds><image>what moves?"
    ]
    assert request.clips == (range(3),)


def test_marks_say_where_clips_and_images_stand() -> None:
    first, second, image = frames(2), frames(1, 7), example_image(9)
    prompt = "<video> then <image> then <video>"
    request = make_chat_request(prompt, [image], [first, second])
    assert request.messages[0].text == (
        "<0.0 seconds><image><0.5 seconds><image> then <image> then <0.0 seconds><image>"
    )
    assert request.clips == (range(2), range(3, 4))
    assert [request.images[n] for n in (0, 1, 3)] == [*first.images, *second.images]


def test_a_clip_of_an_earlier_message_keeps_its_place() -> None:
    talk = [
        {"role": "user", "content": "see <video>"},
        {"role": "assistant", "content": "a circle"},
        {"role": "user", "content": "and now?"},
    ]
    assert texts(talk, [], [frames(1)]) == ["see <0.0 seconds><image>", "a circle", "and now?"]
    assert texts(talk[1:], [], [frames(1)])[1] == "<0.0 seconds><image>and now?"


def test_more_marks_than_clips_are_refused() -> None:
    with pytest.raises(PromptError, match="has 2 <video> marks for 1 clips"):
        make_chat_request("<video> <video>", [], [frames(1)])
    with pytest.raises(PromptError, match="has 1 <video> marks for 0 clips"):
        make_chat_request("<video> what?", [])
    with pytest.raises(PromptError, match="1 clips have no mark and no user message"):
        make_chat_request([{"role": "assistant", "content": "so"}], [], [frames(1)])
    with pytest.raises(PromptError, match="not 5"):
        make_chat_request(5, [], [frames(1)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "times", "message"),
    [
        ([example_image()] * 2, [0.0], "1 times for 2 frames"),
        ([example_image()] * 2, [0.0, float("nan")], "from 0 on, ascending; got nan after 0"),
        ([example_image()] * 2, [-1.0, 0.0], "got -1.0 after 0"),
        ([example_image()] * 2, [0.0, float("inf")], "got inf"),
        ([example_image()] * 3, [0, 2, 1], "got 1 after 2"),
        ([example_image()] * 2, [0, "1"], "got '1'"),
        ([example_image(), example_image().resize((32, 32))], [0, 1], "32x32 and 96x64"),
        ([example_image().convert("RGBA")], [0], "RGB images of PIL, not RGBA images"),
        (["a.png"], [0], "RGB images of PIL, not 'a.png'"),
    ],
)
def test_frames_that_make_no_clip_are_refused(images: Any, times: Any, message: str) -> None:
    able = TINY.replace(video=VideoConfig(und=True))
    with pytest.raises(PromptError, match=message):
        Frames(images, times)
    with pytest.raises(PromptError, match=message):
        in_tubes(able, images, times)


def test_images_beside_clips_have_marks_without_numbers() -> None:
    form = TEMPLATES["pixelumm"]
    request = make_chat_request("<IMAGE> <video>", [example_image(5)], [frames(1)], form)
    assert request.messages[0].text == "<image> <0.0 seconds><image>"
    with pytest.raises(PromptError, match="images are marked by <image> without a number"):
        make_chat_request("<image 1> <video>", [example_image(5)], [frames(1)], form)


def test_frames_are_sized_as_frames_and_images_as_images(pipe: neounify.Pipeline) -> None:
    clip, image = frames(2), example_image(5)
    request = make_chat_request("<image> and <video>", [image], [clip])
    assert request.clips == (range(1, 3),)
    bounds = pipe.config.sampling
    prepared = chat_images(pipe.processor, request)
    low, high = frame_bounds(pipe.config, 2)
    sizes = [(bounds.chat_min_pixels, bounds.chat_max_pixels), (low, high), (low, high)]
    for shown, source, (least, greatest) in zip(prepared, request.images, sizes, strict=True):
        expected = prepare_image(
            source, multiple=pipe.config.token_size, min_pixels=least, max_pixels=greatest
        )
        assert torch.equal(shown, expected)
    assert sizes[0] != sizes[1]


def test_many_frames_share_the_area_of_a_clip(pipe: neounify.Pipeline) -> None:
    assert frame_bounds(pipe.config, 96) == (256, 448**2)
    assert frame_bounds(pipe.config, 960) == (256, 96 * 448**2 // 960)
    assert frame_bounds(pipe.config, 10**6) == (19, 19)


def test_a_clip_is_read_from_a_path_bytes_and_a_generated_video(
    pipe: neounify.Pipeline, tmp_path: Path
) -> None:
    data = clip_bytes(numbered(20))
    (tmp_path / "clip.mp4").write_bytes(data)
    options: dict[str, Any] = {"max_new_tokens": 4}
    answer = pipe.chat("what?", video=data, **options)
    assert pipe.chat("what?", video=tmp_path / "clip.mp4", **options) == answer
    assert pipe.chat("what?", video=[data], fps=1, max_frames=96, **options) == answer
    video = Video(torch.zeros(20, 32, 48, 3, dtype=torch.uint8), Fraction(10))
    generated = pipe.chat("what?", video=video, **options)
    assert generated.prompt_tokens == answer.prompt_tokens
    more = pipe.chat("what?", video=data, fps=5, **options)
    assert more.prompt_tokens > answer.prompt_tokens


def test_sound_is_ignored_with_a_warning(
    pipe: neounify.Pipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loud = tmp_path / "loud.mp4"
    loud.write_bytes(clip_bytes(numbered(8), sound=True))
    read_frames(clip_bytes(numbered(8)), pipe.config)
    assert not caplog.records
    read_frames(loud, pipe.config)
    assert [record.getMessage() for record in caplog.records] == [f"{loud}: its sound is not heard"]


def test_a_short_clip_keeps_its_size_whatever_is_read_at_most() -> None:
    data = clip_bytes(numbered(20, 480, 640))
    for most in (96, 2000):
        shown = read_frames(data, TINY, None, most).images
        assert [image.size for image in shown] == [(640, 480)] * 2


def test_what_is_a_short_clip_is_the_model_s_and_not_the_caller_s() -> None:
    clip = Video(torch.zeros(100, 8, 8, 3, dtype=torch.uint8), Fraction(10))
    counts = [len(read_frames(clip, TINY, None, most).images) for most in (None, 32, 6)]
    assert counts == [10, 10, 6]
    sampling = replace(TINY.sampling, video=replace(TINY.sampling.video, max_frames=16))
    few = TINY.replace(sampling=sampling)  # 4 a second would be more than 16
    assert [len(read_frames(clip, few, None, most).images) for most in (None, 12)] == [16, 12]


def test_impossible_choices_and_models_without_videos_are_refused(pipe: neounify.Pipeline) -> None:
    with pytest.raises(VideoError, match="fps must be a finite number above 0"):
        pipe.chat("what?", video=b"", fps=0)
    with pytest.raises(VideoError, match="the clip: is empty"):
        pipe.chat("what?", video=b"")
    for options in ({"fps": 2.0}, {"max_frames": 3}, {"tubes": True}):
        with pytest.raises(RequestError, match="are of clips: give video too"):
            pipe.chat("what?", **options)
        with pytest.raises(RequestError, match="these Frames are chosen already"):
            pipe.chat("what?", video=frames(2), **options)
    config = replace(pipe.config, capabilities=("chat",))
    blind = neounify.Pipeline(NeoUnify(config).eval(), pipe.tokenizer)
    with pytest.raises(RequestError, match="was not trained to answer questions about videos"):
        blind.chat("what?", video=b"")


def test_a_file_as_a_part_of_a_message_names_the_option(pipe: neounify.Pipeline) -> None:
    for part in ({"type": "video", "video": "clip.mp4"}, {"type": "video"}):
        with pytest.raises(PromptError, match="give a file or a Video with video="):
            pipe.chat([{"role": "user", "content": [part]}])
    with pytest.raises(PromptError, match=r"or \{'type': 'video', 'video': Frames"):
        pipe.chat([{"role": "user", "content": [{"type": "sound"}]}])


def test_clips_are_seen_in_tubes_where_a_model_can(pipe: neounify.Pipeline) -> None:
    config = replace(pipe.config, video=VideoConfig(tube_frames=4, und=True))
    able = neounify.Pipeline(NeoUnify(config).eval(), pipe.tokenizer)
    data = clip_bytes(numbered(20))
    seen = read_frames(data, config, tubes=True)  # 8 frames of 2 s at 4 a second
    assert seen.stamps == "<0.0 seconds><image><1.0 seconds><image>"
    assert [len(piece.frames) for piece in seen.images] == [4, 4]
    video = Video(torch.zeros(20, 32, 48, 3, dtype=torch.uint8), Fraction(10))
    assert read_frames(video, config, tubes=True).times == seen.times
    answers = [
        able.chat("what?", video=data, tubes=tubes, max_new_tokens=3) for tubes in (False, True)
    ]
    assert answers[0].prompt_tokens == answers[1].prompt_tokens  # two images, or two tubes
    with pytest.raises(RequestError, match="no embedding of tubes"):
        pipe.chat("what?", video=data, tubes=True)
