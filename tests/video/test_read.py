"""Reading clips: kinds of files, times, seeking, orientation, and files that mean harm."""

import http.server
import io
import math
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from neounify.errors import VideoError
from neounify.video import decode
from neounify.video.choice import FrameChoice
from neounify.video.decode import VideoLimits, decode_frames
from neounify.video.read import read_video
from support.clips import clip_bytes, numbered, numbers_of, of_streams

EVERY = FrameChoice(fps=1000, max_frames=1000)
B_FRAMES = {
    "libx264": {"x264-params": "b-adapt=0:scenecut=0"},
    "mpeg4": {"b": "2M", "bf": "2", "sc_threshold": "1000000000"},
}
"""Settings of encoders for B-frames, which are stored in another order than they are shown in."""
OPEN = {"x264-params": "b-adapt=0:scenecut=0:open-gop=1"}
"""Those for B-frames that are stored after a keyframe and shown before it."""


def decoded(
    data: bytes,
    choice: FrameChoice | None = None,
    limits: VideoLimits | None = None,
    frame_pixels: int = 10**6,
) -> tuple[decode.Clip, list[Image.Image]]:
    """Decode in this process, without the start of another one."""
    clip, frames = decode_frames(
        io.BytesIO(data), choice or FrameChoice(), limits or VideoLimits(), frame_pixels
    )
    return clip, [Image.fromarray(frame) for frame in frames]


# --- kinds of files ---


@pytest.mark.parametrize(
    ("format", "codec", "pix_fmt"),
    [
        ("mp4", "libx264", "yuv420p"),
        ("mp4", "libx265", "yuv420p"),
        ("mov", "prores_ks", "yuv422p10le"),
        ("mp4", "mpeg4", "yuv420p"),
        ("matroska", "libx264", "yuv420p"),
        ("webm", "libvpx-vp9", "yuv420p"),
        ("webm", "libvpx", "yuv420p"),
        ("matroska", "libx265", "yuv420p"),
        ("matroska", "mpeg4", "yuv420p"),
        ("avi", "libx264", "yuv420p"),
        ("avi", "mpeg4", "yuv420p"),
        ("avi", "msmpeg4", "yuv420p"),
        ("avi", "msmpeg4v2", "yuv420p"),
        ("avi", "mjpeg", "yuvj420p"),
        ("gif", "gif", "rgb8"),
    ],
)
def test_every_kind_is_read(format: str, codec: str, pix_fmt: str) -> None:
    # x265 4.2 corrupts memory for a width or height below 64, and tests after it are aborted.
    width, height = (128, 96) if codec == "libx265" else (48, 32)
    frames = numbered(20, height, width)
    encoder = B_FRAMES.get(codec)
    data = clip_bytes(frames, format=format, codec=codec, pix_fmt=pix_fmt, encoder=encoder)
    clip, images = decoded(data, FrameChoice(fps=5))
    assert (clip.frames, clip.size, clip.has_sound) == (20, (width, height), False)
    assert clip.seconds == pytest.approx(2.0, abs=0.01)
    assert clip.times == pytest.approx([n / 5 for n in range(10)], abs=0.002)
    coarse = 3 if format == "gif" else 0  # 3 bits a colour
    assert np.abs(np.array(numbers_of(images)) - np.arange(0, 20, 2)).max() <= coarse


def test_a_file_is_read_in_another_process_by_its_path_and_by_its_bytes(tmp_path: Path) -> None:
    data = clip_bytes(numbered(30), sound=True)
    path = tmp_path / "clip.mp4"
    path.write_bytes(data)
    for source in (path, str(path), data):
        video = read_video(source)
        assert numbers_of(video.images) == [0, 10, 20]
        assert video.times == [0, 1, 2]
        assert video.clip.has_sound


# --- times ---


def test_frames_of_changing_length_are_read_by_their_times() -> None:
    times = [0, 0.1, 0.2, 0.9, 2.5, 2.6, 4.0]
    data = clip_bytes(numbered(7), format="matroska", times=times)
    clip, images = decoded(data, FrameChoice(fps=1))
    assert numbers_of(images) == [0, 3, 5, 6]
    assert clip.times == pytest.approx([0, 0.9, 2.6, 4.0])


def test_a_clip_that_does_not_start_at_zero_is_timed_from_its_first_frame() -> None:
    times = [100 + number / 10 for number in range(20)]
    clip, images = decoded(clip_bytes(numbered(20), format="matroska", times=times))
    assert clip.times == [0, 1]
    assert numbers_of(images) == [0, 10]


def test_one_frame_is_a_clip() -> None:
    clip, images = decoded(clip_bytes(numbered(1)))
    assert (clip.frames, clip.times, len(images)) == (1, [0], 1)


