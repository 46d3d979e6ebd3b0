"""A real server on loopback, and images to send to it."""

from __future__ import annotations

import asyncio
import base64
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import uvicorn
from fastapi import FastAPI
from openai import OpenAI
from PIL import Image

from neounify.serve.http import create_app
from neounify.serve.http.connections import server_config
from neounify.serve.service import EngineService


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The base URL of the app, served by uvicorn on a free port."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = app.state.server.config
    config = server_config(app, config, log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
    assert not thread.is_alive()


@contextmanager
def serving(service: EngineService, **options: Any) -> Iterator[OpenAI]:
    """OpenAI's client of a service with engines, started and stopped here."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(service, **options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))

    async def run() -> None:
        await service.start()
        await server.serve(sockets=[listener])
        await service.stop()

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started, 60)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(60)
        listener.close()
    assert not thread.is_alive()


@contextmanager
def openai_client(app: FastAPI, key: str = "none") -> Iterator[OpenAI]:
    """OpenAI's client, talking to the app over a socket and never trying twice."""
    with running(app) as url, OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
        yield client


def wait_until(
    condition: Callable[[], bool], seconds: float = 20.0, *, pause: float = 0.01
) -> None:
    """Fail unless the condition comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(pause)


def png(
    colour: tuple[int, int, int] | str = "red", size: tuple[int, int] = (40, 24), kind: str = "png"
) -> bytes:
    """The file of an image of one colour."""
    file = BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    """The file as a data URL."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def to_image(data: bytes | str) -> Image.Image:
    """The image in a file, in base64, or in a data URL."""
    if isinstance(data, str):
        data = base64.b64decode(data.rpartition(",")[2])
    image = Image.open(BytesIO(data))
    image.load()
    return image
