"""Text of clips in prompts: the time of each frame or tube, in front of its tokens."""

from __future__ import annotations

from collections.abc import Sequence

from neounify.text.forms import VIDEO_MARK
from neounify.text.template import IMAGE_MARK


def time_stamp(seconds: float) -> str:
    """The text in front of a frame or tube, `seconds` after the first frame."""
    return f"<{seconds:.1f} seconds>"


def clip_text(times: Sequence[float]) -> str:
    """A clip in a prompt: for each frame or tube its time in seconds and an `<image>` mark."""
    return "".join(time_stamp(seconds) + IMAGE_MARK for seconds in times)


def mark_videos(text: str, count: int) -> str:
    """A user's text with a `<video>` mark for each of `count` clips; missing ones go in front."""
    return VIDEO_MARK * (count - text.count(VIDEO_MARK)) + text