@pytest.mark.parametrize(
    ("format", "codec"),
    [("mp4", "libx264"), ("matroska", "libx264"), ("avi", "libx264"), ("avi", "mpeg4")],
)
def test_frames_that_follow_a_keyframe_are_not_all_decoded(
    format: str, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []
    original = decode._Decoder._decoded

    def count(self: Any) -> Iterator[Any]:
        for frame in original(self):
            counted.append(frame.pts)
            yield frame

    monkeypatch.setattr(decode._Decoder, "_decoded", count)
    frames = [np.full((16, 16, 3), number % 256, np.uint8) for number in range(600)]
    data = clip_bytes(frames, format=format, codec=codec, gop=10, encoder=B_FRAMES[codec])
    clip, images = decoded(data, FrameChoice(max_frames=4, fps=100))
    assert [round(time * 10) for time in clip.times] == [0, 200, 399, 599]
    levels = [int(np.asarray(image).mean()) for image in images]
    assert np.abs(np.array(levels) - np.array([0, 200, 399 - 256, 599 - 512])).max() <= 2
    assert len(counted) < 33  # at most the 10 that follow each keyframe, and one for the delay


@pytest.mark.parametrize(
    ("format", "codec", "encoder"),
    [
        *((format, "libx264", B_FRAMES["libx264"]) for format in ("mp4", "matroska", "avi")),
        *((format, "libx264", OPEN) for format in ("mp4", "matroska", "avi")),
        *((format, "mpeg4", B_FRAMES["mpeg4"]) for format in ("mp4", "matroska", "avi")),
        ("avi", "libx264", {"x264-params": "bframes=8:b-adapt=0:scenecut=0"}),
        ("avi", "libx264", {"bf": "0"}),
    ],
)
def test_seeking_gives_the_frames_of_decoding_everything(
    format: str, codec: str, encoder: dict[str, str]
) -> None:
    frames = numbered(32) * 4
    data = clip_bytes(frames, format=format, codec=codec, gop=7, encoder=encoder)
    everything = numbers_of(decoded(data, EVERY)[1])
    assert everything == list(range(32)) * 4
    for choice in (FrameChoice(fps=0.9, max_frames=100), FrameChoice(fps=10, max_frames=9)):
        clip, some = decoded(data, choice)
        assert numbers_of(some) == [everything[round(time * 10)] for time in clip.times]


@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "mjpeg"])
@pytest.mark.parametrize("fps", [Fraction(30000, 1001), 24, 12])
def test_avi_counts_frames_and_gives_those_of_mp4(codec: str, fps: float) -> None:
    frames = numbered(32) * 4
    settings: dict[str, Any] = {"codec": codec, "fps": fps, "encoder": B_FRAMES.get(codec)}
    settings["pix_fmt"] = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    files = [clip_bytes(frames, format=format, **settings) for format in ("avi", "mov")]
    for choice in (FrameChoice(), FrameChoice(fps=24), FrameChoice(fps=7), FrameChoice(fps=60)):
        (avi, shown), (mov, wanted) = (decoded(data, choice) for data in files)
        assert avi.times == pytest.approx(mov.times, abs=1e-3)
        assert numbers_of(shown) == numbers_of(wanted)
    clip = decoded(files[0])[0]
    first = [math.floor(n * fps + 1e-9) / float(fps) for n in range(math.ceil(128 / fps))]
    assert clip.times == pytest.approx(first)


