"""Clips in chat completions: `video_url` parts as vLLM takes them, limits, and bad ones."""

from __future__ import annotations

import base64
import http.client
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

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
from support.http_server import data_url, png, running, wait_until
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


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"video": {"max_frames": 3}}, "video.max_frames: this field is not known"),
        ({"video": {"fps": 1, "max_duration": 5}}, "the fields are fps, num_frames, tubes"),
        ({"vidoe": {"fps": 1}}, "vidoe: this field is not known; the fields are video"),
    ],
)
def test_unknown_choices_of_frames_are_refused(
    client: TestClient, choice: dict[str, Any], words: str
) -> None:
    error = refused(ask(client, video(clip_url()), media_io_kwargs=choice))
    assert words in error["message"]
    assert error["param"].startswith("media_io_kwargs.")


def test_vllms_name_of_a_decoder_is_ignored(client: TestClient, service: Scripted) -> None:
    choice = {"video": {"video_backend": "opencv", "num_frames": 1}}
    assert ask(client, video(clip_url()), media_io_kwargs=choice).status_code == 200
    assert numbers_of(asked(service).images) == [0]


def test_clips_are_not_read_for_an_answer_that_takes_none(client: TestClient) -> None:
    parts = [video(clip_url(b"not a video")), {"type": "text", "text": "?"}]
    error = refused(ask(client, *parts, modalities=["text", "image"]))
    assert "not supported for answers with images" in error["message"]
    assert (error["param"], error["code"]) == ("messages", "unsupported")


def test_a_server_without_the_library_says_so(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def able() -> list[str]:
        listed: list[str] = client.get("/v1/models").json()["data"][0]["neounify"]["capabilities"]
        return listed

    assert "chat_video" in able()
    monkeypatch.setitem(sys.modules, "av", None)
    assert able() == [name for name in TINY.capabilities if name != "chat_video"]
    answer = ask(client, video(clip_url()))
    assert answer.status_code == 501
    error = answer.json()["error"]
    assert error["type"] == "server_error"
    assert "video files need the extra 'video'" in error["message"]


# --- decoding that takes long ---


@pytest.fixture
def decoders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], list[int]]:
    """Ids of the processes that decode, none of which ends by itself."""
    program, log = tmp_path / "python", tmp_path / "ids"
    program.write_text(f"#!/bin/sh\necho $$ >> {log}\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    return lambda: [int(line) for line in log.read_text().split()] if log.exists() else []


def runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_decoding_ends_at_the_deadline(
    client: TestClient, decoders: Callable[[], list[int]]
) -> None:
    started = time.monotonic()
    answer = ask(client, video(clip_url()), deadline=1.5)
    assert answer.status_code == 504, answer.text
    assert "took more than 1.5 seconds" in answer.json()["error"]["message"]
    assert time.monotonic() - started < 15
    wait_until(lambda: not any(map(runs, decoders())))


def test_decoding_ends_when_the_client_is_gone(
    service: Scripted, decoders: Callable[[], list[int]]
) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": [video(clip_url())]}]})
    with running(create_app(service)) as url:
        connection = http.client.HTTPConnection(urlsplit(url).netloc)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", body, headers)
        wait_until(lambda: len(decoders()) == 1)
        connection.close()
        wait_until(lambda: not runs(decoders()[0]))
    assert not service.requests


def test_few_requests_wait_for_their_clips(
    service: Scripted, decoders: Callable[[], list[int]]
) -> None:
    config = HttpConfig(limits=Limits(video_requests=2))
    app = create_app(service, config)
    with TestClient(app) as client:
        first = [
            threading.Thread(target=ask, args=(client, video(clip_url())), kwargs={"deadline": 6})
            for _ in range(2)
        ]
        for thread in first:
            thread.start()
        wait_until(lambda: app.state.server.clip_decoder.requests == 2)
        answer = ask(client, video(clip_url()))
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
        assert "reads the clips of 2 requests, its limit" in answer.json()["error"]["message"]
        assert "retry-after" in answer.headers
        for thread in first:
            thread.join()
        assert ask(client, video(clip_url()), deadline=0.5).status_code == 504
