"""How training went: losses and accuracies over samples, drawn from log.jsonl of one or more runs.

    python -m benchmarks.training_curve RUN_FOLDER [MORE_FOLDERS] --output docs/curve.png

Later runs continue the one before them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a file is drawn, no window

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from neounify.train.loss import T_INTERVALS

ACCURACIES = {
    "vqa": "answers",
    "caption": "captions",
    "t2i_think": "thoughts before images",
    "video_qa": "answers about clips",
    "video_caption": "captions of clips",
}
SMOOTHED = 25
"""Reports that are averaged, where a stage has many more of them than a chart can show."""
FAINT = 0.25
LOGARITHMIC = 4
"""A loss that falls by more than this factor is drawn on a logarithmic axis."""
NAMED_SHARE = 0.02
"""Share of all samples that a stage must have for its name to fit into the chart."""
NATS = "cross entropy, nats per token"
SQUARES = "‖v̂ − v‖², mean over pixels"

Named = Mapping[str, tuple[str, Any]]
"""Metric → (label, colour)."""


@dataclass
class Stage:
    """The reports of one stage of one run, each with the samples all runs had seen by then."""

    name: str
    start: int
    reports: list[tuple[int, dict[str, float]]] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.reports[-1][0] if self.reports else self.start

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """(samples, values) of the reports that have the metric."""
        points = [(x, report[metric]) for x, report in self.reports if metric in report]
        return [x for x, _ in points], [y for _, y in points]


def read_runs(folders: Sequence[Path]) -> list[Stage]:
    """All stages, one run behind the other. Raises SystemExit for a folder without any."""
    stages: list[Stage] = []
    for folder in folders:
        file = folder / "log.jsonl"
        if not file.is_file():
            raise SystemExit(f"{file} is not there")
        stages += _stages(file, stages[-1].end if stages else 0)
    if not stages:
        raise SystemExit("the runs hold no report yet")
    return stages


def _stages(file: Path, before: int) -> list[Stage]:
    """The stages of one run, whose samples are counted from `before`."""
    stages: list[Stage] = []
    for record in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
        if record["kind"] != "train":
            continue
        if not stages or record["stage"] != stages[-1].name:
            stages.append(Stage(record["stage"], stages[-1].end if stages else before))
        stages[-1].reports.append((before + record["samples"], record))
    return stages


def smooth(values: Sequence[float]) -> list[float]:
    """The mean of each value and its neighbours, of at most `SMOOTHED` and fewer at the ends."""
    half = min(SMOOTHED, len(values) // 10) // 2
    reach = [min(half, index, len(values) - 1 - index) for index in range(len(values))]
    return [sum(values[n - r : n + r + 1]) / (2 * r + 1) for n, r in enumerate(reach)]


def draw(stages: Sequence[Stage], output: Path) -> None:
    """Four panels over the samples seen, as one chart."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), sharex=True, layout="constrained")
    text, image, accuracy, by_t = axes.flat
    _losses(text, stages, {"text/loss": ("all tasks", "C0")}, "Text loss", NATS)
    _losses(image, stages, {"image/loss": ("all tasks", "C0")}, "Image loss", SQUARES)
    _accuracies(accuracy, stages, "Text accuracy by task")
    _losses(by_t, stages, _intervals(), "Image loss by t, from noise (0) to data (1)", SQUARES)
    for axis in axes.flat:
        _finish(axis, stages)
    for axis in axes[0]:
        _name_stages(axis, stages)
    for axis in axes[1]:
        axis.set_xlabel("samples seen")
    figure.savefig(output, dpi=150)
    plt.close(figure)


def _intervals() -> dict[str, tuple[str, Any]]:
    """Label and colour of every interval of t, from dark to light."""
    edges = [n / T_INTERVALS for n in range(T_INTERVALS + 1)]
    return {
        f"image/t{low:.1f}-{high:.1f}": (f"{low:.1f} to {high:.1f}", plt.get_cmap("viridis")(low))
        for low, high in pairwise(edges)
    }


def _losses(axis: Axes, stages: Sequence[Stage], named: Named, title: str, unit: str) -> None:
    _plot(axis, stages, named, title)
    low, high = axis.dataLim.intervaly
    if 0 < LOGARITHMIC * low < high:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_ylabel(unit)


def _accuracies(axis: Axes, stages: Sequence[Stage], title: str) -> None:
    labels = enumerate(ACCURACIES.items())
    named = {f"text/{task}/accuracy": (label, f"C{n}") for n, (task, label) in labels}
    _plot(axis, stages, named, title)
    axis.set_ylabel("tokens predicted right")
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")


def _plot(axis: Axes, stages: Sequence[Stage], named: Named, title: str) -> None:
    """Every metric as a line per stage, with its unsmoothed values faintly behind it."""
    for metric, (label, colour) in named.items():
        lines = [stage.series(metric) for stage in stages]
        for x, y in lines:
            smoothed = smooth(y)
            if smoothed != y:
                axis.plot(x, y, color=colour, alpha=FAINT, linewidth=0.8)
            axis.plot(x, smoothed, color=colour, linewidth=1.6)
        if any(x for x, _ in lines):
            axis.plot([], [], color=colour, label=label)
    labels = axis.get_legend_handles_labels()[1]
    if len(labels) > 1:
        axis.legend(
            frameon=False,
            fontsize=8.5,
            ncols=len(labels),
            handlelength=1.2,
            columnspacing=1,
            loc="lower center",
            bbox_to_anchor=(0.5, 0.98),
        )
    axis.set_title(title, pad=22 if len(labels) > 1 else 6)


def _finish(axis: Axes, stages: Sequence[Stage]) -> None:
    axis.grid(alpha=0.25)
    axis.set_xlim(0, stages[-1].end)
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    for stage in stages[1:]:
        axis.axvline(stage.start, color="0.5", linewidth=0.8, linestyle=":")


def _name_stages(axis: Axes, stages: Sequence[Stage]) -> None:
    """Each stage's name beside the line it starts at, where there is more than one."""
    least = NAMED_SHARE * stages[-1].end
    for stage in stages if len(stages) > 1 else ():
        if stage.end - stage.start >= least:
            axis.annotate(
                stage.name,
                (stage.start, 1),
                xycoords=axis.get_xaxis_transform(),
                xytext=(3, -2),
                textcoords="offset points",
                rotation=90,
                va="top",
                fontsize=7.5,
                color="0.4",
                zorder=0,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw how training went.")
    parser.add_argument("folders", nargs="+", type=Path, help="folders of runs, in their order")
    parser.add_argument("--output", type=Path, required=True, help="the chart, .png or .svg")
    arguments = parser.parse_args()
    draw(read_runs(arguments.folders), arguments.output)
    print(f"saved {arguments.output}")


if __name__ == "__main__":
    main()
