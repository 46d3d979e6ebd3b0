"""Clips in conversations: frames with their times, in the places of `<video>` marks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import PIL.Image

from neounify.config import ModelConfig
from neounify.errors import PromptError, RequestError
from neounify.image.pixels import fit_size
from neounify.runtime.memory_plan import PROMPT_TOKENS, STAMP_TOKENS, Task
from neounify.text.clips import clip_text
from neounify.text.forms import VIDEO_MARK
from neounify.video.choice import finite_number


@dataclass(frozen=True, eq=False)
class ClipPiece:
    """A tube of an input clip, or one of its frames alone: RGB `frames` of one size.

    It stands `seconds` after the first frame. `bounds` are the least and the greatest area in
    pixels that a frame is resized to.
    """

    frames: tuple[PIL.Image.Image, ...]
    tube: bool
    seconds: float
    bounds: tuple[int, int]


NO_TUBES = "this model has no embedding of tubes: it sees the frames of a video as images"


@dataclass(frozen=True)
class Frames:
    """Frames of a clip that a model sees as images of one size, each after its time in seconds.

    Of a clip in tubes, `images` are ClipPieces, as `tasks.video.in_tubes` makes them. Raises
    PromptError as `check_frames` does.
    """

    images: Sequence[Any]
    times: Sequence[float]

    def __post_init__(self) -> None:
        check_frames(self.images, self.times)

    @property
    def frames(self) -> list[PIL.Image.Image]:
        """The frames, also those of tubes."""
        pieces = (i.frames if isinstance(i, ClipPiece) else (i,) for i in self.images)
        return [frame for piece in pieces for frame in piece]

    @property
    def stamps(self) -> str:
        """The text of the frames in a user's message, a mark for each."""
        return clip_text(self.times)


def check_frames(images: Sequence[Any], times: Sequence[float]) -> None:
    """Check RGB images of one size, or ClipPieces, and when each is shown: from 0 s on, ascending.

    Raises PromptError.
    """
    if not images or len(images) != len(times):
        raise PromptError(
            f"a clip has as many times as frames, at least 1: {len(times)} times for "
            f"{len(images)} frames"
        )
    sizes: set[tuple[int, int]] = set()
    for image in images:
        if isinstance(image, ClipPiece):
            continue
        if not isinstance(image, PIL.Image.Image) or image.mode != "RGB":
            mode = f"{image.mode} images" if isinstance(image, PIL.Image.Image) else repr(image)
            raise PromptError(f"frames of a clip are RGB images of PIL, not {mode:.80}")
        sizes.add(image.size)
    if len(sizes) > 1:
        listed = " and ".join(f"{width}x{height}" for width, height in sorted(sizes)[:2])
        raise PromptError(f"frames of a clip have one size; these are of {listed}")
    before = 0.0
    for time in times:
        seconds = finite_number(time)
        if seconds is None or seconds < before:
            raise PromptError(
                f"times of a clip's frames are seconds from 0 on, ascending; got {time!r} after "
                f"{before:g}"
            )
        before = seconds


def place_videos(prompt: Any, videos: Sequence[Frames]) -> list[Any]:
    """The conversation with each clip as a part in the place of its `<video>` mark.

    `prompt` is as in `tasks.chat.read_conversation`. Clips without a mark go in front of the first
    user message. Raises PromptError for more marks than clips, and where no message takes them.
    """
    if isinstance(prompt, str):
        turns: list[Any] = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, Iterable):
        turns = list(prompt)
    else:
        raise PromptError(f"a prompt is a text or a list of messages, not {prompt!r:.80}")
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


def clip_question(
    config: ModelConfig,
    frames: int,
    size: tuple[int, int] | None,
    *,
    tubes: bool = False,
    answer: int = 0,
) -> Task:
    """A question about a clip, as the memory plan takes it.

    `size` (width, height) of the clip None is one of the largest that a frame keeps; `tubes` are
    seen in place of frames; `answer` are the most tokens of the answer. Raises
    RequestError for what the model cannot, and ImageError for sides.
    """
    config.check_can("chat_video")
    if frames < 1:
        raise RequestError(f"frames must be at least 1, got {frames}", param="frames")
    least, most = frame_bounds(config, frames)
    side, pieces = config.token_size, frames
    if tubes:
        if not config.sees_tubes:
            raise RequestError(NO_TUBES, param="tubes")
        pieces = -(-frames // config.seen_tube_frames)
    tokens = max(1, most // side**2)
    if size is not None:
        width, height = size
        bounds = {"min_pixels": least, "max_pixels": most}
        fitted = fit_size(height, width, multiple=side, **bounds)
        tokens = fitted[0] * fitted[1] // side**2
    return Task(
        kind="chat",
        references=pieces,
        reference_tokens=tokens,
        prompt=PROMPT_TOKENS + pieces * STAMP_TOKENS,
        think=answer,
        frames=frames,
        tubes=tubes,
    )


def _is_user(turn: Any) -> bool:
    """Whether clips may stand in a turn; others are refused later, with their own words."""
    if not isinstance(turn, Mapping) or turn.get("role") != "user":
        return False
    return isinstance(turn.get("content"), str | list | tuple)


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
