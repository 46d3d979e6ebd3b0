"""Devices that are not here, by what they would answer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from neounify.attention import select
from neounify.runtime import devices
from neounify.runtime.devices import Abilities, abilities


@contextmanager
def pretending(here: Abilities) -> Iterator[None]:
    """Context in which every device has these abilities."""
    kept = (abilities, select)
    for function in kept:
        function.cache_clear()
    try:
        with mock.patch.object(devices, "ask", return_value=here):
            yield
    finally:
        for function in kept:
            function.cache_clear()
