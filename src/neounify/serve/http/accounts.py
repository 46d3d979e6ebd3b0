"""Who calls, and how much they may: API keys, requests per minute, requests at a time."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from neounify.serve.http.errors import ApiError

EVERYBODY = "everybody"
"""The account of a server without keys."""


class TokenBucket:
    """`per_minute` requests a minute on average, all of them at once at most."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._size, self._clock = float(per_minute), clock
        self._rate = per_minute / 60
        self._tokens, self._seen = self._size, clock()

    def take(self) -> float:
        """Take one request: 0 when it is allowed, else the seconds until the next one is."""
        now = self._clock()
        self._tokens = min(self._size, self._tokens + (now - self._seen) * self._rate)
        self._seen = now
        if self._tokens < 1:
            return (1 - self._tokens) / self._rate
        self._tokens -= 1
        return 0.0


class Account:
    """The use of one key."""

    def __init__(self, bucket: TokenBucket | None, concurrent: int | None) -> None:
        self._bucket, self._concurrent = bucket, concurrent
        self._running = 0

    @contextmanager
    def use(self) -> Iterator[None]:
        """One request, from its start to its end. Raises ApiError 429 over the limits."""
        if self._concurrent is not None and self._running >= self._concurrent:
            raise _too_many(
                f"This key may run {self._concurrent} requests at a time; wait for one to end.",
                "concurrency_limit_exceeded",
                1.0,
            )
        if self._bucket is not None and (wait := self._bucket.take()) > 0:
            raise _too_many(
                f"Too many requests a minute; try again in {wait:.1f} seconds.",
                "rate_limit_exceeded",
                wait,
            )
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1


class Accounts:
    """The accounts of all keys; keys are compared by their digests in constant time."""

    def __init__(
        self,
        keys: Mapping[str, str],
        *,
        requests_per_minute: int | None = None,
        concurrent: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._digests = {name: _digest(key) for name, key in keys.items()}

        def account() -> Account:
            bucket = TokenBucket(requests_per_minute, clock) if requests_per_minute else None
            return Account(bucket, concurrent)

        self._accounts = {name: account() for name in keys or (EVERYBODY,)}

    def find(self, authorization: str | None) -> Account:
        """The account that an Authorization header belongs to. Raises ApiError 401 without one."""
        if not self._digests:
            return self._accounts[EVERYBODY]
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorised(
                "No API key was given; send it as 'Authorization: Bearer KEY'.", "missing_api_key"
            )
        given = _digest(key.strip())
        # All are compared, so that the time does not tell which one came near.
        names = [n for n, known in self._digests.items() if hmac.compare_digest(known, given)]
        if not names:
            raise _unauthorised("The API key is not known here.", "invalid_api_key")
        return self._accounts[names[0]]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _unauthorised(message: str, code: str) -> ApiError:
    return ApiError(401, message, kind="authentication_error", code=code)


def _too_many(message: str, code: str, wait: float) -> ApiError:
    return ApiError(429, message, kind="rate_limit_error", code=code, retry_after=wait)
