"""/v1/videos as OpenAI's own client uses it: jobs, files, previews, limits, cancelling."""

from __future__ import annotations

import errno
import io
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from typing import Any

import av
import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from neounify.config.presets import TINY
from neounify.errors import DeadlineExceeded, EngineDied, Overloaded
from neounify.provenance.metadata import read_packet
from neounify.serve.http import HttpConfig, Limits, create_app
from neounify.serve.replicas import replica_http
from neounify.serve.safety.hooks import Hooks, Refused
from neounify.serve.service import ServiceRequest
from neounify.video.boxes import find_xmp
from support.http_server import openai_client, wait_until
from support.pixelumm import SMALL as PIXELUMM
from support.scripted_service import Scripted
from support.video_server import (
    BY_FRAME,
    CONTINUES,
    SLOW,
    SMALL,
    clip,
    clip_by_frame,
    described,
    finished,
    service,
    until,
)


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(create_app(service())) as client:
        yield client


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_openais_client_creates_polls_and_downloads() -> None:
    with openai_client(create_app(service())) as client:
        extra = {"fps": 8, "seed": 3, "steps": 2}
        size: Any = "64x32"
        seconds: Any = "1"
        video = client.videos.create_and_poll(
            prompt="a star", size=size, seconds=seconds, extra_body=extra
        )
        assert (video.status, video.progress, video.size, video.seconds) == (
            *("completed", 100, "64x32"),
            "1",
        )
        assert video.prompt == "a star"
        file = client.videos.download_content(video.id).read()
        with av.open(io.BytesIO(file)) as container:
            frames = list(container.decode(video=0))
        assert len(frames) == 8
        assert abs(int(frames[0].to_ndarray(format="rgb24").mean()) - 60) <= 2
        facts = read_packet(find_xmp(io.BytesIO(file)))
        assert (facts["seed"], facts["frames"], facts["fps"]) == (3, "8", "8")
        assert "prompt" not in facts
        thumbnail = client.videos.download_content(video.id, variant="thumbnail").read()
        assert Image.open(io.BytesIO(thumbnail)).size == (64, 32)
        assert [v.id for v in client.videos.list()] == [video.id]
        assert client.videos.delete(video.id).deleted
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(video.id)


def test_a_form_is_read_as_json_is(client: TestClient) -> None:
    fields = {name: str(value) for name, value in SMALL.items()}
    created = client.post(
        "/v1/videos",
        files={name: (None, v) for name, v in fields.items()} | {"prompt": (None, "a star")},
    )
    assert created.status_code == 200, created.text
    assert (created.json()["frames"], created.json()["fps"]) == (8, 8)


def test_a_preview_is_the_thumbnail_while_it_is_generated(client: TestClient) -> None:
    video = client.post("/v1/videos", json={"prompt": "slow", **SMALL}).json()
    until(client, video["id"], lambda v: v["progress"] == 50)
    content = f"/v1/videos/{video['id']}/content"
    assert until(client, video["id"], lambda v: True)["status"] == "in_progress"
    for _ in range(200):
        thumbnail = client.get(content, params={"variant": "thumbnail"})
        if thumbnail.status_code == 200:
            break
        time.sleep(0.02)
    assert Image.open(io.BytesIO(thumbnail.content)).getpixel((0, 0)) == (128, 128, 128)
    early = client.get(content)
    assert (early.status_code, early.json()["error"]["code"]) == (409, "not_ready")


def test_deleting_ends_the_generation() -> None:
    script = service()
    with TestClient(create_app(script)) as client:
        video = client.post("/v1/videos", json={"prompt": "slow", **SMALL}).json()
        until(client, video["id"], lambda v: v["progress"] == 50)
        assert script.open == 1
        assert client.delete(f"/v1/videos/{video['id']}").json()["deleted"]
        for _ in range(200):
            if script.open == 0:
                break
            time.sleep(0.02)
        assert script.open == 0
        assert client.get(f"/v1/videos/{video['id']}").status_code == 404


