"""Finished images that wait under an unguessable name until somebody fetches them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from neounify.errors import RequestError


@dataclass(frozen=True)
class StoredResult:
    """A file, and when it goes, in seconds of the store's clock."""

    data: bytes
    media_type: str
    expires: float


class ResultStore:
    """Keeps files for `seconds`, the newest `max_bytes` of them at most."""

    def __init__(
        self, max_bytes: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_bytes, self._seconds, self._clock = max_bytes, seconds, clock
        self._results: dict[str, StoredResult] = {}
        self._bytes = 0

    def put(self, data: bytes, media_type: str, suffix: str) -> str:
        """Keep a file; its name, `TOKEN.suffix`. RequestError when it is larger than the store."""
        if len(data) > self._max_bytes:
            raise RequestError(
                f"response_format url: the image has {len(data)} bytes, the server keeps "
                f"{self._max_bytes} at most; use b64_json"
            )
        name = f"{secrets.token_urlsafe(32)}.{suffix}"
        self._results[name] = StoredResult(data, media_type, self._clock() + self._seconds)
        self._bytes += len(data)
        self._drop_expired()
        while self._bytes > self._max_bytes:
            self._drop(next(iter(self._results)))
        return name

    def get(self, name: str) -> StoredResult | None:
        """The file of that name, unless it is gone."""
        self._drop_expired()
        return self._results.get(name)

    def seconds_left(self, result: StoredResult) -> int:
        """How long it will be kept, in whole seconds."""
        return max(0, int(result.expires - self._clock()))

    def _drop_expired(self) -> None:
        now = self._clock()
        # In order of arrival, and all are kept equally long.
        while self._results and next(iter(self._results.values())).expires <= now:
            self._drop(next(iter(self._results)))

    def _drop(self, name: str) -> None:
        self._bytes -= len(self._results.pop(name).data)
