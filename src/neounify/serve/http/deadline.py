"""Deadline of one request, shared by reading it, and by answering it."""

from __future__ import annotations

import time
from collections.abc import Awaitable
from dataclasses import dataclass, field
from typing import TypeVar

from neounify.errors import DeadlineExceeded
from neounify.serve.client import within

Result = TypeVar("Result")


@dataclass(frozen=True)
class Deadline:
    """End of a request's time: `seconds` after `begin`, a time of time.monotonic.

    `is_servers` where it is the server's own limit, which the caller cannot raise.
    """

    seconds: float
    begin: float = field(default_factory=time.monotonic)
    is_servers: bool = False

    @property
    def left(self) -> float:
        """Seconds until then; negative after it."""
        return self.begin + self.seconds - time.monotonic()

    @property
    def error(self) -> DeadlineExceeded:
        advice = "ask for less or allow more"
        if self.is_servers:
            advice = "the server is busy; try again, or ask for less"
        return DeadlineExceeded(f"The request took more than {self.seconds:g} seconds; {advice}.")

    async def bound(self, work: Awaitable[Result]) -> Result:
        """The result of `work`, which is cancelled at the deadline. Raises DeadlineExceeded."""
        try:
            return await within(work, max(self.left, 0.0))
        except TimeoutError:
            if self.left > 0:  # an error of the work itself
                raise
            raise self.error from None
