"""The process that decodes a clip: its bounds in time, and how it ends."""

from __future__ import annotations

import io
import resource
import sys
import time
from pathlib import Path

import pytest

from neounify.errors import DecoderStopped, VideoError
from neounify.video import child, read
from neounify.video.decode import MeteredFile, VideoLimits
from neounify.video.read import read_video
from support.clips import clip_bytes, numbered


def test_a_clip_that_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "_START_SECONDS", -0.99)
    with pytest.raises(DecoderStopped, match="this machine is busy; try again"):
        read_video(clip_bytes(numbered(2)), limits=VideoLimits(seconds=1))


@pytest.mark.parametrize(
    ("signal", "kind", "words"),
    [
        ("XCPU", VideoError, "more than 7 seconds of a processor to decode; give a shorter"),
        ("KILL", DecoderStopped, "its decoder was killed"),
    ],
)
def test_signals_that_end_a_decoder(
    signal: str,
    kind: type[VideoError],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\nkill -{signal} $$\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(VideoError, match=words) as error:
        read_video(clip_bytes(numbered(2)), limits=VideoLimits(seconds=7))
    assert type(error.value) is kind


def test_a_decoder_that_takes_too_long_gets_a_signal_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bounds: dict[int, tuple[int, int]] = {}
    monkeypatch.setattr(resource, "setrlimit", bounds.__setitem__)
    child._bound_process(VideoLimits(seconds=5))
    assert bounds[resource.RLIMIT_CPU] == (6, 7)


def test_reading_a_file_takes_no_time_while_others_have_the_processor() -> None:
    file = MeteredFile(io.BytesIO(b"content"), seconds=0.2)
    time.sleep(0.3)
    assert file.read(7) == b"content"


def test_reading_a_file_ends_at_its_time() -> None:
    file = MeteredFile(io.BytesIO(b"content"), seconds=0)
    with pytest.raises(VideoError, match="takes too long to read"):
        file.read(1)