def test_too_many_at_a_time_are_refused() -> None:
    config = HttpConfig(limits=Limits(video_jobs=1))
    with TestClient(create_app(service(), config)) as client:
        assert client.post("/v1/videos", json={"prompt": "slow", **SMALL}).status_code == 200
        refused = client.post("/v1/videos", json={"prompt": "slow", **SMALL})
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_videos")


def test_frames_beyond_the_servers_area_are_refused() -> None:
    config = HttpConfig(limits=Limits(output_pixels=2000))
    with TestClient(create_app(service(), config)) as client:
        refused = client.post("/v1/videos", json={"prompt": "x", **SMALL})
        assert "64x32 is 2048 pixels, over this server's 2000" in refused.json()["error"]["message"]


def test_jobs_belong_to_their_key() -> None:
    config = HttpConfig(keys={"a": "key-a", "b": "key-b"})
    with TestClient(create_app(service(), config)) as client:
        mine = {"Authorization": "Bearer key-a"}
        other = {"Authorization": "Bearer key-b"}
        video = client.post("/v1/videos", json={"prompt": "x", **SMALL}, headers=mine).json()
        assert client.get(f"/v1/videos/{video['id']}", headers=other).status_code == 404
        assert client.delete(f"/v1/videos/{video['id']}", headers=other).status_code == 404
        assert client.get("/v1/videos", headers=other).json()["data"] == []
        assert client.get(f"/v1/videos/{video['id']}", headers=mine).status_code == 200


def test_jobs_are_counted_by_account_however_the_key_is_written() -> None:
    config = HttpConfig(keys={"a": "key-a"}, limits=Limits(video_jobs=2))
    with TestClient(create_app(service(), config)) as client:
        answers = [
            client.post(
                "/v1/videos",
                json={"prompt": "slow", **SMALL},
                headers={"Authorization": f"{scheme}{' ' * spaces}key-a"},
            ).status_code
            for scheme, spaces in (("Bearer", 1), ("bearer", 1), ("Bearer", 3), ("BEARER", 2))
        ]
        assert answers == [200, 200, 429, 429]


def test_without_keys_all_callers_are_one_account() -> None:
    with TestClient(create_app(service(), HttpConfig(limits=Limits(video_jobs=2)))) as client:
        answers = [
            client.post(
                "/v1/videos",
                json={"prompt": "slow", **SMALL},
                headers={"Authorization": f"Bearer {number}"},
            ).status_code
            for number in range(4)
        ]
        assert answers == [200, 200, 429, 429]


