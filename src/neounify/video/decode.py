"""Decoding of a video file with FFmpeg, within limits; runs in a separate process (`child.py`).

A container may name other files and addresses (playlists, references of QuickTime): only the
formats of FORMATS are read at all, none of which needs another file, and opening one is an error.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import islice, pairwise
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from neounify.errors import VideoError
from neounify.video.choice import FrameChoice, Timeline
from neounify.video.ends import stated_end
from neounify.video.library import video_library

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "avi", "gif")
"""FFmpeg's names of the containers that are read."""
KINDS = "MP4, MOV, WebM, Matroska, AVI or GIF"
CODECS = (
    *("h264", "hevc", "av1", "libdav1d", "vp8", "vp9", "libvpx", "libvpx-vp9", "mpeg4", "mjpeg"),
    *("msmpeg4v2", "msmpeg4", "gif", "prores", "rawvideo", "png", "ffv1"),
)
"""FFmpeg's names of the decoders that are used."""
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Decoders that read transparency, which those of FFmpeg leave out."""
_NEAR = 8
"""Frames that are rather decoded than passed by seeking."""
_PROBE_BYTES, _PROBE_MICROSECONDS = 5_000_000, 5_000_000


@dataclass(frozen=True, kw_only=True)
class VideoLimits:
    """Upper bounds of one clip.

    `file_bytes` of its file; `streams` inside; `pixels` of a frame, `frames` and `length` in
    seconds, whether they are read or not; `seconds` of a processor and `memory` bytes of the
    process that decodes. `output_pixels` of all chosen frames together, which are reduced to it.
    """

    file_bytes: int = 2 * 2**30
    streams: int = 32
    pixels: int = 36_000_000
    frames: int = 500_000
    length: float = 4 * 3600.0
    seconds: float = 120.0
    memory: int = 3 * 2**30
    output_pixels: int = 128 * 2**20

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value >= 1:
                raise VideoError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class Clip:
    """What a file holds, and which of its frames are read."""

    times: list[float]
    """Of the chosen frames, in seconds from the first frame of the file."""
    size: tuple[int, int]
    """(width, height) of the chosen frames: upright, and reduced."""
    frames: int
    """In the file."""
    seconds: float
    has_sound: bool
    in_tubes: bool
    """Whether the chosen frames are seen in tubes, as `FrameChoice.tubes` asks for."""
    rounding: float = 0.0
    """The greatest error of a time, in seconds; 0 where the file counts frames."""


class MeteredFile:
    """A file for FFmpeg that fails after some seconds of a processor."""

    name = "clip"

    def __init__(self, file: IO[bytes], seconds: float) -> None:
        self._file, self._end = file, time.process_time() + seconds
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if time.process_time() > self._end:
            raise VideoError("takes too long to read; give a shorter or smaller clip")
        return self._file.read(size)


def decode_frames(
    file: IO[bytes], choice: FrameChoice, limits: VideoLimits, frame_pixels: int
) -> tuple[Clip, Iterator[np.ndarray]]:
    """The clip in a file, and its chosen frames as RGB arrays [height, width, 3] uint8.

    Frames are turned upright, laid on white where they are transparent, and reduced to an area of
    `frame_pixels` where they are larger, or to their share of `limits.output_pixels`. Raises
    VideoError, also while frames are read.
    """
    file.seek(0, 2)
    if not file.tell():
        raise VideoError("is empty")
    if file.tell() > limits.file_bytes:
        raise VideoError(f"has {file.tell()} bytes; at most {limits.file_bytes} are read")
    file.seek(0)
    return _Decoder(file, choice, limits, frame_pixels).start()


class _Decoder:
    """One pass over the packets for the times of all frames, then the chosen frames by seeking."""

    def __init__(
        self, file: IO[bytes], choice: FrameChoice, limits: VideoLimits, frame_pixels: int
    ) -> None:
        self._av = video_library()
        self._limits, self._choice, self._frame_pixels = limits, choice, frame_pixels
        self._bytes, self._stated_bytes = file.seek(0, 2), stated_end(file)
        file.seek(0)
        self._container = self._open(MeteredFile(file, limits.seconds))
        # Times that FFmpeg makes up are those of decoding, and wrong for B-frames of H.264.
        self._container.flags &= ~self._av.container.Flags.gen_pts.value
        self._stream = self._find_stream()
        self._context = self._find_context()
        self._unit = self._stream.time_base or Fraction(1, 1000)
        self._stamps: list[int] = []
        self._keys: list[int] = []
        """Time stamps of the frames at which decoding may begin."""
        self._delay: int | None = None
        """Frames by which decoding is ahead; None where the file says when each is shown."""

    def start(self) -> tuple[Clip, Iterator[np.ndarray]]:
        timeline = self._scan()
        indices, in_tubes = self._choice.take(timeline)
        share = max(1, self._limits.output_pixels // len(indices))
        self._frame_pixels = min(self._frame_pixels, share)
        frames = self._frames([self._stamps[index] for index in indices])
        first = next(frames)
        height, width = first.shape[:2]
        if width * height * len(indices) > self._limits.output_pixels:
            raise VideoError(
                f"{len(indices)} frames of {width}x{height} are more than "
                f"{self._limits.output_pixels} pixels; read fewer of them"
            )
        clip = Clip(
            times=[timeline.times[index] for index in indices],
            size=(width, height),
            frames=len(timeline.times),
            seconds=timeline.end,
            rounding=timeline.rounding,
            has_sound=bool(self._container.streams.audio),
            in_tubes=in_tubes,
        )
        return clip, self._all(first, frames)

    # --- opening ---

    def _open(self, file: MeteredFile) -> InputContainer:
        options = {
            "format_whitelist": ",".join(FORMATS),
            "protocol_whitelist": "none",
            "codec_whitelist": ",".join(CODECS),
            "max_streams": str(self._limits.streams + 1),
            "max_pixels": str(self._limits.pixels),
            "probesize": str(_PROBE_BYTES),
            "analyzeduration": str(_PROBE_MICROSECONDS),
            "enable_drefs": "0",
            "threads": "1",
        }
        try:
            return self._av.open(
                file,
                "r",
                options=options,
                metadata_errors="replace",
                io_open=_refuse_other_files,
            )
        except MemoryError as error:  # also for more streams than `max_streams`
            raise VideoError(
                f"has more than {self._limits.streams} streams, or is damaged"
            ) from error
        except (self._av.FFmpegError, ValueError) as error:
            if isinstance(error, VideoError):
                raise
            raise self._error(f"not a video, or damaged; use {KINDS}") from error

    def _find_stream(self) -> VideoStream:
        if len(self._container.streams) > self._limits.streams:
            raise VideoError(f"has more than {self._limits.streams} streams")
        cover = self._av.stream.Disposition.attached_pic
        streams = [s for s in self._container.streams.video if not s.disposition & cover]
        if not streams:
            sound = ", only sound" if self._container.streams.audio else ""
            raise self._error(f"holds no video{sound}")
        readable = [s for s in streams if s.codec_context and s.codec_context.name in CODECS]
        if not readable:
            context = streams[0].codec_context  # None for a kind that FFmpeg does not know
            kind = "of an unknown kind" if context is None else context.name
            raise self._error(f"its frames are {kind}, which is not read here; use H.264 in MP4")
        stream = max(readable, key=lambda s: (s.width * s.height, -s.index))
        for other in self._container.streams:
            if other is not stream:
                other.discard = self._av.stream.Discard.all
        self._check_size(stream.width, stream.height)
        return stream

    def _find_context(self) -> VideoCodecContext:
        """The decoder: FFmpeg's own, or for transparent frames of VP8 and VP9 the one of libvpx."""
        context = self._stream.codec_context
        name = ALPHA_DECODERS.get(context.name)
        if name in self._av.codecs_available and self._stream.metadata.get("alpha_mode") == "1":
            data = context.extradata
            context = self._av.CodecContext.create(name, "r")
            context.extradata = data
        context.thread_count = 1
        context.options = {"max_pixels": str(self._limits.pixels)}
        return context

    def _check_size(self, width: int, height: int) -> None:
        if width < 1 or height < 1:
            raise VideoError(
                "its frames have no pixels, or more than the "
                f"{self._limits.pixels} that are decoded"
            )
        if width * height > self._limits.pixels:
            raise VideoError(
                f"its frames of {width}x{height} are {width * height} pixels; at most "
                f"{self._limits.pixels} are decoded"
            )

    # --- times ---

    def _scan(self) -> Timeline:
        """The times of all frames, from the packets alone."""
        last = (-(2**63), 0)  # the greatest time stamp, and where its frame ends
        count, is_whole, has_times = 0, True, True
        for packet in self._packets():
            if not packet.size:
                continue
            if count >= self._limits.frames:
                raise VideoError(f"has more than {self._limits.frames} frames")
            count, is_whole = count + 1, is_whole and not packet.is_corrupt
            stamp = packet.dts if packet.pts is None else packet.pts
            if stamp is None:
                continue
            has_times = has_times and packet.pts is not None
            if packet.is_keyframe:
                self._keys.append(stamp)
            if packet.is_discard:  # cut off by an edit list: decoded for what follows, not shown
                continue
            self._stamps.append(stamp)
            last = max(last, (stamp, stamp + max(0, packet.duration or 0)))
        self._stamps = sorted(set(self._stamps))
        self._keys.sort()
        timeline = self._timeline(last[1]) if self._stamps else None
        self._check_end(timeline, count if is_whole else 0)
        if timeline is None:
            raise self._error("has no frames")
        if not has_times:
            self._delay = self._find_delay()
        return timeline

    def _find_delay(self) -> int:
        """How many frames are decoded before the first one is shown, without times in the file."""
        self._delay = 0
        self._seek_start()
        first = next(self._decoded(), None)
        return 0 if first is None or first.pts is None else bisect_left(self._stamps, first.pts)

    def _check_end(self, timeline: Timeline | None, count: int) -> None:
        """Raise VideoError where the file ends before the frames that its container states.

        `count` is the number of frames that are there, 0 where some are there in part.
        """
        seconds = timeline.end if timeline else 0.0
        if "mp4" in self._container.format.name:
            # The index, not the last box: players pass over what else is behind the frames.
            entries = islice(self._stream.index_entries, self._limits.frames)
            end = max((entry.pos + entry.size for entry in entries), default=0)
            if end > self._bytes:
                raise self._cut_off(seconds, end)
        elif self._stated_bytes > self._bytes and self._lacks_frames(timeline, count):
            raise self._cut_off(seconds, self._stated_bytes)

    def _lacks_frames(self, timeline: Timeline | None, count: int) -> bool:
        """Whether a file that is too short for its container lacks frames, not only an index.

        Where neither their number nor their length is stated, some are taken to be missing.
        """
        if timeline is None or not count:
            return True
        if self._stream.frames:
            return count < self._stream.frames
        if self._container.duration is None:
            return True
        shown = float(self._stamps[0] * self._unit) + timeline.end
        half_a_frame = timeline.end / len(timeline.times) / 2
        return shown + half_a_frame < self._container.duration / 1e6

    def _cut_off(self, seconds: float, stated: int) -> VideoError:
        """The error of a file that should have the `stated` bytes, and shows so many seconds."""
        place, advice = "before its first frame", ""
        if seconds:
            place = f"after {seconds:.1f} seconds"
            advice = ", or write what is left to a new file: ffmpeg -i OLD -c copy NEW"
        return VideoError(
            f"is cut off {place}: the file has {self._bytes:,} of {stated:,} bytes; copy or "
            f"download it again{advice}"
        )

    def _error(self, message: str) -> VideoError:
        """The error of a file without frames: that it is cut off if it is, else `message`."""
        stated = self._stated_bytes
        return self._cut_off(0, stated) if stated > self._bytes else VideoError(message)

    def _timeline(self, last_end: int) -> Timeline:
        first, last = self._stamps[0], self._stamps[-1]
        count = len(self._stamps)
        if last_end <= last:  # the last frame has no length: it is shown as long as the others
            last_end = last + (round((last - first) / (count - 1)) if count > 1 else 0)
        end = float((last_end - first) * self._unit)
        if count == 1:
            end = end or 1.0
        if not math.isfinite(end) or end > self._limits.length:
            raise VideoError(f"lasts {end:.0f} seconds; at most {self._limits.length:.0f} are read")
        times = [float((stamp - first) * self._unit) for stamp in self._stamps]
        return Timeline(times, end, rounding=self._rounding())

    def _rounding(self) -> float:
        """The greatest error of a time stamp, in seconds; none where frames are what is counted."""
        gap = min((after - before for before, after in pairwise(self._stamps)), default=1)
        counts_frames = gap == 1 or self._container.format.name == "avi"
        return 0.0 if counts_frames else float(self._unit) / 2

    def _packets(self) -> Iterator[Packet[VideoStream]]:
        """The packets from here on; the last, empty one ends decoding. Raises VideoError."""
        try:
            yield from self._container.demux(self._stream)
        except self._av.FFmpegError as error:
            count = len(self._stamps)
            raise VideoError(f"damaged or cut off; {count} frames of it can be read") from error

    # --- frames ---

    def _frames(self, stamps: list[int]) -> Iterator[np.ndarray]:
        """The frames at ascending time stamps; for those that are missing, the ones before."""
        frame: VideoFrame | None = None
        following: VideoFrame | None = None
        decoded: Iterator[VideoFrame] = iter(())
        for stamp in stamps:
            if frame is None or self._skips_much(_stamp_of(frame), stamp):
                decoded, following = self._decode_to(stamp), None
            while frame is None or _stamp_of(frame) < stamp:
                following = following or next(decoded, None)
                if following is None or (frame is not None and _stamp_of(following) > stamp):
                    break
                frame, following = following, None
            if frame is None:
                raise VideoError("no frame can be decoded: damaged or cut off")
            self._check_size(frame.width, frame.height)
            yield self._array(frame)

    def _skips_much(self, current: int, stamp: int) -> bool:
        """Whether seeking to `stamp` passes more than a few frames."""
        number = bisect_right(self._keys, stamp)
        key = self._keys[number - 1] if number else current
        return bisect_right(self._stamps, key) - bisect_right(self._stamps, current) > _NEAR

    def _decode_to(self, stamp: int) -> Iterator[VideoFrame]:
        """Frames from one before `stamp` on, or from `stamp` itself."""
        number = bisect_right(self._keys, stamp)
        # The last one may be shown after `stamp`, where the file does not say when it is.
        for key in reversed(self._keys[max(1, number - 2) : number]):
            if self._seek(key):
                decoded = self._decoded()
                first = next(decoded, None)
                if first is not None and _stamp_of(first) <= stamp:
                    yield first
                    yield from decoded
                    return
        self._seek_start()
        yield from self._decoded()

    def _seek_start(self) -> None:
        self._seek(min(self._stamps[0], self._keys[0] if self._keys else 0))

    def _seek(self, stamp: int) -> bool:
        try:
            self._container.seek(stamp, stream=self._stream)
        except self._av.FFmpegError:
            return False
        self._context.flush_buffers()
        return True

    def _decoded(self) -> Iterator[VideoFrame]:
        """All frames from here on that have a time; packets that are damaged are passed over."""
        number = -1
        for packet in self._packets():
            try:
                frames = self._context.decode(packet)
            except self._av.FFmpegError:
                continue
            for frame in frames:
                if self._delay is not None:
                    # Frames leave the decoder in the order in which they are shown.
                    number += 1
                    if frame.dts is not None:
                        number = bisect_left(self._stamps, frame.dts) - self._delay
                    frame.pts = self._stamps[max(0, min(number, len(self._stamps) - 1))]
                if frame.pts is not None:
                    yield frame

    def _array(self, frame: VideoFrame) -> np.ndarray:
        """The frame as RGB: reduced, upright, on white."""
        scale = max(1.0, math.sqrt(frame.width * frame.height / self._frame_pixels))
        has_alpha = any(component.is_alpha for component in frame.format.components)
        pixels = frame.reformat(
            width=max(1, int(frame.width / scale)),
            height=max(1, int(frame.height / scale)),
            format="rgba" if has_alpha else "rgb24",
            interpolation="AREA" if scale > 1 else None,
        ).to_ndarray()
        if has_alpha:
            alpha = pixels[..., 3:].astype(np.uint16)
            pixels = ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        return np.ascontiguousarray(_turned(pixels, frame))

    def _all(self, first: np.ndarray, frames: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        """The frames, all of one size."""
        yield first
        for frame in frames:
            if frame.shape != first.shape:
                raise VideoError(
                    f"its frames change their size from {first.shape[1]}x{first.shape[0]} to "
                    f"{frame.shape[1]}x{frame.shape[0]}"
                )
            yield frame


def _refuse_other_files(url: str, flags: int, options: dict[str, str]) -> Any:
    raise VideoError("refers to another file or address, which is not read")


def _stamp_of(frame: VideoFrame) -> int:
    """The time stamp of a frame of `_decoded`."""
    assert frame.pts is not None
    return frame.pts


def _turned(pixels: np.ndarray, frame: VideoFrame) -> np.ndarray:
    """The pixels upright, by the matrix that a camera leaves: [a b; c d] for (column, row)."""
    side: Any = frame.side_data.get("DISPLAYMATRIX")
    if side is None:
        return pixels
    a, b, _, c, d = np.frombuffer(bytes(side), "<i4")[:5].tolist()
    if abs(a) + abs(d) < abs(b) + abs(c):
        pixels = pixels.swapaxes(0, 1)
        a, d = c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
