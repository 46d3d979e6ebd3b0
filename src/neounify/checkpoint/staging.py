"""Layers that pass through a device: files → two locked buffers → three slots, ahead of their use.

Reader threads `preadv` the byte ranges of a layer, joined where they touch, straight into a staging
buffer; a copy stream moves it into a slot that never moves; computing waits for the slot's event,
the slot for that of computing. The order wraps from the last layer to the first of the next pass.
Casts, LoRA updates and decoding happen on the device. No copy of the weights is held on the host
but the page cache, which keeps what there is room for.

Of a sparse layer that few tokens pass through, what is not of an expert is staged ahead, and the
experts that they are routed to are read into the same slot once that is known.

On a CPU the same schedule runs with `HostCopies`, whose events do nothing, so that it is tested
without a device.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from neounify.checkpoint.layer_image import LayerImage, Read
from neounify.runtime.memory_plan import SLOTS, STAGING


def readers_for(cores: int) -> int:
    """Threads that read a layer, on a host with so many cores: half of them, from 4 to 8.

    A core reads some 7 GB/s from the page cache, so that PCIe 4 (24 GB/s) needs 4 and PCIe 5
    (50 GB/s) 8.
    """
    return min(8, max(4, cores // 2))


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
    """Copies to a CUDA or ROCm device, in a separate stream.

    A locked buffer takes more than its size: torch rounds it up to a power of two (386 MB to 512
    MiB), and keeps it for the process once it is freed.
    """

    def __init__(self, device: torch.device) -> None:
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
    """A buffer on the device: the layer in it, whether it is there already, and its users.

    `experts` are those of the layer that are in it, `ordered` those that are there or come, `taken`
    those that are weights of the model.
    """

    bytes: Tensor
    number: int | None = None
    ready: bool = False
    users: int = 0
    experts: set[int] = field(default_factory=set)
    ordered: set[int] = field(default_factory=set)
    taken: set[int] = field(default_factory=set)
    filled: Event | None = None
    used: Event | None = None

    def begin(self, number: int) -> None:
        """Make room for a layer."""
        self.number, self.ready = number, False
        for experts in (self.experts, self.ordered, self.taken):
            experts.clear()


class _Order(NamedTuple):
    """What goes into a slot next: some experts of its layer, and with `trunk` what is of none."""

    slot: Slot
    number: int
    experts: frozenset[int]
    trunk: bool


@dataclass(eq=False)
class _Session:
    """Threads and buffers from the first user's begin to the last one's end."""

    slots: list[Slot]
    buffers: list[Tensor]
    readers: ThreadPoolExecutor
    mover: threading.Thread | None = None
    wanted: list[int] = field(default_factory=list)
    orders: list[_Order] = field(default_factory=list)
    few: bool = False
    """Whether the last call was of few tokens, so that experts are read when they are needed."""
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
        self, layers: Mapping[int, LayerImage], copies: Copies, readers: int | None = None
    ) -> None:
        self._layers, self._copies = layers, copies
        self._readers = readers or readers_for(os.cpu_count() or 1)
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
                self._leave(slot, slot.number)

    def take(self, number: int, *, few: bool | None = None) -> None:
        """Wait until a layer is in a slot, and let computing wait for its copy.

        Its experts may come later, with `fetch`. `few`: whether sparse layers have few tokens now,
        None where that is not known.
        """
        if number not in self._layers:
            return
        with self._change:
            session = self._session
            if session is None:
                raise RuntimeError("a layer is computed outside `use` of its stream")
            session.wanted.append(number)
            session.few = session.few if few is None else few
            self._change.notify_all()
            try:
                slot = self._wait(session, number)
            finally:
                session.wanted.remove(number)
            assert slot.filled is not None
            self._copies.wait(slot.filled)
            if not slot.users:
                try:
                    self._make_weights(slot, number, slot.experts, trunk=True)
                except BaseException:
                    # Out of memory, say: the layer stays in its slot, as before it was taken.
                    self._leave(slot, number)
                    slot.used = self._copies.computed()
                    self._change.notify_all()
                    raise
            slot.users += 1

    def fetch(self, number: int, experts: Collection[int]) -> None:
        """Wait until these experts of a layer that was taken are there too."""
        with self._change:
            session = self._session
            slot = None if session is None else session.slot_of(number)
            if session is None or slot is None:
                return  # a layer that stays
            missing = frozenset(experts) - slot.ordered
            if missing:
                slot.ordered |= missing
                session.orders.append(_Order(slot, number, missing, trunk=False))
                self._change.notify_all()
            while not slot.experts.issuperset(experts):
                if session.error is not None:
                    raise session.error
                self._change.wait()
            assert slot.filled is not None
            self._copies.wait(slot.filled)
            self._make_weights(slot, number, experts)

    def _make_weights(
        self, slot: Slot, number: int, experts: Collection[int], *, trunk: bool = False
    ) -> None:
        """Make tensors of a slot the weights of the model, unless they are.

        After an error some may be, and count as if none were.
        """
        new = set(experts) - slot.taken
        with torch.inference_mode(False), torch.no_grad():
            for part in self._layers[number].some(new, trunk=trunk):
                part.take(slot.bytes)
        slot.taken |= new

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
            self._leave(slot, number)
            slot.number, slot.ready = None, False
            self._change.notify_all()

    def _leave(self, slot: Slot, number: int) -> None:
        """Take the tensors of a slot off the model."""
        slot.taken.clear()
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
            while (order := self._next(session)) is not None:
                slot, number, experts, trunk = order
                image, buffer = self._layers[number], session.buffers[turn]
                if (event := copied[turn]) is not None:
                    event.synchronize()
                self._read(session, image.reads(experts, trunk=trunk), buffer)
                for start, stop in image.ranges(experts, trunk=trunk):
                    copied[turn] = self._copies.copy(
                        slot.bytes[start:stop], buffer[start:stop], slot.used
                    )
                with self._change:
                    slot.filled, slot.ready = copied[turn], True
                    slot.experts |= experts
                    self._change.notify_all()
                turn = (turn + 1) % len(session.buffers)
        except BaseException as error:  # the thread that waits raises it
            with self._change:
                session.error = error
                self._change.notify_all()
        for event in copied:
            if event is not None:
                # `close` frees buffers and slots next. A device that fails moves nothing.
                with suppress(RuntimeError):
                    event.synchronize()

    def _read(self, session: _Session, reads: Sequence[Read], buffer: Tensor) -> None:
        view = buffer.numpy().data

        def read(piece: Read) -> None:
            targets = [view[offset : offset + size] for offset, size in piece.places]
            piece.file.read_into(piece.start, targets)

        for _ in session.readers.map(read, reads):
            if session.closed:
                return

    def _next(self, session: _Session) -> _Order | None:
        """What to stage next; waits for something, None when the session ends."""
        with self._change:
            while not session.closed:
                if session.orders:
                    return session.orders.pop(0)
                number = self._choose(session)
                slot = None if number is None else self._free(session, number)
                if number is not None and slot is not None:
                    slot.begin(number)
                    position = self._order.index(number)
                    session.cursor = (position + 1) % len(self._order)
                    all_experts = self._layers[number].experts
                    slot.ordered |= frozenset() if session.few else all_experts
                    return _Order(slot, number, frozenset(slot.ordered), trunk=True)
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
