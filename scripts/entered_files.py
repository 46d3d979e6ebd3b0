"""Which files of the package a piece of work enters, in this process and in those it starts.

A file is entered when one of its functions is called; importing it does not count. Copied to a
folder on PYTHONPATH as `sitecustomize.py`, with REPORT_FOLDER set, it traces every Python process:
each writes its number there, forgets what it saw at SIGUSR1, and reports at SIGUSR2.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

REPORT_FOLDER = "NEOUNIFY_ENTERED_FILES"
_IN_FUNCTION = 1
"""The flag of functions' code (CO_OPTIMIZED); the bodies of modules and classes lack it."""


class Recorder:
    """The files of package `root` with a function called by a thread begun after `start`."""

    def __init__(self, root: str) -> None:
        self._root = root.rstrip(os.sep) + os.sep
        self._code: set[CodeType] = set()

    def start(self) -> None:
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)

    def stop(self) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def clear(self) -> None:
        self._code.clear()

    def files(self) -> set[str]:
        """Paths relative to the package."""
        names = {code.co_filename for code in list(self._code) if code.co_flags & _IN_FUNCTION}
        return {name[len(self._root) :] for name in names if name.startswith(self._root)}

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            self._code.add(frame.f_code)


def install() -> None:
    """Trace this process for the one that set REPORT_FOLDER; nothing where it is not set."""
    folder, _, root = os.environ.get(REPORT_FOLDER, "").partition(os.pathsep)
    if not folder:
        return
    recorder, number = Recorder(root), os.getpid()

    def clear(*_: object) -> None:
        recorder.clear()
        (Path(folder) / f"{number}.cleared").touch()

    def report(*_: object) -> None:
        partial = Path(folder) / f"{number}.partial"
        partial.write_text("\n".join(sorted(recorder.files())), encoding="utf-8")
        partial.rename(partial.with_suffix(".entered"))

    signal.signal(signal.SIGUSR1, clear)
    signal.signal(signal.SIGUSR2, report)
    (Path(folder) / f"{number}.pid").touch()
    recorder.start()


if __name__ == "sitecustomize":
    install()
