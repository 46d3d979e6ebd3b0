"""Pictures on their way in and out: data URLs, uploads, files of what was painted."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Mapping

import PIL.Image
from jaxtyping import Float
from torch import Tensor

from neounify.errors import ImageError
from neounify.image.io import read_image
from neounify.image.pixels import to_pil
from neounify.serve.http.data_urls import data_url_bytes, is_data_url
from neounify.serve.http.hooks import HttpHooks
from neounify.serve.http.remote import ImageFetcher
from neounify.serve.http.results import ResultStore
from neounify.serve.http.settings import HttpSettings
from neounify.serve.safety.provenance import Format

# Whoever has the name, which cannot be guessed, may fetch it: the host before it does not matter.
_RESULT_URL = re.compile(
    r"(?:https?://[^/?#\s]+(?:/[^?#\s]*)?)?/v1/results/([\w.-]{20,80})", re.ASCII
)


async def read_picture(data: bytes, settings: HttpSettings) -> PIL.Image.Image:
    """Decode a file off the event loop. Raises ImageError for what is no picture."""
    return await asyncio.to_thread(
        read_image,
        data,
        max_pixels=settings.limits.image_pixels,
        colour_profiles=settings.colour_profiles,
    )


async def read_picture_url(
    url: str, fetcher: ImageFetcher, settings: HttpSettings, results: ResultStore
) -> PIL.Image.Image:
    """The image in a data URL, in a result of this server, or where the operator allows fetching.

    Raises ImageError.
    """
    if is_data_url(url):
        data = await asyncio.to_thread(data_url_bytes, url)
    elif (name := result_name(url)) and (result := results.get(name)) is not None:
        data = result.data
    elif name and not settings.remote_hosts:
        raise ImageError("image_url: this result is no longer kept; send the image as a data URL")
    else:
        data = await fetcher.fetch(url)
    return await read_picture(data, settings)


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
    hooks: HttpHooks, pixels: Float[Tensor, "3 h w"], format: Format, facts: Mapping[str, str]
) -> bytes:
    """The file of what the model painted, made off the event loop. Raises what the hook raises."""

    def write() -> bytes:
        return hooks.encode_image(to_pil(pixels[None])[0], format, facts)

    return await asyncio.to_thread(write)
