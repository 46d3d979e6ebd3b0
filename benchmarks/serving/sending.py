"""Sending one request, and what came of it."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import h11

from benchmarks.serving.wire import Exchange, exchange
from benchmarks.serving.workload import Call, Kind

MOST_SECONDS = 900.0
"""No request waits longer than that, whatever the server does."""


@dataclass(kw_only=True)
class Outcome:
    """One request's fate. Times are of `time.monotonic`, `first_text` is when text began.

    `status` is 0 without an answer; `error` is the code of an error, also of one that came in
    the middle of a stream, whose status is 200.
    """

    kind: Kind
    start: float
    end: float = 0.0
    status: int = 0
    error: str | None = None
    retry_after: str | None = None
    first_text: float | None = None
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    images: int = 0

    @property
    def ok(self) -> bool:
        return self.status == 200 and self.error is None

    @property
    def seconds(self) -> float:
        return self.end - self.start

    @property
    def seconds_to_text(self) -> float | None:
        return None if self.first_text is None else self.first_text - self.start


async def send(port: int, call: Call, due: float | None = None) -> Outcome:
    """Send and wait for the end. Times count from `due`, when it should have been sent."""
    outcome = Outcome(kind=call.kind, start=time.monotonic() if due is None else due)
    try:
        await asyncio.wait_for(_send(port, call, outcome), MOST_SECONDS)
    except asyncio.TimeoutError:
        outcome.error = "no_answer_in_time"
    except (OSError, h11.RemoteProtocolError):
        outcome.error = "connection_lost"
    outcome.end = time.monotonic()
    return outcome


async def _send(port: int, call: Call, outcome: Outcome) -> None:
    async with exchange(port, call.path, call.body) as answer:
        outcome.status = answer.status
        outcome.retry_after = answer.headers.get("retry-after")
        if answer.status == 200 and call.body.get("stream"):
            await _follow(answer, outcome)
        else:
            _read_whole(json.loads(await answer.read()), outcome)


async def _follow(answer: Exchange, outcome: Outcome) -> None:
    async for event in answer.events():
        if "error" in event:
            outcome.error = event["error"]["code"]
        elif event.get("usage"):
            _count(event["usage"], outcome)
        if outcome.first_text is None and _text(event):
            outcome.first_text = time.monotonic()


def _read_whole(body: Mapping[str, Any], outcome: Outcome) -> None:
    if "error" in body:
        outcome.error = body["error"]["code"]
        return
    outcome.images = len(body.get("data", ()))
    _count(body["usage"], outcome)


def _count(usage: Mapping[str, Any], outcome: Outcome) -> None:
    outcome.tokens = usage.get("completion_tokens", 0)
    outcome.prompt_tokens = usage.get("prompt_tokens", 0)
    outcome.cached_tokens = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)


def _text(event: Mapping[str, Any]) -> str:
    choices = event.get("choices")
    return (choices[0]["delta"].get("content") or "") if choices else ""
