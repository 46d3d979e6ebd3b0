"""Clips in chat completions: `video_url` parts as vLLM takes them, limits, and bad ones."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from neounify.config import VideoConfig
from neounify.config.presets import TINY
from neounify.serve.http import create_app
from neounify.serve.http.config import HttpConfig, Limits
from neounify.serve.safety.hooks import Hooks
from neounify.tasks.chat import ChatRequest
from neounify.tasks.clips import ClipPiece
from support.clips import clip_bytes, numbered, numbers_of
from support.http_server import data_url, png
from support.scripted_service import Scripted

CLIP = clip_bytes(numbered(20))


@pytest.fixture
def service() -> Scripted:
    return Scripted()


@pytest.fixture
def client(service: Scripted) -> Iterator[TestClient]:
    with TestClient(create_app(service)) as client:
        yield client


def clip_url(data: bytes = CLIP, kind: str = "video/mp4") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def video(url: str) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url}}


def ask(client: TestClient, *parts: Any, **fields: Any) -> Any:
    messages = [{"role": fields.pop("role", "user"), "content": list(parts)}]
    return client.post("/v1/chat/completions", json={"messages": messages, **fields})


def asked(service: Scripted) -> ChatRequest:
    request = service.requests[-1]
    assert isinstance(request, ChatRequest)
    return request


def test_a_clip_is_seen_as_frames_with_times(client: TestClient, service: Scripted) -> None:
    text = {"type": "text", "text": "What moves?"}
    image = {"type": "image_url", "image_url": {"url": data_url(png())}}
    answer = ask(client, image, video(clip_url()), text)
    assert answer.status_code == 200, answer.text
    request = asked(service)
    assert request.messages[0].text == (
        "<image>\n<0.0 seconds><image><1.0 seconds><image>What moves?"
    )
    assert request.clips == (range(1, 3),)
    assert numbers_of(request.images[1:]) == [0, 10]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video", "video": clip_url()},
        {"type": "input_video", "video_url": clip_url()},
        {"type": "video_url", "video_url": {"url": clip_url(kind="video/webm")}},
        {"type": "video_url", "url": clip_url()},
    ],
)
def test_other_ways_to_write_a_clip(client: TestClient, service: Scripted, part: Any) -> None:
    assert ask(client, part).status_code == 200
    assert len(asked(service).images) == 2


def test_the_choice_of_frames(client: TestClient, service: Scripted) -> None:
    choice = {"video": {"fps": 5, "num_frames": 96}}
    assert ask(client, video(clip_url()), media_io_kwargs=choice).status_code == 200
    assert numbers_of(asked(service).images) == list(range(0, 20, 2))
    choice = {"video": {"num_frames": 1}}
    assert ask(client, video(clip_url()), media_io_kwargs=choice).status_code == 200
    assert numbers_of(asked(service).images) == [0]


def test_clips_are_seen_in_tubes() -> None:
    shown: list[int] = []

    class Looks(Hooks):
        def check_prompt(self, text: str, images: Any) -> None:
            shown.extend(numbers_of(images))

    choice = {"video": {"tubes": True}}
    service = Scripted(config=TINY.replace(video=VideoConfig(tube_frames=4, und=True)))
    with TestClient(create_app(service, hooks=Looks())) as client:
        assert ask(client, video(clip_url()), media_io_kwargs=choice).status_code == 200
    request = asked(service)
    assert request.messages[0].text == "<0.0 seconds><image><1.0 seconds><image>"
    pieces: Any = request.images
    assert all(isinstance(piece, ClipPiece) for piece in pieces)
    assert [numbers_of(piece.frames) for piece in pieces] == [[0, 2, 5, 7], [10, 12, 15, 17]]
    assert shown == [0, 2, 5, 7, 10, 12, 15, 17]


def test_tubes_need_a_model_that_has_them(client: TestClient) -> None:
    error = refused(ask(client, video(clip_url()), media_io_kwargs={"video": {"tubes": True}}))
    assert error["param"] == "media_io_kwargs"
    assert "no embedding of tubes" in error["message"]


def test_sound_is_ignored_with_a_warning(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    assert ask(client, video(clip_url())).status_code == 200
    assert "sound" not in caplog.text
    loud = clip_bytes(numbered(20), sound=True)
    assert ask(client, video(clip_url(loud))).status_code == 200
    assert "the clip: its sound is not heard" in caplog.text


@pytest.mark.parametrize("texts", [["a <video> mark"], ["a <vid", "eo> mark"]])
@pytest.mark.parametrize("clips", [0, 1])
def test_a_mark_without_a_clip_is_refused(
    client: TestClient, service: Scripted, texts: list[str], clips: int
) -> None:
    parts = [{"type": "text", "text": text} for text in texts]
    error = refused(ask(client, *[video(clip_url())] * clips, *parts))
    assert "the text has a <video> mark without a clip" in error["message"]
    assert not service.requests


def test_a_mark_of_an_image_in_two_texts_is_refused(client: TestClient) -> None:
    parts = [{"type": "text", "text": text} for text in ("a <ima", "ge> mark")]
    assert "1 <image> marks for 0 images" in refused(ask(client, *parts))["message"]


def refused(answer: Any) -> dict[str, Any]:
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    return error


def test_bad_clips_are_errors_about_their_message(client: TestClient) -> None:
    error = refused(ask(client, video(clip_url(b"not a video"))))
    assert (error["code"], error["param"]) == ("invalid_video", "messages.0.content")
    assert "not a video, or damaged" in error["message"]
    error = refused(ask(client, video(data_url(png()))))
    assert "the URL of the video holds image/png, not a video" in error["message"]
    error = refused(ask(client, video("https://example.com/clip.mp4")))
    assert "this server fetches no video URLs; send the video as a data URL" in error["message"]
    error = refused(ask(client, video("file:///etc/passwd")))
    assert "this server fetches no video URLs" in error["message"]
    error = refused(ask(client, video(clip_url()), role="assistant"))
    assert "only user messages hold videos, this one is 'assistant'" in error["message"]
    error = refused(ask(client, video(clip_url()), modalities=["text", "image"]))
    assert "not supported for answers with images" in error["message"]
    error = refused(ask(client, video(clip_url()), media_io_kwargs={"video": {"fps": 0}}))
    assert "fps" in str(error)


def test_limits_of_clips(service: Scripted) -> None:
    limits = Limits(videos=2, video_frames=8)
    with TestClient(create_app(service, HttpConfig(limits=limits))) as client:
        error = refused(ask(client, *[video(clip_url())] * 3))
        assert "3 videos in one request; at most 2 are read" in error["message"]
        choice = {"video": {"fps": 10}}
        assert ask(client, *[video(clip_url())] * 2, media_io_kwargs=choice).status_code == 200
        assert asked(service).clips == (range(4), range(4, 8))
        choice = {"video": {"num_frames": 5}}
        error = refused(ask(client, *[video(clip_url())] * 2, media_io_kwargs=choice))
        assert "num_frames: 5 of each of 2 videos is over this server's 8" in error["message"]
