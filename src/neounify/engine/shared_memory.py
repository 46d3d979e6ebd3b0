"""Shared memory between the processes of one server: pieces, and the transport of tensors in them.

A piece is a file in memory, written and read as a file instead of being mapped. It is one copy
either way, but a full memory is an error of the write, where a mapping would end the process with
SIGBUS.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import math
import os
import secrets
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from neounify.distributed.group import Group
from neounify.engine.messages import TensorRef
from neounify.errors import OutOfMemory, TensorsGone

PREFIX = "psm_neounify_"
"""Prefix of all names. Pieces of Python begin with "psm_" too, which tools look for."""
LOCK = ".lock"
FREE = "free"
"""In names of pieces that can be written again, before their number."""
REUSED_BYTES = 2**20
"""Pieces of at least this size are reused: of 100 MB, a new one took 0.041 s of a core, another
one 0.015 s."""
FREE_PIECES, FREE_BYTES = 4, 2**30
"""Free pieces that a sender keeps at most, and their size together."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)


def folder() -> Path:
    """Folder of the pieces: in memory on Linux, among the temporary files elsewhere."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else Path(tempfile.gettempdir())


def free_bytes() -> int:
    """Free space for pieces, in bytes."""
    status = os.statvfs(folder())
    return status.f_bavail * status.f_frsize


def write_piece(name: str, buffers: Iterable[memoryview], *, reused: bool = False) -> None:
    """Write a new piece, or a `reused` one, with the buffers one after the other.

    Raises OutOfMemory.
    """
    path = folder() / name
    kind = os.O_NOFOLLOW if reused else os.O_CREAT | os.O_EXCL
    try:
        descriptor = os.open(path, kind | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                for buffer in buffers:
                    file.write(buffer)
        except BaseException:
            remove_piece(name)
            raise
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise OutOfMemory(
            f"{path.parent} has no room left for the tensors of a request "
            f"({free_bytes() / 1e6:.0f} MB are free)"
        ) from error


def read_piece(name: str, buffers: Sequence[memoryview]) -> bool:
    """Fill the buffers from a piece; False if it is missing or too short."""
    try:
        with (folder() / name).open("rb") as file:
            return all(file.readinto(buffer) == len(buffer) for buffer in buffers)
    except FileNotFoundError:
        return False


def give_back_piece(name: str) -> None:
    """Let the sender of a piece that was read use it again, or remove it; missing is no error.

    Only a whole reading ends so: a piece that is given up is removed, since another process may
    still be reading it.
    """
    path = folder() / name
    prefix = name.rstrip("0123456789")
    with suppress(FileNotFoundError):
        size = path.stat().st_size
        free = _free_pieces(prefix) if size >= REUSED_BYTES else {}
        full = len(free) >= FREE_PIECES or sum(free.values()) + size > FREE_BYTES
        if size < REUSED_BYTES or full:
            remove_piece(name)
        else:
            path.rename(folder() / f"{prefix}{FREE}{_number(name, prefix)}")


def reuse_piece(name: str, size: int) -> bool:
    """Give a free piece of the same sender a new name, the best one for `size` bytes.

    Returns whether there was one.
    """
    prefix = name.rstrip("0123456789")
    free = _free_pieces(prefix)
    # The smallest that is large enough, else the largest.
    for other in sorted(free, key=lambda piece: (free[piece] < size, abs(free[piece] - size))):
        with suppress(FileNotFoundError):
            (folder() / other).rename(folder() / name)
            return True
    return False


def _free_pieces(prefix: str) -> dict[str, int]:
    """Names and sizes in bytes of the pieces of a sender that are free."""
    sizes: dict[str, int] = {}
    for name in _names(prefix + FREE):
        with suppress(FileNotFoundError):
            sizes[name] = (folder() / name).stat().st_size
    return sizes


def remove_piece(name: str) -> None:
    """Free a piece; a missing one is no error."""
    with suppress(FileNotFoundError):
        (folder() / name).unlink()


def remove_pieces(prefix: str, *, after: int = 0) -> int:
    """Remove the pieces `prefix`N with N > `after`, and the free ones; returns their number."""
    names = [name for name in _names(prefix) if _number(name, prefix) > after]
    names += _free_pieces(prefix)
    for name in names:
        remove_piece(name)
    return len(names)


# --- the names of one server ---


class SharedSpace:
    """Names of one server's pieces, reserved while it holds a lock.

    They are closed at the latest when the object, or the interpreter, ends. The pieces of a
    server that was killed are removed by one of its engines that notices, or by the next server
    when it starts.
    """

    def __init__(self) -> None:
        self.prefix = f"{PREFIX}{secrets.token_hex(6)}_"
        self._closing: weakref.finalize[..., SharedSpace] | None = None

    def open(self) -> None:
        """Lock the names, after removing what killed servers have left."""
        remove_abandoned()
        path = folder() / (self.prefix + LOCK)
        while self._closing is None:
            lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if _is(lock, path):
                self._closing = weakref.finalize(self, _unlock, self.prefix, lock, os.getpid())
            else:  # another process removed it as abandoned before it was locked
                os.close(lock)

    def close(self) -> None:
        """Remove all pieces and unlock the names."""
        if self._closing is not None:
            self._closing()
            self._closing = None


def _unlock(prefix: str, lock: int, owner: int) -> None:
    if os.getpid() == owner:  # not a fork of it
        _remove_all(prefix)
    os.close(lock)


def remove_abandoned() -> None:
    """Remove the pieces of all servers that have ended without doing it themselves."""
    for name in _names(PREFIX):
        if name.endswith(LOCK):
            _remove_if_abandoned(name)


def remove_after_end(prefix: str, seconds: float = 5.0) -> None:
    """Remove all pieces of the server whose engine uses `prefix`, as soon as the server has ended.

    An engine may see the pipe to a killed server closed before the system unlocks the server's
    names, so it tries again for up to `seconds`.
    """
    end = time.monotonic() + seconds
    for name in _names(PREFIX):
        if name.endswith(LOCK) and prefix.startswith(name.removesuffix(LOCK)):
            while not _remove_if_abandoned(name) and time.monotonic() < end:
                time.sleep(0.02)


def _remove_if_abandoned(lock_name: str) -> bool:
    """Remove a server's pieces if it has ended; returns whether they are gone."""
    path = folder() / lock_name
    with _abandoned(path) as abandoned:
        if abandoned:
            _remove_all(lock_name.removesuffix(LOCK))
    return not path.exists()


