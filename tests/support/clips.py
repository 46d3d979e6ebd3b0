"""Video files of every kind for tests, written by FFmpeg with numbered grey frames."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image

STEP = 8
"""Grey levels between two frames."""


def numbered(count: int, height: int = 32, width: int = 48) -> list[np.ndarray]:
    """Frames of one grey each: the number of a frame times STEP, below 32 of them."""
    return [np.full((height, width, 3), number * STEP, np.uint8) for number in range(count)]


def numbers_of(images: Sequence[Image.Image]) -> list[int]:
    """The numbers of frames that were decoded from `numbered`."""
    return [round(float(np.asarray(image).mean()) / STEP) for image in images]


def assert_shows(file: bytes, frames: np.ndarray) -> None:
    """A file shows `frames`, uint8 [count, height, width, 3] of sides that are multiples of 8.

    Frames of an untrained model are noise, which H.264 smooths: they agree where it is not fine.
    """
    with av.open(io.BytesIO(file)) as container:
        shown = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    assert shown.shape == frames.shape
    count, height, width, _ = frames.shape
    cut = count, height // 8, 8, width // 8, 8, 3
    blocks, wanted = (x.reshape(cut).mean((2, 4)) for x in (shown, frames))
    difference = np.abs(blocks - wanted).mean()
    assert difference < 6
    assert np.abs(blocks - wanted[::-1]).mean() > 2 * difference


def clip_bytes(
    frames: Sequence[np.ndarray],
    *,
    format: str = "mp4",
    codec: str = "libx264",
    fps: float = 10,
    times: Sequence[float] | None = None,
    rotation: int = 0,
    gop: int = 250,
    sound: bool = False,
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    encoder: dict[str, str] | None = None,
) -> bytes:
    """A file of `frames`, at `times` in seconds where they are given.

    `options` are those of the format, `encoder` those of the codec.
    """
    file = io.BytesIO()
    with av.open(file, "w", format=format, options=options or {}) as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream: Any = container.add_stream(codec, rate=rate, options=encoder or {})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.gop_size = pix_fmt, gop
        if rotation:
            stream.set_display_rotation(rotation)
        unit = 1 / rate if times is None else Fraction(1, 1000)
        stream.codec_context.time_base = unit
        audio: Any = container.add_stream("aac", rate=8000, layout="mono") if sound else None
        for number, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, "rgb24")
            frame.pts = number if times is None else round(times[number] * 1000)
            frame.time_base = unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            silence.sample_rate, silence.pts = 8000, 0
            container.mux(audio.encode(silence))
            container.mux(audio.encode())
    return file.getvalue()


def of_streams(count: int) -> bytes:
    """A Matroska file of so many streams, each of one frame that cannot be decoded."""
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        streams: list[Any] = [container.add_stream("mjpeg", rate=1) for _ in range(count)]
        for stream in streams:
            stream.width = stream.height = 16
            stream.pix_fmt = "yuvj420p"
        container.start_encoding()
        for stream in streams:
            packet = av.Packet(b"\xff\xd8")
            packet.pts = packet.dts = 0
            packet.stream, packet.is_keyframe, packet.time_base = stream, True, Fraction(1)
            container.mux(packet)
    return file.getvalue()


def gif(size: tuple[int, int], count: int) -> bytes:
    """A GIF of empty frames, each of a few bytes for hundreds of pixels."""
    file = io.BytesIO()
    Image.new("P", size).save(file, "GIF")
    data = file.getvalue()
    head = data.index(b"\x2c", 13 + 3 * 2 ** ((data[10] & 7) + 1))
    delay = b"\x21\xf9\x04\x00\x0a\x00\x00\x00"
    return data[:head] + (delay + data[head:-1]) * count + b"\x3b"
