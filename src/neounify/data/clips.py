"""Clips of files as the frames that a model sees, by the rules of inference and of training.

A clip to look at has the frames that `Pipeline.chat(video=…)` takes of it, with their times. A clip
to generate has consecutive frames at the rate of the model, in whole tubes (`video/choice.py`), and
one before it those that `Pipeline.generate(condition=…)` takes.
"""

from __future__ import annotations

from neounify.config import ModelConfig
from neounify.data.media import check_pixels
from neounify.data.reasons import reason_of
from neounify.data.sample import ClipFile, DataError, Part, Sample, SampleClip
from neounify.errors import VideoError
from neounify.pipeline.videos import RESERVE, frame_choice, frames_before, read_shown
from neounify.video.choice import FrameChoice
from neounify.video.read import name_of, read_video


def read_clips(sample: Sample, config: ModelConfig, target_area: int) -> Sample:
    """The sample with the frames of its clips that are in files.

    Frames to generate are reduced to some times `target_area` pixels. Raises DataError.
    """
    if not any(isinstance(clip, ClipFile) for clip in sample.clips):
        return sample
    generates = any(clip.loss for clip in sample.clips)
    pixels = 0

    def read_clip(part: ClipFile) -> SampleClip:
        if part.loss:
            return _target(part, config, target_area)
        return _before(part, config) if generates else _shown(part, config)

    def read(part: Part) -> Part:
        nonlocal pixels
        if not isinstance(part, ClipFile):
            return part
        try:
            clip = read_clip(part)
        except VideoError as error:
            raise _named(part, str(error)) from error
        height, width = clip.frame_size
        pixels = check_pixels(pixels + height * width * len(clip.frames))
        return clip

    return sample.with_parts(read)


def tube_frames(config: ModelConfig, *, und: bool = False) -> int:
    """Frames of a tube. DataError for a model without an embedding of tubes."""
    video = config.video
    if video is None or (und and not config.sees_tubes):
        what = "to look at in tubes: show it as images (tubes=False)" if und else "to generate"
        raise DataError(f"the model has no embedding of tubes, and the sample a clip {what}")
    return video.tube_frames


def _shown(part: ClipFile, config: ModelConfig) -> SampleClip:
    """A clip to look at."""
    reading = part.reading
    choice = frame_choice(config, reading.fps, reading.max_frames, reading.tubes)
    video = read_shown(part.file, config, choice)
    return SampleClip(video.images, "input", tubes=video.clip.in_tubes, times=video.times)


def _target(part: ClipFile, config: ModelConfig, area: int) -> SampleClip:
    """A clip to generate."""
    reading, defaults = part.reading, config.sampling.video
    fps, most = reading.target_fps or defaults.fps, reading.target_frames or defaults.frames
    choice = FrameChoice(
        fps=fps,
        max_frames=most,
        multiple=tube_frames(config),
        cut=reading.target_frames is not None,
    )
    video = read_video(part.file, choice, frame_pixels=RESERVE * area)
    return SampleClip(video.images, part.role, fps=fps)


def _before(part: ClipFile, config: ModelConfig) -> SampleClip:
    """A clip before the one to generate, as `Pipeline.generate(condition=…)` takes it."""
    fps = part.reading.target_fps or config.sampling.video.fps
    images = frames_before(part.file, config, fps)
    return SampleClip(images, part.role, fps=fps, tubes=config.sees_tubes)


def _named(part: ClipFile, text: str) -> DataError:
    """The error of a file by its name in the record, not by its whole path."""
    reason = text.removeprefix(f"{name_of(part.file)}: ")
    message = text if reason == text else f"{part.name}: {reason}"
    return DataError(message, reason_of(ValueError(reason)))
