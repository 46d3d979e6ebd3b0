"""`results.jsonl`: what a batch has done so far, and what it need not do again."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

from neounify.cli.errors import CliError
from neounify.cli.files import append_line

NAME = "results.jsonl"


def job_hash(document: dict[str, Any]) -> str:
    """A name for a job: equal for equal prompts, settings and models."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class Results:
    """The results file of a folder. One record a line, appended as soon as a line is done."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._done: Counter[str] = Counter()
        try:
            self._read(folder)
        except OSError as error:
            raise CliError(f"{self.path} cannot be used: {error.strerror or error}") from error

    @property
    def any_done(self) -> bool:
        """Whether an earlier run has done anything."""
        return sum(self._done.values()) > 0

    def take(self, job: str) -> bool:
        """Whether a job was done before. Equal lines are as many jobs, so each is taken once."""
        if self._done[job] == 0:
            return False
        self._done[job] -= 1
        return True

    def append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record, ensure_ascii=False) + "\n"
        append_line(self.path, line.encode("utf-8", "replace"))

    def _read(self, folder: Path) -> None:
        if not self.path.exists():
            return
        whole = 0
        with self.path.open("rb") as file:
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                whole += len(raw)
                self._count(raw, folder)
        if whole < self.path.stat().st_size:
            # The last line was cut off while it was written: its job counts as not done.
            with self.path.open("r+b") as file:
                file.truncate(whole)

    def _count(self, raw: bytes, folder: Path) -> None:
        try:
            record = json.loads(raw)
        except ValueError:
            return
        if not isinstance(record, dict) or record.get("status") != "done":
            return
        files = record.get("files", [])
        if isinstance(record.get("job"), str) and all((folder / file).exists() for file in files):
            self._done[record["job"]] += 1
