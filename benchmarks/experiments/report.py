"""What every experiment writes: report.json, report.md, and its table on the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.timing import describe_machine
from neounify.scenes.bench.run import surroundings


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown; the first column is text, the others are figures."""
    rules = ["---", *["--:"] * (len(head) - 1)]
    lines = [head, rules, *([str(cell) for cell in row] for row in rows)]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def circumstances(started: float) -> dict[str, Any]:
    """Seconds since `started` (of `time.monotonic`), versions and machine."""
    return {**surroundings(started), "machine": describe_machine()}


def write(folder: Path, report: Mapping[str, Any], markdown: str) -> None:
    """Write both forms of a report into a folder and print the Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    as_json = json.dumps(report, indent=1, ensure_ascii=False)
    (folder / "report.json").write_text(as_json + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown, encoding="utf-8")
    print(markdown)
