"""The process that decodes one file: its stdin. Frames go to its stdout.

FFmpeg's parsers are fast and written in C: here a file that takes all memory, all time or a wrong
turn ends a process that has nothing else to lose.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import IO, Any

from neounify.errors import VideoError
from neounify.video.choice import FrameChoice
from neounify.video.decode import VideoLimits, decode_frames

REFUSED = 3
"""Exit status with which the reason is on stderr."""


def main(request: dict[str, Any], file: IO[bytes], output: IO[bytes]) -> None:
    """Decode `file`: a line of JSON, the Clip, then its frames as bytes."""
    limits = VideoLimits(**request["limits"])
    choice = FrameChoice(**request["choice"])
    _bound_process(limits)
    try:
        clip, frames = decode_frames(file, choice, limits, request["frame_pixels"])
        output.write(json.dumps(asdict(clip)).encode() + b"\n")
        for frame in frames:
            output.write(frame.data)
        output.flush()
    except (VideoError, MemoryError) as error:
        known = isinstance(error, VideoError)
        sys.stderr.write(str(error) if known else "takes too much memory to decode")
        sys.exit(REFUSED)


def _bound_process(limits: VideoLimits) -> None:
    """Bounds on memory and processor time, where the system has them."""
    try:
        import resource
    except ImportError:  # Windows; the parent's clock is left
        return
    seconds = int(limits.seconds) + 1
    bounds = {
        resource.RLIMIT_AS: (limits.memory, limits.memory),
        # Later for the hard one, whose signal is that of everything else that kills.
        resource.RLIMIT_CPU: (seconds, seconds + 1),
        resource.RLIMIT_CORE: (0, 0),
    }
    for name, bound in bounds.items():
        try:
            resource.setrlimit(name, bound)
        except (ValueError, OSError):  # not on every system, nor above a lower bound
            continue


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.stdin.buffer, sys.stdout.buffer)
