"""Services of others over HTTP: POST with limits of time and size, tried again if that helps.

What is slow or hangs is waited for in daemon threads, which do not keep a process from ending.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

from neounify.errors import NeounifyError
from neounify.files import is_unicode

MAX_ANSWER_BYTES = 2**22
MAX_WAIT = 60.0
"""Seconds that a service may ask to be left alone before the next attempt."""
HTTP = ("http://", "https://")
"""Beginnings of URLs that are asked."""
TOO_MANY_REQUESTS = 429
_PIECE = 2**16
T = TypeVar("T")
R = TypeVar("R")


class NoAnswer(NeounifyError):
    """A service that does not answer, after all attempts: no single request is at fault."""


class BadAnswer(NeounifyError):
    """A request that a service refuses, or an answer that is none."""


def in_thread(call: Callable[[], R]) -> Future[R]:
    """The result of a call in a daemon thread, which cannot be ended but ends with the process."""
    future: Future[R] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # raised where the result is read
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def at_once(call: Callable[[T], R], items: Sequence[T], number: int) -> list[R]:
    """The results of a call for each item, in order, `number` calls at a time.

    Raises the first error; calls that run then, or at an interrupt, are waited for no longer.
    """
    gate, ended = threading.Semaphore(number), threading.Event()

    def one(item: T) -> R:
        with gate:
            if ended.is_set():
                raise NoAnswer("not asked: the others were interrupted")
            return call(item)

    futures = [in_thread(partial(one, item)) for item in items]
    try:
        return [future.result() for future in futures]
    finally:
        ended.set()


def post(
    url: str,
    body: bytes,
    *,
    timeout: float,
    retries: int,
    headers: Mapping[str, str] | None = None,
    max_bytes: int = MAX_ANSWER_BYTES,
) -> bytes:
    """The answer to a POST of `body`, JSON unless `headers` say otherwise.

    Connection errors, answers that end early or take more than `timeout` seconds, status 429 and
    those from 500 up are tried again `retries` times, after 0.5, 1, 2, … seconds or those that
    Retry-After asks for, at most `MAX_WAIT`. Raises NoAnswer after the last attempt, BadAnswer for
    any other status, answers above `max_bytes`, and URLs or headers that cannot be sent.
    """
    headers = {"Content-Type": "application/json", **(headers or {})}
    for attempt in range(retries + 1):
        try:
            request = urllib.request.Request(url, body, headers, method="POST")
            return _read(request, timeout, max_bytes)
        except (OSError, http.client.HTTPException) as error:
            wait = 0.5 * 2**attempt
            if isinstance(error, urllib.error.HTTPError):
                wait = _wait(error, wait)
            if attempt == retries:
                raise NoAnswer(f"{error!r}, {attempt + 1} times") from error
            time.sleep(wait)
        except ValueError as error:  # a host or a header that is none
            raise BadAnswer(f"{url[:80]!r} cannot be asked: {error}") from error
    raise AssertionError  # the loop returns or raises


def post_json(url: str, document: Mapping[str, Any], **options: Any) -> dict[str, Any]:
    """The JSON object that a service answers to another; options and errors are those of `post`.

    BadAnswer also for what is no JSON object.
    """
    return parse_answer(post(url, json.dumps(document).encode(), **options))


def parse_answer(data: bytes) -> dict[str, Any]:
    """The JSON object that an answer is. Raises BadAnswer."""
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadAnswer(f"the answer is not JSON: {data[:80]!r}") from error
    if b"\\u" in data and not is_unicode(answer):
        raise BadAnswer(f"the answer has half a surrogate pair: {data[:80]!r}")
    if not isinstance(answer, dict):
        raise BadAnswer(f"the answer is no JSON object: {data[:80]!r}")
    return answer


def chat_message(
    url: str,
    prompt: str,
    images: Sequence[str],
    fields: Mapping[str, Any],
    **options: Any,
) -> dict[str, Any]:
    """The message that a service with OpenAI's chat route answers, with its `content`.

    `url` ends with /v1, `images` are PNG files in base64, `fields` further ones of the request;
    options and errors are those of `post`, BadAnswer also for an answer without a message.
    """
    content: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}}
        for image in images
    ]
    content.append({"type": "text", "text": prompt})
    document = {"messages": [{"role": "user", "content": content}], **fields}
    answer = post_json(f"{url}/chat/completions", document, **options)
    try:
        message = answer["choices"][0]["message"]
        message["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise BadAnswer(f"the answer has no message: {str(answer)[:80]}") from error
    return dict(message)


def _read(request: urllib.request.Request, timeout: float, max_bytes: int) -> bytes:
    """One attempt; the limits of sockets count from their last byte, this one from the first."""
    deadline = time.monotonic() + timeout
    data = bytearray()
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        while piece := answer.read1(_PIECE):
            data += piece
            if len(data) > max_bytes:
                raise BadAnswer(f"the answer has more than {max_bytes} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"no whole answer after {timeout:g} s")
        if answer.length:
            raise http.client.IncompleteRead(bytes(data[:80]), answer.length)
    return bytes(data)


def _wait(error: urllib.error.HTTPError, wait: float) -> float:
    """Seconds until the next attempt after an error status. BadAnswer if another is no use."""
    with error:
        try:
            said = error.read1(200).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException) as failure:  # the status alone has arrived
            said = repr(failure)
    if error.code != TOO_MANY_REQUESTS and error.code < http.client.INTERNAL_SERVER_ERROR:
        raise BadAnswer(f"status {error.code}: {said}") from error
    try:
        asked = float(error.headers.get("Retry-After", ""))
    except ValueError:  # absent, or a date
        return wait
    return min(MAX_WAIT, max(wait, asked))