# --- pixels ---


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_a_rotation_flag_is_applied(rotation: int) -> None:
    frame = np.zeros((32, 64, 3), np.uint8)
    frame[:16, :32] = 255  # top left
    clip, images = decoded(clip_bytes([frame], rotation=rotation))
    expected = np.rot90(frame, rotation // 90)  # the flag is in degrees counterclockwise
    assert clip.size == (expected.shape[1], expected.shape[0])
    assert np.abs(np.asarray(images[0]).astype(int) - expected).mean() < 8


def test_odd_sizes_are_kept() -> None:
    data = clip_bytes(numbered(3, 33, 47), pix_fmt="yuv444p")
    assert decoded(data)[0].size == (47, 33)


def test_large_frames_are_reduced() -> None:
    clip, images = decoded(clip_bytes(numbered(2, 130, 258)), frame_pixels=60 * 40)
    assert clip.size == (69, 34)
    assert numbers_of(images) == [0]


def test_the_frames_that_are_chosen_share_the_area_of_a_clip() -> None:
    data = clip_bytes(numbered(30))
    limits = VideoLimits(output_pixels=3 * 48 * 32)
    for most in (3, 2000):  # of three frames: what is asked for at most is no matter
        assert decoded(data, FrameChoice(max_frames=most), limits)[0].size == (48, 32)
    clip, images = decoded(data, FrameChoice(fps=10), limits)
    assert (clip.size, len(images)) == ((15, 10), 30)


def test_transparent_frames_are_laid_on_white() -> None:
    file = io.BytesIO()
    shown = Image.new("P", (16, 16), 0)
    shown.putpalette([0, 0, 0, 255, 0, 0])
    shown.paste(1, (0, 0, 8, 16))
    shown.save(file, "GIF", transparency=0, save_all=True, append_images=[shown], duration=100)
    image = decoded(file.getvalue())[1][0]
    assert image.getpixel((2, 8)) == (255, 0, 0)
    assert image.getpixel((12, 8)) == (255, 255, 255)


# --- bad input ---


def refused(data: bytes, **limits: Any) -> str:
    with pytest.raises(VideoError) as error:
        decoded(data, limits=VideoLimits(**limits))
    return str(error.value)


def test_what_is_no_video_is_refused() -> None:
    assert refused(b"") == "is empty"
    assert "not a video, or damaged; use MP4" in refused(b"not a video" * 100)
    data = clip_bytes(numbered(20))
    assert "not a video, or damaged" in refused(bytes(1000) + data)


def test_only_sound_is_refused() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=8000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate, silence.pts = 8000, 0
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    assert refused(file.getvalue()) == "holds no video, only sound"


def test_limits_are_errors_with_their_numbers() -> None:
    data = clip_bytes(numbered(20))
    assert f"has {len(data)} bytes; at most 100 are read" in refused(data, file_bytes=100)
    assert refused(data, frames=10) == "has more than 10 frames"
    assert refused(data, length=1) == "lasts 2 seconds; at most 1 are read"
    assert "2 frames of 1x1 are more than 1 pixels" in refused(data, output_pixels=1)
    assert "not a video" in refused(data, pixels=1000) or "1536 pixels" in refused(
        data, pixels=1000
    )


def test_a_thousand_streams_are_refused() -> None:
    data = of_streams(1000)
    started = time.monotonic()
    with pytest.raises(VideoError, match=r"^the clip: has more than 32 streams$"):
        read_video(data, limits=VideoLimits(seconds=20))
    assert time.monotonic() - started < 30


def test_headers_that_lie_about_the_size_are_refused() -> None:
    data = bytearray(clip_bytes(numbered(3), format="avi", codec="rawvideo", pix_fmt="bgr24"))
    header = data.index(b"strf") + 8
    assert struct.unpack_from("<ii", data, header + 4) == (48, -32)  # rows from the top
    struct.pack_into("<ii", data, header + 4, 12000, -12000)
    message = refused(bytes(data))
    assert message == "its frames have no pixels, or more than the 36000000 that are decoded"


def test_a_size_in_the_header_gives_way_to_that_of_the_frames() -> None:
    data = bytearray(clip_bytes(numbered(3), codec="mpeg4"))
    entry = data.index(b"mp4v")
    data[entry + 28 : entry + 32] = struct.pack(">HH", 65535, 65535)
    assert decoded(bytes(data))[0].size == (48, 32)


def test_a_table_that_promises_a_billion_frames_takes_no_memory() -> None:
    data = bytearray(clip_bytes(numbered(3), codec="mpeg4"))
    sizes = data.index(b"stsz")
    data[sizes + 8 : sizes + 16] = struct.pack(">II", 1, 80_000_000)
    chunks = data.index(b"stsc")
    data[chunks + 16 : chunks + 20] = struct.pack(">I", 80_000_000)
    started = time.monotonic()
    with pytest.raises(VideoError):
        read_video(bytes(data), limits=VideoLimits(memory=2**30, seconds=20))
    assert time.monotonic() - started < 30


def test_paths_that_are_no_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="no such file"):
        read_video(tmp_path / "missing.mp4")
    with pytest.raises(VideoError, match="not a file"):
        read_video(tmp_path)
    with pytest.raises(VideoError, match="cannot be read"):
        read_video("a\0b")


# --- other files and addresses ---


