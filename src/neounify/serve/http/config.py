"""Config of the HTTP server: limits, API keys, host names, origins; its metrics."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from neounify.errors import ConfigError

MEBIBYTE = 1024 * 1024
ANY = "*"
"""Every host name, or every origin."""
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""Upper bounds of the buckets of durations."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Upper bounds of one request, and of all of them together.

    `body_bytes` and `body_seconds` bound the upload, `body_idle_seconds` a pause in it,
    `uploads_bytes` the bodies and fetched files of all requests in flight; `json_values` and
    `json_depth` a JSON body, `header_bytes` and `headers` its head. `images`, `image_pixels` and
    `images_pixels` (of one, of all of a request) bound input images, `decode_bytes` the memory of
    decoding one;
    `videos`, `video_frames` (that the model sees of all of them) and `video_seconds` (of decoding
    one) input clips, `video_requests` the requests whose clips are read at a time;
    `output_pixels`, `output_frames` and `steps` generated ones, `video_jobs` the videos of a caller
    that are generated at a time; `in_flight` the requests that are read or
    answered at a time. Raises ConfigError for values below 1.
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
    videos: int = 4
    video_frames: int = 96
    video_seconds: float = 30.0
    video_requests: int = 16
    output_pixels: int = 2048 * 2048
    output_frames: int = 240
    video_jobs: int = 4
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
class HttpConfig:
    """Config of the API.

    `keys` are the API keys by the name of their owner; without any, no key is required and all
    callers share one account. `requests_per_minute` and `concurrent` limit each account (None: no
    limit). Results behind URLs, where `result_urls` allows them, are kept for `result_seconds`,
    at most `result_bytes` of them, as are videos where `generate_videos` allows them, whose
    generation ends after `video_deadline` seconds. Images are fetched from `remote_hosts` only
    ("host" or "host:port"; none: only data URLs are read), at most `remote_bytes` in
    `remote_seconds`; so are clips, at most `remote_video_bytes`. `colour_profiles` is that of
    `read_image`; `metadata_prompts` writes prompts and negative prompts into the metadata of images
    and videos. `public_url` is the base of result URLs where a proxy hides the server's address.
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
    generate_videos: bool = True
    result_seconds: float = 3600.0
    result_bytes: int = 256 * MEBIBYTE
    video_deadline: float = 3600.0
    remote_hosts: tuple[str, ...] = ()
    remote_bytes: int = 20 * MEBIBYTE
    remote_video_bytes: int = 64 * MEBIBYTE
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


def default_hosts(bind: str) -> tuple[str, ...]:
    """Host names of a server bound to `bind` that need no name server of others."""
    machine = socket.gethostname().lower()
    return tuple(dict.fromkeys(("localhost", machine, f"{machine}.local", bind.lower())))


def parse_origin(text: str) -> str:
    """The origin `text` as browsers send it: "*" or scheme://host[:port]. Raises ConfigError."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"origin {text!r} cannot be read ({error})") from error
    rest = parts.path.strip("/") or parts.query or parts.fragment or parts.username
    if text != ANY and (parts.scheme not in ("http", "https") or not parts.hostname or rest):
        raise ConfigError(f"origin {text!r}: write http://HOST:PORT, https://HOST, or *")
    if text == ANY:
        return ANY
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return f"{parts.scheme}://{host}" + ("" if port is None else f":{port}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _at_least_one(values: Mapping[str, float]) -> None:
    for name, value in values.items():
        if not value >= 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")


class HttpMetrics:
    """Prometheus metrics of HTTP; those of the engines are collectors in the same `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.registry = registry
        self.requests = Counter(
            "neounify_http_requests",
            "HTTP requests by route and status; 499 when the client went away.",
            ("method", "route", "status"),
            registry=registry,
        )
        self.in_flight = Gauge(
            "neounify_http_in_flight", "HTTP requests being read or answered.", registry=registry
        )
        self.first_token = Histogram(
            "neounify_time_to_first_token_seconds",
            "From a request's hand-over to the engines to its first text, preview or image.",
            ("task",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.total = Histogram(
            "neounify_http_request_seconds",
            "From a request's arrival to the end of its answer.",
            ("route",),
            buckets=_SECONDS,
            registry=registry,
        )
