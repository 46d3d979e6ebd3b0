"""Choice of the frames that a model reads of a clip, by their times.

The rules are those of the published video models: `published` for understanding, `dense` for tubes
of consecutive frames, `consecutive` for clips to generate in training (24 a second), and `at_rate`
for a rate of the caller's.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from neounify.errors import VideoError

MAX_FRAMES = 96
"""Frames of a clip that a model reads where a caller sets no limit."""
FRAME_LIMIT = 500_000
"""Greatest limit that a caller may set."""
SAMPLE_FPS, TUBE_FPS = 1.0, 4.0
LEAST_FRAMES = 23
"""Frames that a clip to generate must have at least for 24 that are taken."""
_ROUNDING = 1e-9
"""Frames by which a sample may lie before a frame and still show it."""


def finite_number(value: Any) -> float | None:
    """A real number as a float; None for text, a bool, NaN, and what is infinite or too large."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


@dataclass(frozen=True, kw_only=True)
class FrameChoice:
    """Which frames of a clip are read.

    `fps` samples per second, None for the rule of `published` with the model's rates and its
    `model_frames`; at most `max_frames`, which a longer clip is covered by evenly. With `tubes`,
    the frames of one, the rule of `dense` where it applies. With `multiple`, the rule of
    `consecutive`, which needs `fps`; `cut` is its own. Raises VideoError.
    """

    fps: float | None = None
    max_frames: int = MAX_FRAMES
    model_frames: int = MAX_FRAMES
    sample_fps: float = SAMPLE_FPS
    tube_fps: float = TUBE_FPS
    tubes: int = 0
    multiple: int = 0
    cut: bool = False

    def __post_init__(self) -> None:
        if self.multiple and self.fps is None:
            raise VideoError("consecutive frames need fps, how many of them are taken a second")
        if self.fps is not None:
            fps = finite_number(self.fps)
            if fps is None or fps <= 0:
                raise VideoError(
                    f"fps must be a finite number above 0, or None for the rule, got {self.fps!r}",
                    param="fps",
                )
            object.__setattr__(self, "fps", fps)
        count: object = self.max_frames
        is_count = isinstance(count, Integral) and not isinstance(count, bool)
        if not is_count or not 1 <= self.max_frames <= FRAME_LIMIT:
            raise VideoError(
                f"max_frames must be a whole number from 1 to {FRAME_LIMIT:,}, got {count!r}",
                param="max_frames",
            )
        object.__setattr__(self, "max_frames", int(self.max_frames))

    def take(self, clip: Timeline) -> tuple[list[int], bool]:
        """Indices of the frames, ascending, and whether they are seen in tubes."""
        if self.multiple and self.fps is not None:
            return consecutive(clip, self.fps, self.max_frames, self.multiple, cut=self.cut), False
        if self.tubes:
            frames = dense(clip, self.tubes, self.max_frames, self.fps or self.tube_fps)
            if frames is not None:
                return frames, True
        if self.fps is None:
            rule = self.model_frames, self.sample_fps, self.tube_fps
            return published(clip, self.max_frames, *rule), False
        return at_rate(clip, self.fps, self.max_frames), False


@dataclass(frozen=True)
class Timeline:
    """Times of all frames of a clip in seconds from the first, ascending, and its end.

    `rounding` is the greatest error of a time: half the unit that its file counts in, 0 where that
    is a frame.
    """

    times: Sequence[float]
    end: float
    rounding: float = 0.0

    @property
    def fps(self) -> float:
        """Frames per second, on average."""
        return len(self.times) / self.end

    @property
    def _slack(self) -> float:
        """Seconds by which a sample may lie before a frame and still show it."""
        return self.rounding + _ROUNDING * self.end / len(self.times)

    def count(self, fps: float) -> int:
        """How many k there are with k / fps within the clip, at least 1."""
        samples = (self.end - self._slack) * fps
        return max(1, math.ceil(min(samples, 2**53)))  # the product may be infinite

    def shown(self, fps: float, count: int) -> list[int]:
        """The frame that is shown at k / fps, for the first `count` k."""
        slack = self._slack
        return [max(0, bisect_right(self.times, k / fps + slack) - 1) for k in range(count)]

    def sample(self, fps: float, limit: int) -> list[int] | None:
        """The frame that is shown at k / fps, for all k within the clip; None for over `limit`."""
        count = self.count(fps)
        return None if count > limit else self.shown(fps, count)

    def evenly(self, count: int) -> list[int]:
        """The frames nearest to `count` times from the first to the last, evenly.

        All where there are no more; fewer where one frame is the nearest to several times.
        """
        last = len(self.times) - 1
        if count > last:
            return list(range(last + 1))
        if count == 1:
            return [0]
        if self._is_steady:  # exact, where times are rounded
            return [math.floor(number * last / (count - 1) + 0.5) for number in range(count)]
        times = [number * self.times[last] / (count - 1) for number in range(count)]
        return _merged([self._nearest(time) for time in times])

    @property
    def _is_steady(self) -> bool:
        """Whether all frames but the last are equally long, up to the rounding of their times."""
        step = self.times[-1] / max(1, len(self.times) - 1)
        slack = self._slack + self.rounding  # of this time, and of the first or the last
        return all(abs(time - n * step) <= slack for n, time in enumerate(self.times))

    def _nearest(self, time: float) -> int:
        """The frame that begins nearest to a time, the later one of two."""
        after = min(bisect_right(self.times, time), len(self.times) - 1)
        before = max(0, after - 1)
        return before if time - self.times[before] < self.times[after] - time else after


