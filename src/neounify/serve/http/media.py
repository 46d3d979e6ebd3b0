"""Images in and out: decoding, content checks, provenance, and short-lived results behind URLs."""

from __future__ import annotations

import asyncio
import base64
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Protocol, TypeVar

import PIL.Image
from jaxtyping import Float
from torch import Tensor

from neounify.errors import ImageError, RequestError
from neounify.image.budget import DecodeBudget
from neounify.image.io import read_image
from neounify.image.pixels import to_pil
from neounify.provenance.metadata import Format, encode_image
from neounify.runtime import return_freed_memory
from neounify.serve.http.image_urls import ImageFetcher, data_url_bytes, is_data_url
from neounify.serve.http.settings import HttpSettings
from neounify.serve.http.streaming import task_of
from neounify.serve.safety.hooks import Hooks
from neounify.tasks.events import ImageFinished, Preview
from neounify.tasks.interleave import InterleaveRequest
from neounify.tasks.requests import ImageRequest

if TYPE_CHECKING:
    from neounify.provenance.watermark import Marker


MAX_PROMPT = 4000
"""Maximum characters of a prompt in metadata, so that two of them fit into a JPEG's."""
# The unguessable name is the permission to fetch it: the host before it does not matter.
_RESULT_URL = re.compile(
    r"(?:https?://[^/?#\s]+(?:/[^?#\s]*)?)?/v1/results/([\w.-]{20,80})", re.ASCII
)
Form = TypeVar("Form")
_LARGE_BYTES = 8 * 2**20
"""Memory of decoded and encoded images above this is returned to the system when it is freed."""


@dataclass(frozen=True)
class StoredResult:
    """A file, and when it expires, in seconds of the store's clock."""

    data: bytes
    media_type: str
    expires: float


