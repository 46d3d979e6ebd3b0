"""Report page of a run: curves, newest sheets of groups, settings, warnings in one HTML file.

The page needs no network: curves are inline SVG, images data URLs. It is written from files of the
run's folder alone (log.jsonl, warnings.jsonl, stages.json, failed_rewards.txt, rollouts/), so
`write_report` makes it anew at any time.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neounify.errors import NeounifyError
from neounify.files import read_json, read_text, write_bytes, write_json
from neounify.post_train.curves import Points, chart, number_text
from neounify.post_train.watch import BY, FALL
from neounify.terminal import duration

if TYPE_CHECKING:
    from neounify.train.method import StageContext

PAGE, LOG, WARNINGS = "report.html", "log.jsonl", "warnings.jsonl"
SETTINGS, FAILED = "stages.json", "failed_rewards.txt"
"""Files of a run's folder."""
SHEETS = 4
"""Sheets that the page shows, of the newest iterations."""
TEXT_GROUPS = 6
"""Groups of texts that the page shows, of the newest iteration."""
MAX_SHEET_BYTES = 2**23
MAX_LOG_BYTES = 2**30
MAX_FAILURES = 20
MIN_ENDS = 3
"""Reports at least whose mean is the start or the end of a reward in the table."""

GROUPS: Sequence[tuple[str, str, bool]] = (
    ("reward and its parts", r"reward(/(?!by/|failed$).+)?", False),
    ("reward by category", r"reward/by/.+", False),
    ("groups without a difference, samples without a reward", r"equal|reward/failed", False),
    ("loss", r"loss(/(?!step).+)?", True),
    ("loss of each step", r"loss/step\d+", True),
    ("KL of the update, nats", r"kl(/step\d+)?", True),
    ("KL from the reference", r"kl_reference.*", True),
    ("ratio of the policies", r"ratio(/step\d+)?", False),
    ("spread of the ratio", r"ratio_spread(/step\d+)?", True),
    ("share of samples that is clipped", r"clipped(/step\d+)?", False),
    ("gradient norm", r"gradient_norm(/.+)?", True),
    ("learning rate", r"learning_rate(/.+)?", False),
    ("images a second", r"images_per_second", False),
)
"""Title of a chart, the metrics in it, and whether its axis is logarithmic."""
COUNTERS = frozenset(
    (
        *(
            "step",
            "stage",
            "stage_step",
            "samples",
            "images",
            "tokens",
            "damaged",
            "damaged_samples",
        ),
        *("nonfinite", "seconds", "seconds_left", "tokens_per_second", "operations_per_second"),
        *("matmul_share", "peak_memory_gb"),
    )
)
"""Numbers of the log that no chart shows."""

STYLE = """
body { margin: 2rem auto; max-width: 1000px; padding: 0 1rem; color: #1f2937; background: #fff;
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin-bottom: .2rem; font-size: 1.6rem; } h2 { margin: 2.2rem 0 .6rem; font-size: 1.15rem; }
p.about { margin-top: 0; color: #6b7280; } .charts { display: flex; flex-wrap: wrap; gap: 1.2rem; }
figure { flex: 1 1 440px; max-width: 490px; margin: 0; } figcaption { font-weight: 600; }
svg { width: 100%; height: auto; } svg path { fill: none; stroke-width: 2; }
svg path.grid { stroke: #e5e7eb; stroke-width: 1; } svg path.border { stroke: #9ca3af;
  stroke-width: 1; stroke-dasharray: 4 3; } svg path.faint { stroke-width: 1; opacity: .3; }
svg text { font: 11px system-ui, sans-serif; fill: #6b7280; }
ul { margin: .2rem 0 0; padding: 0; list-style: none; } figure li { display: inline-block;
  margin-right: 1em; color: #4b5563; font-size: 12.5px; }
figure i { display: inline-block; width: .8em; height: .8em; margin-right: .4em;
  border-radius: 2px; }
table { border-collapse: collapse; } td, th { padding: .15rem .9rem .15rem 0; text-align: left;
  vertical-align: top; border-bottom: 1px solid #f0f1f3; } td.n, th.n { text-align: right; }
td.fell { color: #b42318; font-weight: 600; } .warning { margin: .3rem 0; padding: .4rem .8rem;
  border-left: 4px solid #d97706; background: #fffbeb; }
.sheet { max-width: 100%; border: 1px solid #e5e7eb; } summary { cursor: pointer; }
code { font: 13px ui-monospace, monospace; overflow-wrap: anywhere; }
"""


