"""Clips in chat completions: `video_url` parts as vLLM takes them, limits, and bad ones."""

from __future__ import annotations

import asyncio
import base64
import http.client
import io
import json
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from neounify.config import VideoConfig
from neounify.config.presets import TINY
from neounify.errors import VideoError
from neounify.serve.http import create_app, input_videos
from neounify.serve.http.config import HttpConfig, Limits
from neounify.serve.safety.hooks import Hooks
from neounify.tasks.chat import ChatRequest
from neounify.tasks.clips import ClipPiece
from support.clips import clip_bytes, numbered, numbers_of
from support.http_server import data_url, png, running, wait_until
from support.scripted_service import Scripted

CLIP = clip_bytes(numbered(20))
NO_CLIP = b"not a video" * 10


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


@pytest.mark.parametrize("stream", [False, True])
def test_sound_is_ignored_with_a_warning(client: TestClient, stream: bool) -> None:
    answer = ask(client, video(clip_url()), stream=stream)
    assert answer.status_code == 200
    assert "neounify-warning" not in answer.headers
    loud = video(clip_url(clip_bytes(numbered(20), sound=True)))
    answer = ask(client, loud, video(clip_url()), loud, stream=stream)
    assert answer.status_code == 200
    assert answer.headers["neounify-warning"] == (
        "messages.0.content.0: the clip: its sound is not heard; "
        "messages.0.content.2: the clip: its sound is not heard"
    )


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
    assert (error["code"], error["param"]) == ("invalid_video", "messages.0.content.0")
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
        ({"video": {"num_frame": 5}}, "this field is not known; did you mean 'num_frames'?"),
        ({"vidoe": {"fps": 1}}, "vidoe: this field is not known; did you mean 'video'?"),
    ],
)
def test_unknown_choices_of_frames_are_refused(
    client: TestClient, choice: dict[str, Any], words: str
) -> None:
    error = refused(ask(client, video(clip_url()), media_io_kwargs=choice))
    assert words in error["message"]
    assert error["param"].startswith("media_io_kwargs.")


@pytest.mark.parametrize(
    "choice", [None, {"video": None}, {"video": {"tubes": None, "fps": None, "num_frames": None}}]
)
def test_null_choices_of_frames_are_absent(
    client: TestClient, service: Scripted, choice: Any
) -> None:
    answer = ask(client, video(clip_url()), media_io_kwargs=choice)
    assert answer.status_code == 200, answer.text
    assert numbers_of(asked(service).images) == [0, 10]


def test_all_frames_are_seen_within_the_limit(service: Scripted) -> None:
    choice = {"video": {"num_frames": -1}}
    with TestClient(create_app(service, HttpConfig(limits=Limits(video_frames=20)))) as client:
        assert ask(client, video(clip_url()), media_io_kwargs=choice).status_code == 200
        assert numbers_of(asked(service).images) == list(range(20))
        assert ask(client, *[video(clip_url())] * 2, media_io_kwargs=choice).status_code == 200
        assert asked(service).clips == (range(10), range(10, 20))
        error = refused(
            ask(client, video(clip_url()), media_io_kwargs={"video": {"num_frames": 0}})
        )
        assert error["param"] == "media_io_kwargs.video.num_frames"


def test_vllms_name_of_a_decoder_is_ignored(client: TestClient, service: Scripted) -> None:
    choice = {"video": {"video_backend": "opencv", "num_frames": 1}}
    assert ask(client, video(clip_url()), media_io_kwargs=choice).status_code == 200
    assert numbers_of(asked(service).images) == [0]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 10**6}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_logprobs": 3}, "top_logprobs"),
    ],
)
def test_clips_are_not_read_for_fields_that_are_wrong(
    client: TestClient, fields: dict[str, Any], param: str
) -> None:
    error = refused(ask(client, video(clip_url(b"not a video")), **fields))
    assert error["param"] == param


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


# --- frames as JPEG files ---


def jpegs(count: int, width: int = 48) -> str:
    files = []
    for frame in numbered(count, width=width):
        file = io.BytesIO()
        Image.fromarray(frame).save(file, "JPEG", quality=95)
        files.append(base64.b64encode(file.getvalue()).decode())
    return "data:video/jpeg;base64," + ",".join(files)


