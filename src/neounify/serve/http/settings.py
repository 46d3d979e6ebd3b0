"""Settings of the HTTP server: limits, API keys, and the accounts that keys belong to."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from neounify.errors import ConfigError
from neounify.serve.http.errors import ApiError

MEBIBYTE = 1024 * 1024


EVERYBODY = "everybody"
"""The name of the only account of a server without keys."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Upper bounds of one request, and of all of them together.

    `body_bytes` and `body_seconds` bound the upload, `body_idle_seconds` a pause in it,
    `uploads_bytes` the bodies of all requests in flight; `json_values` and `json_depth` a JSON
    body, `header_bytes` and `headers` its head. `images`, `image_pixels` and `images_pixels` (of
    one, of all of a request) bound input images, `decode_bytes` the memory of decoding one;
    `output_pixels` and `steps` generated ones; `in_flight` the requests that are read or answered
    at a time. Raises ConfigError for values below 1.
    """

    in_flight: int = 256
    body_bytes: int = 64 * MEBIBYTE
    body_seconds: float = 60.0
    body_idle_seconds: float = 20.0
    uploads_bytes: int = 256 * MEBIBYTE
    json_values: int = 20_000
    json_depth: int = 64
    header_bytes: int = 32 * 1024
    headers: int = 100
    prompt_chars: int = 100_000
    images: int = 16
    image_pixels: int = 50_000_000
    images_pixels: int = 100_000_000
    decode_bytes: int = 192 * MEBIBYTE
    output_pixels: int = 2048 * 2048
    steps: int = 200
    n: int = 10
    answer_images: int = 10
    tokens: int = 4096
    deadline: float = 600.0

    def __post_init__(self) -> None:
        _at_least_one(vars(self))


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """Upper bounds of connections: their number `count`, and times in seconds.

    A request's head arrives within `head`, the next request on the same connection begins within
    `idle`, and a connection whose client does not read a waiting answer is closed after `write`.
    Raises ConfigError for values below 1.
    """

    count: int = 512
    head: float = 15.0
    idle: float = 15.0
    write: float = 30.0

    def __post_init__(self) -> None:
        _at_least_one(vars(self))


@dataclass(frozen=True, kw_only=True)
class HttpSettings:
    """Settings of the API.

    `keys` are the API keys by the name of their owner; without any, no key is required and all
    callers share one account. `requests_per_minute` and `concurrent` limit each account (None: no
    limit). Results behind URLs, where `result_urls` allows them, are kept for `result_seconds`,
    at most `result_bytes` of them. Images are fetched from `remote_hosts` only ("host" or
    "host:port"; none: only data URLs are read), at most `remote_bytes` in `remote_seconds`.
    `colour_profiles` is that of `read_image`; `metadata_prompts` writes prompts and negative
    prompts into the metadata of images.
    `public_url` is the base of result URLs where a proxy hides the server's own address.
    `allowed_hosts` are the accepted names in Host headers (none: all; IP addresses always),
    `cors_origins` the origins whose pages may use the API ("*": all).
    """

    model_name: str = "neounify"
    keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    requests_per_minute: int | None = None
    concurrent: int | None = None
    limits: Limits = field(default_factory=Limits)
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    result_urls: bool = True
    result_seconds: float = 3600.0
    result_bytes: int = 256 * MEBIBYTE
    remote_hosts: tuple[str, ...] = ()
    remote_bytes: int = 20 * MEBIBYTE
    remote_seconds: float = 10.0
    public_url: str | None = None
    colour_profiles: bool = True
    metadata_prompts: bool = False
    allowed_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        numbers = {name: value for name, value in vars(self).items() if _is_number(value)}
        _at_least_one(numbers)
        if not self.model_name:
            raise ConfigError("model_name is empty")
        if any(not name or not key for name, key in self.keys.items()):
            raise ConfigError("every API key needs a name and at least one character")


def parse_keys(text: str) -> dict[str, str]:
    """API keys by name, from `name:key` entries on lines or between commas.

    An entry without a name is called key-1, key-2 and so on; `#` starts a comment line.
    Raises ConfigError for an empty key and for names or keys that come twice.
    """
    lines = [line.strip() for line in text.splitlines()]
    entries = [e.strip() for line in lines if not line.startswith("#") for e in line.split(",")]
    keys: dict[str, str] = {}
    for number, entry in enumerate(filter(None, entries), start=1):
        name, colon, key = entry.rpartition(":")
        name, key = name.strip() or f"key-{number}", key.strip()
        if not key or (colon and not entry.partition(":")[0].strip()):
            raise ConfigError(f"API key {number}: write name:key")
        if name in keys or key in keys.values():
            raise ConfigError(f"API key {number} ({name}): the name or the key comes twice")
        keys[name] = key
    return keys


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _at_least_one(values: Mapping[str, float]) -> None:
    for name, value in values.items():
        if not value >= 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")


class TokenBucket:
    """Token bucket: `per_minute` requests a minute on average, as many in one burst."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._size, self._clock = float(per_minute), clock
        self._rate = per_minute / 60
        self._tokens, self._updated = self._size, clock()

    def take(self) -> float:
        """Take one request: 0 when it is allowed, else the seconds until the next one is."""
        now = self._clock()
        self._tokens = min(self._size, self._tokens + (now - self._updated) * self._rate)
        self._updated = now
        if self._tokens < 1:
            return (1 - self._tokens) / self._rate
        self._tokens -= 1
        return 0.0


class Account:
    """Requests of one API key: their rate, and how many are in flight."""

    def __init__(self, bucket: TokenBucket | None, concurrent: int | None) -> None:
        self._bucket, self._concurrent = bucket, concurrent
        self._running = 0

    @contextmanager
    def use(self) -> Iterator[None]:
        """Context of one request, from its start to its end. Raises ApiError 429 over a limit."""
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
    """Accounts by API key; keys are compared by their digests in constant time."""

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
        """The account of an Authorization header. Raises ApiError 401 for no or a wrong key."""
        if not self._digests:
            return self._accounts[EVERYBODY]
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorised(
                "No API key was given; send it as 'Authorization: Bearer KEY'.", "missing_api_key"
            )
        digest = _digest(key.strip())
        # All are compared, so that the time reveals nothing about any of them.
        names = [n for n, known in self._digests.items() if hmac.compare_digest(known, digest)]
        if not names:
            raise _unauthorised("The API key is not known here.", "invalid_api_key")
        return self._accounts[names[0]]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _unauthorised(message: str, code: str) -> ApiError:
    return ApiError(401, message, kind="authentication_error", code=code)


def _too_many(message: str, code: str, wait: float) -> ApiError:
    return ApiError(429, message, kind="rate_limit_error", code=code, retry_after=wait)
