"""Charts of the reports, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # a file is drawn, no window

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from benchmarks.serving.series import Series
from benchmarks.serving.stats import Latency

_LINES = (
    ("chat", "first_text", "first text", "C0"),
    ("chat", "total", "whole chat", "C1"),
    ("paint", "total", "whole image", "C2"),
)


def draw_load(series: Sequence[Series], file: Path) -> None:
    """Latency of the mix, if any, over the number of clients, and memory over the time."""
    _style()
    mix = [s for s in series if s.name == "mix"]
    panels = 2 if mix else 1
    figure, axes = plt.subplots(
        1, panels, figsize=(6 * panels, 4.5), layout="constrained", squeeze=False
    )
    if mix:
        _latencies(axes[0, 0], mix)
    _memories(axes[0, -1], series)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _latencies(axis: Axes, mix: Sequence[Series]) -> None:
    for kind, measure, label, colour in _LINES:
        measured: list[tuple[int, Latency]] = [
            (s.clients, value)
            for s in mix
            if kind in s.kinds and (value := getattr(s.kinds[kind], measure)) is not None
        ]
        clients = [count for count, _ in measured]
        for name, dashes in (("p50", "--"), ("p95", "-")):
            values = [getattr(value, name) for _, value in measured]
            axis.plot(clients, values, dashes, color=colour, marker="o", label=f"{label}, {name}")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.set_xticks([s.clients for s in mix])
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_title("80 % chat, 20 % image generation")
    axis.set_xlabel("clients at once")
    axis.set_ylabel("seconds")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8.5)


def _memories(axis: Axes, series: Sequence[Series]) -> None:
    begin = min(s.started for s in series)
    for number, one in enumerate(series):
        times = [one.started - begin + at for at, _ in one.memory]
        label = one.name if one.asked is None else f"{one.name}, {one.clients}"
        axis.plot(times, [mb for _, mb in one.memory], color=f"C{number}", label=label)
    axis.set_title("Resident memory of the server, new for each series")
    axis.margins(y=0.1)
    axis.set_xlabel("seconds")
    axis.set_ylabel("MB")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=7.5, ncols=2, loc="lower right")


def draw_soak(samples: Sequence[tuple[float, float]], fitted_from: float, file: Path) -> None:
    """Memory (MB) over time (s), with where the fit of its slope begins."""
    _style()
    figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
    axis.plot([at / 60 for at, _ in samples], [mb for _, mb in samples], color="C0")
    axis.axvline(fitted_from / 60, color="0.5", linewidth=0.8, linestyle=":")
    axis.set_title("Resident memory of the server; the slope is that after the dotted line")
    axis.set_xlabel("minutes")
    axis.set_ylabel("MB")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _style() -> None:
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
