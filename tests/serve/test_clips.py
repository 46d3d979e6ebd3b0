"""Clips of the service are those of the pipeline, with their engines in threads or processes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import neounify
from neounify.config import VideoConfig
from neounify.config.presets import TINY
from neounify.errors import RequestError
from neounify.flow.sampling import ImageSampling
from neounify.model import NeoUnify
from neounify.serve.build import ServeConfig, build_service, colocated
from neounify.serve.service import AdmissionConfig, EngineService, ServiceRequest
from neounify.tasks.chat import make_chat_request
from neounify.tasks.clips import Frames
from neounify.tasks.image import ImageRequest
from neounify.tasks.program import (
    Finished,
    FramesFinished,
    ImageFinished,
    Preview,
    TextPiece,
)
from neounify.tasks.video import in_tubes
from neounify.text import byte_tokenizer
from support.clips import assert_shows, numbered
from support.http_server import serving
from support.pixelumm import saved
from support.serving import serve


def tiny(video: VideoConfig) -> neounify.Pipeline:
    torch.manual_seed(0)
    able = (*TINY.capabilities, "generate_video")
    config = TINY.replace(video=video, capabilities=able)
    return neounify.Pipeline(NeoUnify(config).eval().requires_grad_(False), byte_tokenizer())


@pytest.fixture(scope="module")
def clips() -> neounify.Pipeline:
    return tiny(VideoConfig(tube_frames=4, und=True))


@pytest.fixture(scope="module")
def by_frame() -> neounify.Pipeline:
    return tiny(VideoConfig(tube_frames=1, image_weights=True, frame_by_frame=True))


@pytest.mark.parametrize("mode", ["colocated", "separate"])
@pytest.mark.parametrize(
    ("model", "frames", "places"), [("clips", 8, [0, 4]), ("by_frame", 4, [0, 3, 1, 2])]
)
def test_a_clip_is_that_of_the_pipeline(
    model: str,
    frames: int,
    places: list[int],
    mode: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Its events are tubes in turn, or one frame each in order of generation."""
    clips: neounify.Pipeline = request.getfixturevalue(model)
    sampling = ImageSampling(steps=3).resolve(clips.config, editing=False, video=True)
    asked = ImageRequest(
        prompt="a star", width=64, height=32, frames=frames, fps=16.0, sampling=sampling, count=2
    )

    async def work(service: EngineService) -> list[object]:
        return [event async for event in service.answer(asked)]

    if mode == "colocated":
        service = colocated(clips)
    else:
        clips.save(tmp_path / "model")
        service = build_service(ServeConfig(folder=tmp_path / "model", mode="separate"))
    events = serve(service, work)
    wanted = clips.generate_requests([asked]).videos
    for index in (0, 1):
        parts = [e for e in events if isinstance(e, FramesFinished) and e.index == index]
        assert [part.first for part in parts] == places
        for part in parts:
            there = wanted[index].frames[part.first : part.first + frames // len(places)]
            assert part.frames.shape == there.shape
            assert (part.frames.int() - there.int()).abs().max() <= 1
        assert parts[-1].usage.image_tokens == 2 * len(places)
    previews = [event for event in events if isinstance(event, Preview)]
    assert {tuple(preview.pixels.shape) for preview in previews} <= {(3, 32, 64)}


def test_every_token_of_a_clip_counts_against_the_limit(clips: neounify.Pipeline) -> None:
    sampling = ImageSampling(steps=2).resolve(clips.config, editing=False, video=True)
    request = ImageRequest(prompt="x", width=64, height=32, frames=8, fps=8, sampling=sampling)

    async def work(service: EngineService) -> None:
        with pytest.raises(RequestError, match="have 4 tokens, this server generates at most 3"):
            service.check_together([request])

    serve(colocated(clips, admission=AdmissionConfig(image_tokens=3)), work)


def test_of_a_clip_frame_by_frame_one_frame_counts(by_frame: neounify.Pipeline) -> None:
    """Of several clips too, which are made one after the other."""
    sampling = ImageSampling(steps=2).resolve(by_frame.config, editing=False, video=True)
    clip: Any = {"prompt": "x", "width": 64, "height": 32, "fps": 8, "sampling": sampling}
    request = ImageRequest(**clip, frames=4, count=2)

    def limited(tokens: int) -> None:
        async def work(service: EngineService) -> None:
            service.check_together([request])

        serve(colocated(by_frame, admission=AdmissionConfig(image_tokens=tokens)), work)

    limited(2)
    with pytest.raises(RequestError, match="have 2 tokens, this server generates at most 1"):
        limited(1)


@pytest.mark.slow
def test_separate_engines_of_the_second_family_answer_as_the_pipeline(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    pipe = neounify.load(folder, device="cpu")
    size: Any = {"width": 64, "height": 48, "seed": 3}
    images, clips = (
        ImageRequest(
            prompt="a fox",
            negative_prompt="blur",
            sampling=ImageSampling().resolve(pipe.config, editing=False, video=bool(frames)),
            frames=frames,
            **size,
        )
        for frames in (0, 8)
    )
    frames = [Image.fromarray(frame) for frame in numbered(9, 48, 64)]
    times = [number / 4 for number in range(9)]
    shown = [Frames(frames, times), in_tubes(pipe.config, frames, times)]
    chats = [
        make_chat_request("What moves?", [], [one], pipe.processor.template, max_new_tokens=6)
        for one in shown
    ]

    async def work(service: EngineService) -> list[list[Any]]:
        async def events(request: ServiceRequest) -> list[Any]:
            return [event async for event in service.answer(request)]

        requests: list[ServiceRequest] = [images, clips, *chats]
        return await asyncio.gather(*map(events, requests))

    config = ServeConfig(
        folder=folder,
        mode="separate",
        understanding_devices=("cpu",),
        generation_devices=("cpu",),
    )
    image, clip, *answers = serve(build_service(config), work)
    wanted = pipe.generate_requests([images]).pixels[0]
    [finished] = [event for event in image if isinstance(event, ImageFinished)]
    assert (finished.pixels - wanted).abs().max() <= 1e-4
    parts = [event.frames.int() for event in clip if isinstance(event, FramesFinished)]
    video = pipe.generate_requests([clips]).videos[0]
    assert (torch.cat(parts) - video.frames.int()).abs().max() <= 1
    texts = ["".join(e.text for e in one if isinstance(e, TextPiece)) for one in answers]
    alone = [pipe.chat("What moves?", video=one, max_new_tokens=6) for one in shown]
    assert texts == [answer.text for answer in alone]
    ends = [next(e for e in one if isinstance(e, Finished)) for one in answers]
    assert [end.prompt_tokens for end in ends] == [answer.prompt_tokens for answer in alone]
    assert alone[0].prompt_tokens != alone[1].prompt_tokens


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_a_video_over_http_is_that_of_the_pipeline(clips: neounify.Pipeline) -> None:
    fields: Any = {"frames": 8, "fps": 16, "steps": 3, "seed": 5}
    size: Any = "64x32"
    with serving(colocated(clips)) as client:
        video = client.videos.create_and_poll(
            prompt="a star", size=size, extra_body=fields, poll_interval_ms=20
        )
        assert video.status == "completed", video.error
        file = client.videos.download_content(video.id).read()
    wanted = clips.generate("a star", width=64, height=32, **fields).videos[0].frames.numpy()
    assert_shows(file, wanted)
