"""Layers that pass through a device: files → two locked buffers → three slots, ahead of their use.

Reader threads `preadv` the byte ranges of a layer, joined where they touch, straight into a staging
buffer; a copy stream moves it into a slot that never moves; computing waits for the slot's event,
the slot for that of computing. The order wraps from the last layer to the first of the next pass.
Casts, LoRA updates and decoding happen on the device. No copy of the weights is held on the host
but the page cache, which keeps what there is room for.

On a CPU the same schedule runs with `HostCopies`, whose events do nothing, so that it is tested
without a device.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn

from neounify.checkpoint.mapped import MappedFile
from neounify.checkpoint.residency import StoredWeight, code_names
from neounify.errors import RequestError
from neounify.runtime.memory_plan import SLOTS, STAGING

READERS = 4
"""Threads that read a layer: a core reads some 7 GB/s from the page cache, PCIe 4 takes 24."""
PIECE = 8 * 2**20
"""Bytes of one read; the readers of a layer share its pieces."""
ALIGNMENT = 256
"""Of tensors in a slot, as torch aligns its own."""

# --- what a layer consists of ---


@dataclass(frozen=True)
class Part:
    """A stored tensor at bytes `offset` of a slot, and the parameters that it becomes.

    That is one, or those of a layer of codes by the names of its format.
    """

    parameters: Mapping[str, nn.Parameter]
    source: StoredWeight
    offset: int

    def take(self, slot: Tensor) -> None:
        """Make the slot's bytes the values, decoded or quantised where stored otherwise."""
        info = self.source.info
        stored = slot[self.offset : self.offset + info.nbytes].view(info.dtype)
        stored = stored.view(info.stored_shape)
        if self.source.format is not None:
            for name, tensor in self.source.encode(stored).items():
                self.parameters[name].data = tensor
            return
        (parameter,) = self.parameters.values()
        parameter.data = self.source.decode(stored, parameter.dtype)

    def leave(self) -> None:
        for parameter in self.parameters.values():
            parameter.data = parameter.data.new_empty(0)


@dataclass(frozen=True)
class Read:
    """Bytes from `start` of a file on, that go to (offset, size) places of a slot in order."""

    file: MappedFile
    start: int
    places: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class LayerImage:
    """A layer as bytes of a slot: its tensors, how they are read, and how many bytes it takes."""

    parts: tuple[Part, ...]
    reads: tuple[Read, ...]
    size: int


