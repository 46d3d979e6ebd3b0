"""Clips of files as the frames that a model sees, by the rules of inference and of training.

A clip to look at has the frames that `Pipeline.chat(video=…)` takes of it, with their times. A clip
to generate has consecutive frames at the rate of the model, in whole tubes, and so has a clip
before it (`video/choice.py`).
"""

from __future__ import annotations

from pathlib import Path

from neounify.config import ModelConfig
from neounify.data.media import check_pixels
from neounify.data.reasons import reason_of
from neounify.data.sample import ClipFile, DataError, Part, Sample, SampleClip
from neounify.errors import VideoError
from neounify.pipeline.videos import RESERVE, frame_choice, read_shown
from neounify.tasks.clips import frame_bounds
from neounify.video.choice import FrameChoice
from neounify.video.decode import VideoLimits
from neounify.video.read import read_video


def read_clips(sample: Sample, config: ModelConfig, target_area: int) -> Sample:
    """The sample with the frames of its clips that are in files.

    Frames to generate are reduced to some times `target_area` pixels. Raises DataError.
    """
    if not any(isinstance(clip, ClipFile) for clip in sample.clips):
        return sample
    generates = any(clip.loss for clip in sample.clips)
    pixels = 0

    def read(part: Part) -> Part:
        nonlocal pixels
        if not isinstance(part, ClipFile):
            return part
        try:
            clip = _consecutive(part, config, target_area) if generates else _shown(part, config)
        except VideoError as error:
            raise _named(part, str(error)) from error
        height, width = clip.frame_size
        pixels = check_pixels(pixels + height * width * len(clip.frames))
        return clip

    return sample.with_parts(read)


def tube_frames(config: ModelConfig, *, und: bool = False) -> int:
    """Frames of a tube. DataError for a model without an embedding of tubes."""
    video = config.video
    if video is None or (und and not video.und):
        what = "to look at in tubes: show it as images (tubes=False)" if und else "to generate"
        raise DataError(f"the model has no embedding of tubes, and the sample a clip {what}")
    return video.tube_frames


def _shown(part: ClipFile, config: ModelConfig) -> SampleClip:
    """A clip to look at."""
    reading = part.reading
    choice = frame_choice(config, reading.fps, reading.max_frames, reading.tubes)
    video = read_shown(part.file, config, choice)
    return SampleClip(video.images, "input", tubes=video.clip.in_tubes, times=video.times)


def _consecutive(part: ClipFile, config: ModelConfig, target_area: int) -> SampleClip:
    """A clip to generate, or one that it continues."""
    multiple, defaults, reading = tube_frames(config), config.sampling.video, part.reading
    fps, most = reading.target_fps or defaults.fps, defaults.frames
    area, cut = target_area, part.loss and reading.target_frames is not None
    tubes = config.video is not None and config.video.und
    tube = multiple if tubes else 1
    if part.loss:
        most = reading.target_frames or most
    else:
        multiple, most, area = 1, defaults.max_frames, frame_bounds(config, 1)[1]
    choice = FrameChoice(fps=fps, max_frames=most, multiple=multiple, cut=cut)
    limits = VideoLimits()
    bound = min(RESERVE * area, limits.output_pixels // most)
    video = read_video(part.file, choice, limits=limits, frame_pixels=max(1, bound))
    images = video.images
    if not part.loss:  # as `read_condition` takes them, without the first ones that fill no tube
        if len(images) < tube:
            raise VideoError(f"has {len(images)} frames at {fps:g} a second, a tube {tube}")
        images = images[len(images) % tube :]
    return SampleClip(images, part.role, fps=fps, tubes=tubes)


def _named(part: ClipFile, text: str) -> DataError:
    """The error of a file by its name in the record, not by its whole path."""
    where = str(part.file) if isinstance(part.file, Path) else "the clip"
    reason = text.removeprefix(f"{where}: ")
    message = text if reason == text else f"{part.name}: {reason}"
    return DataError(message, reason_of(ValueError(reason)))
