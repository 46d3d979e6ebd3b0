"""Tensors arrive as they were sent, and leave no memory behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from neounify.serve.transport import (
    LocalTransport,
    ParcelGone,
    SharedParcel,
    SharedTransport,
    Transport,
)

TENSORS = {
    "keys": torch.randn(2, 3, 5),
    "half": torch.randn(7).bfloat16(),
    "bytes": torch.arange(9, dtype=torch.uint8).view(3, 3).t(),
    "nothing": torch.empty(2, 0, 4),
    "one": torch.tensor(3.5, dtype=torch.float64),
}


def in_shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


@pytest.mark.parametrize("transport", [LocalTransport(), SharedTransport()])
def test_tensors_arrive_as_they_were(transport: Transport) -> None:
    before = in_shared_memory()
    taken = transport.take(transport.pack(TENSORS))
    assert list(taken) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert taken[name].dtype == tensor.dtype
        assert torch.equal(taken[name], tensor)
    assert in_shared_memory() == before


def test_a_freed_parcel_is_gone_and_may_be_freed_again() -> None:
    transport, before = SharedTransport(), in_shared_memory()
    parcel = transport.pack(TENSORS)
    assert isinstance(parcel, SharedParcel)
    assert in_shared_memory() - before == {parcel.memory}
    transport.free(parcel)
    transport.free(parcel)
    assert in_shared_memory() == before
    with pytest.raises(ParcelGone, match="keys"):
        transport.take(parcel)
