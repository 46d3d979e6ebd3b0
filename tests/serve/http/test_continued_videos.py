"""/v1/videos with the clip before it: frames, prompts, and clips that cannot be continued."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from neounify.errors import RequestError
from neounify.pipeline.videos import read_condition
from neounify.provenance.metadata import read_packet, read_provenance
from neounify.serve.http import HttpConfig, Limits, create_app
from neounify.serve.http.middleware import EVERYBODY
from neounify.tasks.image import ImageRequest
from neounify.tasks.video import after_clip, clip_shape
from neounify.video.boxes import find_xmp
from support.clips import clip_bytes, numbered, numbers_of
from support.scripted_service import Scripted
from support.video_server import CONTINUES, SMALL, clip, finished, service, until


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(create_app(service())) as client:
        yield client


def data_url(file: bytes) -> str:
    return "data:video/mp4;base64," + base64.b64encode(file).decode()


def test_a_clip_is_continued_as_the_pipeline_does() -> None:
    scripted = Scripted(clip, CONTINUES)
    file = clip_bytes(numbered(6), fps=16)
    with TestClient(create_app(scripted)) as client:
        video = finished(client, condition=data_url(file))
    assert (video["status"], video["prompt"]) == ("completed", "a star")
    request = scripted.last
    assert isinstance(request, ImageRequest)
    assert numbers_of([piece.frames[0] for piece in request.condition]) == [0, 2, 4]
    assert request.prompt == after_clip(request.condition, "a star")
    shown = read_condition(file, CONTINUES, 8)
    wanted = clip_shape(CONTINUES, (64, 32), 8, 8, shown).condition
    for ours, theirs in zip(request.condition, wanted, strict=True):
        assert ours.frames[0].tobytes() == theirs.frames[0].tobytes()
        assert (ours.tube, ours.seconds, ours.bounds) == (
            theirs.tube,
            theirs.seconds,
            theirs.bounds,
        )


@pytest.mark.parametrize(
    ("condition", "words"),
    [
        ("data:video/mp4;base64,AAAA", "not a video"),
        ("https://example.org/clip.mp4", "fetches no video URLs"),
        ("clip.mp4", "send the video as a data URL"),
        ("", "at least 1 character"),
        (data_url(clip_bytes(numbered(31), fps=8)), "more than the 16 frames"),
    ],
    ids=["no clip", "a host", "a path", "empty", "long"],
)
def test_clips_that_cannot_be_continued_are_errors(condition: str, words: str) -> None:
    limits = Limits(video_frames=16)
    with TestClient(create_app(Scripted(clip, CONTINUES), HttpConfig(limits=limits))) as client:
        answer = client.post("/v1/videos", json={"prompt": "x", **SMALL, "condition": condition})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == "condition"
    assert words in error["message"]


@pytest.mark.parametrize("sound", [False, True])
def test_the_sound_of_a_clip_is_not_continued(sound: bool) -> None:
    condition = data_url(clip_bytes(numbered(6), fps=16, sound=sound))
    with TestClient(create_app(Scripted(clip, CONTINUES))) as client:
        answer = client.post("/v1/videos", json={"prompt": "x", **SMALL, "condition": condition})
    assert answer.status_code == 200, answer.text
    wanted = "condition: the clip: its sound is not heard" if sound else None
    assert answer.headers.get("neounify-warning") == wanted


def test_the_callers_prompt_is_written_of_a_clip_that_is_continued() -> None:
    config = HttpConfig(metadata_prompts=True)
    with TestClient(create_app(Scripted(clip, CONTINUES), config)) as client:
        condition = data_url(clip_bytes(numbered(6), fps=8))
        video = client.post(
            "/v1/videos", json={"prompt": "slow", **SMALL, "condition": condition}
        ).json()
        content = f"/v1/videos/{video['id']}/content"
        until(client, video["id"], lambda v: v["progress"] == 50)
        preview = client.get(content, params={"variant": "thumbnail"}).content
        assert read_provenance(preview)["prompt"] == "slow"
        video = finished(client, condition=condition)
        file = client.get(f"/v1/videos/{video['id']}/content").content
        assert read_packet(find_xmp(io.BytesIO(file)))["prompt"] == "a star"


def test_a_finished_job_keeps_no_frames_of_the_clip_before_it() -> None:
    app = create_app(Scripted(clip, CONTINUES))
    with TestClient(app) as client:
        finished(client, condition=data_url(clip_bytes(numbered(6), fps=8)))
        (job,) = app.state.server.videos.of(EVERYBODY)
        assert job.completed is not None
        assert job.request.condition == ()


def test_a_clip_is_not_read_for_a_request_that_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither for wrong fields nor for a caller who has too many videos."""
    read: list[str] = []

    async def counted(url: str, *_: Any) -> list[Any]:
        read.append(url)
        return []

    def too_much(*_: Any) -> None:
        raise RequestError("more than the limits can ever admit")

    monkeypatch.setattr("neounify.serve.http.input_videos.read_condition_url", counted)
    limits = Limits(video_jobs=1)
    body = {**SMALL, "prompt": "slow", "condition": "data:video/mp4;base64,AAAA"}
    with TestClient(create_app(Scripted(clip, CONTINUES), HttpConfig(limits=limits))) as client:
        for wrong in (
            {"size": "63x32"},
            {"steps": 10**5},
            {"prompt": "an <image>"},
            {"prompt": "a <video>"},
        ):
            assert client.post("/v1/videos", json={**body, **wrong}).status_code == 400
        with monkeypatch.context() as patch:
            patch.setattr(Scripted, "check_together", too_much)
            assert client.post("/v1/videos", json=body).status_code == 400
        assert not read
        assert client.post("/v1/videos", json=body).status_code == 200
        assert client.post("/v1/videos", json=body).status_code == 429
        assert len(read) == 1


def test_a_model_that_continues_none_says_so(client: TestClient) -> None:
    body = {"prompt": "x", **SMALL, "condition": data_url(clip_bytes(numbered(8)))}
    error = client.post("/v1/videos", json=body).json()["error"]
    assert error["param"] == "condition"
    assert "was not trained to continue" in error["message"]