def test_a_full_disk_is_the_jobs_error_and_is_logged(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/secret/clip.mp4")

    monkeypatch.setattr("neounify.video.clip.encode_video", full)
    video = finished(client)
    assert (video["status"], video["error"]["code"]) == ("failed", "internal_error")
    assert "secret" not in str(video)
    assert "No space left on device" in caplog.text
    monkeypatch.undo()
    assert finished(client)["status"] == "completed"


def test_cancelling_twice_and_asking_afterwards_is_not_found(client: TestClient) -> None:
    path = f"/v1/videos/{client.post('/v1/videos', json={'prompt': 'slow', **SMALL}).json()['id']}"
    assert client.delete(path).status_code == 200
    answers = [client.delete(path), client.get(path), client.get(f"{path}/content")]
    assert [answer.status_code for answer in answers] == [404] * 3


@pytest.mark.parametrize(
    "name", ["x", "..", "%2e%2e%2fetc", "..%2f..%2fetc%2fpasswd", "a" * 5000, "%00", "a%0d%0ab"]
)
def test_ids_that_are_none_are_not_found(client: TestClient, name: str) -> None:
    for answer in (client.get(f"/v1/videos/{name}/content"), client.delete(f"/v1/videos/{name}")):
        assert answer.status_code in (404, 405)
        assert len(answer.text) < 2000


def test_wrong_pages_of_the_list_name_their_field(client: TestClient) -> None:
    for query, param in (("limit=0", "limit"), ("limit=x", "limit"), ("order=up", "order")):
        answer = client.get(f"/v1/videos?{query}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert answer.json()["error"]["message"].startswith(f"{param}: ")


@pytest.mark.parametrize("body", ["", "null", "[]", "5", "{", '{"prompt": NaN}', "[" * 10**5])
def test_bodies_that_are_no_object_are_errors(client: TestClient, body: str) -> None:
    answer = client.post("/v1/videos", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith("The body")


def test_an_error_of_the_generation_is_the_jobs() -> None:
    def failing(request: ServiceRequest, previews: int) -> Iterable[Any]:
        yield RuntimeError("secret detail")

    with TestClient(create_app(service(failing))) as client:
        video = finished(client)
        assert video["status"] == "failed"
        assert video["error"]["type"] == "server_error"
        assert "secret" not in video["error"]["message"]
        content = client.get(f"/v1/videos/{video['id']}/content")
        assert content.status_code == 409


@pytest.mark.parametrize("error", [Overloaded("full", 0.01), EngineDied("is being started")])
def test_a_server_that_is_full_or_starts_an_engine_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    calls = []
    monkeypatch.setattr("neounify.serve.http.videos._RETRY_SECONDS", 0.01)

    def busy(request: ServiceRequest, previews: int) -> Iterable[Any]:
        calls.append(request)
        if len(calls) < 3:
            return [error]
        return clip(request, previews)

    with TestClient(create_app(service(busy))) as client:
        assert finished(client)["status"] == "completed"
        assert len(calls) == 3


def test_a_job_whose_engine_ends_is_not_begun_again() -> None:
    """It may be what the engine ended of."""
    calls = []

    def ending(request: ServiceRequest, previews: int) -> Iterable[Any]:
        calls.append(request)
        yield next(iter(clip(request, previews)))
        yield EngineDied("the engine ended while it worked on the request")

    with TestClient(create_app(service(ending))) as client:
        video = finished(client)
    assert (video["status"], video["error"]["code"]) == ("failed", "engine_restarting")
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": " "}, "prompt", "is empty"),
        ({"prompt": "a <image> star"}, "prompt", "<image>"),
        ({"prompt": "a <video> star"}, "prompt", "a <video> mark without a clip"),
        ({"negative_prompt": "a <video>"}, "negative_prompt", "a <video> mark without a clip"),
        ({"frames": 6, "seconds": None}, "frames", "multiple of 4"),
        ({"frames": 8}, "frames", "give one of them"),
        ({"seconds": 1000}, "seconds", "1000 seconds at 8 frames per second are over this"),
        ({"seconds": 1e308, "fps": 240}, "seconds", "over this server's 240"),
        ({"seconds": None, "frames": 10**400}, "frames", "less than or equal to 1000000000"),
        ({"fps": 1e-320}, "fps", "position inf, the model has"),
        ({"aspect_ratio": "16:9"}, "aspect_ratio", "give size as WIDTHxHEIGHT"),
        ({"size": "2K"}, "size", "give size as WIDTHxHEIGHT"),
        ({"size": "63x32"}, "size", "multiple"),
        ({"size": "4096x4096"}, None, "tokens"),
        ({"fps": 0}, "fps", "greater than 0"),
        ({"fps": 1000, "seconds": None, "frames": 8}, "fps", "at most 240"),
        ({"steps": 100000}, "steps", "steps"),
        ({"stream": True}, "stream", "not supported"),
        ({"partial_images": 2}, "partial_images", "not supported for videos"),
        ({"output_format": "png"}, "output_format", "not supported for videos"),
        ({"input_reference": {"image_url": "x"}}, "input_reference", "not supported"),
        ({"model": "sora-2"}, "model", "not served"),
        ({"n": 2}, "n", "only 1"),
        ({"framez": 3}, "framez", "not known"),
    ],
)
def test_bad_fields_are_errors(
    client: TestClient, fields: dict[str, Any], param: str | None, words: str
) -> None:
    answer = client.post("/v1/videos", json={"prompt": "a star", **SMALL, **fields})
    assert answer.status_code in (400, 404), answer.text
    error = answer.json()["error"]
    assert words in error["message"], error
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    ("field", "what"), [("prompt", "the prompt"), ("negative_prompt", "the negative prompt")]
)
def test_prompts_that_are_too_long_begin_no_job(field: str, what: str) -> None:
    with TestClient(create_app(Scripted(clip, PIXELUMM))) as client:
        body = {"prompt": "a star", "size": "64x48", "frames": 8}
        assert client.post("/v1/videos", json={**body, field: "x" * 4096}).status_code == 200
        answer = client.post("/v1/videos", json={**body, field: "x" * 4097})
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == field
        assert f"{what} has 4,097 tokens, this model reads 4,096 at most" in error["message"]
        assert len(client.get("/v1/videos").json()["data"]) == 1


