"""Memory and rates of devices, which are not here: torch's answers are patched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from neounify.errors import RequestError
from neounify.runtime.devices import Abilities
from neounify.runtime.plan import free_memory
from neounify.runtime.process import OwnMemory
from neounify.runtime.rates import (
    CARDS,
    DEVICE_NAMES,
    FIRST_USE,
    PROBE_BYTES,
    UNKNOWN,
    Rates,
    probe,
    rates_here,
    this_machine,
)
from support.device_abilities import pretending

HOST = 64 * 2**30
MEASURED = Rates(name="measured", products=1e12, copies=1e10, memory=1e11)


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("plan", "rates"):
        monkeypatch.setattr(f"neounify.runtime.{module}.available_bytes", lambda: HOST)
    process = OwnMemory(resident=3 * 2**28, private=2**28)
    monkeypatch.setattr("neounify.runtime.rates.own_memory", lambda: process)


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_memory_of_another_model_is_not_free(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 GB, 5 are free; torch reserved 10, of which weights have 9."""
    answers = {"mem_get_info": (5e9, 16e9), "memory_reserved": 10e9, "memory_allocated": 9e9}
    for name, answer in answers.items():
        monkeypatch.setattr(f"torch.{kind}.{name}", lambda device, answer=answer: answer)
    with pretending(Abilities(type=kind)):
        machine = this_machine(torch.device(kind), UNKNOWN)
        assert machine.device == free_memory(torch.device(kind)) == 6e9
    assert machine.host == HOST
    assert machine.process is None
    assert not machine.unified
    assert machine.by_layers is (kind == "cuda")


def test_cpu_and_mps_have_the_memory_of_the_host() -> None:
    for kind in ("cpu", "mps"):
        with pretending(Abilities(type=kind)):
            machine = this_machine(torch.device(kind), UNKNOWN)
            named = this_machine(torch.device(kind), UNKNOWN, 2**30)
        # What the process takes for itself is not free, and there for the model.
        assert (machine.device, machine.host, machine.unified) == (HOST + 2**28, HOST, True)
        assert (named.device, named.host) == (2**30, 2**30)
        assert (machine.process, named.process) == (3 * 2**28 + FIRST_USE, None)
        assert machine.by_layers is (kind == "cpu")


def test_a_driver_that_tells_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("the device doesn't support querying the available free memory")

    monkeypatch.setattr("torch.xpu.mem_get_info", fail)
    with pretending(Abilities(type="xpu")):
        assert free_memory(torch.device("xpu")) is None
        with pytest.raises(RequestError, match="how much memory is free for xpu, so nothing can"):
            this_machine(torch.device("xpu"), UNKNOWN)


def test_rates_are_measured_where_the_device_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table, by exact names, is for devices whose memory is too full to measure them."""
    device = torch.device("cuda")
    name = ["NVIDIA GeForce RTX 4090"]
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: name[0])
    monkeypatch.setattr("neounify.runtime.rates.probe", lambda *_: MEASURED)
    assert rates_here(device, torch.bfloat16) is MEASURED

    def fail(*_: object) -> Rates:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 256.00 MiB")

    monkeypatch.setattr("neounify.runtime.rates.probe", fail)
    assert rates_here(device, torch.bfloat16) is CARDS["RTX 4090"][1]
    for name[0] in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4070 Ti"):
        with pytest.raises(torch.OutOfMemoryError):
            rates_here(device, torch.bfloat16)
    assert set(DEVICE_NAMES.values()) == set(CARDS)


@pytest.mark.parametrize(
    ("free", "size"), [(HOST, PROBE_BYTES), (2**24, 2**21), (None, PROBE_BYTES)]
)
def test_bandwidth_is_measured_with_more_than_caches_hold(
    free: int | None, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of memory that is short, an eighth for each of two buffers."""
    assert PROBE_BYTES == 2**28
    sizes: list[int] = []
    ones = torch.ones

    def small(*shape: int, **options: Any) -> torch.Tensor:
        sizes.append(shape[0])
        return ones(8, **options) if len(shape) == 1 else ones(*shape, **options)

    monkeypatch.setattr("neounify.runtime.rates.available_bytes", lambda: free)
    monkeypatch.setattr("neounify.runtime.rates.PROBE_SECONDS", 0.0)
    monkeypatch.setattr("torch.ones", small)
    rates = probe(torch.device("cpu"), torch.float32)
    assert sizes[-1] == size
    assert rates.memory > 0
