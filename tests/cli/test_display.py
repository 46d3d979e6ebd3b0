"""Progress without a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from neounify.cli import display
from neounify.cli.display import Display


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "FIRST_LINE", 0.01)
    monkeypatch.setattr(display, "NEXT_LINES", 0.01)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.usefixtures("quick")
def test_long_work_says_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    said = ""

    def heard(words: str) -> bool:
        nonlocal said
        said += capsys.readouterr().err
        return words in said

    shown = Display()
    with shown.bar("jobs.jsonl", 4, "line") as outer:
        outer(1)
        with shown.bar("generating", 50) as inner:
            inner(20)
            wait_for(lambda: heard("jobs.jsonl: 1 of 4 lines, "))
            wait_for(lambda: heard("; generating: 20 of 50 steps, "))
        with shown.bar("loading"):
            wait_for(lambda: heard("; loading: 0:00 so far"))
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("quick")
def test_short_and_quiet_work_says_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Display(quiet=True).bar("generating", 50):
        time.sleep(0.05)
    monkeypatch.setattr(display, "FIRST_LINE", 60)
    with Display().bar("generating", 50):
        pass
    assert capsys.readouterr().err == ""
