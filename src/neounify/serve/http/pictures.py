"""Pictures on their way in and out: data URLs, uploads, files of what was painted."""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Mapping

import PIL.Image
from jaxtyping import Float
from torch import Tensor

from neounify.errors import ImageError
from neounify.image.io import read_image
from neounify.image.pixels import to_pil
from neounify.serve.http.hooks import HttpHooks
from neounify.serve.http.remote import ImageFetcher
from neounify.serve.http.settings import HttpSettings
from neounify.serve.safety.provenance import Format

_DATA_URL = re.compile(r"data:([\w.+/-]*)((?:;[\w.+=-]+)*),", re.ASCII)


async def read_picture(data: bytes, settings: HttpSettings) -> PIL.Image.Image:
    """Decode a file off the event loop. Raises ImageError for what is no picture."""
    return await asyncio.to_thread(
        read_image,
        data,
        max_pixels=settings.limits.image_pixels,
        colour_profiles=settings.colour_profiles,
    )


async def read_picture_url(
    url: str, fetcher: ImageFetcher, settings: HttpSettings
) -> PIL.Image.Image:
    """The picture in a data URL, or behind a URL where the operator allows fetching."""
    if url.startswith("data:"):
        data = await asyncio.to_thread(data_url_bytes, url)
    else:
        data = await fetcher.fetch(url)
    return await read_picture(data, settings)


def data_url_bytes(url: str) -> bytes:
    """The file inside a base64 data URL. Raises ImageError for anything else."""
    head = _DATA_URL.match(url)
    if head is None or not head[2].endswith(";base64"):
        raise ImageError("image_url must be 'data:image/png;base64,…' or another image type")
    if head[1] and not head[1].startswith("image/"):
        raise ImageError(f"image_url holds {head[1][:40]}, not an image")
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageError(f"image_url is not valid base64 ({error})") from error


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