@dataclass
class RunLog:
    """Lines of a run's log: numbers of each report and evaluation by name, and its warnings."""

    reports: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> RunLog:
        """The log of a run; lines that are cut short are left out."""
        log = cls(warnings=list(_records(folder / WARNINGS)))
        for record in _records(folder / LOG):
            if record.get("kind") == "train":
                log.reports.append(record)
            elif record.get("kind") == "evaluation":
                log.evaluations.append(record)
        return log


def _records(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file that are JSON objects with a step."""
    text = read_text(file, MAX_LOG_BYTES, NeounifyError) if file.is_file() else ""
    for line in text.splitlines():
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and _is_number(record.get("step")):
                yield record


def update_report(context: StageContext) -> None:
    """Write the page of a run that is under way, once it has a log."""
    if context.ranks.first and (context.folder / LOG).is_file():
        save_settings(context)
        write_report(context.folder)


def save_settings(context: StageContext) -> None:
    """Add a stage's settings to stages.json of its run, which the page shows."""
    file = context.folder / SETTINGS
    stages: dict[str, Any] = {}
    with suppress(NeounifyError, OSError):
        stages = read_json(file, MAX_LOG_BYTES, NeounifyError)
    stages[context.stage.name] = plain(asdict(context.stage))
    write_json(file, stages)


def list_failures(folder: Path, iteration: int, failures: Iterable[str]) -> None:
    """Append what went wrong with rewards to failed_rewards.txt."""
    if lines := [f"iteration {iteration}: {' '.join(text.split())}\n" for text in failures]:
        with (folder / FAILED).open("a", encoding="utf-8", errors="replace") as file:
            file.writelines(lines)


def write_report(folder: Path) -> Path:
    """Write report.html of a run. Raises NeounifyError for a folder without log.jsonl."""
    if not (folder / LOG).is_file():
        raise NeounifyError(f"{folder} holds no {LOG}; give the folder of a training run")
    write_bytes(folder / PAGE, page(folder).encode())
    return folder / PAGE


def page(folder: Path) -> str:
    """The HTML of a run's report."""
    log = RunLog.read(folder)
    settings: dict[str, Any] = {}
    with suppress(NeounifyError, OSError):
        settings = read_json(folder / SETTINGS, MAX_LOG_BYTES, NeounifyError)
    title = escape(folder.resolve().name)
    sections = (
        ("", f"<h1>{title}</h1><p class=about>{escape(_about(log))}</p>"),
        ("Warnings", _warnings(log.warnings)),
        ("Samples that were skipped", _skipped(log.reports)),
        ("Rewards", _rewards(log.reports)),
        ("Curves over steps", _charts(log)),
        ("Newest groups", _sheets(folder / "rollouts")),
        ("Newest texts", _texts(folder / "rollouts")),
        ("Rewards that failed", _failures(folder / FAILED)),
        ("Settings", _settings(settings)),
    )
    body = "\n".join(
        (f"<h2>{name}</h2>" if name else "") + content for name, content in sections if content
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _about(log: RunLog) -> str:
    if not log.reports:
        return "no report yet"
    last = log.reports[-1]
    stages = dict.fromkeys(str(line.get("stage", "")) for line in log.reports)
    images, seconds = int(last.get("images") or 0), float(last.get("seconds") or 0)
    about = f"step {int(last['step']):,}, {images:,} images, {duration(seconds)}"
    return f"{', '.join(stages)}: {about}"


def _warnings(warnings: Sequence[Mapping[str, Any]]) -> str:
    """Warnings that differ in more than their numbers, the newest first, with their steps."""
    alike: dict[str, list[Mapping[str, Any]]] = {}
    for warning in warnings:
        key = re.sub(r"[\d.,]+", "0", str(warning.get("message", "")))
        alike.setdefault(key, []).append(warning)
    rows = sorted(alike.values(), key=lambda same: -same[-1]["step"])
    return "".join(
        f'<div class="warning"><b>{escape(_steps(same))}</b>: '
        f"{escape(str(same[-1].get('message', '')))}</div>"
        for same in rows
    )


def _steps(same: Sequence[Mapping[str, Any]]) -> str:
    first, last = int(same[0]["step"]), int(same[-1]["step"])
    if len(same) == 1:
        return f"step {last:,}"
    return f"{len(same):,} times, steps {first:,} to {last:,}"


def _rewards(reports: Sequence[Mapping[str, Any]]) -> str:
    """Mean rewards of the first and last reports of each stage."""
    rows = []
    for stage in dict.fromkeys(str(line.get("stage", "")) for line in reports):
        lines = [line for line in reports if str(line.get("stage", "")) == stage]
        ordered = sorted(_series(lines).items(), key=lambda row: (row[0].startswith(BY), row[0]))
        for name, points in ordered:
            if name == "reward" or name.startswith("reward/"):
                label = _label(name)
                rows.append(_reward_row(stage, label, [y for _, y in points]))
    if not rows:
        return ""
    head = '<th>stage<th><th class="n">start<th class="n">end<th class="n">change'
    return (
        f"<table><tr>{head}</tr>{''.join(rows)}</table><p class=about>Means of the first and the "
        f"last tenth of the stage's reports, of {MIN_ENDS} at least.</p>"
    )


def _reward_row(stage: str, label: str, values: Sequence[float]) -> str:
    ends = max(MIN_ENDS, len(values) // 10)
    first, last = values[:ends], values[-ends:]
    start, end = sum(first) / len(first), sum(last) / len(last)
    change = end - start if label != "failed" else start - end
    style = "n fell" if change < -FALL else "n"
    return (
        f'<tr><td>{escape(stage)}<td>{escape(label)}<td class="n">{start:.3f}<td class="n">'
        f'{end:.3f}<td class="{style}">{end - start:+.3f}</tr>'
    )


def _charts(log: RunLog) -> str:
    series, reports = _series(log.reports), log.reports
    steps = [float(line["step"]) for line in reports] or [0.0]
    stages = [str(line.get("stage", "")) for line in reports]
    borders = [steps[n] for n in range(len(steps) - 1) if stages[n] != stages[n + 1]]
    draw = partial(chart, across=(0.0, max(steps)), borders=borders)
    charts = []
    for title, pattern, logarithmic in GROUPS:
        lines = {_label(n): series.pop(n) for n in sorted(series) if re.fullmatch(pattern, n)}
        smooth = title != "learning rate"
        charts.append(draw(title, lines, logarithmic=logarithmic, smooth=smooth))
    families = dict.fromkeys(name.partition("/")[0] for name in series)
    for family in families:
        lines = {_label(n): p for n, p in series.items() if n.partition("/")[0] == family}
        charts.append(draw(family.replace("_", " "), lines))
    charts.append(draw("evaluation", _series(log.evaluations)))
    figures = "\n".join(figure for figure in charts if figure)
    return f'<div class="charts">{figures}</div>' if figures else ""


def _label(name: str) -> str:
    """A metric's name without the family that the title of its chart names."""
    if name.startswith(BY):
        return name.removeprefix(BY)
    return name.partition("/")[2] or name


def _series(lines: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """(step, value) pairs of every metric, without the counters of progress."""
    series: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in COUNTERS and _is_number(value):
                series.setdefault(name, []).append((float(line["step"]), float(value)))
    return dict(series)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sheets(folder: Path) -> str:
    """The newest sheets, in the order in which they were saved."""
    newest = sorted(folder.glob("*.png"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    parts = []
    for path in newest[-SHEETS:]:
        with suppress(OSError):
            if path.stat().st_size > MAX_SHEET_BYTES:
                parts.append(f"<p>{escape(path.name)} is too large for this page</p>")
                continue
            source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
            name = escape(path.stem)
            parts.append(f'<div>{name}<br><img class="sheet" alt="{name}" src="{source}"></div>')
    return f'<div class="charts">{"".join(parts)}</div>' if parts else ""


def _texts(folder: Path) -> str:
    """The first groups of the newest sheet of texts: reward, advantage and output of each."""
    sheets = sorted(folder.glob("*.jsonl"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    if not sheets:
        return ""
    tables = [f"<p>{escape(sheets[-1].stem)}</p>"]
    with suppress(NeounifyError, OSError, ValueError, KeyError, TypeError):
        text = read_text(sheets[-1], MAX_SHEET_BYTES, NeounifyError)
        for group in map(json.loads, text.splitlines()[:TEXT_GROUPS]):
            rows = "".join(
                f'<tr><td class="n">{escape(str(s["reward"]))}<td class="n">'
                f"{float(s['advantage']):+.1f}<td>{escape(str(s['output']))}</tr>"
                for s in group["samples"]
            )
            tables.append(f"<h3>{escape(str(group['prompt']))}</h3><table>{rows}</table>")
    return "".join(tables)


def _skipped(reports: Sequence[Mapping[str, Any]]) -> str:
    """A table of damaged samples by source and reason, from the newest report of every stage."""
    newest = {str(line.get("stage", "")): line.get("skipped_by_reason") for line in reports}
    rows = [
        f"<tr><td>{escape(stage)}<td>{escape(source)}<td class=n>{int(count):,}<td>{escape(reason)}"
        for stage, sources in newest.items()
        for source, reasons in (sources or {}).items()
        for reason, count in reasons.items()
    ]
    if not rows:
        return ""
    head = "<tr><th>stage<th>source<th class=n>samples<th>reason"
    return f"<table>{head}{''.join(rows)}</table><p>Each is listed in skipped.txt.</p>"


def _failures(file: Path) -> str:
    """The newest failures of rewards, each once."""
    with suppress(OSError):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
        unique = list(dict.fromkeys(lines))
        shown = "".join(f"<li><code>{escape(line[:500])}</code></li>" for line in _last(unique))
        return f"<p>{len(unique):,} in {FAILED}; the newest:</p><ul>{shown}</ul>" if shown else ""
    return ""


def _last(lines: Sequence[str]) -> Sequence[str]:
    return lines[: -MAX_FAILURES - 1 : -1]


def _settings(stages: Mapping[str, Any]) -> str:
    tables = []
    for name, settings in stages.items():
        rows = "".join(
            f"<tr><td>{escape(key)}<td><code>{escape(value)}</code></tr>"
            for key, value in _flat(settings)
        )
        opened = " open" if len(stages) == 1 else ""
        tables.append(
            f"<details{opened}><summary>{escape(name)}</summary><table>{rows}</table></details>"
        )
    return "".join(tables)


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """(dotted name, value) of every setting that is not None."""
    if isinstance(value, Mapping) and value:
        return [
            pair
            for key, inner in value.items()
            for pair in _flat(inner, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        return [pair for n, item in enumerate(value, 1) for pair in _flat(item, f"{prefix}[{n}]")]
    if value in (None, {}, []):
        return []
    shown = number_text(value) if isinstance(value, float) else value
    return [(prefix, shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False))]


def plain(value: Any) -> Any:
    """A value as JSON has it; paths and other objects as their text."""
    return json.loads(json.dumps(value, default=str))
