"""Progress bars and durations, as the commands and a training run show them."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text


def progress_bar(
    console: Console, *columns: ProgressColumn, bar: bool = True, redirect_stderr: bool = True
) -> Progress:
    """Label, bar and `columns` in a line that disappears at the end.

    `bar=False` is for narrow terminals. With `redirect_stderr`, what is written to stderr meanwhile
    goes above the line.
    """
    return Progress(
        TextColumn("{task.description}", markup=False),
        *((BarColumn(),) if bar else ()),
        *columns,
        console=console,
        transient=True,
        # Otherwise a redirected stdout would end up on the terminal.
        redirect_stdout=False,
        redirect_stderr=redirect_stderr,
    )


def pace_column() -> ProgressColumn:
    """Steps done, time per step, estimated time left; tasks carry `unit`, the name of a step."""
    return _Pace(table_column=Column(no_wrap=True))


class _Pace(ProgressColumn):
    """Time per step and estimated time left."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text(duration(task.elapsed or 0), style="progress.elapsed")
        unit, speed = task.fields["unit"], task.speed
        if not speed:
            return Text(f"{task.completed:.0f}/{task.total:.0f} {unit}s")
        left = (task.total - task.completed) / speed
        return Text(
            f"{task.completed:.0f}/{task.total:.0f} {unit}s, {1 / speed:.2f} s/{unit}, "
            f"{duration(left)} left"
        )


def duration(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: "3:05", "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
