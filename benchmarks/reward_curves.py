"""How rewards rose: runs of reinforcement learning over the images they sampled, in one chart.

    python -m benchmarks.reward_curves "NFT=RUN_FOLDER" "Flow-GRPO=RUN_FOLDER" --output FILE.png

One panel for the strict reward of all prompts, and one for each category named.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.ticker import EngFormatter

from benchmarks.training_curve import FAINT, Stage, read_runs, smooth

CATEGORIES = ("two_object", "attribution", "counting", "edit")
COLUMNS = 3


def series(stages: Sequence[Stage], metric: str) -> tuple[list[float], list[float]]:
    """(images sampled, values) of a metric over the stages of a run."""
    reports = [report for stage in stages for _, report in stage.reports if metric in report]
    return [report["images"] for report in reports], [report[metric] for report in reports]


def draw(runs: Mapping[str, Sequence[Stage]], categories: Sequence[str], output: Path) -> None:
    """A panel per metric, a line per run, all over the same axis of images."""
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    metrics = {"all prompts, strict": "reward/strict"}
    metrics |= {f"{name}, mean reward": f"reward/by/{name}" for name in categories}
    rows = math.ceil(len(metrics) / COLUMNS)
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=(11, 3.2 * rows), layout="constrained", squeeze=False
    )
    for axis, (title, metric) in zip(axes.flat, metrics.items(), strict=False):
        for number, (name, stages) in enumerate(runs.items()):
            x, y = series(stages, metric)
            axis.plot(x, y, color=f"C{number}", alpha=FAINT, linewidth=0.8)
            axis.plot(x, smooth(y), color=f"C{number}", linewidth=1.6, label=name)
        axis.set_title(title)
        axis.set_xlabel("images sampled")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(metrics) :]:
        axis.axis("off")
    lines, names = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=COLUMNS, frameon=False)
    figure.savefig(output, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw rewards over the images sampled.")
    parser.add_argument("runs", nargs="+", metavar="NAME=FOLDER", help="runs and their names")
    parser.add_argument("--categories", nargs="*", default=CATEGORIES)
    parser.add_argument("--output", type=Path, required=True, help="the chart, .png or .svg")
    arguments = parser.parse_args()
    named = [run.partition("=") for run in arguments.runs]
    if wrong := [name for name, _, folder in named if not folder]:
        parser.error(f"expected NAME=FOLDER, got {', '.join(wrong)}")
    runs = {name: read_runs([Path(folder)]) for name, _, folder in named}
    draw(runs, arguments.categories, arguments.output)


if __name__ == "__main__":
    main()
