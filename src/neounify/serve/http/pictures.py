"""Pictures on their way in and out: data URLs, uploads, files of what was painted."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import PIL.Image
from jaxtyping import Float
from torch import Tensor

from neounify.errors import ImageError
from neounify.image.budget import DecodeBudget
from neounify.image.io import read_image
from neounify.image.pixels import to_pil
from neounify.provenance.metadata import Format
from neounify.runtime import return_freed_memory
from neounify.serve.http.data_urls import data_url_bytes, is_data_url
from neounify.serve.http.hooks import HttpHooks
from neounify.serve.http.remote import ImageFetcher
from neounify.serve.http.results import ResultStore
from neounify.serve.http.settings import HttpSettings

# Whoever has the name, which cannot be guessed, may fetch it: the host before it does not matter.
_RESULT_URL = re.compile(
    r"(?:https?://[^/?#\s]+(?:/[^?#\s]*)?)?/v1/results/([\w.-]{20,80})", re.ASCII
)


Form = TypeVar("Form")

_LARGE_BYTES = 8 * 2**20
"""Decoded and encoded images above this are given back to the system when they are freed."""


class ImageDecoder:
    """The thread in which all images of a process are decoded, one after the other.

    So the memory of decoding is that of one image, however many requests come.
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
    """The input images of one request, within the limits of one request."""

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
        # A new one: the other holds the file, through the frames it passed.
        raise ImageError(problem)


def result_name(url: str) -> str | None:
    """The name of a result in a URL such as this server gives; None for other URLs."""
    found = _RESULT_URL.fullmatch(url.strip())
    return found[1] if found else None


def to_base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def to_data_url(data: bytes, format: Format) -> str:
    """A file as a URL that holds it."""
    return f"data:image/{format};base64,{to_base64(data)}"


async def write_picture(
    hooks: HttpHooks,
    pixels: Float[Tensor, "3 h w"],
    format: Format,
    facts: Mapping[str, str],
    form: Callable[[bytes], Form],
) -> Form:
    """The file of a painted image, as `form` makes it of its bytes, all off the event loop.

    Raises what the hook raises.
    """

    def write() -> Form:
        return form(hooks.encode_image(to_pil(pixels[None])[0], format, facts))

    return await asyncio.to_thread(write)
