"""Clips that are cut off: one error where the container states its size, else what is there."""

from __future__ import annotations

import io
import re
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

from neounify.errors import VideoError
from neounify.video.choice import FrameChoice
from neounify.video.clip import Video
from neounify.video.decode import VideoLimits, decode_frames
from neounify.video.ends import stated_end
from neounify.video.read import read_video
from support.clips import clip_bytes, numbered

EVERY = FrameChoice(fps=1000, max_frames=1000)
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}


def saved() -> bytes:
    """An MP4 file of 3 seconds as `Video.save` writes it, with its index in front."""
    data = Video(torch.from_numpy(np.stack(numbered(30))), Fraction(10)).to_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    return data


FILES = {
    "mp4": saved,
    "mp4 of fragments": lambda: clip_bytes(numbered(30), gop=5, options=FRAGMENTS),
    "matroska": lambda: clip_bytes(numbered(30), format="matroska", gop=5),
    "webm": lambda: clip_bytes(numbered(30), format="webm", codec="libvpx", gop=5),
    "avi": lambda: clip_bytes(numbered(30), format="avi", codec="mjpeg", pix_fmt="yuvj420p"),
}
"""Files whose container states how many bytes there should be."""


def frames_of(data: bytes) -> int:
    clip, frames = decode_frames(io.BytesIO(data), EVERY, VideoLimits(), 10**6)
    assert len(list(frames)) == len(clip.times)
    return clip.frames


def refused(data: bytes) -> str:
    with pytest.raises(VideoError) as error:
        frames_of(data)
    return str(error.value)


@pytest.mark.parametrize("kind", FILES)
def test_a_clip_that_is_cut_off_is_refused(kind: str) -> None:
    data = FILES[kind]()
    assert frames_of(data) == 30
    message = refused(data[: len(data) * 4 // 5])
    pattern = (
        r"is cut off after (\d\.\d) seconds: the file has ([\d,]+) of ([\d,]+) bytes; copy or "
        r"download it again, or write what is left to a new file: ffmpeg -i OLD -c copy NEW"
    )
    match = re.fullmatch(pattern, message)
    assert match, message
    seconds, size, stated = (float(text.replace(",", "")) for text in match.groups())
    assert 0.5 < seconds < 2.9
    assert size == len(data) * 4 // 5 < stated <= len(data)
    assert kind == "mp4 of fragments" or stated == len(data)  # the others state the whole size


def test_one_byte_is_missed() -> None:
    data = saved()
    assert f"has {len(data) - 1:,} of {len(data):,} bytes" in refused(data[:-1])


@pytest.mark.parametrize("kind", FILES)
def test_a_clip_that_is_cut_off_before_its_first_frame(kind: str) -> None:
    data = FILES[kind]()
    for share in (10, 5):
        message = refused(data[: len(data) // share])
        assert message.startswith("is cut off before its first frame: the file has "), message
        assert message.endswith("bytes; copy or download it again")


def test_an_index_behind_the_frames_that_is_cut_off() -> None:
    data = clip_bytes(numbered(30))
    assert data.index(b"mdat") < data.index(b"moov")
    for end in (data.index(b"mdat") + 100, len(data) - 100):
        assert refused(data[:end]).startswith("is cut off before its first frame")


def test_what_is_behind_the_frames_may_be_missing_or_foreign() -> None:
    for kind in ("matroska", "webm", "avi"):
        assert frames_of(FILES[kind]()[:-1]) == 30  # of the index
    for kind in FILES:
        for junk in (b"TAG" + b"text" * 100, bytes(3000), bytes(range(1, 256)) * 9):
            assert frames_of(FILES[kind]() + junk) == 30


def test_containers_that_state_no_size_give_what_is_there() -> None:
    live = clip_bytes(numbered(30), format="matroska", gop=5, options={"live": "1"})
    gif = clip_bytes(numbered(30), format="gif", codec="gif", pix_fmt="rgb8")
    for data in (live, gif):
        assert 5 < frames_of(data[: len(data) * 4 // 5]) < 30
    assert stated_end(io.BytesIO(live)) == stated_end(io.BytesIO(gif)) == 0


def test_a_fragment_that_is_damaged_ends_the_clip_with_an_error() -> None:
    data = bytearray(FILES["mp4 of fragments"]())
    place = -1
    for _ in range(4):
        place = data.index(b"tfhd", place + 1)
    struct.pack_into(">I", data, place + 12, 2**32 - 1)  # where its frames are
    assert refused(bytes(data)) == "damaged or cut off; 12 frames of it can be read"


def test_the_error_names_the_file() -> None:
    with pytest.raises(VideoError, match=r"the clip: is cut off after \d"):
        read_video(saved()[:-40])


@pytest.mark.parametrize(
    ("head", "end"),
    [
        (b"", 0),
        (b"\x1a\x45\xdf\xa3", 0),
        (b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67", 0),
        (b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67\x00\x01", 0),
        (b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67\xff", 0),  # not known when it was written
        (b"\x1a\x45\xdf\xa3\x80\x18\x53\x80\x67\x85", 15),
        (b"\x1a\x45\xdf\xa3\x81a\x18\x53\x80\x67\x40\x85", 145),
        (b"\x1a\x45\xdf\xa3\xfe\x18\x53\x80\x67\x85", 0),
        (b"RIFF\0\0\0\0AVI ", 0),
        (b"RIFF\x05\0\0\0AVI ", 14),
        (b"RIFF\x04\0\0\0AVI RIFF\x10\0\0\0", 36),
        (b"\0\0\0\x08ftyp\0\0\0\x20moov", 40),
        (b"\0\0\0\x08ftyp\0\0\0\x20abcd", 0),
        (b"\0\0\0\x08ftyp\0\0\0\x01mdat\0\0\0\0\0\0\0\x20", 40),
        (b"\0\0\0\x08ftyp\0\0\0\0mdat", 16),
    ],
)
def test_ends_by_the_sizes_in_a_file(head: bytes, end: int) -> None:
    assert stated_end(io.BytesIO(head)) == end