def layer_image(
    sources: Mapping[str, StoredWeight], parameters: Mapping[str, nn.Parameter]
) -> LayerImage:
    """The image of a layer from its stored weights by our names.

    Raises RequestError for weights of which a rank holds a share.
    """
    parts: list[Part] = []
    joined: list[list[Part]] = []
    size = 0
    for name, source in sorted(
        sources.items(), key=lambda item: (str(item[1].file.path), item[1].info.start)
    ):
        if source.share is not None:
            raise RequestError("memory='layers' cannot be used with shares of ranks")
        names = {name: name} if source.format is None else code_names(name, source)
        part = Part({key: parameters[ours] for key, ours in names.items()}, source, size)
        size += -(-source.info.nbytes // ALIGNMENT) * ALIGNMENT
        parts.append(part)
        last = joined[-1][-1].source if joined else None
        if last is None or last.file is not source.file or last.info.stop != source.info.start:
            joined.append([])
        joined[-1].append(part)
    reads = tuple(read for run in joined for read in _pieces(run))
    return LayerImage(tuple(parts), reads, size)


def _pieces(run: Sequence[Part]) -> Iterator[Read]:
    """Reads of touching tensors, of PIECE bytes each."""
    places = [(part.offset, part.source.info.nbytes) for part in run]
    first = run[0].source.info.start
    total = sum(size for _, size in places)
    cuts = [*range(0, total, PIECE), total]
    for begin, end in pairwise(cuts):
        piece, passed = [], 0
        for offset, size in places:
            low, high = max(begin, passed), min(end, passed + size)
            if high > low:
                piece.append((offset + low - passed, high - low))
            passed += size
        yield Read(run[0].source.file, first + begin, tuple(piece))


# --- how bytes get to the device ---


class Event(Protocol):
    """Work of a device up to a moment."""

    def synchronize(self) -> None:
        """Wait on the host until it is done."""


class Copies(Protocol):
    """Buffers and copies of one device."""

    def host_buffer(self, size: int) -> Tensor:
        """Bytes of the host that the device can copy from, locked."""

    def slot(self, size: int) -> Tensor:
        """Bytes of the device."""

    def copy(self, slot: Tensor, buffer: Tensor, after: Event | None) -> Event:
        """Start a copy once computing has passed `after`; the event of its end."""

    def computed(self) -> Event:
        """The event of what the caller's thread has given the device to compute."""

    def wait(self, event: Event) -> None:
        """Let what the caller's thread computes next wait for an event."""


class DeviceCopies:
    """Copies to a CUDA or ROCm device, in a separate stream."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise RequestError(
                f"memory='layers' streams to cuda devices and works in place on the CPU, not on "
                f"{device.type}; take memory='stream'"
            )
        self._device, self._stream = device, torch.cuda.Stream(device)

    def host_buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def slot(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def copy(self, slot: Tensor, buffer: Tensor, after: Event | None) -> Event:
        with torch.cuda.stream(self._stream):
            if isinstance(after, torch.cuda.Event):
                self._stream.wait_event(after)
            slot.copy_(buffer, non_blocking=True)
            return self._stream.record_event()

    def computed(self) -> Event:
        return torch.cuda.current_stream(self._device).record_event()

    def wait(self, event: Event) -> None:
        assert isinstance(event, torch.cuda.Event)
        torch.cuda.current_stream(self._device).wait_event(event)


class HostCopies:
    """The same within the host's memory: copies are done when they return."""

    class Done:
        def synchronize(self) -> None:
            pass

    def host_buffer(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    slot = host_buffer

    def copy(self, slot: Tensor, buffer: Tensor, after: Event | None) -> Event:
        slot.copy_(buffer)
        return self.Done()

    def computed(self) -> Event:
        return self.Done()

    def wait(self, event: Event) -> None:
        pass


# --- the schedule ---


@dataclass(eq=False)
class Slot:
    """A buffer on the device: the layer in it, whether it is there already, and its users."""

    bytes: Tensor
    number: int | None = None
    ready: bool = False
    users: int = 0
    filled: Event | None = None
    used: Event | None = None


@dataclass(eq=False)
class _Session:
    """Threads and buffers from the first user's begin to the last one's end."""

    slots: list[Slot]
    buffers: list[Tensor]
    readers: ThreadPoolExecutor
    mover: threading.Thread | None = None
    wanted: list[int] = field(default_factory=list)
    cursor: int = 0
    error: BaseException | None = None
    closed: bool = False

    def slot_of(self, number: int) -> Slot | None:
        return next((slot for slot in self.slots if slot.number == number), None)


class Staged:
    """The layers of one stream that do not stay, staged ahead of their use; a `Feed`.

    Layers are staged in their order from the one taken last. One that is out of order, as after
    an abandoned pass, is staged next.
    """

    def __init__(
        self, layers: Mapping[int, LayerImage], copies: Copies, readers: int = READERS
    ) -> None:
        self._layers, self._copies, self._readers = layers, copies, readers
        self._order = sorted(layers)
        self._change = threading.Condition()
        self._users = 0
        self._session: _Session | None = None

    def open(self) -> None:
        """Allocate the buffers and start the threads, for the first user."""
        with self._change:
            if self._users == 0 and self._layers:
                self._session = self._begin()
            self._users += 1

    def close(self) -> None:
        """Stop the threads and free the buffers, with the last user."""
        with self._change:
            self._users -= 1
            if self._users or self._session is None:
                return
            session, self._session = self._session, None
            session.closed = True
            self._change.notify_all()
        assert session.mover is not None
        session.mover.join()
        session.readers.shutdown()
        for slot in session.slots:
            if slot.number is not None and slot.users:
                self._leave(slot.number)

    def take(self, number: int) -> None:
        """Wait until a layer is in a slot, and let computing wait for its copy."""
        if number not in self._layers:
            return
        with self._change:
            session = self._session
            if session is None:
                raise RuntimeError("a layer is computed outside `use` of its stream")
            session.wanted.append(number)
            self._change.notify_all()
            try:
                slot = self._wait(session, number)
            finally:
                session.wanted.remove(number)
            slot.users += 1
            assert slot.filled is not None
            self._copies.wait(slot.filled)
            if slot.users > 1:
                return
            with torch.inference_mode(False), torch.no_grad():
                for part in self._layers[number].parts:
                    part.take(slot.bytes)

    def give_back(self, number: int) -> None:
        """Free the slot, once the device has computed what it was given."""
        with self._change:
            slot = None if self._session is None else self._session.slot_of(number)
            if slot is None:
                return
            slot.users -= 1
            if slot.users:
                return
            slot.used = self._copies.computed()
            slot.number, slot.ready = None, False
            self._leave(number)
            self._change.notify_all()

    def _leave(self, number: int) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for part in self._layers[number].parts:
                part.leave()

    def _begin(self) -> _Session:
        size = max(image.size for image in self._layers.values())
        with torch.inference_mode(False):
            session = _Session(
                # Memory of a slot may be in use until what was computed before has ended.
                [Slot(self._copies.slot(size), used=self._copies.computed()) for _ in range(SLOTS)],
                [self._copies.host_buffer(size) for _ in range(STAGING)],
                ThreadPoolExecutor(self._readers, thread_name_prefix="neounify-reader"),
            )
        session.mover = threading.Thread(
            target=self._move, args=(session,), name="neounify-mover", daemon=True
        )
        session.mover.start()
        return session

    def _wait(self, session: _Session, number: int) -> Slot:
        while True:
            if session.error is not None:
                raise session.error
            slot = session.slot_of(number)
            if slot is not None and slot.ready:
                return slot
            self._change.wait()

    def _move(self, session: _Session) -> None:
        """Stage one layer after the other; the mover's thread."""
        copied: list[Event | None] = [None] * len(session.buffers)
        turn = 0
        try:
            while (place := self._next(session)) is not None:
                slot, number = place
                image, buffer = self._layers[number], session.buffers[turn]
                if (event := copied[turn]) is not None:
                    event.synchronize()
                self._read(session, image, buffer)
                filled = self._copies.copy(
                    slot.bytes[: image.size], buffer[: image.size], slot.used
                )
                copied[turn], turn = filled, (turn + 1) % len(session.buffers)
                with self._change:
                    slot.filled, slot.ready = filled, True
                    self._change.notify_all()
            for event in copied:
                if event is not None:
                    event.synchronize()  # the buffers are freed next
        except BaseException as error:  # the thread that waits raises it
            with self._change:
                session.error = error
                self._change.notify_all()

    def _read(self, session: _Session, image: LayerImage, buffer: Tensor) -> None:
        view = buffer.numpy().data

        def read(piece: Read) -> None:
            targets = [view[offset : offset + size] for offset, size in piece.places]
            piece.file.read_into(piece.start, targets)

        for _ in session.readers.map(read, image.reads):
            if session.closed:
                return

    def _next(self, session: _Session) -> tuple[Slot, int] | None:
        """The slot and the layer to stage next; waits for one, None when the session ends."""
        with self._change:
            while not session.closed:
                number = self._choose(session)
                slot = None if number is None else self._free(session, number)
                if number is not None and slot is not None:
                    slot.number, slot.ready = number, False
                    position = self._order.index(number)
                    session.cursor = (position + 1) % len(self._order)
                    return slot, number
                self._change.wait()
        return None

    def _choose(self, session: _Session) -> int | None:
        """A layer that is waited for, else the next in order that is in no slot."""
        for number in session.wanted:
            if session.slot_of(number) is None:
                return number
        following = self._order[session.cursor]
        return following if session.slot_of(following) is None else None

    @staticmethod
    def _free(session: _Session, number: int) -> Slot | None:
        """An empty slot; for a layer that is waited for, also one staged too early."""
        for slot in session.slots:
            if slot.number is None:
                return slot
        if number in session.wanted:
            for slot in session.slots:
                if slot.ready and not slot.users and slot.number not in session.wanted:
                    return slot
        return None
