"""Context of one request: its programs on the engines, their calls, tensors and deadline."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from neounify.engine.messages import (
    Answer,
    Cancel,
    Command,
    DecodedToken,
    Failed,
    GenerateImages,
    ImageInput,
    Prefill,
    Release,
    SequenceName,
    TensorRef,
    refs_of,
)
from neounify.errors import DeadlineExceeded
from neounify.serve.client import Call, EngineClients, within
from neounify.tasks.program import (
    Compute,
    NextAnswer,
    PackImage,
    PackTensors,
    Program,
    Returned,
    Step,
    Take,
    TaskEvent,
    resume,
)

R = TypeVar("R")


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
