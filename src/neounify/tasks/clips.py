"""Clips in conversations: frames with their times, in the places of `<video>` marks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image

from neounify.config import ModelConfig
from neounify.errors import PromptError
from neounify.text.clips import VIDEO_MARK, clip_text


@dataclass(frozen=True)
class Frames:
    """Frames of a clip that a model sees as images of one size, each after its time in seconds.

    Of a clip in tubes, `images` are `tasks.video.ClipPiece`s; `in_tubes` makes them.
    """

    images: Sequence[Any]
    times: Sequence[float]

    def __post_init__(self) -> None:
        if not self.images or len(self.images) != len(self.times):
            raise PromptError(
                f"a clip has as many times as frames, at least 1: {len(self.times)} times for "
                f"{len(self.images)} frames"
            )

    @property
    def stamps(self) -> str:
        """The text of the frames in a user's message, a mark for each."""
        return clip_text(self.times)


def place_videos(prompt: Any, videos: Sequence[Frames]) -> list[Any]:
    """The conversation with each clip as a part in the place of its `<video>` mark.

    `prompt` is as in `tasks.chat.read_conversation`. Clips without a mark go in front of the first
    user message. Raises PromptError for more marks than clips, and where no message takes them.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    left = iter(videos)
    marks = sum(part.count(VIDEO_MARK) for turn in turns for part in _texts(turn))
    if marks > len(videos):
        raise PromptError(
            f"the text has {marks} {VIDEO_MARK} marks for {len(videos)} clips; at most one mark "
            "for each"
        )
    placed = [
        _placed(turn, left) if any(VIDEO_MARK in t for t in _texts(turn)) else turn
        for turn in turns
    ]
    rest = [_part(video) for video in left]
    if rest:
        first = next((n for n, turn in enumerate(placed) if _is_user(turn)), None)
        if first is None:
            raise PromptError(f"{len(rest)} clips have no mark and no user message to stand in")
        content = placed[first]["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else list(content)
        placed[first] = {**placed[first], "content": [*rest, *parts]}
    return placed


def clip_ranges(prompt: Any, images: Sequence[PIL.Image.Image]) -> tuple[range, ...]:
    """The places among `images` of the frames of each clip in `prompt`; both in order."""
    ranges: list[range] = []
    for video in _videos(prompt):
        start = ranges[-1].stop if ranges else 0
        while images[start] is not video.images[0]:
            start += 1
        ranges.append(range(start, start + len(video.images)))
    return tuple(ranges)


def frame_bounds(config: ModelConfig, count: int) -> tuple[int, int]:
    """(minimum, maximum) area of each of `count` frames of a clip, in pixels."""
    video = config.sampling.video
    largest = max(1, min(video.frame_max_pixels, video.max_total_pixels // count))
    return min(video.frame_min_pixels, largest), largest


def _is_user(turn: Any) -> bool:
    return isinstance(turn, Mapping) and turn.get("role") == "user" and "content" in turn


def _texts(turn: Any) -> Iterator[str]:
    """Texts of a user's message that may hold marks."""
    if not _is_user(turn):
        return
    content = turn["content"]
    if isinstance(content, str):
        yield content
    elif isinstance(content, Sequence):
        for part in content:
            if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                yield part["text"]


def _placed(turn: Mapping[str, Any], videos: Iterator[Frames]) -> Mapping[str, Any]:
    content = turn["content"]
    parts: list[Any] = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if not (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
            parts.append(part)
            continue
        first, *rest = part["text"].split(VIDEO_MARK)
        parts.append({**part, "text": first})
        for text in rest:
            parts += [_part(next(videos)), {**part, "text": text}]
    return {**turn, "content": parts}


def _part(video: Frames) -> dict[str, Any]:
    return {"type": "video", "video": video}


def _videos(prompt: Any) -> Iterator[Frames]:
    for turn in () if isinstance(prompt, str) else prompt:
        content = turn.get("content") if isinstance(turn, Mapping) else None
        for part in content if isinstance(content, list | tuple) else ():
            if isinstance(part, Mapping) and isinstance(part.get("video"), Frames):
                yield part["video"]
