"""Joint bound on the bytes that all requests in flight send or name by URL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from neounify.serve.http.errors import overloaded


class UploadBytes:
    """Counter of the bytes of all bodies and fetched files in flight, up to `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.bytes = 0

    def add(self, count: int) -> None:
        """Raises ApiError 429 above the limit."""
        if self.bytes + count > self._max_bytes:
            raise overloaded(
                "The bodies and fetched files of all requests together exceed "
                f"{self._max_bytes} bytes; try again soon.",
                2.0,
            )
        self.bytes += count

    def remove(self, count: int) -> None:
        self.bytes -= count

    @contextmanager
    def counting(self) -> Iterator[Callable[[int], None]]:
        """Context that gives `add`, and in the end removes what was added by it."""
        total = 0

        def add(count: int) -> None:
            nonlocal total
            self.add(count)
            total += count

        try:
            yield add
        finally:
            self.remove(total)
