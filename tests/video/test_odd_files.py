"""Clips that are trimmed, transparent, lying or hostile: read as they are shown, or one error."""

from __future__ import annotations

import io
import os
import random
import struct
import time
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from neounify.errors import VideoError
from neounify.video.choice import FRAME_LIMIT, FrameChoice, Timeline, at_rate
from neounify.video.decode import ALPHA_DECODERS, Clip, VideoLimits, decode_frames
from neounify.video.read import read_video
from support.clips import STEP, clip_bytes, gif, numbered, numbers_of

TENTHS = FrameChoice(fps=10)


def decoded(
    data: bytes, choice: FrameChoice = TENTHS, limits: VideoLimits | None = None
) -> tuple[Clip, list[Image.Image]]:
    """Decode in this process, without the start of another one."""
    clip, frames = decode_frames(io.BytesIO(data), choice, limits or VideoLimits(), 10**6)
    return clip, [Image.fromarray(frame) for frame in frames]


def refused(data: bytes, **limits: Any) -> str:
    with pytest.raises(VideoError) as error:
        decoded(data, limits=VideoLimits(**limits))
    return str(error.value)


def patched(data: bytes, box: bytes, offset: int, form: str, *values: int) -> bytes:
    """The file with numbers of a box overwritten, `offset` bytes behind its name."""
    changed = bytearray(data)
    struct.pack_into(form, changed, data.index(box) + 4 + offset, *values)
    return bytes(changed)


def of_packets(
    packets: Sequence[bytes], size: tuple[int, int] = (48, 32), codec: str = "mjpeg"
) -> bytes:
    """An AVI whose header says `size`, of JPEGs, or of what else stands for them."""
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as container:
        stream: Any = container.add_stream(codec, rate=10)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        container.start_encoding()
        for number, data in enumerate(packets):
            packet = av.Packet(data)
            packet.pts = packet.dts = number
            packet.stream, packet.is_keyframe, packet.time_base = stream, True, Fraction(1, 10)
            container.mux(packet)
    return file.getvalue()


def jpeg(number: int, size: tuple[int, int] = (48, 32)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (number * STEP,) * 3).save(file, "JPEG")
    return file.getvalue()


# --- trimmed ---


@pytest.mark.parametrize("gop", [7, 250])
@pytest.mark.parametrize("cut", [5, 12, 19])
def test_what_an_edit_list_cuts_off_is_no_part_of_the_clip(gop: int, cut: int) -> None:
    """Telephones trim so: the file keeps the frames, and says where the clip begins."""
    data = clip_bytes(numbered(20), gop=gop)
    unit = struct.unpack_from(">i", data, data.index(b"elst") + 16)[0] // 2  # of B-frames: two
    data = patched(data, b"elst", 12, ">i", (2 + cut) * unit)
    clip, images = decoded(data)
    assert (clip.frames, clip.times[0]) == (20 - cut, 0)
    assert clip.seconds == pytest.approx((20 - cut) / 10)
    assert numbers_of(images) == list(range(cut, 20))


def test_a_clip_that_ends_early_is_as_short_as_it_is_shown() -> None:
    data = patched(clip_bytes(numbered(20)), b"elst", 8, ">I", 500)  # of 2000 ms
    clip, images = decoded(data)
    assert (clip.frames, clip.seconds, numbers_of(images)) == (5, 0.5, [0, 1, 2, 3, 4])


def test_a_clip_that_is_cut_off_whole_has_no_frames() -> None:
    assert refused(patched(clip_bytes(numbered(20)), b"elst", 12, ">i", 10**6)) == "has no frames"


# --- transparent ---


@pytest.mark.parametrize("codec", list(ALPHA_DECODERS.values()))
def test_transparent_webm_is_laid_on_white_also_after_seeking(codec: str) -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="webm") as container:
        stream: Any = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 48, 32, "yuva420p", 10
        stream.options = {"auto-alt-ref": "0"}
        for number in range(90):
            array = np.full((32, 48, 4), number * 2, np.uint8)
            array[:, :24, 3], array[:, 24:, 3] = 255, 0
            frame = av.VideoFrame.from_ndarray(array, "rgba").reformat(format="yuva420p")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    clip, images = decoded(file.getvalue(), FrameChoice(fps=0.25))
    assert clip.times == [0, 4, 8]
    levels = [np.asarray(image).astype(int) for image in images]
    for level, grey in zip(levels, (0, 80, 160), strict=True):
        assert np.abs(level[:, 2:20] - grey).max() <= 4
        assert level[:, 28:46].min() >= 251


# --- pictures that are no clip, kinds that are not known ---


def test_the_cover_of_a_song_is_no_clip() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        sound: Any = container.add_stream("aac", rate=8000, layout="mono")
        cover: Any = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 16, 16, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(numbered(1, 16, 16)[0], "rgb24")
        picture.pts = 0
        container.mux(cover.encode(picture))
        container.mux(cover.encode())
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate, silence.pts = 8000, 0
        container.mux(sound.encode(silence))
        container.mux(sound.encode())
    assert refused(file.getvalue()) == "holds no video, only sound"


