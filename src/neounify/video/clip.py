"""Video: frames at a rate, and their encoding as MP4."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import torch
from jaxtyping import UInt8
from torch import Tensor

from neounify.errors import VideoError
from neounify.files import atomic_file
from neounify.video.boxes import xmp_box
from neounify.video.choice import finite_number
from neounify.video.library import video_library

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video.stream import VideoStream

MAX_FPS = 240
"""Greatest frame rate of a clip."""
MAX_SIDE = 16384
"""Longest side of a frame that H.264 encodes, in pixels."""
MAX_DENOMINATOR = 1001
"""Greatest denominator of a rate: 29.97 as 30000/1001 is exact, and no player needs more."""

ENCODERS = ("libx264", "libopenh264", "mpeg4")
"""Encoders by preference; the first that FFmpeg was built with is used."""
_OPTIONS = {"libx264": {"crf": "17"}, "libopenh264": {"b": "8M"}, "mpeg4": {"qscale": "3"}}
"""Settings at which differences from the frames are hard to see."""
_BT709, _LIMITED_RANGE = 1, 1


@dataclass(frozen=True)
class Video:
    """A clip: RGB `frames` [frames, height, width, 3] of 0 to 255, `fps` of them per second.

    `fps` may be any real number above 0 up to MAX_FPS; it is kept as a fraction. Raises VideoError.
    """

    frames: UInt8[Tensor, "frames height width 3"]
    fps: Fraction

    def __post_init__(self) -> None:
        shape = tuple(self.frames.shape)
        if self.frames.dtype != torch.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
            raise VideoError(
                "frames must be uint8 [frames, height, width, 3] and not empty, got "
                f"{self.frames.dtype} {list(shape)}"
            )
        object.__setattr__(self, "fps", read_fps(self.fps))

    @property
    def seconds(self) -> float:
        """Length of the clip."""
        return float(len(self.frames) / self.fps)

    @property
    def images(self) -> list[PIL.Image.Image]:
        """The frames as PIL images."""
        return [PIL.Image.fromarray(frame) for frame in self.frames.cpu().numpy()]

    def save(self, path: str | PathLike[str], *, xmp: bytes = b"") -> None:
        """Write or replace an MP4 file, all or nothing.

        `xmp` is a packet of metadata, such as `provenance.metadata.write_packet` gives. Sides that
        are odd are kept, in 4:4:4 colours, which some browsers do not play. Raises VideoError, and
        OSError where the file cannot be written.
        """
        with atomic_file(Path(path)) as aside:
            encode_video(self.frames.cpu().numpy(), self.fps, aside)
            if xmp:
                with aside.open("ab") as file:
                    file.write(xmp_box(xmp))

    def to_bytes(self, *, xmp: bytes = b"") -> bytes:
        """The MP4 file of `save`."""
        return video_bytes(self.frames.cpu().numpy(), self.fps, xmp)


def read_fps(value: float | Fraction) -> Fraction:
    """A frame rate as a fraction, above 0 and at most MAX_FPS. Raises VideoError."""
    number = finite_number(value)
    if number is None or not 0 < number <= MAX_FPS:
        raise VideoError(f"fps must be above 0 and at most {MAX_FPS}, got {value!r}", param="fps")
    exact = value if isinstance(value, Fraction) else number
    fraction = Fraction(exact).limit_denominator(MAX_DENOMINATOR)
    return fraction or Fraction(1, MAX_DENOMINATOR)


def video_bytes(frames: Iterable[np.ndarray], fps: Fraction, xmp: bytes = b"") -> bytes:
    """The MP4 file of `encode_video` with a packet of metadata. Raises what it raises."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "clip.mp4")
        encode_video(frames, fps, path)
        return path.read_bytes() + (xmp_box(xmp) if xmp else b"")


def encode_video(frames: Iterable[np.ndarray], fps: Fraction, path: Path) -> None:
    """Write RGB frames [height, width, 3] uint8 of one size as MP4, each as soon as it comes.

    Its index stands in front of the frames, so that players begin before they have the whole file.
    Raises VideoError, and OSError where the file cannot be written.
    """
    av = video_library()
    options = {"movflags": "+faststart"}
    path.touch()  # an error of the system that names the file, where FFmpeg's would not
    try:
        with av.open(f"file:{path}", "w", format="mp4", options=options) as container:
            stream: VideoStream | None = None
            for number, array in enumerate(frames):
                if stream is None:
                    stream = _open_stream(container, array, fps)
                _check_size(stream, array, number)
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(array), "rgb24")
                frame = frame.reformat(
                    format=stream.pix_fmt, dst_colorspace=_BT709, dst_color_range=_LIMITED_RANGE
                )
                frame.pts, frame.time_base = number, 1 / fps
                container.mux(stream.encode(frame))
            if stream is None:
                raise VideoError("a video needs at least one frame, got none")
            container.mux(stream.encode())
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, VideoError | OSError):
            raise
        raise VideoError(f"the video could not be encoded: {error}") from error


def _open_stream(container: OutputContainer, first: np.ndarray, fps: Fraction) -> VideoStream:
    """The stream for frames of the size of `first`."""
    from av import VideoStream, codecs_available

    height, width = first.shape[:2]
    if max(height, width) > MAX_SIDE:
        raise VideoError(f"frames are at most {MAX_SIDE} pixels a side, got {width}x{height}")
    encoder = next(name for name in ENCODERS if name in codecs_available)
    stream = container.add_stream(encoder, rate=fps, options=_OPTIONS[encoder])
    assert isinstance(stream, VideoStream)
    stream.width, stream.height = width, height
    is_even = height % 2 == 0 and width % 2 == 0
    stream.pix_fmt = "yuv420p" if is_even else "yuv444p"
    context = stream.codec_context
    context.time_base = 1 / fps
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = _LIMITED_RANGE
    return stream


def _check_size(stream: VideoStream, array: np.ndarray, number: int) -> None:
    if array.dtype != np.uint8 or array.shape != (stream.height, stream.width, 3):
        raise VideoError(
            f"frame {number} must be uint8 [{stream.height}, {stream.width}, 3] like the first, "
            f"got {array.dtype} {list(array.shape)}"
        )