class ResultStore:
    """Short-lived results behind unguessable URLs: files for `seconds`, the newest `max_bytes`."""

    def __init__(
        self, max_bytes: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_bytes, self._seconds, self._clock = max_bytes, seconds, clock
        self._results: dict[str, StoredResult] = {}
        self._bytes = 0

    def put(self, data: bytes, media_type: str, suffix: str) -> str:
        """Keep a file. Its name, `TOKEN.suffix`. Raises RequestError if it exceeds the store."""
        if len(data) > self._max_bytes:
            raise RequestError(
                f"response_format url: the image has {len(data)} bytes, the server keeps "
                f"{self._max_bytes} at most; use b64_json",
                param="response_format",
            )
        name = f"{secrets.token_urlsafe(32)}.{suffix}"
        self._results[name] = StoredResult(data, media_type, self._clock() + self._seconds)
        self._bytes += len(data)
        self._drop_expired()
        while self._bytes > self._max_bytes:
            self._drop(next(iter(self._results)))
        return name

    def get(self, name: str) -> StoredResult | None:
        """The file of that name; None after it expired or made room for newer ones."""
        self._drop_expired()
        return self._results.get(name)

    def seconds_left(self, result: StoredResult) -> int:
        """Whole seconds until the file expires."""
        return max(0, int(result.expires - self._clock()))

    def _drop_expired(self) -> None:
        now = self._clock()
        # They are in order of arrival, and all are kept equally long.
        while self._results and next(iter(self._results.values())).expires <= now:
            self._drop(next(iter(self._results)))

    def _drop(self, name: str) -> None:
        self._bytes -= len(self._results.pop(name).data)


def image_metadata(
    request: ImageRequest | InterleaveRequest,
    event: Preview | ImageFinished,
    settings: HttpSettings,
) -> dict[str, str]:
    """Provenance metadata of one image of a request; `preview` only for previews.

    Without the text of prompts unless the operator wants it (`metadata_prompts`): an image is
    passed on more freely than the words it was asked for with.
    """
    sampling = request.sampling
    height, width = event.pixels.shape[-2:]
    metadata = {
        "generator": "neounify",
        "model": settings.model_name,
        "task": task_of(request),
        "seed": str(request.seed),
        "index": str(event.index),
        "size": f"{width}x{height}",
        "steps": str(sampling.steps),
        "guidance": f"{sampling.guidance.text:g}",
        "image_guidance": f"{sampling.guidance.image:g}",
        "shift": f"{sampling.shift:g}",
        "solver": sampling.solver,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if settings.metadata_prompts:
        metadata["prompt"] = request.prompt[:MAX_PROMPT]
    if request.negative_prompt:
        negative = request.negative_prompt[:MAX_PROMPT]
        metadata["negative_prompt"] = negative if settings.metadata_prompts else "given"
    if isinstance(event, Preview):
        metadata["preview"] = f"{event.step}/{event.steps}"
    return metadata


class ImageDecoder:
    """A thread that decodes all images of a server, one after the other.

    So the memory of decoding is that of one image, whatever the number of requests.
    """

    def __init__(self) -> None:
        self._executor = self._start()

    async def run(self, work: Callable[[], PIL.Image.Image]) -> PIL.Image.Image:
        """The result of `work`, which is not begun after the caller was cancelled."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def close(self) -> None:
        """End the thread; images that wait for it are not decoded. `run` starts another one."""
        executor, self._executor = self._executor, self._start()
        executor.shutdown(wait=False, cancel_futures=True)

    @staticmethod
    def _start() -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="decode")


class RequestImages:
    """Reader of the input images of one request, within the limits of one request."""

    def __init__(
        self,
        decoder: ImageDecoder,
        fetcher: ImageFetcher,
        results: ResultStore,
        settings: HttpSettings,
        keep_pixels: int,
    ) -> None:
        """Images are reduced to no fewer than `keep_pixels`."""
        limits = settings.limits
        self._decoder, self._fetcher, self._results = decoder, fetcher, results
        self._settings = settings
        self._budget = DecodeBudget(
            max_pixels=limits.images_pixels,
            max_bytes=limits.decode_bytes,
            keep_pixels=keep_pixels,
        )

    async def read(self, data: bytes) -> PIL.Image.Image:
        """Decode a file. Raises ImageError for what is no image or exceeds the limits."""
        return await self._decoder.run(lambda: self._read(lambda: data))

    async def read_url(self, url: str) -> PIL.Image.Image:
        """The image in a data URL, a result of this server, or on a host that is allowed.

        Raises ImageError.
        """
        if is_data_url(url):
            return await self._decoder.run(lambda: self._read(lambda: data_url_bytes(url)))
        name = result_name(url)
        result = self._results.get(name) if name else None
        if result is not None:
            return await self.read(result.data)
        if name and not self._settings.remote_hosts:
            raise ImageError(
                "image_url: this result is no longer kept; send the image as a data URL"
            )
        return await self.read(await self._fetcher.fetch(url))

    def _read(self, file: Callable[[], bytes]) -> PIL.Image.Image:
        limits = self._settings.limits
        try:
            return read_image(
                file(),
                max_pixels=limits.image_pixels,
                colour_profiles=self._settings.colour_profiles,
                budget=self._budget,
            )
        except ImageError as error:
            problem = str(error)
        finally:
            if self._budget.last_bytes > _LARGE_BYTES:
                return_freed_memory()
        # A new error: the frames of the caught one's traceback hold the file.
        raise ImageError(problem)


class HttpHooks(Protocol):
    """Checks of prompts, and the writer of images; called from several worker threads at a time."""

    def check_prompt(self, text: str, images: Sequence[PIL.Image.Image]) -> None:
        """Raises Refused for prompts that may not be answered; `text` is all of a request."""

    def encode_image(
        self, image: PIL.Image.Image, format: Format, metadata: Mapping[str, str]
    ) -> bytes:
        """The file of a generated image or preview, checked and marked.

        `metadata` says how it was made: model, task, seed, steps and so on; prompts only with
        `HttpSettings.metadata_prompts`. Raises Refused for an image that may not leave the server.
        """


class MarkingHooks:
    """HttpHooks that write provenance metadata, and an invisible mark if there is a marker."""

    def __init__(self, hooks: Hooks | None = None, marker: Marker | None = None) -> None:
        self._hooks, self._marker = hooks or Hooks(), marker

    def check_prompt(self, text: str, images: Sequence[PIL.Image.Image]) -> None:
        """Raises Refused."""
        self._hooks.check_prompt(text, images)

    def encode_image(
        self, image: PIL.Image.Image, format: Format, metadata: Mapping[str, str]
    ) -> bytes:
        """Raises Refused for an image that may not leave the server."""
        self._hooks.check_image(image)
        return encode_image(self._marker.mark(image) if self._marker else image, format, metadata)


def result_name(url: str) -> str | None:
    """The name of a result in a URL such as this server gives; None for other URLs."""
    match = _RESULT_URL.fullmatch(url.strip())
    return match[1] if match else None


def to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def to_data_url(data: bytes, format: Format) -> str:
    """The data URL of an image file."""
    return f"data:image/{format};base64,{to_base64(data)}"


async def encode_result(
    hooks: HttpHooks,
    pixels: Float[Tensor, "3 h w"],
    format: Format,
    metadata: Mapping[str, str],
    form: Callable[[bytes], Form],
) -> Form:
    """`form` of the file of a generated image, encoded by `hooks` in a thread.

    `pixels` are in about [-1, 1]. Raises the hooks' errors.
    """

    def write() -> Form:
        return form(hooks.encode_image(to_pil(pixels[None])[0], format, metadata))

    return await asyncio.to_thread(write)