def test_replicas_generate_no_videos() -> None:
    """The next request about a job may reach another replica."""
    scripted = Scripted(clip, CONTINUES)
    with TestClient(create_app(scripted)) as client:
        assert {"generate_video", "continue_video"} <= set(described(client)[0])
        assert described(client)[1] is not None
    with TestClient(create_app(scripted, replica_http(HttpConfig()))) as client:
        assert described(client) == (list(TINY.capabilities), None)
        body = {"prompt": "a star", **SMALL}
        for answer in (
            client.post("/v1/videos", json=body),
            client.get("/v1/videos"),
            client.get("/v1/videos/video_x"),
            client.get("/v1/videos/video_x/content"),
            client.delete("/v1/videos/video_x"),
        ):
            assert answer.status_code == 501, answer.text
            assert "one of several replicas" in answer.json()["error"]["message"]
    assert not scripted.requests


def test_nothing_is_generated_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = service()
    with TestClient(create_app(scripted)) as client:
        monkeypatch.setitem(sys.modules, "av", None)
        answer = client.post("/v1/videos", json={"prompt": "a star", **SMALL})
        assert (answer.status_code, answer.json()["error"]["type"]) == (501, "server_error")
        assert "video files need the extra 'video'" in answer.json()["error"]["message"]
        able, defaults = described(client)
        assert "generate_video" not in able
        assert defaults is None
    assert not scripted.requests


@pytest.mark.parametrize(("fields", "seconds"), [({"deadline": 40}, 40), ({}, 500)])
def test_a_job_has_the_deadline_of_its_request(fields: dict[str, Any], seconds: int) -> None:
    def late(request: ServiceRequest, previews: int) -> Iterable[Any]:
        yield DeadlineExceeded("the request was not finished after 3.2 s, its deadline")

    scripted = service(late)
    with TestClient(create_app(scripted, HttpConfig(video_deadline=500))) as client:
        video = finished(client, **fields)
    assert scripted.deadlines == [pytest.approx(seconds, abs=20)]
    assert (video["status"], video["error"]["code"]) == ("failed", "deadline_exceeded")
    assert f"took more than {seconds} seconds" in video["error"]["message"]


def test_a_job_is_in_progress_once_it_is_admitted() -> None:
    calls = []

    def without_previews(request: ServiceRequest, previews: int) -> Iterable[Any]:
        calls.append(request)
        yield Overloaded("full", 1.0) if len(calls) == 1 else SLOW

    with TestClient(create_app(service(without_previews))) as client:
        video = client.post("/v1/videos", json={"prompt": "a star", **SMALL}).json()
        until(client, video["id"], lambda v: len(calls) == 1 and v["status"] == "queued")
        video = until(client, video["id"], lambda v: v["status"] != "queued")
        assert (video["status"], video["progress"], len(calls)) == ("in_progress", 0, 2)


