"""Input clips of the Python API, of the command line and of the server, as frames with times.

Questions are about clips, and clips are continued: their frames are the `condition` of new ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from os import PathLike
from typing import Any

from PIL import Image

from neounify.config import ModelConfig
from neounify.errors import RequestError, VideoError
from neounify.image.io import ImageSource
from neounify.tasks.chat import read_images
from neounify.tasks.clips import Frames, frame_bounds
from neounify.tasks.video import in_tubes
from neounify.video.choice import FrameChoice, Timeline
from neounify.video.clip import Video
from neounify.video.decode import Clip, VideoLimits
from neounify.video.read import ReadVideo, VideoSource, name_of, read_video

log = logging.getLogger("neounify")
VideoInput = VideoSource | Video | Frames
"""A path, the bytes of a file, a clip, or frames that were read of one."""
ConditionInput = VideoSource | Video | Sequence[ImageSource]
"""A path, the bytes of a file, a clip, or a list of its frames."""
RESERVE = 4
"""Area that frames keep while they are read, in areas of what the model sees of them."""


def frame_choice(
    config: ModelConfig, fps: float | None, max_frames: int | None, tubes: bool = False
) -> FrameChoice:
    """The frames that are read of a clip; None is the checkpoint's rule. Raises VideoError."""
    video = config.sampling.video
    return FrameChoice(
        fps=fps,
        max_frames=video.max_frames if max_frames is None else max_frames,
        model_frames=video.max_frames,
        sample_fps=video.sample_fps,
        tube_fps=video.tube_fps,
        tubes=config.seen_tube_frames if tubes else 0,
    )


def read_inputs(
    videos: VideoInput | Sequence[VideoInput],
    config: ModelConfig,
    fps: float | None,
    max_frames: int | None,
    tubes: bool,
) -> list[Frames]:
    """Frames of one clip or several, as `read_frames` reads each.

    Raises RequestError for a model that sees no videos, and the errors of `read_frames`.
    """
    several: Sequence[Any] = videos if isinstance(videos, list | tuple) else [videos]
    if several:
        config.check_can("chat_video")
    return [read_frames(one, config, fps, max_frames, tubes=tubes) for one in several]


def read_frames(
    source: VideoInput,
    config: ModelConfig,
    fps: float | None = None,
    max_frames: int | None = None,
    *,
    tubes: bool = False,
) -> Frames:
    """Frames of a clip, for a model of `config`.

    With `tubes` several are seen as one, where the clip is long enough and not too long. Frames
    are chosen already. Raises VideoError, and RequestError for a model without an embedding of
    tubes, and for options beside Frames.
    """
    if isinstance(source, Frames):
        if fps is not None or max_frames is not None or tubes:
            raise RequestError(
                "fps, max_frames and tubes choose frames of files and Videos, and these Frames "
                "are chosen already: leave them out, or give the file or the Video",
                param="video",
            )
        return source
    if isinstance(source, Video):
        choice = frame_choice(config, fps, max_frames, tubes)
        images, timeline = source.images, _timeline_of(source)
        indices, grouped = choice.take(timeline)
        times = [timeline.times[n] for n in indices]
        return seen_frames(config, [images[n] for n in indices], times, grouped)
    return read_file(source, config, fps, max_frames, tubes=tubes)[0]


def read_file(
    source: VideoSource,
    config: ModelConfig,
    fps: float | None = None,
    max_frames: int | None = None,
    *,
    tubes: bool = False,
    limits: VideoLimits | None = None,
    reserve: int = RESERVE,
    warn: Callable[[str], object] = log.warning,
) -> tuple[Frames, Clip]:
    """Frames of a file, and what the file holds; its sound is not heard, of which `warn` is called.

    Larger frames are reduced to `reserve` times the area that the model sees. Raises VideoError.
    """
    choice = frame_choice(config, fps, max_frames, tubes)
    video = read_shown(source, config, choice, limits=limits, reserve=reserve)
    if video.clip.has_sound:
        warn(f"{name_of(source)}: its sound is not heard")
    return seen_frames(config, video.images, video.times, video.clip.in_tubes), video.clip