@contextmanager
def _abandoned(path: Path) -> Iterator[bool]:
    """Whether a lock is free; it is held inside the context."""
    try:
        lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # gone meanwhile, or another user's
        yield False
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        yield False
    else:
        yield _is(lock, path)
    finally:
        os.close(lock)


def _remove_all(prefix: str) -> None:
    for name in _names(prefix):
        if not name.endswith(LOCK):
            remove_piece(name)
    remove_piece(prefix + LOCK)


def _names(prefix: str) -> list[str]:
    return [entry.name for entry in folder().glob(prefix + "*")]


def _number(name: str, prefix: str) -> int:
    digits = name.removeprefix(prefix)
    return int(digits) if digits.isdecimal() else 0


def _is(descriptor: int, path: Path) -> bool:
    """Whether the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


# --- tensors ---


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor in shared memory."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True, eq=False)
class SharedTensors:
    """Tensors by name, one after the other in a piece of shared memory."""

    memory: str
    specs: Mapping[str, TensorSpec]

    def free(self) -> None:
        remove_piece(self.memory)


@dataclass(frozen=True, eq=False)
class HeadShares:
    """Keys and values of a sequence, [layers, heads, length, d] each, from the ranks of a group.

    `parcels` are those of each rank and the key heads that they hold, in order and without gaps:
    ranges decide, since sender and receiver may be any number of ranks.
    """

    parcels: tuple[tuple[range, SharedTensors], ...]

    def free(self) -> None:
        for _, tensors in self.parcels:
            tensors.free()

    def overlapping(self, wanted: range) -> list[tuple[range, SharedTensors]]:
        """The parcels that hold some of the heads wanted, and which heads of them those are."""
        overlaps = []
        for heads, tensors in self.parcels:
            start, stop = max(heads.start, wanted.start), min(heads.stop, wanted.stop)
            if start < stop:
                overlaps.append((range(start - heads.start, stop - heads.start), tensors))
        return overlaps


class SharedTransport:
    """Transport of engine processes: one copy into shared memory and one out of it.

    Its pieces are named `prefix`, of a `SharedSpace`, and the numbers from `first`; `last_piece` is
    the newest. Without a prefix it opens a space, which ends with it.
    """

    copies = True

    def __init__(self, prefix: str | None = None, first: int = 1) -> None:
        if prefix is None:
            self._space = SharedSpace()
            self._space.open()
            prefix = self._space.prefix
        self.prefix = prefix
        self.last_piece = first - 1
        self._numbers = itertools.count(first)

    def pack(self, tensors: Mapping[str, Tensor]) -> SharedTensors:
        specs = {
            name: TensorSpec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in tensors.items()
        }
        number = next(self._numbers)  # atomic: the server packs in several threads at once
        memory = f"{self.prefix}{number}"
        size = sum(spec.bytes for spec in specs.values())
        reused = size >= REUSED_BYTES and reuse_piece(memory, size)
        buffers = (_bytes(tensor.cpu().contiguous()) for tensor in tensors.values())
        write_piece(memory, buffers, reused=reused)
        self.last_piece = max(self.last_piece, number)
        return SharedTensors(memory, specs)

    def pack_heads(self, keys: Tensor, values: Tensor) -> TensorRef:
        return self.pack({"keys": keys, "values": values})

    def read(self, ref: TensorRef) -> Mapping[str, Tensor]:
        """The tensors of a reference, which stays. Raises TensorsGone."""
        if isinstance(ref, HeadShares):
            heads = range(ref.parcels[-1][0].stop)
            return self.read_heads(ref, heads)
        assert isinstance(ref, SharedTensors)
        tensors = {
            name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))
            for name, spec in ref.specs.items()
        }
        if not read_piece(ref.memory, [_bytes(tensor) for tensor in tensors.values()]):
            raise TensorsGone(f"the tensors {', '.join(ref.specs)} are gone")
        return tensors

    def read_heads(self, ref: HeadShares, wanted: range) -> Mapping[str, Tensor]:
        """Some of the heads of keys and values, from the parcels that hold them."""
        pieces: dict[str, list[Tensor]] = {}
        for heads, tensors in ref.overlapping(wanted):
            for name, tensor in self.read(tensors).items():
                pieces.setdefault(name, []).append(tensor[:, heads.start : heads.stop])
        return {name: torch.cat(parts, dim=1) for name, parts in pieces.items()}

    def take(self, ref: TensorRef) -> Mapping[str, Tensor]:
        tensors = self.read(ref)
        give_back(ref)
        return tensors


def give_back(ref: TensorRef) -> None:
    """Let the senders reuse the pieces of a reference that was read."""
    assert isinstance(ref, SharedTensors | HeadShares)
    parcels = [tensors for _, tensors in ref.parcels] if isinstance(ref, HeadShares) else [ref]
    for tensors in parcels:
        give_back_piece(tensors.memory)


class GroupTransport:
    """Transport of the engines of a group, the same on all its ranks; every call is collective.

    All ranks take tensors, which are freed when all have them. Results are packed by rank 0 alone,
    since it alone answers; the others get a reference to nothing.
    """

    copies = True

    def __init__(self, transport: SharedTransport, group: Group) -> None:
        self._own, self._group = transport, group

    def pack(self, tensors: Mapping[str, Tensor]) -> TensorRef:
        packing, first = self._own, self._group.first
        ref = self._group.together(lambda: packing.pack(tensors) if first else None)
        return ref if ref is not None else HeadShares(())

    def pack_heads(self, keys: Tensor, values: Tensor) -> TensorRef:
        """One reference to the keys and values of all ranks, each of which has a share of heads."""
        ref: SharedTensors | None = None
        try:
            ref = self._own.pack({"keys": keys, "values": values})
        except OutOfMemory as error:
            outcome: SharedTensors | OutOfMemory = error
        else:
            outcome = ref
        parcels, start = [], 0
        for other in self._group.gather(outcome):
            if isinstance(other, OutOfMemory):
                if ref is not None:
                    ref.free()
                raise other
            stop = start + other.specs["keys"].shape[1]
            parcels.append((range(start, stop), other))
            start = stop
        return HeadShares(tuple(parcels))

    def take(self, ref: TensorRef) -> Mapping[str, Tensor]:
        tensors = self._group.together(lambda: self._own.read(ref))
        if self._group.first:
            give_back(ref)
        return tensors


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    if not tensor.numel():
        return memoryview(bytearray())
    return tensor.detach().view(-1).view(torch.uint8).numpy().data
