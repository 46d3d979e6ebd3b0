"""Clips on the command line: options of input videos, and their frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from neounify.cli.command import UsageError
from neounify.cli.display import Display
from neounify.cli.options import FILES, option

if TYPE_CHECKING:
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
VideoRate = Annotated[
    float | None,
    option(
        FILES, "N", "Frames of a second that are looked at. Default: the model's rule.", "--fps"
    ),
]
"""The option --fps of input videos."""
VideoFrames = Annotated[
    int | None,
    option(FILES, "N", "Maximum frames of a video that are looked at. Default: the model's."),
]
"""The option --max-frames."""
VideoTubes = Annotated[
    bool,
    option(
        FILES,
        None,
        "Look at videos in tubes of several frames, with a model that has an embedding of them.",
        "--tubes",
    ),
]
"""The option --tubes."""


@dataclass(frozen=True)
class ClipFiles:
    """Paths of clips, and which of their frames are looked at."""

    paths: Sequence[Path]
    fps: float | None
    max_frames: int | None
    tubes: bool

    def read(self, config: ModelConfig, display: Display) -> list[Frames]:
        """Frames of all clips, with a note about what is left out. Raises VideoError."""
        if not self.paths:
            if self.fps is not None or self.max_frames is not None or self.tubes:
                raise UsageError("--fps, --max-frames and --tubes need --video FILE")
            return []
        from neounify.pipeline.videos import read_file

        config.check_can("chat_video")
        videos = []
        for path in self.paths:
            frames, clip = read_file(path, config, self.fps, self.max_frames, tubes=self.tubes)
            sound = "; its sound is not heard" if clip.has_sound else ""
            count = len(frames.images)
            display.note(
                f"({path.name}: {count} of {clip.frames} frames, {clip.seconds:.1f} s{sound})"
            )
            videos.append(frames)
        return videos