def test_frames_of_other_kinds_are_named() -> None:
    data = clip_bytes(numbered(5), format="avi", codec="wmv2")
    assert refused(data) == "its frames are wmv2, which is not read here; use H.264 in MP4"
    data = clip_bytes(numbered(5)).replace(b"avc1", b"zzzz")
    assert "its frames are of an unknown kind, which is not read here" in refused(data)


# --- frames ---


def test_frames_that_change_their_size_are_refused() -> None:
    data = of_packets([jpeg(1)] * 10 + [jpeg(2, (64, 32))] * 10)
    assert refused(data) == "its frames change their size from 48x32 to 64x32"


def test_a_size_in_the_header_of_an_avi_gives_way_to_that_of_the_frames() -> None:
    assert decoded(of_packets([jpeg(n) for n in range(9)], (4800, 32)))[0].size == (48, 32)


def test_damaged_frames_show_the_one_before() -> None:
    packets = [jpeg(n) for n in range(12)]
    packets[4:7] = [b"\xff\xd8 no image"] * 3
    assert numbers_of(decoded(of_packets(packets))[1]) == [0, 1, 2, 3, 3, 3, 3, *range(7, 12)]
    packets[:2] = [b"\xff\xd8 no image"] * 2  # none is before them
    assert numbers_of(decoded(of_packets(packets))[1])[:5] == [2, 2, 2, 3, 3]
    assert refused(of_packets([b"no image"] * 9)) == "no frame can be decoded: damaged or cut off"


def packed(count: int, gop: int) -> list[bytes]:
    """Packets of MPEG-4 as DivX and Xvid wrote them to AVI: a B-frame in that of the P-frame before
    it, and for it an empty one.
    """
    settings = {"b": "2M", "bf": "1", "b_strategy": "0", "sc_threshold": "1000000000"}
    with av.open(io.BytesIO(), "w", format="avi") as container:
        stream: Any = container.add_stream("mpeg4", rate=10, options=settings)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = 32, 48, "yuv420p", gop
        packets = []
        for number, array in enumerate(numbered(count)):
            frame = av.VideoFrame.from_ndarray(array, "rgb24")
            frame.pts = number
            packets += stream.encode(frame)
        packets = [bytes(packet) for packet in packets + stream.encode()]
    mark, maker = b"\0\0\x01\xb6", b"\0\0\x01\xb2DivX503b1393p"
    kinds = [packet[packet.index(mark) + 4] >> 6 for packet in packets]  # 0: I, 1: P, 2: B
    assert kinds.count(2) > count // 3
    packets[0] = packets[0].replace(mark, maker + mark)
    empty = mark + bytes([0b01010000, 0b10011111])
    kinds.append(0)
    return [
        empty if kind == 2 else packet + (packets[number + 1] if kinds[number + 1] == 2 else b"")
        for number, (packet, kind) in enumerate(zip(packets, kinds, strict=False))
    ]


def test_packed_frames_are_shown_in_their_order() -> None:
    data = of_packets(packed(31, 6), codec="mpeg4")
    assert numbers_of(decoded(data)[1]) == list(range(31))
    assert numbers_of(decoded(data, FrameChoice(fps=0.7))[1]) == [0, 14, 28]


def test_gifs_that_unpack_to_gigabytes_are_bounded() -> None:
    bomb = gif((3000, 3000), 8)
    assert 500 * len(bomb) < 8 * 3000**2 * 3
    video = read_video(bomb, FrameChoice(fps=10, max_frames=2), frame_pixels=10**4)
    assert (video.clip.frames, len(video.images)) == (8, 2)
    assert video.clip.size[0] * video.clip.size[1] <= 10**4
    assert "no pixels, or more than the 36000000" in refused(gif((6100, 6000), 2))
    lying = bytearray(gif((10, 10), 3))
    struct.pack_into("<HH", lying, 6, 65535, 65535)
    assert "no pixels, or more than the 36000000" in refused(bytes(lying))
    assert refused(gif((1, 1), 1001), frames=1000) == "has more than 1000 frames"


# --- times ---


def test_rates_that_are_none_in_the_header_leave_the_frames() -> None:
    data = clip_bytes(numbered(20), format="avi", codec="mpeg4")
    for scale, rate in ((0, 0), (1, 0), (0, 1)):
        changed = patched(data, b"strh", 4 + 20, "<II", scale, rate)
        changed = patched(changed, b"avih", 4, "<I", 0)
        clip, images = decoded(changed)
        assert clip.frames == 20
        assert 0 < clip.seconds < 10
        assert len(images) == 8  # 0.8 s, at the 25 a second that are taken then


@pytest.mark.parametrize(
    ("box", "offset", "value", "frames"),
    [
        (b"mdhd", 12, 2**31 - 1, 20),  # units of a second
        (b"stts", 8, 2**32 - 1, 20),  # frames of one length
        (b"stts", 12, 0, 1),  # their length: all at once
        (b"stsz", 8, 1, 1),  # frames
    ],
)
def test_lies_about_times_and_counts_leave_what_is_there(
    box: bytes, offset: int, value: int, frames: int
) -> None:
    clip, _ = decoded(patched(clip_bytes(numbered(20)), box, offset, ">I", value))
    assert clip.frames == frames
    assert clip.seconds > 0
    assert clip.times == sorted(clip.times)