def published(
    clip: Timeline,
    max_frames: int = MAX_FRAMES,
    model_frames: int = MAX_FRAMES,
    sample_fps: float = SAMPLE_FPS,
    tube_fps: float = TUBE_FPS,
) -> list[int]:
    """Frames as the published command takes them, each an image.

    `sample_fps` a second where `tube_fps` would be at most `model_frames`, so up to 24 s for 96;
    else, for clips of fewer frames than `sample_fps` a second, and where the samples would be more
    than `max_frames`, `max_frames` evenly.
    """
    is_short = clip.count(tube_fps) <= model_frames
    frames = clip.sample(sample_fps, max_frames) if is_short and clip.fps >= sample_fps else None
    return clip.evenly(max_frames) if frames is None else _merged(frames)


def dense(
    clip: Timeline, tube: int, max_frames: int = MAX_FRAMES, tube_fps: float = TUBE_FPS
) -> list[int] | None:
    """Frames of tubes of `tube` frames: `tube_fps` a second, the last one repeated to fill one.

    None where the published route takes images instead: over `max_frames`, a clip of fewer
    frames a second, or less than one tube.
    """
    frames = clip.sample(tube_fps, max_frames)
    if frames is None or clip.fps < tube_fps or len(frames) < tube:
        return None
    return frames + frames[-1:] * (-len(frames) % tube)


def at_rate(clip: Timeline, fps: float, max_frames: int = MAX_FRAMES) -> list[int]:
    """Frames at `fps` a second, or `max_frames` evenly where those are more."""
    frames = clip.sample(fps, max_frames)
    return clip.evenly(max_frames) if frames is None else _merged(frames)


def consecutive(
    clip: Timeline,
    fps: float,
    max_frames: int = MAX_FRAMES,
    multiple: int = 1,
    *,
    cut: bool = False,
) -> list[int]:
    """Frames of a clip to generate: `fps` a second from the first one, the last ones left out.

    Their number is a `multiple`. Frames that are shown twice in a row are taken once, as in the
    published training: 90 frames at 23.976 a second are 90 at 24. A clip of fewer frames than that
    training read, `LEAST_FRAMES` for 24, would so run too fast, and is refused; one of more than
    `max_frames` too, unless `cut` takes its first ones. Raises VideoError, also for a clip of fewer
    frames than `multiple`.
    """
    count = clip.count(fps)
    # Equal neighbours are taken once, so `max_frames` may need some more samples.
    samples = min(count, max_frames + max_frames // LEAST_FRAMES + 2)
    frames = _merged(clip.shown(fps, samples))
    if len(frames) + 1 < samples * LEAST_FRAMES / (LEAST_FRAMES + 1):
        raise VideoError(
            f"has {clip.fps:.3g} frames a second, and {fps:g} are taken for a clip to generate; "
            f"at least {fps * LEAST_FRAMES / (LEAST_FRAMES + 1):g}, evenly spaced, are needed"
        )
    if len(frames) > max_frames and not cut:
        raise VideoError(
            f"lasts {clip.end:.1f} seconds, {count:,} frames at {fps:g} a second, and a clip to "
            f"generate has at most {max_frames}; cut it, or take its first frames (target_frames)"
        )
    frames = frames[:max_frames]
    whole = len(frames) // multiple * multiple
    if not whole:
        raise VideoError(
            f"has {len(frames)} frames at {fps:g} a second, fewer than the {multiple} of a tube"
        )
    return frames[:whole]


def _merged(frames: list[int]) -> list[int]:
    """The frames without equal neighbours."""
    return list(dict.fromkeys(frames))
