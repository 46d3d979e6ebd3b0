"""Shared memory: a full one is one error, what was left is found, tensors arrive as they were."""

from __future__ import annotations

import errno
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from neounify.distributed.group import share
from neounify.engine import shared_memory
from neounify.engine.messages import LocalTransport, Transport
from neounify.engine.shared_memory import (
    HeadShares,
    SharedSpace,
    SharedTensors,
    SharedTransport,
    folder,
    remove_abandoned,
    remove_after_end,
    remove_pieces,
)
from neounify.errors import OutOfMemory, TensorsGone

MEGABYTE = torch.zeros(2**18)
KILLED = """
import sys, time
from neounify.engine.shared_memory import SharedSpace, write_piece
space = SharedSpace()
space.open()
for number in range(3):
    write_piece(f"{space.prefix}und1_{number}", [memoryview(b"left behind")])
print(space.prefix, flush=True)
time.sleep(60)
"""


def names(prefix: str) -> set[str]:
    return {path.name for path in folder().glob(f"{prefix}*")}


def pieces(prefix: str) -> set[str]:
    """Without the lock of the names."""
    return {name for name in names(prefix) if not name.endswith(shared_memory.LOCK)}


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes fail in the kernel, as they do when the memory is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_memory_is_one_error_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_FULL", (*shared_memory._FULL, errno.EFBIG))
    transport = SharedTransport()
    with files_of_at_most(2**16), pytest.raises(OutOfMemory, match="no room left for the tensors"):
        transport.pack({"noise": MEGABYTE})
    assert pieces(transport.prefix) == set()
    ref = transport.pack({"noise": MEGABYTE})
    assert torch.equal(transport.take(ref)["noise"], MEGABYTE)


def test_a_tensor_that_cannot_be_packed_leaves_nothing() -> None:
    transport = SharedTransport()
    with pytest.raises(RuntimeError):
        transport.pack({"good": MEGABYTE, "bad": torch.empty(2, device="meta")})
    assert pieces(transport.prefix) == set()


def test_what_a_killed_server_left_is_removed_by_the_next() -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        prefix = process.stdout.readline().decode().strip()
        remove_abandoned()
        assert len(names(prefix)) == 4  # three and the lock: the server is alive
        process.kill()
    space = SharedSpace()
    space.open()
    try:
        assert names(prefix) == set()
        assert len(names(space.prefix)) == 1
    finally:
        space.close()
    assert names(space.prefix) == set()
    space.close()


def test_an_engine_waits_for_the_end_of_a_server_that_is_being_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        prefix = process.stdout.readline().decode().strip()
        sweep = threading.Thread(target=remove_after_end, args=(prefix + "und1_", 30.0))
        sweep.start()
        remove_after_end("another", 30.0)  # no such server: at once
        assert len(names(prefix)) == 4
        process.kill()
        sweep.join(20)
        assert not sweep.is_alive()
    assert names(prefix) == set()


STANDALONE = """
import os, sys, time, torch
from neounify.engine.shared_memory import SharedTransport
transport = SharedTransport()
left = transport.pack({"keys": torch.zeros(2**18)})
transport.take(transport.pack({"keys": torch.zeros(2**18)}))
print(transport.prefix, flush=True)
if sys.argv[1] == "forks" and not os.fork():
    sys.exit()  # the pieces are those of the first process
if sys.argv[1] == "forks":
    os.wait()
    transport.take(left)
if sys.argv[1] == "killed":
    time.sleep(60)
"""


@pytest.mark.parametrize("end", ["ends", "forks", "killed"])
def test_a_transport_alone_leaves_nothing_behind_its_program(end: str) -> None:
    command = [sys.executable, "-c", STANDALONE, end]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        prefix = process.stdout.readline().decode().strip()
        if end == "killed":
            assert len(names(prefix)) == 3
            process.kill()
    if end == "killed":
        assert len(names(prefix)) == 3
        SharedTransport()  # the next start
    else:
        assert process.returncode == 0
    assert names(prefix) == set()


def test_a_transport_alone_leaves_nothing_behind_itself() -> None:
    transport = SharedTransport()
    prefix = transport.prefix
    transport.pack({"keys": MEGABYTE})
    assert len(names(prefix)) == 2
    del transport
    assert names(prefix) == set()


def test_only_unreported_pieces_are_removed_after_a_crash() -> None:
    transport = SharedTransport()
    reported, *unreported = (transport.pack({"pixels": MEGABYTE}) for _ in range(3))
    assert isinstance(reported, SharedTensors)
    try:
        assert transport.last_piece == 3
        assert remove_pieces(transport.prefix, after=1) == len(unreported)
        assert pieces(transport.prefix) == {reported.memory}
    finally:
        reported.free()


def test_pieces_are_for_their_owner_only() -> None:
    transport = SharedTransport()
    ref = transport.pack({"pixels": MEGABYTE})
    assert isinstance(ref, SharedTensors)
    assert (folder() / ref.memory).stat().st_mode & 0o077 == 0
    ref.free()