def test_a_model_without_videos_says_so() -> None:
    with TestClient(create_app(Scripted())) as client:
        answer = client.post("/v1/videos", json={"prompt": "a star"})
        assert answer.status_code == 400
        assert "was not trained to generate videos" in answer.json()["error"]["message"]


def test_pages_of_the_list(client: TestClient) -> None:
    ids = [finished(client)["id"] for _ in range(3)]
    page = client.get("/v1/videos", params={"limit": 2, "order": "asc"}).json()
    assert ([v["id"] for v in page["data"]], page["has_more"]) == (ids[:2], True)
    rest = client.get("/v1/videos", params={"order": "asc", "after": page["last_id"]}).json()
    assert ([v["id"] for v in rest["data"]], rest["has_more"]) == (ids[2:], False)
    newest = client.get("/v1/videos").json()["data"]
    assert [v["id"] for v in newest] == ids[::-1]


@pytest.mark.parametrize("end", ["deleted", "deadline", "shutdown"])
def test_encoding_ends_when_it_is_not_wanted_any_more(
    monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    begun, may_continue = threading.Event(), threading.Event()
    ends: list[tuple[str, int, type[BaseException]]] = []

    def encoded(frames: Iterable[Any], *_: Any) -> bytes:
        count = 0
        try:
            for _ in frames:
                count += 1
                begun.set()
                assert may_continue.wait(60)
        except BaseException as error:
            ends.append((threading.current_thread().name[:6], count, type(error)))
            raise
        return b"clip"

    monkeypatch.setattr("neounify.serve.http.videos.video_bytes", encoded)
    config = HttpConfig(video_deadline=6 if end == "deadline" else 600)
    with TestClient(create_app(service(), config)) as client:
        path = f"/v1/videos/{client.post('/v1/videos', json={'prompt': 'x', **SMALL}).json()['id']}"
        assert begun.wait(60)
        if end == "deleted":
            assert client.delete(path).status_code == 200
            assert client.get(path).status_code == 404
        elif end == "deadline":
            video = until(client, path.rpartition("/")[2], lambda v: v["status"] == "failed")
            assert video["error"]["code"] == "deadline_exceeded"
    may_continue.set()
    wait_until(lambda: bool(ends))
    assert ends == [("encode", 1, CancelledError)]


def test_frames_are_put_in_their_places() -> None:
    with TestClient(create_app(Scripted(clip_by_frame, BY_FRAME))) as client:
        video = finished(client)
        assert (video["status"], video["evaluations"]) == ("completed", 8.0)
        content = f"/v1/videos/{video['id']}/content"
        with av.open(io.BytesIO(client.get(content).content)) as container:
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        assert [round(float(frame.mean()) / 30) for frame in frames] == list(range(8))
        thumbnail = client.get(content, params={"variant": "thumbnail"}).content
        assert np.asarray(Image.open(io.BytesIO(thumbnail))).max() <= 2


def test_a_hook_that_refuses_a_middle_frame_ends_the_job() -> None:
    shown: list[int] = []

    class NoFourth:
        def check_prompt(self, text: str, images: Sequence[Image.Image]) -> None:
            """Allow all."""

        def check_image(self, image: Image.Image) -> None:
            shown.append(np.asarray(image).max() // 30)
            if shown[-1] == 3:
                raise Refused("the fourth", "it is not shown here.")

    generated: list[int] = []

    def counted(request: ServiceRequest, previews: int) -> Iterable[Any]:
        for event in clip_by_frame(request, previews):
            generated.append(getattr(event, "first", -1))
            yield event

    scripted = Scripted(counted, BY_FRAME)
    with TestClient(create_app(scripted, hooks=Hooks([NoFourth()]))) as client:
        video = finished(client)
        assert (video["status"], video["error"]["code"]) == ("failed", "content_policy_violation")
        assert shown == generated == [0, 7, 3]
        assert scripted.open == 0
        for variant in ("video", "thumbnail"):
            content = f"/v1/videos/{video['id']}/content"
            assert client.get(content, params={"variant": variant}).status_code == 409
