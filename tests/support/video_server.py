"""A server of a scripted model that generates videos, and its jobs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from fastapi.testclient import TestClient

from neounify.config import VideoConfig
from neounify.config.presets import TINY
from neounify.serve.service import ServiceRequest
from neounify.tasks.image import ImageRequest
from neounify.tasks.program import Finished, FramesFinished, Preview
from neounify.text.clips import frame_order
from support.scripted_service import Scripted

ABLE = TINY.replace(
    video=VideoConfig(tube_frames=4), capabilities=(*TINY.capabilities, "generate_video")
)
CONTINUES = ABLE.replace(capabilities=(*ABLE.capabilities, "continue_video"))
BY_FRAME = ABLE.replace(video=VideoConfig(tube_frames=1, image_weights=True, frame_by_frame=True))
SMALL = {"size": "64x32", "seconds": 1, "fps": 8, "seed": 3, "steps": 2}
SLOW = 60.0


def clip(request: ServiceRequest, previews: int) -> Iterable[Any]:
    """Two tubes at a time, of the seed's grey, after a preview."""
    assert isinstance(request, ImageRequest)
    usage = Finished("stop", 20, 0, 0, 16)
    yield Preview(0, 1, 2, torch.zeros(3, request.height, request.width))
    if request.prompt.endswith("slow"):
        yield SLOW
    for first in range(0, request.frames, 4):
        shape = 4, request.height, request.width, 3
        frames = torch.full(shape, request.seed * 20, dtype=torch.uint8)
        yield FramesFinished(0, first, request.frames, frames, usage, 4.0)
    yield usage


def clip_by_frame(request: ServiceRequest, previews: int) -> Iterable[Any]:
    """One frame at a time, the ends first, each of the grey 30 times its place."""
    assert isinstance(request, ImageRequest)
    usage = Finished("stop", 20, 0, 0, 16)
    for number, place in enumerate(frame_order(request.frames), 1):
        frame = torch.full((1, request.height, request.width, 3), 30 * place, dtype=torch.uint8)
        yield FramesFinished(0, place, request.frames, frame, usage, float(number))
    yield usage


def service(script: Any = clip) -> Scripted:
    return Scripted(script, ABLE)


def until(client: TestClient, video_id: str, met: Callable[[Any], bool]) -> Any:
    for _ in range(600):
        video = client.get(f"/v1/videos/{video_id}").json()
        if met(video):
            return video
        time.sleep(0.02)
    raise AssertionError(video)


def finished(client: TestClient, **fields: Any) -> Any:
    created = client.post("/v1/videos", json={"prompt": "a star", **SMALL, **fields})
    assert created.status_code == 200, created.text
    return until(client, created.json()["id"], lambda v: v["status"] in ("completed", "failed"))


def described(client: TestClient) -> tuple[list[str], Any]:
    """Capabilities, and the defaults of videos."""
    model = client.get("/v1/models").json()["data"][0]["neounify"]
    return model["capabilities"], model["video"]