# --- the transport of tensors ---


TENSORS = {
    "keys": torch.randn(2, 3, 5),
    "half": torch.randn(7).bfloat16(),
    "bytes": torch.arange(9, dtype=torch.uint8).view(3, 3).t(),
    "nothing": torch.empty(2, 0, 4),
    "one": torch.tensor(3.5, dtype=torch.float64),
}


@pytest.mark.parametrize("transport", [LocalTransport(), SharedTransport()])
def test_tensors_arrive_as_they_were(transport: Transport) -> None:
    taken = transport.take(transport.pack(TENSORS))
    assert list(taken) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert taken[name].dtype == tensor.dtype
        assert torch.equal(taken[name], tensor)
    if isinstance(transport, SharedTransport):
        assert not pieces(transport.prefix)


def test_a_freed_reference_is_gone_and_may_be_freed_again() -> None:
    transport = SharedTransport()
    ref = transport.pack(TENSORS)
    assert isinstance(ref, SharedTensors)
    assert pieces(transport.prefix) == {ref.memory}
    ref.free()
    ref.free()
    assert not pieces(transport.prefix)
    with pytest.raises(TensorsGone, match="keys"):
        transport.take(ref)


# --- reused pieces, shares of heads ---


def test_a_piece_that_was_read_is_written_again() -> None:
    transport = SharedTransport()
    try:
        first = transport.pack({"keys": MEGABYTE})
        transport.take(first)
        (free,) = pieces(transport.prefix)
        inode = (folder() / free).stat().st_ino
        smaller = torch.ones(2**18)
        second = transport.pack({"keys": smaller})
        assert pieces(transport.prefix) == {second.memory}
        assert (folder() / second.memory).stat().st_ino == inode
        assert torch.equal(transport.take(second)["keys"], smaller)
        # Both are taken: the first reference is to nothing, not to the second's tensors.
        with pytest.raises(TensorsGone):
            transport.take(first)
        first.free()
        assert len(pieces(transport.prefix)) == 1
    finally:
        remove_pieces(transport.prefix)
    assert not pieces(transport.prefix)


def test_a_piece_that_is_given_back_late_is_written_by_the_next_start() -> None:
    """An engine that was started again has the names of the earlier one, with other numbers."""
    space = SharedSpace()
    space.open()
    earlier, later = SharedTransport(space.prefix), SharedTransport(space.prefix, 1000)
    assert (earlier.last_piece, later.last_piece) == (0, 999)
    ref = earlier.pack({"keys": MEGABYTE})
    earlier.pack({"keys": MEGABYTE})
    remove_pieces(space.prefix, after=1)  # those that were not reported
    later.take(ref)
    assert len(pieces(space.prefix)) == 1
    second = later.pack({"keys": MEGABYTE})
    assert pieces(space.prefix) == {second.memory} == {f"{space.prefix}1000"}
    space.close()


def test_a_piece_that_is_given_up_is_not_reused() -> None:
    """Another process may still read it."""
    transport = SharedTransport()
    transport.pack({"keys": MEGABYTE}).free()
    assert not pieces(transport.prefix)


def test_few_free_pieces_are_kept() -> None:
    transport = SharedTransport()
    try:
        for ref in [transport.pack({"keys": MEGABYTE}) for _ in range(6)]:
            transport.take(ref)
        assert len(pieces(transport.prefix)) == shared_memory.FREE_PIECES
        transport.take(transport.pack({"small": torch.zeros(3)}))
        assert len(pieces(transport.prefix)) == shared_memory.FREE_PIECES
    finally:
        remove_pieces(transport.prefix)


@pytest.mark.parametrize(
    ("senders", "receivers"), [(1, 1), (2, 1), (2, 2), (4, 2), (2, 4), (8, 3), (3, 2)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_arrive_bit_for_bit(senders: int, receivers: int, dtype: torch.dtype) -> None:
    """By ranges of heads, from any number of ranks to any number."""
    heads = 8
    whole = {name: torch.randn(2, heads, 5, 4).to(dtype) for name in ("keys", "values")}
    transport = SharedTransport()
    parcels = []
    for rank in range(senders):
        part = share(heads, rank, senders)
        tensors = {name: x[:, part.start : part.stop] for name, x in whole.items()}
        parcels.append((part, transport.pack(tensors)))
    ref = HeadShares(tuple(parcels))
    for rank in range(receivers):
        wanted = share(heads, rank, receivers)
        read = transport.read_heads(ref, wanted)
        for name, tensor in whole.items():
            assert torch.equal(read[name], tensor[:, wanted.start : wanted.stop])
        # Only the parcels that overlap are read.
        for part, parcel in parcels:
            needed = max(part.start, wanted.start) < min(part.stop, wanted.stop)
            assert (parcel in [other for _, other in ref.overlapping(wanted)]) == needed
    for name, tensor in transport.take(ref).items():
        assert torch.equal(tensor, whole[name])
    assert not pieces(transport.prefix)
