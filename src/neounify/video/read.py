"""Untrusted video files as frames with times, decoded in a separate process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import IO

import numpy as np
import PIL.Image

from neounify.errors import DecoderStopped, VideoError
from neounify.video.child import REFUSED
from neounify.video.choice import FrameChoice
from neounify.video.decode import Clip, VideoLimits
from neounify.video.library import video_library

VideoSource = str | PathLike[str] | bytes | bytearray | memoryview
"""A path, or the bytes of a file."""

FRAME_PIXELS = 4 * 448**2
"""Area to which larger frames are reduced: four times what the published models read of one."""
PROCESS_STARTED: ContextVar[Callable[[subprocess.Popen[bytes]], None] | None] = ContextVar(
    "PROCESS_STARTED", default=None
)
"""Called in its context with each process that decodes, so that another thread can kill it."""
_START_SECONDS = 20.0
"""For the start of the process, beside the seconds that decoding may take."""
_OUT_OF_TIME, _KILLED = -24, -9
"""Exit states of a process that used up its processor time, by SIGXCPU, and of a killed one."""
_WITH_BYTES = "the clip"
_URL = re.compile(r"data:|[a-z][a-z0-9+.-]+:/", re.IGNORECASE | re.ASCII)
_MAX_NAME = 200
"""Characters of a path in messages."""


@dataclass(frozen=True)
class ReadVideo:
    """The chosen frames of a clip: RGB images of one size, upright, and what the file holds."""

    images: list[PIL.Image.Image]
    clip: Clip

    @property
    def times(self) -> list[float]:
        """Of each image, in seconds from the first frame of the clip."""
        return self.clip.times


def read_video(
    source: VideoSource,
    choice: FrameChoice | None = None,
    *,
    limits: VideoLimits | None = None,
    frame_pixels: int = FRAME_PIXELS,
) -> ReadVideo:
    """Read the frames of a clip that `choice` names; None is the published models' rule.

    Frames that are larger are reduced to an area of `frame_pixels`. Sound is not read. Raises
    VideoError: missing, empty, damaged, no video, beyond `limits`, or referring to
    other files, which are never read; DecoderStopped: no processor was free for the decoder, or
    it was killed.
    """
    video_library()
    choice, limits = choice or FrameChoice(), limits or VideoLimits()
    request = {
        "choice": asdict(choice),
        "limits": asdict(limits),
        "frame_pixels": frame_pixels,
    }
    name = name_of(source)
    with _opened(source, name, limits) as file:
        output = _run(json.dumps(request), file, limits, name)
    head, _, body = output.partition(b"\n")
    answer = json.loads(head)
    clip = Clip(**answer | {"size": tuple(answer["size"])})
    width, height = clip.size
    frames = np.frombuffer(body, np.uint8).reshape(len(clip.times), height, width, 3)
    return ReadVideo([PIL.Image.fromarray(frame) for frame in frames], clip)


def name_of(source: VideoSource) -> str:
    """What messages call a source. Raises VideoError for what is none."""
    if isinstance(source, bytes | bytearray | memoryview):
        return _WITH_BYTES
    if not isinstance(source, str | PathLike):
        raise VideoError(
            "a clip is a path, the bytes of a file, a Video, or Frames, not "
            f"{type(source).__name__}"
        )
    name = str(source)
    name = name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME // 2]}…"
    return name or "''"


@contextmanager
def _opened(source: VideoSource, name: str, limits: VideoLimits) -> Iterator[IO[bytes]]:
    """The file to hand over. Raises VideoError."""
    if isinstance(source, bytes | bytearray | memoryview):
        if len(source) > limits.file_bytes:
            raise VideoError(
                f"{name}: has {len(source)} bytes; at most {limits.file_bytes} are read"
            )
        with tempfile.TemporaryFile() as file:
            file.write(source)
            file.seek(0)
            yield file
        return
    try:
        path = Path(source)
        if path.exists() and not path.is_file():
            raise VideoError(f"{name}: not a file")
        opened = path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, VideoError):
            raise
        if _URL.match(name):
            raise VideoError(f"{name}: a URL is not read; give a path, or bytes") from error
        if isinstance(error, FileNotFoundError):
            raise VideoError(f"{name}: no such file") from error
        raise VideoError(f"{name}: cannot be read ({error})") from error
    with opened:
        yield opened


def _run(request: str, file: IO[bytes], limits: VideoLimits, name: str) -> bytes:
    """What the process wrote. Raises VideoError, and DecoderStopped."""
    command = [sys.executable, "-m", "neounify.video.child", request]
    # One thread of numpy: each would count its stack against the bound on memory.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    path = os.pathsep.join(filter(None, sys.path))
    process = subprocess.Popen(
        command,
        stdin=file,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, **threads, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
    )
    seconds = limits.seconds + _START_SECONDS
    with process:
        try:
            if (started := PROCESS_STARTED.get()) is not None:
                started(process)
            output, reason = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            raise DecoderStopped(
                f"{name}: its decoder had no processor for most of {seconds:g} seconds, this "
                "machine is busy; try again"
            ) from None
        except BaseException:
            process.kill()
            raise
    if process.returncode == REFUSED:
        raise VideoError(f"{name}: {reason.decode('utf-8', 'replace')}")
    if process.returncode == _OUT_OF_TIME:
        raise VideoError(
            f"{name}: takes more than {limits.seconds:g} seconds of a processor to decode; give a "
            "shorter or smaller clip"
        )
    if process.returncode == _KILLED:
        raise DecoderStopped(
            f"{name}: its decoder was killed, perhaps for want of memory on this machine; try again"
        )
    if process.returncode:
        raise VideoError(f"{name}: damaged; its decoder failed")
    return output
