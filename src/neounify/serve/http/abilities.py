"""Abilities of a server: what its model was trained for, less what the server cannot do."""

from __future__ import annotations

import asyncio

from neounify.config import ModelConfig
from neounify.errors import VideoError
from neounify.serve.http.config import HttpConfig
from neounify.serve.http.errors import ApiError
from neounify.serve.http.serving import State
from neounify.video.library import has_video_library, video_library

_JOBS = ("generate_video", "continue_video")
_WITH_FILES = (*_JOBS, "chat_video")
"""Capabilities that need the library of video files."""


def capabilities(config: ModelConfig, http: HttpConfig) -> list[str]:
    """The capabilities of the model that requests to this server can use."""
    lacking: tuple[str, ...] = () if http.generate_videos else _JOBS
    if not has_video_library():
        lacking = _WITH_FILES
    return [name for name in config.capabilities if name not in lacking]


async def check_video_files() -> None:
    """Raise ApiError 501 where the library of video files is not installed."""
    try:
        await asyncio.to_thread(video_library)
    except VideoError as error:
        raise _not_here(f"This server reads and writes no videos: {error}") from error


async def check_video_jobs(state: State) -> None:
    """Raise ApiError 501 where the server keeps no jobs; the dependency of their routes."""
    if not state.config.generate_videos:
        raise _not_here(
            "This server generates no videos: it is one of several replicas, which do not share "
            "their jobs."
        )


def _not_here(message: str) -> ApiError:
    return ApiError(501, message, kind="server_error", code="unsupported")
