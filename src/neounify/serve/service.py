"""Service of concurrent requests: admission, shared prefixes, and a context for each."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from neounify.config import ModelConfig
from neounify.engine.messages import Prefix
from neounify.errors import Draining, Overloaded, RequestError
from neounify.image.pixels import check_image_tokens, image_tokens
from neounify.serve.client import EngineClient, EngineClients, EngineState
from neounify.serve.context import RequestContext
from neounify.serve.memory import cached_tokens
from neounify.tasks.chat import ChatRequest, CompletionRequest, chat, complete
from neounify.tasks.frames import image_program
from neounify.tasks.image import ImageRequest
from neounify.tasks.interleave import InterleaveRequest, interleave
from neounify.tasks.program import (
    Processor,
    Program,
    TaskEvent,
    keep,
    pin,
    prefill_prefix,
)
from neounify.text.template import image_prompt

R = TypeVar("R")

ServiceRequest = ChatRequest | CompletionRequest | ImageRequest | InterleaveRequest


class Service(Protocol):
    """A service that answers many requests at once."""

    @property
    def config(self) -> ModelConfig:
        """Config of the model."""

    @property
    def processor(self) -> Processor:
        """What prepares the prompts of the model."""

    def check_together(self, requests: Sequence[ServiceRequest]) -> None:
        """RequestError if the limits can never admit all of these requests at the same time.

        ImageError for an image that is too large by itself.
        """

    def answer(
        self,
        request: ServiceRequest,
        *,
        previews: int = 0,
        deadline: float | None = None,
        admitted: Callable[[], None] | None = None,
    ) -> AsyncIterator[TaskEvent]:
        """Events of one request; `Finished` comes last.

        `previews` is how many previews of each image are wanted at most, evenly over its steps
        (the finished image not counted). `deadline` is in seconds from now. `admitted` is called
        once the request is counted in, after which Overloaded is not raised. Closing the iterator
        frees the request's work within one step. Raises PromptError, ImageError and RequestError
        for requests the model cannot answer, and ServiceError.
        """


@dataclass(frozen=True, kw_only=True)
class AdmissionConfig:
    """Maximum `requests` in progress, and `image_tokens` of all images in progress.

    A request of several images counts as often as it has images, and with a step cache for the
    tokens as well whose state in denoising takes the memory of the cache.
    `max_image_tokens` bounds one image; None is four times the tokens of the model's default size,
    at least 1,024.
    """

    requests: int = 128
    image_tokens: int = 65_536
    max_image_tokens: int | None = None

    def largest_image(self, config: ModelConfig) -> int:
        """Tokens of one image at most."""
        if self.max_image_tokens is not None:
            return self.max_image_tokens
        return max(1024, 4 * image_tokens(config, *config.sampling.image_size))


# --- the service ---

KEPT = {"": "uncond"}
"""The unconditional prefix of all guided images without a negative prompt."""


class EngineService:
    """The `Service` of two engines, which may be in this process or in separate ones."""

    def __init__(
        self, processor: Processor, clients: EngineClients, admission: AdmissionConfig
    ) -> None:
        self.processor, self.clients, self.admission = processor, clients, admission
        self._active = 0
        self._image_tokens = 0
        self._draining = False
        self._durations: deque[float] = deque([1.0], maxlen=32)
        self._pinned: RequestContext | None = None
        self._unconditional: tuple[Mapping[str, Tensor], int] | None = None

    @property
    def config(self) -> ModelConfig:
        return self.processor.config

    @property
    def ready(self) -> bool:
        """Whether requests can be answered now."""
        return not self._draining and all(client.ready for client in self.clients.all)

    @property
    def states(self) -> Mapping[str, EngineState]:
        """State of each engine, by its name."""
        return {client.name: client.state for client in self.clients.all}

    async def start(self) -> None:
        """Start the engines. Raises what keeps them from starting."""
        if self.clients.space is not None:
            self.clients.space.open()
        self.clients.generation.prepare = self._share_prefixes
        if self.clients.understanding is not self.clients.generation:
            self.clients.understanding.prepare = self._pin_system_message
        # Understanding first: the generation engine's prefix comes from it.
        for client in self.clients.all:
            await client.start()

    def close_doors(self) -> None:
        """Refuse new requests; those in progress continue."""
        self._draining = True

    async def stop(self) -> None:
        """Stop the engines, and with them all requests in progress."""
        self.close_doors()
        stops = (client.stop() for client in self.clients.all)
        results = await asyncio.gather(*stops, return_exceptions=True)
        if self.clients.space is not None:
            self.clients.space.close()
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def answer(
        self,
        request: ServiceRequest,
        *,
        previews: int = 0,
        deadline: float | None = None,
        admitted: Callable[[], None] | None = None,
    ) -> AsyncGenerator[TaskEvent]:
        """See `Service.answer`."""
        tokens = self._admit(request)
        start = time.monotonic()
        context = RequestContext(self.clients, deadline)
        try:
            if admitted is not None:
                admitted()
            async with aclosing(context.events(self._program(request, previews))) as events:
                async for event in events:
                    yield event
        finally:
            self._durations.append(time.monotonic() - start)
            self._active -= _answers_of(request)
            self._image_tokens -= tokens
            context.close()

    def check_together(self, requests: Sequence[ServiceRequest]) -> None:
        """See `Service.check_together`."""
        answers = sum(map(_answers_of, requests))
        if answers > self.admission.requests:
            raise RequestError(
                f"{answers} answers at once, this server works on at most "
                f"{self.admission.requests}; ask for fewer"
            )
        tokens = sum(map(self._tokens_of, requests))
        if tokens > self.admission.image_tokens:
            raise RequestError(
                f"the request's images have {tokens:,} tokens, this server generates at most "
                f"{self.admission.image_tokens:,} at once; ask for fewer or smaller images"
            )

    def gauges(self) -> Mapping[str, float]:
        """Requests and image tokens in progress, and the engines' gauges."""
        values = {"requests": float(self._active), "image_tokens": float(self._image_tokens)}
        for client in self.clients.all:
            values |= client.report.gauges
        return values

    def counters(self) -> Mapping[str, float]:
        """Counters of the engines since they started, and the number of restarts."""
        values: dict[str, float] = {"restarts": sum(client.restarts for client in self.clients.all)}
        for client in self.clients.all:
            values |= client.report.counters
        return values

    # --- one request ---

    def _admit(self, request: ServiceRequest) -> int:
        """Count a request in, or refuse it; its image tokens."""
        if self._draining:
            raise Draining("the server is shutting down and takes no new requests")
        for client in self._needed(request):
            if not client.ready:
                raise client.down()
        self.check_together([request])
        answers = _answers_of(request)
        if self._active + answers > self.admission.requests:
            raise Overloaded(
                f"too many requests in progress: {self._active} of {self.admission.requests}, "
                f"this one counts as {answers}",
                self._retry_after(),
            )
        tokens = self._tokens_of(request)
        if self._image_tokens + tokens > self.admission.image_tokens:
            raise Overloaded(
                f"too many images in progress: {self._image_tokens:,} of "
                f"{self.admission.image_tokens:,} image tokens, this request needs {tokens:,}",
                self._retry_after(),
            )
        self._active += answers
        self._image_tokens += tokens
        return tokens

    def _needed(self, request: ServiceRequest) -> list[EngineClient]:
        text_only = isinstance(request, ChatRequest | CompletionRequest)
        return [self.clients.understanding] if text_only else self.clients.all

    def _tokens_of(self, request: ServiceRequest) -> int:
        """Maximum image tokens in progress for a request. ImageError for an image too large."""
        count, sizes = 1, list[tuple[int, int]]()
        if isinstance(request, ImageRequest):
            sizes = [(request.width, request.height)]
            if not request.frames:
                count = request.count
            elif not self.config.frame_by_frame:  # else one frame and one clip after the other
                count = request.count * request.grid(self.config).tubes
        elif isinstance(request, InterleaveRequest):
            sizes = list(request.sizes)
        for size in sizes:
            check_image_tokens(self.config, *size, self.admission.largest_image(self.config))
        tokens = count * max((image_tokens(self.config, *size) for size in sizes), default=0)
        if isinstance(request, ImageRequest | InterleaveRequest):
            caches = request.sampling.cache.threshold > 0
            tokens += cached_tokens(self.processor, request.sampling, tokens) if caches else 0
        return tokens

    def _retry_after(self) -> float:
        """Estimated seconds until a request in progress ends."""
        return max(1.0, sum(self._durations) / len(self._durations) / max(1, self._active))

    def _program(self, request: ServiceRequest, previews: int) -> Program[None]:
        match request:
            case ChatRequest():
                return chat(self.processor, request)
            case CompletionRequest():
                return complete(self.processor, request)
            case ImageRequest():
                return image_program(self.processor, request, KEPT, previews)
            case InterleaveRequest():
                return interleave(self.processor, request, KEPT, previews)

    # --- shared prefixes ---

    async def _share_prefixes(self) -> None:
        """Keep the prefix of the unconditional prompt in the generation engine; prefilled once."""
        if self.clients.understanding is self.clients.generation:
            await self._pin_system_message()
        context = RequestContext(self.clients, preparing=True)
        try:
            if self._unconditional is None:
                prompt = self.processor.unconditional_prompt()
                prefix = await context.result(prefill_prefix(prompt))
                self._unconditional = await context.take(prefix.ref), prefix.next_t
            tensors, next_t = self._unconditional
            kept = Prefix(await context.pack(tensors), next_t)
            await context.result(keep(KEPT[""], kept))
        finally:
            context.close()

    async def _pin_system_message(self) -> None:
        """Pin the common prefix of all image prompts in the cache."""
        shared = _shared_prefix(self.processor)
        if shared:
            self._pinned = RequestContext(self.clients, preparing=True)
            await self._pinned.result(pin(shared))


def _answers_of(request: ServiceRequest) -> int:
    """Answers of a request: its images if it is for images, else one."""
    return request.count if isinstance(request, ImageRequest) else 1


def _shared_prefix(processor: Processor) -> tuple[int, ...]:
    """Token ids that every image prompt begins with; none without a system message."""
    if not processor.system_message:
        return ()
    first, second = (
        image_prompt(
            processor.tokenizer,
            text,
            system=processor.system_message,
            think=False,
            template=processor.template,
        ).ids([], 0)
        for text in ("a", "b")
    )
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return tuple(token for token, _ in pairs)
