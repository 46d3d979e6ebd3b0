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

from neounify.engine.messages import LocalTransport, Transport
from neounify.errors import OutOfMemory, TensorsGone
from neounify.serve import shared_memory
from neounify.serve.shared_memory import (
    SharedSpace,
    SharedTensors,
    SharedTransport,
    folder,
    remove_abandoned,
    remove_after_end,
    remove_pieces,
)

MEGABYTE = torch.zeros(2**18)
KILLED = """
import sys, time
from neounify.serve.shared_memory import SharedSpace, write_piece
space = SharedSpace()
space.open()
for number in range(3):
    write_piece(f"{space.prefix}und1_{number}", [memoryview(b"left behind")])
print(space.prefix, flush=True)
time.sleep(60)
"""


def pieces(prefix: str) -> set[str]:
    return {path.name for path in folder().glob(f"{prefix}*")}


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
        assert len(pieces(prefix)) == 4  # three and the lock: the server is alive
        process.kill()
    space = SharedSpace()
    space.open()
    try:
        assert pieces(prefix) == set()
        assert len(pieces(space.prefix)) == 1
    finally:
        space.close()
    assert pieces(space.prefix) == set()
    space.close()


def test_an_engine_waits_for_the_end_of_a_server_that_is_being_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        prefix = process.stdout.readline().decode().strip()
        sweep = threading.Thread(target=remove_after_end, args=(prefix + "und1_", 30.0))
        sweep.start()
        remove_after_end("another", 30.0)  # no such server: at once
        assert len(pieces(prefix)) == 4
        process.kill()
        sweep.join(20)
        assert not sweep.is_alive()
    assert pieces(prefix) == set()


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
