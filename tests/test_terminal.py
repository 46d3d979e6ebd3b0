"""Progress bars and durations."""

import io

import pytest
from rich.console import Console
from rich.progress import BarColumn

from neounify.terminal import duration, progress_bar


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (65, "1:05"), (3599.6, "1:00:00"), (36_000, "10:00:00")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_narrow_terminal_gets_no_bar() -> None:
    console = Console(file=io.StringIO())
    assert any(isinstance(c, BarColumn) for c in progress_bar(console).columns)
    assert not any(isinstance(c, BarColumn) for c in progress_bar(console, bar=False).columns)
