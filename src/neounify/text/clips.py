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


def frame_order(frames: int, *, follows: bool = False) -> list[int]:
    """The order in which the frames of a clip are generated one by one: the ends first.

    The first and the last, then always the one in the middle of two that are there, so that a frame
    shows far more of a motion than its neighbours would. With `follows` a frame is there before 0.
    """
    order = [frames - 1] if follows or frames == 1 else [0, frames - 1]
    gaps = [(-1 if follows else 0, frames - 1)]
    for first, last in gaps:
        middle = (first + last) // 2
        if middle > first:
            order.append(middle)
            gaps += [(first, middle), (middle, last)]
    return order