@pytest.mark.parametrize(
    ("box", "offset", "value", "message"),
    [
        (b"stts", 12, 2**31 - 1, "seconds; at most 14400 are read"),
        (b"stsz", 8, 2**32 - 1, "not a video, or damaged"),
        (b"stco", 8, 2**31, "is cut off before its first frame: the file has"),
    ],
)
def test_lies_that_leave_nothing_are_one_error(
    box: bytes, offset: int, value: int, message: str
) -> None:
    assert message in refused(patched(clip_bytes(numbered(20)), box, offset, ">I", value))


def test_a_length_that_is_no_number_is_not_used() -> None:
    data = bytearray(clip_bytes(numbered(20), format="matroska"))
    length = data.index(b"\x44\x89\x88") + 3
    for value in (float("nan"), 1e300, -1.0):
        struct.pack_into(">d", data, length, value)
        assert decoded(bytes(data))[0].seconds == pytest.approx(2)


def test_bytes_changed_at_random_give_a_clip_or_an_error() -> None:
    numbers = random.Random(0)
    files = [
        clip_bytes(numbered(12)),
        clip_bytes(numbered(12), options={"movflags": "frag_keyframe+empty_moov"}),
        clip_bytes(numbered(12), format="matroska"),
        clip_bytes(numbered(12), format="avi", codec="mpeg4"),
        clip_bytes(numbered(12), format="gif", codec="gif", pix_fmt="rgb8"),
    ]
    seen: Counter[str] = Counter()
    for number in range(120):
        data = bytearray(files[number % len(files)])
        for _ in range(numbers.choice((1, 2, 4, 16))):
            place = numbers.randrange(len(data))
            data[place : place + 4] = numbers.choice(
                (b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", bytes([numbers.randrange(256)]))
            )
        try:
            clip, images = decoded(bytes(data))
        except (VideoError, MemoryError):
            seen["refused"] += 1
        else:
            seen["read"] += 1
            assert len(images) == len(clip.times) >= 1
    assert min(seen["refused"], seen["read"]) > 15


# --- what is asked for ---


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 10**400, "2", True])
def test_rates_that_are_none_are_refused(fps: Any) -> None:
    with pytest.raises(VideoError, match="fps must be a finite number above 0"):
        FrameChoice(fps=fps)


@pytest.mark.parametrize("count", [0, -1, 2.5, float("nan"), "3", True, None, FRAME_LIMIT + 1])
def test_limits_that_are_none_are_refused(count: Any) -> None:
    with pytest.raises(VideoError, match="max_frames must be a whole number from 1 to 500,000"):
        FrameChoice(max_frames=count)


def test_numbers_of_numpy_are_numbers() -> None:
    choice = FrameChoice(fps=np.float32(2), max_frames=np.int64(3))
    assert choice == FrameChoice(fps=2.0, max_frames=3)
    assert (type(choice.fps), type(choice.max_frames)) == (float, int)


def test_rates_beyond_all_measure_read_every_frame() -> None:
    clip = Timeline([0.0, 1.0, 2.0], 3.0)
    started = time.monotonic()
    for fps in (1e6, 1e300, 1.7e308):
        assert at_rate(clip, fps, FRAME_LIMIT) == [0, 1, 2]
    assert at_rate(clip, 5e-324) == [0]
    assert time.monotonic() - started < 5


# --- sources ---


def test_sources_that_are_no_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "to-pipe.mp4").symlink_to(tmp_path / "pipe.mp4")
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    (tmp_path / "empty.mp4").touch()
    cases: dict[Any, str] = {
        tmp_path / "pipe.mp4": "not a file",
        tmp_path / "to-pipe.mp4": "not a file",
        tmp_path / "loop.mp4": "cannot be read",
        tmp_path / "empty.mp4": "is empty",
        "/dev/zero": "not a file",
        "": "'': not a file",
        "http://127.0.0.1:1/a.mp4": "a URL is not read; give a path, or bytes",
        Path("http://127.0.0.1:1/a.mp4"): "a URL is not read",
        "file:///etc/passwd": "a URL is not read",
        "data:video/mp4;base64," + "A" * 10**6: "AAAA…: a URL is not read",
        5: "a clip is a path, the bytes of a file, a Video, or Frames, not int",
    }
    for source, message in cases.items():
        with pytest.raises(VideoError) as error:
            read_video(source)
        assert message in str(error.value)
        assert len(str(error.value)) < 400


def test_a_link_to_a_clip_is_read(tmp_path: Path) -> None:
    (tmp_path / "ü 😀\n.mp4").write_bytes(clip_bytes(numbered(2)))
    (tmp_path / "link").symlink_to(tmp_path / "ü 😀\n.mp4")
    assert numbers_of(read_video(tmp_path / "link").images) == [0]
