"""Clips that are generated: what a model can, the noise it begins with, and the clip before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import PIL.Image
import torch
from jaxtyping import Float
from torch import Tensor

from neounify.config import ModelConfig
from neounify.errors import PromptError, RequestError
from neounify.flow.path import initial_noise, noise_scale
from neounify.image.clips import tube_rows
from neounify.image.pixels import check_image_tokens, check_size, image_tokens
from neounify.model.layout import Grid
from neounify.tasks.clips import NO_TUBES, ClipPiece, Frames, check_frames, frame_bounds
from neounify.text.clips import clip_text
from neounify.video.clip import read_fps


def check_clip(config: ModelConfig, width: int, height: int, frames: int, fps: float) -> None:
    """Check the clip that a request asks for: sides in pixels, frames, frames per second.

    Raises RequestError for a model that generates no clips, for frames that fill no tubes, a rate
    that is none, and tokens or positions beyond the model's; ImageError for sides.
    """
    config.check_can("generate_video")
    assert config.video is not None
    tube_frames = config.video.tube_frames
    is_count = hasattr(frames, "__index__") and not isinstance(frames, bool)
    if not is_count or frames < tube_frames or frames % tube_frames:
        raise RequestError(
            f"frames must be a multiple of {tube_frames}, at least {tube_frames}, got {frames}",
            param="frames",
        )
    read_fps(fps)
    fps = float(fps)
    check_size(width, height, config.token_size, config.max_grid * config.token_size)
    check_image_tokens(config, width, height)
    tubes = frames // tube_frames
    tokens, most = tubes * image_tokens(config, width, height), max_clip_tokens(config)
    if tokens > most:
        fitting = most // image_tokens(config, width, height) * tube_frames
        raise RequestError(
            f"{frames} frames of {width}x{height} are {tokens:,} tokens, this model generates "
            f"{most:,} at most; {fitting} frames of this size are",
            param="frames",
        )
    last = tubes * config.video.position_fps / fps
    if last > config.max_positions:
        raise RequestError(
            f"{frames} frames at {fps:g} frames per second end at position {last:,.0f}, the model "
            f"has {config.max_positions:,}; give a higher rate, or fewer frames",
            param="fps",
        )


def max_clip_tokens(config: ModelConfig) -> int:
    """Tokens of the largest clip a model generates: its context, or its default clip if larger."""
    video, tube_frames = config.sampling.video, config.video.tube_frames if config.video else 1
    default = video.frames // tube_frames * image_tokens(config, *video.size)
    return max(config.max_positions, default)


def clip_grid(config: ModelConfig, width: int, height: int, frames: int, fps: float) -> Grid:
    """The tubes of a clip that `check_clip` accepts."""
    assert config.video is not None
    image = Grid.of_pixels(height, width, config.token_size)
    tubes, step = frames // config.video.tube_frames, config.video.position_fps / fps
    return Grid(image.rows, image.columns, tubes, step)


def draw_clip_noise(
    config: ModelConfig, grid: Grid, generator: torch.Generator, count: int = 1
) -> Float[Tensor, "count n fccc"]:
    """Initial scaled noise of clips as tokens, one draw of all of them."""
    assert config.video is not None
    scale, size = noise_scale(grid.length, config.flow), config.token_size
    if config.flow.noise_draw == "tokens":
        return initial_noise((count, grid.length, config.tube_width), scale, generator)
    frames = grid.tubes * config.video.tube_frames
    shape = count, frames, config.channels, grid.rows * size, grid.columns * size
    noise = initial_noise(shape, scale, generator)
    return torch.stack([tube_rows(clip, size, config.video.tube_frames) for clip in noise])


# --- to look at, and to continue ---


def clip_pieces(
    config: ModelConfig,
    frames: Sequence[PIL.Image.Image],
    times: Sequence[float],
    *,
    tubes: bool,
) -> list[ClipPiece]:
    """The pieces of an input clip, from its frames and when each is shown, in seconds.

    Without `tubes` each frame stands alone. Raises PromptError as `check_frames` does, and
    RequestError for tubes that a model has no embedding of.
    """
    check_frames(frames, times)
    per_piece = 1
    if tubes:
        if not config.sees_tubes:
            raise RequestError(NO_TUBES, param="video")
        per_piece = config.seen_tube_frames
    bounds = frame_bounds(config, len(frames))
    return [
        ClipPiece(
            tuple(frames[min(n, len(frames) - 1)] for n in range(first, first + per_piece)),
            tubes,
            times[first] - times[0],
            bounds,
        )
        for first in range(0, len(frames), per_piece)
    ]


def in_tubes(
    config: ModelConfig, frames: Sequence[PIL.Image.Image], times: Sequence[float]
) -> Frames:
    """Frames of a clip, each with its time in seconds, as a conversation takes them in tubes.

    A tube has the time of its first frame, counted from the first of all; the last frame fills the
    last tube. Raises PromptError and RequestError.
    """
    pieces = clip_pieces(config, frames, times, tubes=True)
    return Frames(pieces, [piece.seconds for piece in pieces])


def after_clip(condition: Sequence[ClipPiece], prompt: str) -> str:
    """The prompt of what follows a clip: the times and marks of its pieces, then the text.

    Raises PromptError for an empty text behind a clip.
    """
    if condition and not prompt.strip():
        raise PromptError("the prompt is empty; describe the next frames")
    return clip_text([piece.seconds for piece in condition]) + prompt


# --- requests ---


@dataclass(frozen=True, kw_only=True)
class OutputShape:
    """What is generated: `width` x `height` in pixels, of clips `frames` of them, `fps` a second.

    `condition` are pieces of the clip before it.
    """

    width: int
    height: int
    frames: int = 0
    fps: float = 24.0
    condition: tuple[ClipPiece, ...] = ()


def clip_shape(
    config: ModelConfig,
    size: tuple[int | None, int | None],
    frames: int,
    fps: float | None = None,
    condition: Sequence[PIL.Image.Image] = (),
) -> OutputShape:
    """A clip as asked for, `size` (width, height), else with the checkpoint's default; checked.

    `condition` are the frames before it, at its rate. Raises RequestError, also for a model that
    was not trained to continue clips, and ImageError.
    """
    defaults, (width, height) = config.sampling.video, size
    if (width is None) != (height is None):
        raise RequestError(
            f"give both width and height, or neither; got {width} and {height}", param="size"
        )
    if width is None or height is None:
        width, height = defaults.size
    rate = defaults.fps if fps is None else fps
    check_clip(config, width, height, frames, rate)
    rate = float(rate)
    pieces: list[ClipPiece] = []
    if condition:
        config.check_can("continue_video")
        times = [number / rate for number in range(len(condition))]
        pieces = clip_pieces(config, condition, times, tubes=config.sees_tubes)
    return OutputShape(
        width=width, height=height, frames=int(frames), fps=rate, condition=tuple(pieces)
    )
