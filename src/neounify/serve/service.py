"""Service of concurrent requests: admission, deadlines, shared prefixes, and each one's context."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from neounify.config import ModelConfig
from neounify.engine.messages import (
    Answer,
    Cancel,
    Command,
    DecodedToken,
    Failed,
    GenerateImages,
    ImageInput,
    Prefill,
    Prefix,
    Release,
    SequenceName,
    TensorRef,
    refs_of,
)
from neounify.errors import DeadlineExceeded, Draining, Overloaded, RequestError
from neounify.image.pixels import check_image_tokens, image_tokens
from neounify.serve.client import Call, EngineClient, EngineClients, EngineState, within
from neounify.serve.memory import cached_tokens
from neounify.tasks.chat import ChatRequest, CompletionRequest, chat, complete
from neounify.tasks.image import ImageRequest, generate_images
from neounify.tasks.interleave import InterleaveRequest, interleave
from neounify.tasks.program import (
    Compute,
    NextAnswer,
    PackImage,
    PackTensors,
    Processor,
    Program,
    Returned,
    Step,
    Take,
    TaskEvent,
    keep,
    pin,
    prefill_prefix,
    resume,
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
        self, request: ServiceRequest, *, previews: int = 0, deadline: float | None = None
    ) -> AsyncIterator[TaskEvent]:
        """Events of one request; `Finished` comes last.

        `previews` is how many previews of each image are wanted at most, evenly over its steps
        (the finished image not counted). `deadline` is in seconds from now. Closing the iterator
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
        self, request: ServiceRequest, *, previews: int = 0, deadline: float | None = None
    ) -> AsyncGenerator[TaskEvent]:
        """See `Service.answer`."""
        tokens = self._admit(request)
        start = time.monotonic()
        context = RequestContext(self.clients, deadline)
        try:
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
            tubes = request.grid(self.config).tubes if request.frames else 1
            count, sizes = request.count * tubes, [(request.width, request.height)]
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
                return generate_images(self.processor, request, KEPT, previews)
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


# --- one request ---


class RequestContext:
    """Runs programs on the engines, on the event loop; see `tasks.program`.

    Awaited steps raise DeadlineExceeded, EngineDied, and the errors that the engine answers.
    """

    def __init__(
        self, clients: EngineClients, seconds: float | None = None, *, preparing: bool = False
    ) -> None:
        """`seconds` from now is the deadline; `preparing` engines may be called already."""
        self.clients, self._preparing = clients, preparing
        self._seconds = seconds
        self._deadline = None if seconds is None else time.monotonic() + seconds
        self._closed = False
        self._sequences: list[SequenceName] = []
        self._refs: dict[int, TensorRef] = {}
        self._call: Call | None = None
        self._is_denoising = False

    async def events(self, program: Program[object]) -> AsyncGenerator[TaskEvent]:
        """Run a program to its end; yields its events."""
        try:
            step = resume(program)
            while not isinstance(step, Returned):
                result: object = None
                if isinstance(step, TaskEvent):
                    yield step
                elif not isinstance(step, DecodedToken):
                    result = await self._outcome(step)
                step = resume(program, result)
        finally:
            program.close()

    async def result(self, program: Program[R]) -> R:
        """Return value of a program without events."""
        try:
            step = resume(program)
            while not isinstance(step, Returned):
                step = resume(program, await self._outcome(step))
        finally:
            program.close()
        value: R = step.value
        return value

    def close(self) -> None:
        """Release everything, finished or not."""
        self._closed = True
        self._end_call()
        if self._sequences:
            self.clients.understanding.send(Release(tuple(self._sequences)))
        for ref in self._refs.values():
            ref.free()

    async def pack(self, tensors: Mapping[str, Tensor]) -> TensorRef:
        """Reference that is freed with the context unless it was taken. Raises OutOfMemory."""
        transport = self.clients.transport
        if not transport.copies:
            ref = transport.pack(tensors)
            self._hold(ref)
            return ref
        packing = asyncio.ensure_future(asyncio.to_thread(transport.pack, tensors))
        # The thread is not cancelled with the request; its reference is then freed by the callback.
        packing.add_done_callback(self._hold_packed)
        return await asyncio.shield(packing)

    async def take(self, ref: TensorRef) -> Mapping[str, Tensor]:
        """The tensors of a reference that came with an answer. Raises TensorsGone."""
        take = self.clients.transport.take
        copies = self.clients.transport.copies
        tensors = await asyncio.to_thread(take, ref) if copies else take(ref)
        self._refs.pop(id(ref), None)
        return tensors

    # --- steps ---

    async def _outcome(self, step: Step) -> object:
        """Result of a step, or its error."""
        try:
            return await self._carry_out(step)
        except Exception as error:
            return error

    async def _carry_out(self, step: Step) -> object:
        match step:
            case NextAnswer():
                return await self._answer()
            case Compute(function):
                with self._before_deadline() as seconds:
                    return await within(asyncio.to_thread(function), seconds)
            case PackTensors(tensors):
                return await self.pack(tensors)
            case PackImage(pixels, grid):
                digest = await asyncio.to_thread(_digest, pixels)
                return ImageInput(await self.pack({"pixels": pixels}), digest, grid)
            case Take(ref):
                return await self.take(ref)
            case Release(sequences):
                self._sequences = [name for name in self._sequences if name not in sequences]
                self.clients.understanding.send(step)
                return None
            case _:
                assert not isinstance(step, DecodedToken | TaskEvent | Cancel)
                self._send(step)
                return await self._answer()

    def _send(self, command: Command) -> None:
        assert not isinstance(command, Release)
        self._end_call()
        client = self.clients.of(command)
        self._call = client.open_call(command.call, preparing=self._preparing)
        self._is_denoising = isinstance(command, GenerateImages)
        if isinstance(command, Prefill):
            self._sequences += command.prompts
        client.send(command)

    def _end_call(self) -> None:
        call, self._call = self._call, None
        if call is None:
            return
        if self._is_denoising and not call.answered:
            call.client.send(Cancel(call.number))
        call.client.close_call(call)

    async def _answer(self) -> Answer:
        assert self._call is not None
        with self._before_deadline() as seconds:
            reply = await self._call.next(seconds)
        for ref in refs_of(reply.answer):
            self._hold(ref)
        if reply.final:
            self._end_call()
        if isinstance(reply.answer, Failed):
            raise reply.answer.exception()
        return reply.answer

    @contextmanager
    def _before_deadline(self) -> Iterator[float | None]:
        """Seconds left until the deadline; a TimeoutError inside is DeadlineExceeded."""
        try:
            yield None if self._deadline is None else self._deadline - time.monotonic()
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"the request was not finished after {self._seconds:g} s, its deadline"
            ) from error

    # --- references ---

    def _hold_packed(self, packing: asyncio.Future[TensorRef]) -> None:
        if not packing.cancelled() and packing.exception() is None:
            self._hold(packing.result())

    def _hold(self, ref: TensorRef) -> None:
        """Free a reference with the context, which may have been closed already."""
        if self._closed:
            ref.free()
        else:
            self._refs[id(ref)] = ref


def _digest(pixels: Tensor) -> bytes:
    """16-byte BLAKE2b hash of an image's pixels and shape."""
    plain = pixels.contiguous().view(torch.uint8).numpy()
    shape = ",".join(map(str, pixels.shape)).encode()
    return hashlib.blake2b(plain.tobytes() + shape, digest_size=16).digest()
