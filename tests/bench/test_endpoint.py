"""Endpoints that answer with an error, garbage, too late or not at all: what a run makes of it."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from neounify import services
from neounify.bench import ADAPTERS, BenchError, Endpoint, Job, Plan, PromptFiles, run
from neounify.bench.subjects import png
from neounify.errors import ConfigError, NeounifyError
from neounify.services import BadAnswer, NoAnswer
from support.bench import solid
from support.services import say, service

GENEVAL = ADAPTERS["geneval"]
IMAGE = base64.b64encode(png(solid(5, 16))).decode()


def painted(image: str = IMAGE) -> bytes:
    return json.dumps({"data": [{"b64_json": image}]}).encode()


def said(content: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


def bomb() -> str:
    """A small PNG of 20,000 x 20,000 pixels."""
    buffer = io.BytesIO()
    PIL.Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services.time, "sleep", lambda _: None)


def test_one_prompt_that_breaks_the_service_costs_itself(tmp_path: Path) -> None:
    """It shares a batch with others, which are asked once, and finished."""
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(f'{{"tag": "t", "prompt": "p{n}"}}\n' for n in range(7)))
    cases = GENEVAL.cases(PromptFiles(path), "mine", 1)
    asked: list[str] = []
    errors = {"p2": (500, b"{}"), "p3": (429, b"{}"), "p4": (400, b"no"), "p5": (200, b"garbage")}

    def answer(handler: Any, number: int) -> None:
        asked.append(json.loads(handler.body)["prompt"])
        say(handler, *errors.get(asked[-1], (200, painted())))

    with service(answer) as (url, _):
        endpoint = Endpoint(url=f"{url}v1", retries=2, concurrency=3)
        done = run(GENEVAL, cases, endpoint, tmp_path / "run", 0, Plan(folder=tmp_path))
        assert done.finished == 3
        assert {name: asked.count(name) for name in set(asked)} == {
            **dict.fromkeys(("p0", "p1", "p4", "p5", "p6"), 1),
            **dict.fromkeys(("p2", "p3"), 3),
        }
        assert list(done.failures) == ["00002", "00003", "00004", "00005"]
        for (case, reason), message in zip(
            done.failures.items(), ("500", "429", "400: no", "not JSON"), strict=True
        ):
            assert message in reason, case
        errors.clear()
        done = run(GENEVAL, cases, endpoint, tmp_path / "run", 0, Plan(folder=tmp_path))
    assert (done.finished, done.failures) == (7, {})


def test_a_service_that_only_fails_ends_the_run(tmp_path: Path) -> None:
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("".join(f'{{"tag": "t", "prompt": "p{n}"}}\n' for n in range(40)))
    cases = GENEVAL.cases(PromptFiles(path), "mine", 1)
    plan = Plan(folder=tmp_path, batch_size=4)
    with service(lambda handler, _: say(handler, 503)) as (url, times):
        endpoint = Endpoint(url=f"{url}v1", retries=1)
        with pytest.raises(BenchError, match=r"no answer \(.*503.*0 of 40 cases are finished"):
            run(GENEVAL, cases, endpoint, tmp_path / "run", 0, plan)
        assert len(times) == 3 * 4 * 2


CALLS: dict[str, Callable[[Endpoint, list[Job]], Any]] = {
    "image": Endpoint.images,
    "answer": Endpoint.answers,
    "story": Endpoint.stories,
}


@pytest.mark.parametrize(
    ("call", "body", "message"),
    [
        ("image", b"", "not JSON"),
        ("image", b"[]", "no JSON object"),
        ("image", b'{"data": []}', "no data"),
        ("image", b'{"data": [{"url": "http://x"}]}', "no data"),
        ("image", b'{"data": [{"b64_json": 5}]}', "cannot be read"),
        ("image", painted("not base64"), "cannot be read"),
        ("image", painted("AAAA"), "cannot be read"),
        ("image", painted(bomb()), "cannot be read"),
        ("answer", b'{"choices": []}', "no message"),
        ("answer", b'{"choices": [{"message": ["x"]}]}', "no message"),
        ("answer", said(None), "no text"),
        ("answer", said([{"type": "text", "text": "x"}]), "no text"),
        ("answer", rb'{"choices": [{"message": {"content": "\udc80"}}]}', "surrogate"),
        ("story", said(None), "no parts"),
        ("story", said({"a": 1}), "no parts"),
        ("story", said([{"type": "text", "text": 5}]), "no parts"),
        ("story", said([{"type": "image_url", "image_url": {"url": 5}}]), "no parts"),
        ("story", said([{"type": "image_url", "image_url": {"url": "data:,x"}}]), "cannot be read"),
    ],
)
def test_garbage_is_the_error_of_its_job(call: str, body: bytes, message: str) -> None:
    with service(lambda handler, _: say(handler, 200, body)) as (url, times):
        (got,) = CALLS[call](Endpoint(url=f"{url}v1"), [Job(prompt="p", seed=1)])
    assert isinstance(got, BadAnswer)
    assert message in str(got)
    assert len(times) == 1


def test_an_answer_that_trickles_in_has_a_limit() -> None:
    def answer(handler: Any, number: int) -> None:
        handler.send_response(200)
        handler.end_headers()
        with suppress(OSError):  # the reader has gone
            while not ended.wait(0.02):
                handler.wfile.write(b" ")

    ended = threading.Event()
    with service(answer) as (url, _):
        started = time.monotonic()
        endpoint = Endpoint(url=f"{url}v1", timeout=0.1, retries=0)
        (got,) = endpoint.images([Job(prompt="p", seed=1)])
        assert time.monotonic() - started < 1
        ended.set()
    assert isinstance(got, NoAnswer)
    assert "no whole answer after 0.1 s" in str(got)


def test_the_length_of_answers_is_asked_for_where_it_is_given() -> None:
    asked: list[dict[str, Any]] = []

    def answer(handler: Any, number: int) -> None:
        asked.append(json.loads(handler.body))
        say(handler, 200, said("x"))

    with service(answer) as (url, _):
        for most in (None, 7):
            endpoint = Endpoint(url=f"{url}v1", max_new_tokens=most)
            assert endpoint.answers([Job(prompt="p", seed=1)]) == ["x"]
            assert endpoint.describe()["max_new_tokens"] == most
    assert [fields.get("max_tokens") for fields in asked] == [None, 7]


@pytest.mark.parametrize("url", ["localhost:8000/v1", "file:///etc/hostname", ""])
def test_urls_that_are_no_endpoints(url: str) -> None:
    with pytest.raises(ConfigError, match="begins with http"):
        Endpoint(url=url)


def test_errors_are_ours() -> None:
    """A subject gives errors that a run counts; anything else would end it."""
    (got,) = Endpoint(url="http://a..b/v1", retries=0).images([Job(prompt="p", seed=1)])
    assert isinstance(got, NeounifyError)
