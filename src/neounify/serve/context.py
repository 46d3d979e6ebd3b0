"""Request context: runs one program on the engines and releases their resources."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from neounify.engine.messages import (
    Answer,
    Cancel,
    Command,
    Failed,
    GenerateImages,
    ImageInput,
    Prefill,
    Release,
    SequenceName,
    TensorRef,
    Token,
    Transport,
    is_for_generation,
    refs_of,
)
from neounify.serve.client import Call, EngineClient
from neounify.serve.events import DeadlineExceeded
from neounify.serve.shared_memory import SharedSpace
from neounify.tasks.events import TaskEvent
from neounify.tasks.program import (
    Compute,
    NextAnswer,
    Pack,
    PackImage,
    Program,
    Returned,
    Step,
    Take,
    resume,
)

R = TypeVar("R")


@dataclass(frozen=True)
class EngineClients:
    """Clients of the two engines; in one process both are the same.

    `space` reserves the names of shared memory, None where none is used.
    """

    understanding: EngineClient
    generation: EngineClient
    transport: Transport
    space: SharedSpace | None = None

    @property
    def all(self) -> list[EngineClient]:
        same = self.understanding is self.generation
        return [self.understanding] if same else [self.understanding, self.generation]


class RequestContext:
    """Runs programs on the engines, on the event loop; see `tasks.program`.

    Awaited steps raise DeadlineExceeded, EngineDied, and the errors that the engine answers.
    """

    def __init__(
        self, clients: EngineClients, deadline: float | None = None, *, preparing: bool = False
    ) -> None:
        """`deadline` is a time of `time.monotonic`; `preparing` engines may be called already."""
        self.clients, self.deadline = clients, deadline
        self._preparing = preparing
        self._closed = False
        self._sequences: list[SequenceName] = []
        self._refs: dict[int, TensorRef] = {}
        self._call: Call | None = None
        self._client: EngineClient | None = None
        self._generates = False

    async def events(self, program: Program[object]) -> AsyncGenerator[TaskEvent]:
        """Run a program to its end; yields its events."""
        try:
            step = resume(program)
            while not isinstance(step, Returned):
                result: object = None
                if isinstance(step, TaskEvent):
                    yield step
                elif not isinstance(step, Token):
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
                return await asyncio.to_thread(function)
            case Pack(tensors):
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
                assert not isinstance(step, Token | TaskEvent | Cancel)
                self._send(step)
                return await self._answer()

    def _send(self, command: Command) -> None:
        assert not isinstance(command, Release)
        self._end_call()
        self._generates = isinstance(command, GenerateImages)
        generates = is_for_generation(command)
        client = self.clients.generation if generates else self.clients.understanding
        self._call = client.open_call(command.call, preparing=self._preparing)
        self._client = client
        if isinstance(command, Prefill):
            self._sequences += command.prompts
        client.send(command)

    def _end_call(self) -> None:
        if self._call is None or self._client is None:
            return
        if self._generates and not self._call.answered:
            self._client.send(Cancel(self._call.number))
        self._client.close_call(self._call)
        self._call = self._client = None

    async def _answer(self) -> Answer:
        assert self._call is not None
        seconds = None if self.deadline is None else self.deadline - time.monotonic()
        try:
            reply = await self._call.next(seconds)
        except TimeoutError as error:
            raise DeadlineExceeded("the request took longer than it was given") from error
        for ref in refs_of(reply.answer):
            self._hold(ref)
        if reply.final:
            self._end_call()
        if isinstance(reply.answer, Failed):
            raise reply.answer.exception()
        return reply.answer

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
