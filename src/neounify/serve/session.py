"""One request's dealings with the engines: what it opened is closed, whatever happens."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from neounify import errors
from neounify.config import TextSampling
from neounify.engine.messages import (
    Answer,
    Cancel,
    Close,
    Done,
    Export,
    Exported,
    Extend,
    Extended,
    Keep,
    Kept,
    Open,
    Opened,
    Order,
    Paint,
    PicturePart,
    Prefix,
    PromptPart,
    Seen,
    SequenceName,
    TextPart,
    Token,
    Write,
    Written,
    parcels_of,
)
from neounify.engine.tensors import TensorRef, Transport
from neounify.errors import EngineDied, OutOfMemory, TensorsGone
from neounify.flow.guidance import Branch
from neounify.flow.sampling import ResolvedSampling
from neounify.model.layout import Grid
from neounify.serve.events import DeadlineExceeded
from neounify.serve.link import Call, EngineLink, answer_or_raise
from neounify.serve.shared_memory import SharedSpace
from neounify.text.template import ImageSegment, Prompt

A = TypeVar("A", bound=Answer)

ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        errors.PromptError,
        errors.ContextFullError,
        errors.RequestError,
        errors.CheckpointError,
        errors.ImageError,
        EngineDied,
        OutOfMemory,
        TensorsGone,
    )
}


@dataclass(frozen=True)
class Links:
    """The engines of a server; in one process both links are the same.

    `space` are the names of its shared memory, where it has any.
    """

    understanding: EngineLink
    generation: EngineLink
    transport: Transport
    space: SharedSpace | None = None

    @property
    def all(self) -> list[EngineLink]:
        same = self.understanding is self.generation
        return [self.understanding] if same else [self.understanding, self.generation]


class Session:
    """Calls of one request. Sequences go by a short name of their own, like "cond".

    All calls raise DeadlineExceeded once the time is up, EngineDied, and what the engine found
    wrong with the request.
    """

    def __init__(
        self,
        links: Links,
        number: int,
        deadline: float | None = None,
        *,
        preparing: bool = False,
    ) -> None:
        """`deadline` is a time of `time.monotonic`; `preparing` engines may be called already."""
        self.links, self.number, self.deadline = links, number, deadline
        self._preparing = preparing
        self._closed = False
        self._sequences: list[SequenceName] = []
        self._parcels: dict[int, TensorRef] = {}
        self._calls: dict[Call, EngineLink] = {}
        self._paints: set[Call] = set()

    async def open(
        self, prompts: Mapping[str, Sequence[PromptPart]], room: Mapping[str, int]
    ) -> Opened:
        """Read prompts; `room` tokens may follow each."""
        named, rooms = self._new_sequences(prompts, room)
        return await self._ask(lambda call: Open(call, named, rooms), Opened)

    async def open_and_write(
        self,
        name: str,
        prompt: Sequence[PromptPart],
        sampling: TextSampling,
        stop_ids: frozenset[int],
        most: int,
    ) -> AsyncGenerator[Opened | Token | Written]:
        """Read a prompt and write behind it, in one go: the first token comes sooner."""
        named, rooms = self._new_sequences({name: prompt}, {name: most})
        link = self.links.understanding
        reading, writing = self._open_call(link), self._open_call(link)
        try:
            then = Write(writing.number, self._name(name), sampling, stop_ids, most)
            link.send(Open(reading.number, named, rooms, then))
            answer = await self._next(reading)
            assert isinstance(answer, Opened)
            yield answer
            async for written in self._written(writing):
                yield written
        finally:
            self._close_call(reading)
            self._close_call(writing)

    async def write(
        self, name: str, sampling: TextSampling, stop_ids: frozenset[int], most: int
    ) -> AsyncGenerator[Token | Written]:
        """Tokens as they are written, then how it ended."""
        link = self.links.understanding
        call = self._open_call(link)
        try:
            link.send(Write(call.number, self._name(name), sampling, stop_ids, most))
            async for written in self._written(call):
                yield written
        finally:
            self._close_call(call)

    async def _written(self, call: Call) -> AsyncGenerator[Token | Written]:
        while True:
            answer = await self._next(call)
            assert isinstance(answer, Token | Written)
            yield answer
            if isinstance(answer, Written):
                return

    async def extend(self, parts: Mapping[str, Sequence[PromptPart]]) -> None:
        """Append to sequences."""
        named = {self._name(name): tuple(own) for name, own in parts.items()}
        await self._ask(lambda call: Extend(call, named), Extended)

    async def export(self, names: Sequence[str]) -> list[Prefix]:
        """Copies of sequences to paint behind."""
        named = tuple(self._name(name) for name in names)
        exported = await self._ask(lambda call: Export(call, named), Exported)
        return list(exported.prefixes)

    def leave(self, names: Iterable[str]) -> None:
        """Give up sequences that are needed no more, and with them their room in the cache."""
        gone = tuple(self._name(name) for name in names)
        if gone:
            self._sequences = [name for name in self._sequences if name not in gone]
            self.links.understanding.send(Close(gone))

    async def keep(self, name: str, prefix: Prefix) -> None:
        """Let the generation engine keep a prefix."""
        link = self.links.generation
        await self._ask(lambda call: Keep(call, name, prefix), Kept, link)

    async def paint(
        self,
        noise: Tensor,
        grid: Grid,
        sampling: ResolvedSampling,
        prefixes: Mapping[Branch, Prefix | str],
        previews: int,
    ) -> AsyncIterator[tuple[Seen | Done, Tensor]]:
        """Previews and finished images of `noise` [count, tokens, 3·C²], with their pixels."""
        parcel = await self.pack(noise=noise)
        link = self.links.generation
        call = self._open_call(link)
        self._paints.add(call)
        link.send(Paint(call.number, parcel, grid, sampling, prefixes, previews))
        left = noise.shape[0]
        while left:
            answer = await self._next(call)
            assert isinstance(answer, Seen | Done)
            left -= isinstance(answer, Done)
            yield answer, (await self.take(answer.pixels))["pixels"]
        self._paints.discard(call)
        self._close_call(call)

    async def pack(self, **tensors: Tensor) -> TensorRef:
        """A parcel that is freed with the session, if nobody has taken it. Raises OutOfMemory."""
        transport = self.links.transport
        if not transport.copies:
            parcel = transport.pack(tensors)
            self._hold(parcel)
            return parcel
        packing = asyncio.ensure_future(asyncio.to_thread(transport.pack, tensors))
        # The thread goes on when the waiting is given up; then nobody will hold the parcel.
        packing.add_done_callback(self._hold_packed)
        return await asyncio.shield(packing)

    async def take(self, parcel: TensorRef) -> Mapping[str, Tensor]:
        """The tensors of a parcel that came with an answer. Raises TensorsGone."""
        take = self.links.transport.take
        copies = self.links.transport.copies
        tensors = await asyncio.to_thread(take, parcel) if copies else take(parcel)
        self._parcels.pop(id(parcel), None)
        return tensors

    async def parts(self, prompt: Prompt, images: Sequence[Tensor], side: int) -> list[PromptPart]:
        """A prompt as the engine reads it; `images` are prepared, `side` is a token's."""
        return [
            await self.picture(images[segment.image], side)
            if isinstance(segment, ImageSegment)
            else TextPart(segment.ids)
            for segment in prompt.segments
        ]

    async def picture(self, pixels: Tensor, side: int) -> PicturePart:
        """A prepared image [3, height, width] as the engine reads it."""
        grid = Grid.of_pixels(pixels.shape[1], pixels.shape[2], side)
        digest = await asyncio.to_thread(_digest, pixels)
        return PicturePart(await self.pack(pixels=pixels), digest, grid)

    def close(self) -> None:
        """Free everything, finished or not."""
        self._closed = True
        for call in self._paints:
            self.links.generation.send(Cancel(call.number))
        if self._sequences:
            self.links.understanding.send(Close(tuple(self._sequences)))
        for call in list(self._calls):
            self._close_call(call)
        for parcel in self._parcels.values():
            parcel.free()

    def _open_call(self, link: EngineLink) -> Call:
        call = link.open_call(preparing=self._preparing)
        self._calls[call] = link
        return call

    def _close_call(self, call: Call) -> None:
        link = self._calls.pop(call, None)
        if link is not None:
            link.close_call(call)

    def _hold_packed(self, packing: asyncio.Future[TensorRef]) -> None:
        if not packing.cancelled() and packing.exception() is None:
            self._hold(packing.result())

    def _hold(self, parcel: TensorRef) -> None:
        """Free a parcel with the session, which may have ended already."""
        if self._closed:
            parcel.free()
        else:
            self._parcels[id(parcel)] = parcel

    def _new_sequences(
        self, prompts: Mapping[str, Sequence[PromptPart]], room: Mapping[str, int]
    ) -> tuple[dict[SequenceName, tuple[PromptPart, ...]], dict[SequenceName, int]]:
        named = {self._name(name): tuple(parts) for name, parts in prompts.items()}
        self._sequences += named
        return named, {self._name(name): room[name] for name in prompts}

    def _name(self, name: str) -> SequenceName:
        return self.number, name

    async def _ask(
        self, order: Callable[[int], Order], kind: type[A], link: EngineLink | None = None
    ) -> A:
        link = link or self.links.understanding
        call = self._open_call(link)
        try:
            link.send(order(call.number))
            answer = await self._next(call)
        finally:
            self._close_call(call)
        assert isinstance(answer, kind)
        return answer

    async def _next(self, call: Call) -> Answer:
        seconds = None if self.deadline is None else self.deadline - time.monotonic()
        try:
            reply = await call.next(seconds)
        except TimeoutError as error:
            raise DeadlineExceeded("the request took longer than it was given") from error
        for parcel in parcels_of(reply.answer):
            self._hold(parcel)
        return answer_or_raise(reply.answer, ERRORS)


def _digest(pixels: Tensor) -> bytes:
    """A name for the content of a picture."""
    plain = pixels.contiguous().view(torch.uint8).numpy()
    shape = ",".join(map(str, pixels.shape)).encode()
    return hashlib.blake2b(plain.tobytes() + shape, digest_size=16).digest()