@contextmanager
def listening() -> Iterator[tuple[str, list[str]]]:
    """An HTTP server, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


def references(address: str, path: Path) -> dict[str, bytes]:
    """Files that name `address` and `path`, by their kinds."""
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{address}/a.ts\n#EXT-X-ENDLIST\n"
    manifest = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static">'
        f"<BaseURL>{address}/</BaseURL></MPD>"
    )
    url = address.encode() + b"/a.mov"
    reference = b"url " + struct.pack(">I", len(url)) + url
    data_reference = box(b"rdrf", bytes(4) + reference)
    movie = box(b"moov", box(b"rmra", box(b"rmda", data_reference)))
    return {
        "playlist": playlist.encode(),
        "playlist of files": playlist.replace(address, f"file://{path.parent}").encode(),
        "concat": f"ffconcat version 1.0\nfile '{path}'\n".encode(),
        "session": f"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nu={address}\n".encode(),
        "manifest": manifest.encode(),
        "reference movie": box(b"ftyp", b"qt  " + bytes(4)) + movie,
        "image pattern": b"P6\n1 1\n255\n" + bytes(3),
    }


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", len(content) + 8, kind) + content


@pytest.mark.parametrize("kind", list(references("", Path("/"))))
def test_files_and_addresses_inside_a_file_are_not_read(kind: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(clip_bytes(numbered(2)))
    with listening() as (address, asked):
        message = refused(references(address, secret)[kind])
        assert "not a video" in message or "holds no video" in message, message
        assert not asked


@pytest.mark.parametrize("kind", ["playlist", "playlist of files", "concat"])
def test_no_file_is_opened_even_where_a_format_would(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "FORMATS", (*decode.FORMATS, "hls", "concat", "mpegts"))
    secret = tmp_path / "a.ts"
    secret.write_bytes(clip_bytes(numbered(2), format="mpegts"))
    with listening() as (address, asked):
        refused(references(address, secret)[kind])
        assert not asked


def alias(path: Path, up: int) -> bytes:
    """An entry of QuickTime that names a file, by its path or, with `up` 1, beside this one."""
    name = str(path).encode()
    name += bytes(len(name) % 2)
    tail = struct.pack(">HH16xHH", up, up, 2, len(name)) + name + struct.pack(">HH", 0xFFFF, 0)
    return box(b"alis", bytes(4 + 50) + struct.pack("B63s", 8, b"clip.mp4") + bytes(16) + tail)


def with_reference(data: bytes, entry: bytes) -> bytes:
    """An MP4 file whose frames are in another one, which `entry` names."""
    assert data.index(b"mdat") < data.index(b"moov")  # the frames stay where they are
    content = bytes(4) + struct.pack(">I", 1) + entry
    return _replaced(data, [b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"], content)


def _replaced(data: bytes, path: list[bytes], content: bytes) -> bytes:
    """The boxes of `data`, with another content of the one at the end of `path`."""
    boxes, position = b"", 0
    while position < len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        inside = data[position + 8 : position + size]
        if kind == path[0]:
            inside = _replaced(inside, path[1:], content) if path[1:] else content
        boxes += box(kind, inside)
        position += size
    return boxes


@pytest.mark.parametrize("kind", ["address", "file", "alias", "alias beside"])
def test_frames_in_another_file_are_not_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def refuse(url: str, flags: int, options: dict[str, str]) -> Any:
        opened.append(url)
        raise VideoError("refers to another file")

    monkeypatch.setattr(decode, "_refuse_other_files", refuse)
    monkeypatch.chdir(tmp_path)
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(clip_bytes([np.full((32, 48, 3), 255, np.uint8)] * 5))
    with listening() as (address, asked):
        entries = {
            "address": box(b"url ", bytes(4) + f"{address}/a.mp4\0".encode()),
            "file": box(b"url ", bytes(4) + f"file://{secret}\0".encode()),
            "alias": alias(secret, 0),
            "alias beside": alias(secret, 1),
        }
        data = with_reference(clip_bytes(numbered(5)), entries[kind])
        if "alias" in kind:
            assert refused(data) == "has no frames"
        else:  # FFmpeg takes the frames for those of this file
            assert numbers_of(decoded(data, EVERY)[1]) == [0, 1, 2, 3, 4]
        assert not asked
        assert not opened


def test_an_alias_is_refused_even_where_ffmpeg_would_follow_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Any = av.open

    def follow(*values: Any, options: dict[str, str], **named: Any) -> Any:
        follows = {"enable_drefs": "1", "use_absolute_path": "1"}
        return original(*values, options=options | follows, **named)

    monkeypatch.setattr(av, "open", follow)
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(clip_bytes(numbered(5)))
    message = refused(with_reference(clip_bytes(numbered(5)), alias(secret, 0)))
    assert message == "refers to another file or address, which is not read"


def test_opening_another_file_is_an_error() -> None:
    with pytest.raises(VideoError, match="refers to another file or address"):
        decode._refuse_other_files("http://127.0.0.1/", 0, {})


@pytest.mark.parametrize("name", ["streams", "frames", "pixels", "seconds"])
def test_limits_below_one_are_refused(name: str) -> None:
    with pytest.raises(VideoError, match=f"{name} must be at least 1, got 0"):
        VideoLimits(**{name: 0})


def test_rates_of_files_are_fractions_of_their_times() -> None:
    data = clip_bytes(numbered(30), fps=float(Fraction(30000, 1001)))
    clip, _ = decoded(data, FrameChoice(fps=24))
    assert clip.seconds == pytest.approx(1.001, abs=1e-3)
    assert len(clip.times) == 25
