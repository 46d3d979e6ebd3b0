"""Ranks of one machine that act as one engine, and what they exchange.

They meet by a store, a file, without torch's default process group: that one belongs to the program
that uses the package, and a process may be in several groups here.
"""

from __future__ import annotations

import pickle
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from neounify.errors import NeounifyError

T = TypeVar("T")

MEETING = timedelta(minutes=10)
"""Time for all ranks to come to the store."""
EXCHANGE = timedelta(minutes=30)
"""Time of one exchange inside a step; a longer one is an error."""
IDLE = timedelta(days=365)
"""Time that a rank waits for orders."""
SLICE = timedelta(seconds=0.5)
"""Waiting is done in pieces, between which Python handles signals, such as that of Ctrl-C."""
SMALL = 4096
"""Bytes of an object that take one exchange; a larger one takes two."""
HEADER = 8


class Group:
    """Rank `rank` of `size` ranks that act as one engine. One process is the case of size 1.

    The exchanges are collective: every rank calls each of them, in the same order. They work on
    tensors of any device; those between GPUs go by NCCL if every rank has its own. They raise
    ConnectionError where another rank has ended, or takes too long.
    """

    def __init__(self, rank: int, size: int, store: Any, device: torch.device, nccl: bool) -> None:
        self.rank, self.size, self.device = rank, size, device
        self.first = rank == 0
        self._store = store
        self._nccl: Any = None
        self._parts: dict[int, Group] = {}
        if size == 1:
            return
        self._gloo = _gloo(distributed.PrefixStore("gloo", store), rank, size)
        if nccl:
            self._nccl = _nccl(distributed.PrefixStore("nccl", store), rank, size)

    @staticmethod
    def meet(path: Path, rank: int, devices: Sequence[str]) -> Group:
        """The group of all ranks that meet at a file; `devices` has that of each rank."""
        if len(devices) == 1:
            return Group(0, 1, None, torch.device(devices[0]), nccl=False)
        store = distributed.FileStore(str(path), len(devices))
        store.set_timeout(MEETING)
        apart = len(set(devices)) == len(devices)
        nccl = apart and all(device.startswith("cuda") for device in devices)
        return Group(rank, len(devices), store, torch.device(devices[rank]), nccl)

    def part(self, size: int) -> Group:
        """The group of `size` consecutive ranks that this one belongs to, the same every time."""
        if size == self.size:
            return self
        if size not in self._parts:
            number, rank = divmod(self.rank, size)
            store = distributed.PrefixStore(f"part-{size}-{number}", self._store)
            self._parts[size] = Group(rank, size, store, self.device, self._nccl is not None)
        return self._parts[size]

    def leave(self) -> None:
        """Close the connections: exchanges that others wait in fail there."""
        for part in self._parts.values():
            part.leave()
        if self._nccl is not None:
            self._nccl.abort()
        if self.size > 1:
            self._gloo.abort()

    # --- objects ---

    def choose(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0: a choice that depends on time or chance, made once."""
        if self.size == 1:
            return make()
        return self._broadcast(make() if self.first else None, EXCHANGE)

    def announce(self, value: T) -> None:
        """Send the others an object that they `hear`."""
        self._broadcast(value, EXCHANGE)

    def hear(self) -> Any:
        """The next object that rank 0 announces."""
        return self._broadcast(None, IDLE)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank."""
        if self.size == 1:
            return [value]
        data = pickle.dumps(value)
        first = self._all_gather(_framed(data))
        sizes = [_size_of(x) for x in first]
        parts = [x[HEADER : HEADER + n] for x, n in zip(first, sizes, strict=True)]
        rest = max(sizes) - (SMALL - HEADER)
        if rest > 0:
            tail = torch.zeros(rest, dtype=torch.uint8)
            more = _bytes(data[SMALL - HEADER :])
            tail[: more.shape[0]] = more
            tails = self._all_gather(tail)
            parts = [
                torch.cat([x, y[: max(0, n - x.shape[0])]])
                for x, y, n in zip(parts, tails, sizes, strict=True)
            ]
        return [pickle.loads(x.numpy().tobytes()) for x in parts]

    def together(self, work: Callable[[], T]) -> T:
        """The result of `work` on this rank, if it ends well on all.

        Else every rank raises the error of the first rank that has one; for the others an
        unexpected one is a ConnectionError that names the rank.
        """
        if self.size == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except Exception as raised:
            error = raised
        for rank, other in enumerate(self.gather(error)):
            if other is not None:
                if rank == self.rank or isinstance(other, NeounifyError):
                    raise other
                reason = f"{type(other).__name__}: {other}"
                raise ConnectionError(f"rank {rank} failed with {reason}") from other
        return result  # type: ignore[return-value]

    def _broadcast(self, value: Any, limit: timedelta) -> Any:
        data = pickle.dumps(value) if self.first else b""
        first = _framed(data)
        self._from_first(first, limit)
        size = _size_of(first)
        if size > SMALL - HEADER:
            rest = _bytes(data[SMALL - HEADER :]) if self.first else torch.empty(0)
            if not self.first:
                rest = torch.empty(size - (SMALL - HEADER), dtype=torch.uint8)
            self._from_first(rest, EXCHANGE)
            first = torch.cat([first, rest])
        if self.first:
            return value
        return pickle.loads(first[HEADER : HEADER + size].numpy().tobytes())

    def _from_first(self, data: Tensor, limit: timedelta) -> None:
        options = distributed.BroadcastOptions()
        options.rootRank, options.timeout = 0, limit
        _finish(self._gloo.broadcast([data], options))

    # --- tensors ---

    def add_(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over the ranks, the same bits on all of them."""
        if self.size == 1:
            return
        for tensor in tensors:
            if self._nccl is not None and tensor.is_cuda:
                self._nccl.allreduce([tensor]).wait()
                continue
            host = tensor.cpu().contiguous()
            _finish(self._gloo.allreduce([host]))
            if host is not tensor:
                tensor.copy_(host)

    def join_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """The rows of all ranks behind each other; rank r gives `counts[r]` of them."""
        if self.size == 1:
            return rows
        most = max(counts)
        if rows.shape[0] < most:
            rows = torch.cat([rows, rows.new_zeros(most - rows.shape[0], *rows.shape[1:])])
        pieces = self._all_gather(rows.contiguous())
        return torch.cat([x[:count] for x, count in zip(pieces, counts, strict=True)])

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        backend, host = self._gloo, tensor
        if self._nccl is not None and tensor.is_cuda:
            backend = self._nccl
        else:
            host = tensor.cpu()
        pieces = [torch.empty_like(host) for _ in range(self.size)]
        work = backend.allgather([pieces], [host])
        if backend is self._gloo:
            _finish(work)
        else:
            work.wait()
        return [piece.to(tensor.device) for piece in pieces]


ALONE = Group(0, 1, None, torch.device("cpu"), nccl=False)
"""A single process."""


def share(total: int, rank: int, ranks: int) -> range:
    """The consecutive items of `total` that a rank has: as many as any other, or one more."""
    return range(total * rank // ranks, total * (rank + 1) // ranks)


def _finish(work: Any) -> None:
    """Wait for an exchange of gloo."""
    while not work.is_completed():
        with suppress(RuntimeError):  # the time is over, or the error that is raised below
            work.wait(SLICE)
    try:
        work.wait()
    except RuntimeError as error:
        raise ConnectionError(f"another rank does not answer: {error}") from error


def _gloo(store: Any, rank: int, size: int) -> Any:
    gloo: Any = distributed.ProcessGroupGloo  # its options lack declarations
    options = gloo._Options()
    # Only this machine: what ranks send each other is not protected.
    interface = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "")
    options._devices = [gloo.create_device(interface=interface)]
    options._timeout = EXCHANGE
    return gloo(store, rank, size, options)


def _nccl(store: Any, rank: int, size: int) -> Any:
    nccl: Any = distributed.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = EXCHANGE
    return nccl(store, rank, size, options)


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()


def _framed(data: bytes) -> Tensor:
    """The length of some bytes and the first of them, [SMALL]."""
    start = len(data).to_bytes(HEADER, "little") + data[: SMALL - HEADER]
    return _bytes(start.ljust(SMALL, b"\0"))


def _size_of(framed: Tensor) -> int:
    return int.from_bytes(framed[:HEADER].numpy().tobytes(), "little")
