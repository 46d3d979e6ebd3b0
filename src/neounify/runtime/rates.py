"""Devices and hosts: their memory, and rates of products, copies and reading.

Rates are measured in 0.3 s where the device is there, else those of a table of cards.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from neounify.errors import RequestError, is_out_of_memory
from neounify.runtime.devices import abilities
from neounify.runtime.plan import free_memory
from neounify.runtime.process import available_bytes, own_memory

if TYPE_CHECKING:
    import torch

PCIE_4, PCIE_5 = 24e9, 50e9
"""Bytes a second from pinned memory over 16 lanes."""
NVME_3, NVME_4 = 3.5e9, 7e9
PAGE_CACHE = 6.8e9
"""Bytes a second that one core reads from the page cache."""
FIRST_USE = 0.085e9
"""Resident bytes that libraries take at their first use on the CPU, most of it pages of their
files; measured, see docs/memory.md."""
PROBE_SECONDS = 0.3
PROBE_BYTES = 2**28
"""Bytes that are copied to measure a bandwidth, more than caches hold."""
PROBE_SHARE = 8
"""Of what is free on the host one part in so many is taken for each of the two buffers."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """φ, operations a second of matrix products; β, bytes a second to the device; others.

    `memory` is the bandwidth of the device's own memory, `disk` the rate files are read at where
    the page cache has no room for them, both in bytes a second.
    """

    name: str
    products: float
    copies: float
    memory: float
    disk: float = NVME_3
    bus: str = ""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A device of `device` bytes and a host of `host` bytes, with their rates.

    `unified`: the device computes in the host's memory (CPU, mps); `process` then is what the
    process takes before any weight, None for that of the plan. `by_layers`: whether layers can come
    to the device one by one.
    """

    device: float
    host: float
    rates: Rates
    unified: bool = False
    by_layers: bool = True
    process: float | None = None


CARDS = {
    "H100": (80, Rates(name="H100", products=520e12, copies=PCIE_5, memory=3350e9, bus="PCIe 5")),
    "RTX 5090": (
        32,
        Rates(name="RTX 5090", products=190e12, copies=PCIE_5, memory=1792e9, bus="PCIe 5"),
    ),
    "RTX 4090": (
        24,
        Rates(name="RTX 4090", products=140e12, copies=PCIE_4, memory=1008e9, bus="PCIe 4"),
    ),
    "RTX 3090": (
        24,
        Rates(name="RTX 3090", products=60e12, copies=PCIE_4, memory=936e9, bus="PCIe 4"),
    ),
    "RTX 4070": (
        12,
        Rates(name="RTX 4070", products=50e12, copies=PCIE_4, memory=504e9, bus="PCIe 4"),
    ),
}
"""GiB and sustained rates of cards; those of bandwidth are their makers'."""
DEVICE_NAMES = {
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA GeForce RTX 5090": "RTX 5090",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA GeForce RTX 3090": "RTX 3090",
    "NVIDIA GeForce RTX 4070": "RTX 4070",
}
"""Cards of the table by the names that drivers give them; variants with more words are others."""


UNKNOWN = Rates(name="unknown", products=1e12, copies=PAGE_CACHE, memory=1e10)
"""For plans of which only the memory counts."""


def rates_of_size(gibibytes: float) -> Rates:
    """Rates of the first card in the table whose memory is nearest to this size."""
    return min(CARDS.values(), key=lambda card: abs(card[0] - gibibytes))[1]


def this_machine(device: torch.device, rates: Rates, host: int | None = None) -> Machine:
    """What is free on a device of this machine, and on its host: `host` bytes, if given.

    A device that is the host's memory, if that is not given, has besides what is free what this
    process takes already, and plans have the process as it is measured. Raises RequestError where
    the system does not say how much memory is free.
    """
    here = abilities(device)
    measured = here.unified and host is None
    host = available_bytes() if host is None else host
    free = host if here.unified else free_memory(device)
    if host is None or free is None:
        raise RequestError(
            f"this system does not say how much memory is free for {device}, so nothing can be "
            "planned; plan='ignore' (--plan ignore) loads without a plan",
            param="plan",
        )
    return Machine(
        device=free + own_memory().private if measured else free,
        host=host,
        rates=rates,
        unified=here.unified,
        by_layers=here.by_layers,
        process=process_bytes() if measured else None,
    )


def process_bytes() -> float | None:
    """Bytes that this process takes before any weight, libraries in use; None where unknown."""
    resident = own_memory().resident
    return resident + FIRST_USE if resident else None


def rates_here(device: torch.device, dtype: torch.dtype) -> Rates:
    """Rates of a device of this machine: measured, or of the table where its memory is too full.

    Raises the error of memory for a device that is not in the table.
    """
    try:
        return probe(device, dtype)
    except Exception as error:
        card = DEVICE_NAMES.get(_name(device))
        if card is None or not is_out_of_memory(error):
            raise
        return CARDS[card][1]


def _name(device: torch.device) -> str:
    """The name that the driver gives a GPU, else that of the device."""
    import torch

    if device.type in ("cuda", "xpu"):
        return str(torch.get_device_module(device).get_device_name(device))
    return str(device)


def probe(device: torch.device, dtype: torch.dtype) -> Rates:
    """Rates of a device of this machine, measured for about PROBE_SECONDS."""
    import torch

    cpu = device.type == "cpu"
    side = 512 if cpu else 4096
    a = torch.ones(side, side, dtype=dtype, device=device)
    product = torch.empty_like(a)
    size = PROBE_BYTES
    if cpu and (free := available_bytes()) is not None:
        size = min(size, free // PROBE_SHARE)
    large = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(large)

    def wait() -> None:
        if not cpu:
            torch.accelerator.synchronize(device)

    share = PROBE_SECONDS / (2 if cpu else 3)
    products = 2 * side**3 * _per_second(lambda: torch.mm(a, a, out=product), wait, share)
    memory = 2 * large.numel() * _per_second(lambda: target.copy_(large), wait, share)
    copies = PAGE_CACHE
    if not cpu:
        pinned = torch.empty(2**26, dtype=torch.uint8, pin_memory=device.type == "cuda")
        part = large[: pinned.numel()]
        copy = _per_second(lambda: part.copy_(pinned, non_blocking=True), wait, share)
        copies = pinned.numel() * copy
    return Rates(name=_name(device), products=products, copies=copies, memory=memory)


def _per_second(work: Callable[[], object], wait: Callable[[], None], seconds: float) -> float:
    """How often a second something is done, after a first time that does not count."""
    work()
    wait()
    start, done = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds or not done:
        work()
        wait()
        done += 1
    return done / elapsed
