"""Clips: frames, rates, encoding, metadata."""

import io
import tempfile
from collections.abc import Iterator
from concurrent.futures import CancelledError
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from neounify.errors import VideoError
from neounify.image.clips import frame_levels
from neounify.provenance.metadata import read_provenance
from neounify.video.boxes import find_xmp, xmp_box
from neounify.video.clip import Video, encode_video, read_fps, video_bytes


def moving_square(frames: int, height: int, width: int) -> torch.Tensor:
    """A red square on blue that moves to the right by two pixels a frame."""
    clip = torch.zeros(frames, height, width, 3, dtype=torch.uint8)
    clip[..., 2] = 160
    for number in range(frames):
        clip[number, 4:12, 2 * number : 2 * number + 8] = torch.tensor([220, 30, 20])
    return clip


def decoded(path: Path) -> tuple[np.ndarray, list[float]]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    return np.stack([f.to_ndarray(format="rgb24") for f in frames]), [f.time for f in frames]


@pytest.mark.parametrize("size", [(32, 48), (33, 47)], ids=["even", "odd"])
def test_a_saved_clip_has_the_frames_and_their_times(tmp_path: Path, size: tuple[int, int]) -> None:
    clip = Video(moving_square(9, *size), Fraction(30000, 1001))
    clip.save(tmp_path / "clip.mp4")
    frames, times = decoded(tmp_path / "clip.mp4")
    assert frames.shape == (9, *size, 3)
    difference = np.abs(frames.astype(int) - clip.frames.numpy().astype(int))
    assert difference.mean() < 4
    assert np.allclose(times, [n * 1001 / 30000 for n in range(9)], atol=1e-4)


def test_colours_stay_what_they_are(tmp_path: Path) -> None:
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128], [255] * 3])
    frames = colours.to(torch.uint8)[None, None].repeat_interleave(16, 2).expand(4, 32, -1, -1)
    Video(frames.contiguous(), Fraction(4)).save(tmp_path / "clip.mp4")
    shown = decoded(tmp_path / "clip.mp4")[0][0, 16, 8::16].astype(int)
    assert np.abs(shown - colours.numpy()).max() <= 8


def test_metadata_is_read_back_and_the_clip_still_plays(tmp_path: Path) -> None:
    clip = Video(moving_square(3, 32, 32), Fraction(8))
    clip.save(tmp_path / "clip.mp4", xmp=b"<x:xmpmeta/>")
    assert find_xmp(io.BytesIO((tmp_path / "clip.mp4").read_bytes())) == b"<x:xmpmeta/>"
    assert len(decoded(tmp_path / "clip.mp4")[0]) == 3
    assert find_xmp(io.BytesIO(clip.to_bytes())) == b""


def test_boxes_beyond_the_end_of_a_file_hold_no_metadata() -> None:
    damaged = b"\0\0\0\x01mdat" + b"\xff" * 8  # of 2^64 - 1 bytes
    assert find_xmp(io.BytesIO(damaged)) == b""
    assert read_provenance(damaged) == {}
    assert find_xmp(io.BytesIO(damaged + xmp_box(b"<x:xmpmeta/>"))) == b""


def test_a_failed_save_leaves_the_file_of_before(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"before")
    wide = Video(torch.zeros(1, 2, 16386, 3, dtype=torch.uint8), Fraction(8))
    with pytest.raises(VideoError, match="at most 16384 pixels a side, got 16386x2"):
        wide.save(path)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_missing_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"clip\.mp4"):
        Video(moving_square(2, 16, 16), Fraction(8)).save(tmp_path / "missing" / "clip.mp4")


def test_pixels_are_rounded_as_those_of_images() -> None:
    pixels = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).expand(1, 3, 1, 5)
    clip = Video(frame_levels(pixels), Fraction(24))
    assert clip.frames[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert clip.images[0].size == (5, 1)
    assert clip.seconds == 1 / 24


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), 241, True, "24"])
def test_impossible_rates_are_refused(fps: float) -> None:
    with pytest.raises(VideoError, match="fps must be above 0 and at most 240"):
        read_fps(fps)


def test_rates_are_fractions() -> None:
    assert read_fps(29.97) == Fraction(2997, 100)
    assert read_fps(Fraction(30000, 1001)) == Fraction(30000, 1001)
    assert read_fps(1e-9) == Fraction(1, 1001)


@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(0, 4, 4, 3, dtype=torch.uint8),
        torch.zeros(2, 4, 4, dtype=torch.uint8),
        torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
        torch.zeros(2, 4, 4, 3),
    ],
)
def test_frames_of_another_form_are_refused(frames: torch.Tensor) -> None:
    with pytest.raises(VideoError, match="frames must be uint8"):
        Video(frames, Fraction(24))


def test_frames_of_several_sizes_and_none_are_refused(tmp_path: Path) -> None:
    frames = [np.zeros((16, 16, 3), np.uint8), np.zeros((16, 32, 3), np.uint8)]
    with pytest.raises(VideoError, match=r"frame 1 must be uint8 \[16, 16, 3\] like the first"):
        encode_video(frames, Fraction(8), tmp_path / "clip.mp4")
    with pytest.raises(VideoError, match="at least one frame, got none"):
        encode_video([], Fraction(8), tmp_path / "clip.mp4")


@pytest.mark.parametrize("count", [0, 2])
def test_encoding_ends_with_an_error_of_the_frames(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def frames() -> Iterator[np.ndarray]:
        yield from moving_square(count, 32, 48).numpy()
        raise CancelledError

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(CancelledError):
        video_bytes(frames(), Fraction(8))
    assert not list(tmp_path.iterdir())