def test_frames_as_jpeg_files_are_a_clip(client: TestClient, service: Scripted) -> None:
    answer = ask(client, video(jpegs(5)))
    assert answer.status_code == 200, answer.text
    request = asked(service)
    assert request.messages[0].text == "".join(f"<{n}.0 seconds><image>" for n in range(5))
    assert request.clips == (range(5),)
    assert numbers_of(request.images) == list(range(5))
    choice = {"video": {"fps": 4, "num_frames": 3}}
    assert ask(client, video(jpegs(5)), media_io_kwargs=choice).status_code == 200
    request = asked(service)
    assert numbers_of(request.images) == [0, 2, 4]
    assert request.messages[0].text == (
        "<0.0 seconds><image><0.5 seconds><image><1.0 seconds><image>"
    )


def test_frames_as_jpeg_files_share_the_limit_of_clips(service: Scripted) -> None:
    with TestClient(create_app(service, HttpConfig(limits=Limits(video_frames=8)))) as client:
        assert ask(client, video(jpegs(8)), video(clip_url())).status_code == 200
    request = asked(service)
    assert request.clips == (range(4), range(4, 6))
    assert numbers_of(request.images) == [0, 2, 5, 7, 0, 10]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (jpegs(2) + ",AAAA", "frame 2 of the clip"),
        (jpegs(2) + ",", "frame 2 of the clip"),
        ("data:video/jpeg;base64," + "," * 10_000, "has 10001 frames; at most 10000 are read"),
        (f"{jpegs(1)},{jpegs(1, 64).partition(',')[2]}", "change their size from 48x32 to 64x32"),
    ],
    ids=["no image", "empty", "too many", "two sizes"],
)
def test_bad_frames_as_jpeg_files(client: TestClient, url: str, words: str) -> None:
    error = refused(ask(client, video(url)))
    assert (error["code"], error["param"]) == ("invalid_video", "messages.0.content.0")
    assert words in error["message"]


# --- fetched clips ---


def read_fetched(file: bytes, count: int, read: Callable[[bytes], Any]) -> list[int]:
    """How many clips were there as each was fetched, of `count` that are read at once."""
    there = 0
    counts: list[int] = []

    class Fetcher:
        @asynccontextmanager
        async def fetched(self, _: str) -> AsyncIterator[bytes]:
            nonlocal there
            there += 1
            counts.append(there)
            yield file
            there -= 1

    fetcher: Any = Fetcher()

    async def work() -> None:
        state = replace(create_app(Scripted()).state.server, clip_fetcher=fetcher)
        urls = [f"https://example.org/{number}.mp4" for number in range(count)]
        await asyncio.gather(*[input_videos._read_url(url, read, state) for url in urls])

    asyncio.run(work())
    return counts


def test_clips_that_wait_for_their_turn_are_not_fetched() -> None:
    def read(_: bytes) -> None:
        time.sleep(0.05)

    assert read_fetched(CLIP, 3, read) == [1, 1, 1]


def test_the_error_of_a_fetched_clip_does_not_hold_the_file() -> None:
    def read(file: bytes) -> None:
        raise VideoError(f"has {len(file)} bytes")

    with pytest.raises(VideoError, match="has 110 bytes") as caught:
        read_fetched(NO_CLIP, 1, read)
    frames = [entry.frame for entry in caught.traceback if entry.name == "_read_url"]
    assert frames
    assert not any(value is NO_CLIP for frame in frames for value in frame.f_locals.values())
    assert caught.value.__context__ is None


# --- decoding that takes long ---


def test_a_decoder_that_is_killed_is_no_fault_of_the_clip(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nkill -KILL $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    answer = ask(client, video(clip_url()))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (503, "decoder_stopped")
    assert "its decoder was killed" in error["message"]
    assert "retry-after" in answer.headers


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
    assert "took more than 1.5 seconds; ask for less or allow more" in answer.text
    assert time.monotonic() - started < 15
    assert decoders()
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


def test_the_servers_own_deadline_says_so(
    service: Scripted, decoders: Callable[[], list[int]]
) -> None:
    with TestClient(create_app(service, HttpConfig(limits=Limits(deadline=1)))) as client:
        answer = ask(client, video(clip_url()), deadline=9)
    assert answer.status_code == 504
    assert "took more than 1 seconds; the server is busy; try again" in answer.text


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
