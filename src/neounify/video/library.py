"""PyAV, the library that reads and writes video files, imported at first use."""

from __future__ import annotations

from types import ModuleType

from neounify.errors import VideoError, missing_extra


def video_library() -> ModuleType:
    """The module `av`. Raises VideoError where the extra `video` is not installed."""
    try:
        import av
    except ImportError as error:
        raise VideoError(missing_extra("video files", "video", error)) from error
    return av
