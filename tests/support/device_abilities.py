"""Devices that are not here, by what they would answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from neounify.attention import select
from neounify.runtime import devices
from neounify.runtime.devices import Abilities, abilities


@contextmanager
def pretending(here: Abilities, *, host: bool = False) -> Iterator[None]:
    """Context in which every device has these abilities; with `host`, the CPU keeps its own."""
    ask = devices.ask

    def answer(device: torch.device) -> Abilities:
        return ask(device) if host and device.type == "cpu" else here

    kept = (abilities, select)
    for function in kept:
        function.cache_clear()
    try:
        with mock.patch.object(devices, "ask", side_effect=answer):
            yield
    finally:
        for function in kept:
            function.cache_clear()