def read_condition(
    source: ConditionInput,
    config: ModelConfig,
    fps: float | None = None,
    *,
    colour_profiles: bool = True,
    max_frames: int | None = None,
    limits: VideoLimits | None = None,
    reserve: int = RESERVE,
    warn: Callable[[str], object] = log.warning,
) -> list[Image.Image]:
    """Frames of a clip that is continued at `fps` a second; None is the checkpoint's rate.

    A list of frames is at that rate, a clip is taken as `frames_before` takes it; of both the first
    frames are left out that fill no tube. Raises RequestError for a model that was not trained for
    it; VideoError and ImageError.
    """
    config.check_can("continue_video")
    try:
        if isinstance(source, Video | str | PathLike | bytes | bytearray | memoryview):
            return frames_before(
                source, config, fps, max_frames, limits=limits, reserve=reserve, warn=warn
            )
        images = read_images(source, colour_profiles=colour_profiles)
        if not images:
            raise VideoError("the clip to continue has no frames")
        return _whole_tubes(images, config)
    except VideoError as error:
        error.param = "condition"
        raise


def frames_before(
    source: VideoSource | Video,
    config: ModelConfig,
    fps: float | None = None,
    max_frames: int | None = None,
    *,
    limits: VideoLimits | None = None,
    reserve: int = RESERVE,
    warn: Callable[[str], object] = log.warning,
) -> list[Image.Image]:
    """Frames of a clip at `fps` a second, as a model sees those before the ones it generates.

    The first ones are left out that fill no tube; `max_frames` are the checkpoint's if None. Raises
    VideoError, also for a clip of more or too few frames.
    """
    rate = float(config.sampling.video.fps if fps is None else fps)
    most = frame_choice(config, rate, max_frames).max_frames
    if isinstance(source, Video):
        images, timeline = source.images, _timeline_of(source)
    else:
        frames, clip = read_file(
            source, config, rate, most, limits=limits, reserve=reserve, warn=warn
        )
        images = list(frames.images)
        timeline = Timeline(list(frames.times), clip.seconds, clip.rounding)
    shown = timeline.sample(rate, most)
    if shown is None:
        raise VideoError(
            f"{timeline.end:.1f} s at {rate:g} frames a second are more than the {most} frames "
            "that are continued here; give a shorter clip"
        )
    return _whole_tubes([images[number] for number in shown], config, f" at {rate:g} a second")


def read_shown(
    source: VideoSource,
    config: ModelConfig,
    choice: FrameChoice,
    *,
    limits: VideoLimits | None = None,
    reserve: int = RESERVE,
) -> ReadVideo:
    """The chosen frames of a file, for a model to look at. Raises VideoError."""
    area = reserve * frame_bounds(config, 1)[1]
    return read_video(source, choice, limits=limits, frame_pixels=area)


def _whole_tubes(
    images: Sequence[Image.Image], config: ModelConfig, rate: str = ""
) -> list[Image.Image]:
    """The frames without the first ones that fill no tube. Raises VideoError for too few."""
    tube = config.seen_tube_frames
    if len(images) < tube:
        raise VideoError(
            f"a clip of {len(images)} frames{rate} is too short to be continued; this model needs "
            f"{tube}"
        )
    return list(images[len(images) % tube :])


def _timeline_of(video: Video) -> Timeline:
    rate = float(video.fps)
    return Timeline([number / rate for number in range(len(video.frames))], video.seconds)


def seen_frames(
    config: ModelConfig, images: Sequence[Image.Image], times: Sequence[float], grouped: bool
) -> Frames:
    """Frames as the model sees them: each an image, or `grouped` in tubes."""
    return in_tubes(config, images, times) if grouped else Frames(images, times)
