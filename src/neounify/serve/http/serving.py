"""The service behind the routes: state they share, limits, event streams, answers as JSON.

Base64, JSON and lists of log-probabilities take about 10 ms of a processor per MB, during which an
event loop answers nothing else; a change of threads takes about 0.1 ms. So large bodies are
rendered in threads and small ones on the event loop.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from functools import partial
from typing import Annotated, Any, Generic, TypeVar

import PIL.Image
from fastapi import Depends, Request
from starlette.datastructures import UploadFile
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from neounify.errors import DeadlineExceeded
from neounify.flow.sampling import ImageSampling, ResolvedSampling
from neounify.image.pixels import output_size, size_of_shape, to_pil
from neounify.provenance.metadata import Format
from neounify.serve.client import within
from neounify.serve.http.config import HttpConfig, HttpMetrics
from neounify.serve.http.deadline import Deadline
from neounify.serve.http.decoders import ClipDecoder, MediaDecoder
from neounify.serve.http.errors import INTERNAL, ApiError, bad_request, to_api_error
from neounify.serve.http.fields import ImageFields, RequestFields, blame
from neounify.serve.http.media import MediaFetcher, RequestImages, ResultStore
from neounify.serve.http.metadata import image_metadata, task_of
from neounify.serve.http.video_jobs import VideoJobs
from neounify.serve.safety.hooks import Hooks
from neounify.serve.service import Service, ServiceRequest
from neounify.tasks.image import ImageRequest
from neounify.tasks.interleave import InterleaveRequest
from neounify.tasks.program import Finished, ImageFinished, Preview, PromptPrefilled, TaskEvent

EVENTS = {"text/event-stream": {"schema": {"type": "string"}}}
"""The media type of an answer with `stream`, for the API's description."""
DONE = b"data: [DONE]\n\n"
ALIVE = b": working\n\n"
"""A comment, which clients pass over; proxies close connections that stay silent."""
SILENCE_SECONDS = 15.0
INLINE_BYTES = 64 * 1024
"""Bodies up to this are rendered on the event loop."""
_log = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ServerState:
    """State of one server, which its routes share."""

    service: Service
    config: HttpConfig
    hooks: Hooks
    metrics: HttpMetrics
    results: ResultStore
    fetcher: MediaFetcher
    decoder: MediaDecoder
    clip_fetcher: MediaFetcher
    clip_decoder: ClipDecoder
    videos: VideoJobs
    started: int
    """Start of the server, Unix time in seconds."""

    async def answer(
        self, request: ServiceRequest, fields: RequestFields
    ) -> AsyncGenerator[TaskEvent]:
        """The events of one request, within its own deadline and the server's.

        Closing this closes the service's iterator at once.
        """
        deadline = self.deadline(fields)
        previews = fields.partial_images if isinstance(fields, ImageFields) else 0
        events = self.service.answer(
            request, previews=previews if fields.stream else 0, deadline=deadline.left
        )
        started, is_measured = time.perf_counter(), False
        async with AsyncExitStack() as stack:
            if isinstance(events, AsyncGenerator):
                await stack.enter_async_context(aclosing(events))
            try:
                async for event in events:
                    if not is_measured and not isinstance(event, PromptPrefilled | Finished):
                        seconds = time.perf_counter() - started
                        self.metrics.first_token.labels(task_of(request)).observe(seconds)
                        is_measured = True
                    yield event
            except DeadlineExceeded as error:
                raise deadline.error from error

    def deadline(self, fields: RequestFields) -> Deadline:
        """The deadline of a request's reading and its answer: its own, or earlier the server's."""
        return fields.deadline_within(self.config.limits.deadline)

    def answers(
        self, groups: Sequence[Sequence[ServiceRequest]], fields: RequestFields
    ) -> AsyncGenerator[tuple[int, TaskEvent]]:
        """(number of the request, event) of several requests; those of a group have one prompt.

        Raises ApiError 400 at once for more than the service can ever admit together, instead of
        429 each time the caller tries again.
        """
        together = [request for group in groups for request in group]
        asks_for_several = getattr(fields, "n", 1) > 1
        if len(together) > 1 or asks_for_several:
            with blame("n" if asks_for_several else "prompt"):
                self.service.check_together(together)
        return answers_in_groups(
            [[partial(self.answer, request, fields) for request in group] for group in groups]
        )

    async def encode(
        self,
        request: ImageRequest | InterleaveRequest,
        event: Preview | ImageFinished,
        format: Format,
        form: Callable[[bytes], Result],
    ) -> Result:
        """`form` of the file of an image of `request`, encoded by the hooks in a thread.

        Raises the hooks' errors.
        """

        def write() -> Result:
            metadata = image_metadata(request, event, self.config)
            return form(self.hooks.encode_image(to_pil(event.pixels[None])[0], format, metadata))

        return await asyncio.to_thread(write)

    async def read_images(
        self, sources: Sequence[tuple[str, str | UploadFile]], param: str
    ) -> list[PIL.Image.Image]:
        """The input images of a request, from (field, URL or uploaded file) of each.

        Raises ApiError: for too many about `param`, for one that cannot be read about its field.
        """
        count, max_count = len(sources), self.config.limits.images
        if count > max_count:
            raise bad_request(f"{count} images in one request; at most {max_count} are read", param)
        if not sources:
            return []
        sampling = self.service.config.sampling
        max_pixels = max(sampling.chat_max_pixels, sampling.edit_max_pixels)
        # Up to four times the area that the model reads, less the more images there are.
        keep = max_pixels * max(1, min(4, 8 // count))
        reader = RequestImages(self.decoder, self.fetcher, self.results, self.config, keep)
        images = []
        for field, source in sources:
            with blame(field):
                if isinstance(source, str):
                    images.append(await reader.read_url(source))
                else:
                    images.append(await reader.read(await source.read()))
        return images

    def check_model(self, name: str | None) -> None:
        """Raises ApiError 404 for any model but the served one."""
        served = self.config.model_name
        if name not in (None, "", served):
            raise ApiError(
                404,
                f"The model {name[:80]!r} is not served here; this is {served!r}.",
                param="model",
                code="model_not_found",
            )

    def check_n(self, n: int) -> None:
        """Raises ApiError for more answers than this server gives to one request."""
        max_n = self.config.limits.n
        if n > max_n:
            raise bad_request(f"n: {n} is over this server's {max_n}", "n")

    def check_tokens(self, count: int, field: str) -> int:
        """`count`, a number of tokens to generate. Raises ApiError above the server's limit."""
        max_tokens = self.config.limits.tokens
        if count > max_tokens:
            raise bad_request(f"{field}: {count} is over this server's {max_tokens}", field)
        return count

    async def check_prompt(self, texts: Iterable[str], images: Sequence[PIL.Image.Image]) -> None:
        """Raises ApiError for too much text, Refused where a hook refuses it.

        `texts` are iterated in a thread.
        """

        def check() -> None:
            text, max_chars = "\n".join(texts), self.config.limits.prompt_chars
            if len(text) > max_chars:
                raise bad_request(
                    f"The text has {len(text)} characters, over this server's {max_chars}."
                )
            self.hooks.check_prompt(text, images)

        await asyncio.to_thread(check)

    def sampling(
        self, fields: ImageFields, *, editing: bool, steps: int | None, video: bool = False
    ) -> ResolvedSampling:
        """Sampling of images, or of a video.

        Raises RequestError for values out of range, ApiError over limits.
        """
        names = [field.name for field in dataclass_fields(ImageSampling)]
        wanted = ImageSampling(**{name: getattr(fields, name) for name in names} | {"steps": steps})
        sampling = wanted.resolve(self.service.config, editing=editing, video=video)
        max_steps = self.config.limits.steps
        if sampling.steps > max_steps:
            raise bad_request(f"steps: {sampling.steps} is over this server's {max_steps}", "steps")
        return sampling

    def _requested_size(
        self, fields: ImageFields, reference: PIL.Image.Image | None
    ) -> tuple[int, int]:
        config, ratio = self.service.config, fields.ratio
        if fields.width_height is not None:
            width, height = fields.width_height
            if ratio is not None and width * ratio[1] != height * ratio[0]:
                raise bad_request(
                    f"size: {fields.size} has not the aspect_ratio {fields.aspect_ratio}; "
                    "give one of them alone",
                    "size",
                )
            with blame("size"):
                return output_size(config, width, height, reference)
        if ratio is None and fields.pixels is None:
            return output_size(config, None, None, reference)
        if ratio is None:
            ratio = config.sampling.image_size if reference is None else reference.size
        return size_of_shape(config, ratio, fields.pixels)

    def size(self, fields: ImageFields, reference: PIL.Image.Image | None) -> tuple[int, int]:
        """(width, height) of an image, by default in the shape of `reference`.

        Raises ImageError for a size that the model cannot have, ApiError over limits.
        """
        width, height = self._requested_size(fields, reference)
        max_pixels = self.config.limits.output_pixels
        if width * height > max_pixels:
            raise bad_request(
                f"size: {width}x{height} is {width * height} pixels, "
                f"over this server's {max_pixels}",
                "size",
            )
        return width, height


def to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _state_of(request: Request) -> ServerState:
    state = request.app.state.server
    assert isinstance(state, ServerState)
    return state


State = Annotated[ServerState, Depends(_state_of)]
"""The ServerState as an argument of a route."""


def account_of(request: Request) -> str:
    """The name of the caller's account."""
    return str(request.state.account)


# --- events of the service ---


async def answers_in_groups(
    groups: Sequence[Sequence[Callable[[], AsyncGenerator[TaskEvent]]]],
) -> AsyncGenerator[tuple[int, TaskEvent]]:
    """(number of the answer, event) of answers to several prompts, several to each.

    The answers of a group have one prompt: the first prefills it, the others begin after that and
    find it in the KV cache. An error of one answer ends them all.
    """
    sources: list[AsyncGenerator[TaskEvent]] = []
    for group in groups:
        prefilled = asyncio.Event()
        sources += [_in_group(answer, i == 0, prefilled) for i, answer in enumerate(group)]
    if len(sources) == 1:  # the usual case, without a task and a queue for every event
        async with aclosing(sources[0]) as events:
            async for event in events:
                yield 0, event
        return
    async with aclosing(merge_streams(sources)) as merged:
        async for item in merged:
            yield item


async def _in_group(
    answer: Callable[[], AsyncGenerator[TaskEvent]], is_first: bool, prefilled: asyncio.Event
) -> AsyncGenerator[TaskEvent]:
    if not is_first:
        await prefilled.wait()
    async with aclosing(answer()) as events:
        async for event in events:
            if isinstance(event, PromptPrefilled | Finished):
                prefilled.set()
            yield event


async def merge_streams(
    sources: Sequence[AsyncIterator[TaskEvent]],
) -> AsyncGenerator[tuple[int, TaskEvent]]:
    """(number of the source, event) as they come; an error of one source ends them all."""
    async with aclosing(MergedStreams(sources)) as merged:
        while (item := await merged.next()) is not None:
            yield item


class MergedStreams(Generic[Item]):
    """Several async iterators run as tasks, each at most two items ahead, their items in order.

    To be closed with `aclose`.
    """

    def __init__(self, sources: Sequence[AsyncIterator[Item]]) -> None:
        self._queue: asyncio.Queue[tuple[int, Item] | Exception | None] = asyncio.Queue(1)
        self._tasks = [asyncio.ensure_future(self._run(n, s)) for n, s in enumerate(sources)]
        self._open = len(self._tasks)

    async def next(self) -> tuple[int, Item] | None:
        """(number of the source, item); None once all have ended.

        Raises what a source raised; that ends them all.
        """
        while self._open:
            item = await self._queue.get()
            if isinstance(item, Exception):
                self._open = 0
                raise item
            if item is not None:
                return item
            self._open -= 1
        return None

    async def aclose(self) -> None:
        """End the sources, wherever they are."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, number: int, source: AsyncIterator[Item]) -> None:
        try:
            async with AsyncExitStack() as stack:
                if isinstance(source, AsyncGenerator):
                    await stack.enter_async_context(aclosing(source))
                async for item in source:
                    await self._queue.put((number, item))
        except Exception as error:  # raised again by `next`
            await self._queue.put(error)
        else:
            await self._queue.put(None)


def sse(data: Mapping[str, Any], event: str | None = None) -> bytes:
    """One event as it goes over the wire."""
    name = "" if event is None else f"event: {event}\n"
    return f"{name}data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


class EventStream(Response):
    """Response that sends `chunks`, and closes them at their end, an error or a disconnect."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes | None, chunks: MergedStreams[bytes]) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first, self._chunks = first, chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        async with aclosing(self._chunks):
            await send(start)
            chunk = self._first
            while chunk is not None:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                # Sending to a closed connection does not wait, and the watch needs its turn.
                await asyncio.sleep(0)
                chunk = await self._next()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _next(self) -> bytes | None:
        try:
            return await _next_within(self._chunks)
        except Exception as error:
            api_error = to_api_error(error)
            if api_error is INTERNAL:
                _log.exception("an answer broke off while it was streamed")
            return sse(api_error.body(), "error")


async def start_stream(source: AsyncGenerator[bytes]) -> EventStream:
    """The response of `source`, after its first chunk or SILENCE_SECONDS.

    So errors before the first chunk are raised here and get their HTTP status.
    """
    chunks = MergedStreams([source])
    try:
        first = await _next_within(chunks)
    except BaseException:
        await chunks.aclose()
        raise
    return EventStream(first, chunks)


async def _next_within(chunks: MergedStreams[bytes]) -> bytes | None:
    """The next chunk, or a comment after SILENCE_SECONDS; None at the end."""
    try:
        item = await within(chunks.next(), SILENCE_SECONDS)
    except TimeoutError:
        return ALIVE
    return None if item is None else item[1]


async def off_loop(work: Callable[[], Result], size: int) -> Result:
    """The result of `work`, which makes about `size` bytes; in a thread above INLINE_BYTES."""
    return work() if size <= INLINE_BYTES else await asyncio.to_thread(work)


async def json_response(content: Callable[[], Mapping[str, Any]], size: int) -> JSONResponse:
    """The JSON response of `content`, of about `size` bytes."""
    return await off_loop(lambda: JSONResponse(content()), size)


async def sse_of(
    content: Callable[[], Mapping[str, Any]], size: int, event: str | None = None
) -> bytes:
    """The server-sent event of `content`, of about `size` bytes."""
    return await off_loop(lambda: sse(content(), event), size)
