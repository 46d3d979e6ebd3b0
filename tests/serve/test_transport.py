"""Tensors arrive as they were sent, and leave no memory behind."""

from __future__ import annotations

import pytest
import torch

from neounify.engine.messages import LocalTransport, Transport
from neounify.errors import TensorsGone
from neounify.serve.shared_memory import SharedTensors, SharedTransport, folder

TENSORS = {
    "keys": torch.randn(2, 3, 5),
    "half": torch.randn(7).bfloat16(),
    "bytes": torch.arange(9, dtype=torch.uint8).view(3, 3).t(),
    "nothing": torch.empty(2, 0, 4),
    "one": torch.tensor(3.5, dtype=torch.float64),
}


def pieces(transport: SharedTransport) -> set[str]:
    return {path.name for path in folder().glob(f"{transport.prefix}*")}


@pytest.mark.parametrize("transport", [LocalTransport(), SharedTransport()])
def test_tensors_arrive_as_they_were(transport: Transport) -> None:
    taken = transport.take(transport.pack(TENSORS))
    assert list(taken) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert taken[name].dtype == tensor.dtype
        assert torch.equal(taken[name], tensor)
    if isinstance(transport, SharedTransport):
        assert not pieces(transport)


def test_a_freed_parcel_is_gone_and_may_be_freed_again() -> None:
    transport = SharedTransport()
    parcel = transport.pack(TENSORS)
    assert isinstance(parcel, SharedTensors)
    assert pieces(transport) == {parcel.memory}
    parcel.free()
    parcel.free()
    assert not pieces(transport)
    with pytest.raises(TensorsGone, match="keys"):
        transport.take(parcel)
