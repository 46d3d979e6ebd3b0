"""PyAV, the library that reads and writes video files, imported at first use."""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

from neounify.errors import VideoError, install_command, missing_extra


def has_video_library() -> bool:
    """Whether the extra `video` is installed."""
    return find_spec("av") is not None


def video_library() -> ModuleType:
    """The module `av`. Raises VideoError where the extra `video` is not installed."""
    try:
        import av
    except ImportError as error:
        raise VideoError(missing_extra("video files", "video", error)) from error
    return av


def describe_library() -> tuple[bool, str]:
    """Whether video files can be read and written here, and by what, or what is missing."""
    try:
        library = video_library()
    except VideoError:
        return False, f"need the extra 'video', which is not installed: {install_command('video')}"
    return True, f"read and written by PyAV {library.__version__}"
