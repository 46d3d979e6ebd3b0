"""Seconds by stage: measured in the tasks, kept beside the parts for the report of later runs."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

Seconds = Counter[str]
"""Seconds of a worker by the name of a stage."""
ALL = "all sources"
"""In place of a source: work over all of them."""


class Stopwatch:
    """Counts the time since the last lap for the stage of each lap."""

    def __init__(self) -> None:
        self.seconds: Seconds = Counter()
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """The time since the last lap was spent on this stage."""
        now = time.perf_counter()
        self.seconds[stage] += now - self._last  # type: ignore[assignment]  # a float
        self._last = now


class SecondsLog:
    """A file with a line for every part that was made; a line that a kill cut off is left out."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, part: str, seconds: Seconds) -> None:
        """Note the seconds of a part. Raises OSError."""
        line = json.dumps({"part": part, "seconds": seconds})
        # The line end comes first, so that a line that was cut off spoils no other.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"\n{line}")

    def of(self, parts: Collection[str]) -> dict[str, Seconds]:
        """The last seconds of each of these parts that has some."""
        seconds: dict[str, Seconds] = {}
        if self.path.is_file():
            for line in self.path.read_text("utf-8").splitlines():
                with suppress(ValueError, KeyError, TypeError):
                    entry = json.loads(line)
                    if entry["part"] in parts:
                        seconds[entry["part"]] = Counter(entry["seconds"])
        return seconds
