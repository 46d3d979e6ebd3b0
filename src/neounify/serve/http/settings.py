"""What an operator decides about the HTTP server: its name, its keys and its limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from neounify.errors import ConfigError

MEBIBYTE = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Upper bounds of one request, and of all of them together.

    `body_bytes` and `body_seconds` bound the upload, `body_idle_seconds` a pause in it,
    `uploads_bytes` the bodies of all requests that are under way; `json_values` and `json_depth`
    what a JSON body holds, `header_bytes` and `headers` its head. `images`, `image_pixels` and
    `images_pixels` (of one, of all of a request) bound the pictures that come in, `decode_bytes`
    the memory that decoding one takes; `output_pixels` and `steps` those that are painted;
    `in_flight` is how many requests are read or answered at a time.
    Raises ConfigError for values below 1.
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
    """Upper bounds of connections, in seconds where not said otherwise.

    `count` are open at a time. A request's head arrives within `head`, the next request on the
    same connection begins within `idle`, and a client that reads nothing of an answer that waits
    is given up after `write`. Raises ConfigError for values below 1.
    """

    count: int = 512
    head: float = 15.0
    idle: float = 15.0
    write: float = 30.0

    def __post_init__(self) -> None:
        _at_least_one(vars(self))


@dataclass(frozen=True, kw_only=True)
class HttpSettings:
    """How the API is offered.

    `keys` are the API keys by the name of their owner; without any, no key is asked for and
    all callers share one account. `requests_per_minute` and `concurrent` bound each account
    (None: not at all). Results behind URLs, where `result_urls` allows them, are kept for
    `result_seconds`, `result_bytes` of them at most. Images are fetched from `remote_hosts` only
    ("host" or "host:port"; none: no image URL but data URLs is read), `remote_bytes` and
    `remote_seconds` at most.
    `colour_profiles` is that of `read_image`; `metadata_prompts` writes prompts and negative
    prompts into the metadata of images.
    `public_url` is what result URLs begin with where a proxy hides the server's own address.
    `allowed_hosts` are the names in Host headers that are answered (none: all; IP addresses
    always), `cors_origins` the origins whose pages may use the API ("*": all).
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
