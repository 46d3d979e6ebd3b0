"""Reports: JSON for programs, Markdown for people, each with hardware and date."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.serving.series import Series
from benchmarks.serving.stats import Latency, Summary
from benchmarks.timing import describe_machine


def write_report(folder: Path, record: Mapping[str, Any], markdown: str) -> None:
    """report.json and report.md, and the Markdown on the screen."""
    folder.mkdir(parents=True, exist_ok=True)
    head = {"date": date.today().isoformat(), "machine": describe_machine()}
    text = json.dumps(head | dict(record), indent=1, ensure_ascii=False)
    (folder / "report.json").write_text(text + "\n")
    about = [f"{head['date']}"] + [f"{key} {value}" for key, value in describe_machine().items()]
    about += [f"{key} {value}" for key, value in record["server"].items() if value]
    page = ", ".join(about) + "\n\n" + markdown + "\n"
    (folder / "report.md").write_text(page)
    print(page)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_HEAD = (
    *("series", "clients", "kind", "requests", "errors", "requests/s", "tokens/s", "images/s"),
    *("tokens an answer", "first text p50 / p95, s", "total p50 / p95, s"),
    *("against one client", "peak, MB"),
)


def series_table(series: Sequence[Series]) -> str:
    """Every series and kind of request; the ratio is that of requests/s."""
    serial = {s.name: s for s in series if s.clients == 1}
    rows = [
        _row(s, kind, summary, serial.get(s.name))
        for s in series
        for kind, summary in s.kinds.items()
    ]
    return markdown(_HEAD, rows)


def _row(series: Series, kind: str, summary: Summary, serial: Series | None) -> list[str]:
    ratio = ""
    if serial is not None and serial.kinds[kind].request_rate:
        ratio = f"×{summary.request_rate / serial.kinds[kind].request_rate:.2f}"
    errors = ", ".join(f"{count} × {name}" for name, count in summary.errors.items())
    return [
        series.name + (" (cut short)" if series.cut else ""),
        str(series.clients),
        kind,
        str(summary.requests),
        errors or "0",
        f"{summary.request_rate:.2f}",
        f"{summary.token_rate:.1f}",
        f"{summary.image_rate:.2f}",
        f"{summary.mean_tokens:.1f}" if summary.mean_tokens else "",
        _pair(summary.first_text),
        _pair(summary.total),
        ratio,
        f"{series.peak_mb:.0f}" if kind == "all" else "",
    ]


def _pair(latency: Latency | None) -> str:
    return "" if latency is None else f"{latency.p50:.3f} / {latency.p95:.3f}"
