"""Clips on the command line: options of input videos, their frames, and clips to continue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from neounify.cli.command import UsageError
from neounify.cli.display import Display
from neounify.cli.options import FILES, IMAGES, ChatOptions, ClipOptions, GenerateOptions, option

if TYPE_CHECKING:
    from PIL.Image import Image

    from neounify.config import ModelConfig
    from neounify.tasks.clips import Frames

VideoFiles = Annotated[
    list[Path] | None,
    option(
        FILES,
        "FILE",
        "Video to ask about. May be repeated; `<video>` in the question marks the position of "
        "each.",
    ),
]
"""The option --video."""
ConditionFile = Annotated[
    Path | None,
    option(
        IMAGES,
        "FILE",
        "Video whose next frames are generated, with --frames, by a model trained to continue.",
    ),
]
"""The option --condition."""


@dataclass(frozen=True, kw_only=True)
class QuestionOptions(ChatOptions):
    """Answers to questions, also about videos."""

    fps: Annotated[
        float | None,
        option(FILES, "N", "Frames of a second that are looked at. Default: the model's rule."),
    ] = None
    max_frames: Annotated[
        int | None,
        option(FILES, "N", "Maximum frames of a video that are looked at. Default: the model's."),
    ] = None
    tubes: Annotated[
        bool,
        option(
            FILES,
            None,
            "Look at videos in tubes of several frames, with a model that has an embedding of "
            "them.",
            "--tubes",
        ),
    ] = False

    @property
    def of_videos(self) -> bool:
        """Whether an option is set that only videos have."""
        return self.fps is not None or self.max_frames is not None or self.tubes


def read_clips(
    paths: Sequence[Path],
    options: QuestionOptions,
    config: ModelConfig,
    display: Display | None = None,
) -> list[Frames]:
    """Frames of clips, with a note on the display about what is left out.

    Raises VideoError, and RequestError for a model that sees no videos.
    """
    if not paths:
        return []
    from neounify.pipeline.videos import read_file

    config.check_can("chat_video")
    videos = []
    for path in paths:
        frames, clip = read_file(path, config, options.fps, options.max_frames, tubes=options.tubes)
        count = len(frames.images)
        if display is not None:
            display.note(f"({path.name}: {count} of {clip.frames} frames, {clip.seconds:.1f} s)")
        videos.append(frames)
    return videos


def read_condition_file(
    path: Path | None, options: GenerateOptions, config: ModelConfig
) -> list[Image]:
    """Frames of the clip that is continued; none without a file.

    Raises UsageError without --frames, and the errors of `pipeline.videos.read_condition`.
    """
    if path is None:
        return []
    from neounify.pipeline.videos import read_condition

    if not isinstance(options, ClipOptions) or options.frames is None:
        raise UsageError("--condition is of videos: give --frames, how many to generate, too")
    return read_condition(path, config, options.fps)
