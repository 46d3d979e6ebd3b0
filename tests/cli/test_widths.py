"""Help and tables on narrow and wide terminals; text in brackets is text."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from cli.test_help import COMMANDS
from neounify.cli.app import app
from neounify.cli.command import CliCommand, with_options

Run = Callable[..., Any]
WIDTHS = (40, 80, 200)


@pytest.fixture(params=WIDTHS)
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("COLUMNS", str(request.param))
    return int(request.param)


def texts() -> Iterator[tuple[str, str, str]]:
    """(command, option, text) of all help there is, as it was written."""
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        for param in command.params:
            yield name, param.opts[0], (getattr(param, "help", None) or "").replace("\\[", "[")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_whole_at_any_width(run_bare: Run, command: str, width: int) -> None:
    ran = run_bare(*filter(None, (command,)), "--help")
    assert ran.code == 0
    assert "…" not in ran.out
    assert "..." not in ran.out.replace("]...", "").replace("}...", "").replace("FILE...", "")
    shown = "".join(re.findall(r"\w", ran.out))
    written = [text for name, _, text in texts() if name == command]
    if width < 100:  # the cells of a table stand between those beside them
        for text in written:
            assert "".join(re.findall(r"\w", text)) in shown
    for name, option, _ in texts():
        assert name != command or option.removeprefix("--") in ran.out or "-" not in option
    if width == 40:
        examples = [
            line for line in ran.out.splitlines() if line.startswith(("  neounify ", "  torchrun "))
        ]
        assert all(len(line) <= 40 for line in ran.out.splitlines() if line not in examples)


@pytest.mark.parametrize("text", ["'.[serve]'", "[red]x[/red]", "[/]", "FILE[:STRENGTH]"])
def test_brackets_in_help_stay(
    run_bare: Run, monkeypatch: pytest.MonkeyPatch, width: int, text: str
) -> None:
    def command(*, flag: bool = False) -> None: ...

    command.__doc__ = f"About {text}.\n\n\\b\n  example {text}\n"
    command.__annotations__["flag"] = Annotated[bool, typer.Option("--flag", help=f"See {text}.")]
    small = typer.Typer(rich_markup_mode="rich")
    small.command(cls=CliCommand)(with_options(command))
    out = CliRunner().invoke(small, ["--help"]).stdout
    assert out.count(text) == 3, out


NAME = "[red]x[/]"


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", NAME),
        ("provenance", NAME),
        ("generate", "a", "--model", NAME),
        ("generate", "a", "--lora", NAME),
        ("generate", "a", "--device", NAME),
        ("generate", "a", "--size", NAME),
        ("generate", "a", f"--{NAME}"),
        ("generate", "--input", NAME),
        (NAME,),
        ("edit", "a", "--image", NAME),
        ("chat", "a", "--image", NAME),
        ("story", "a", "--image", NAME),
        ("convert", NAME, "out"),
        ("eval", "--tasks", NAME),
        ("eval", "--world", NAME),
        ("serve", "--api-keys", NAME),
        ("serve", "--mode", NAME),
        ("serve", "--hook", NAME),
        ("serve", "--word-list", NAME),
        ("train", NAME),
        ("report", NAME),
        ("doctor", NAME),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_brackets_in_errors_stay(
    run: Run, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    ran = run(*arguments)
    assert ran.code in (1, 2)
    assert NAME in ran.err


def test_brackets_in_results_stay(run: Run, toy: Path) -> None:
    prompt = "[red]boat[/] [x"
    ran = run("generate", prompt, "--size", "64x32", "--steps", 1, "-o", "[b]x.png", "--json")
    assert ran.json["files"][0]["record"]["prompt"] == prompt
    assert prompt in run("inspect", "[b]x.png").out
    shown = run("provenance", "[b]x.png").out
    assert "[b]x.png" in shown
    assert prompt in shown
    shutil.copytree(toy, "[b]m")
    assert "[b]m" in run("inspect", "[b]m").out


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 40 columns."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(Console, "is_terminal", property(lambda _: True))


@pytest.mark.usefixtures("narrow")
def test_inspect_on_a_narrow_terminal(run: Run) -> None:
    ran = run("inspect")
    assert ran.code == 0
    assert "…" not in ran.out
    for words in ("hidden size", "understanding, attention (float32):", "parameters", "total, all"):
        assert words in ran.out


@pytest.mark.usefixtures("narrow")
def test_eval_on_a_narrow_terminal(run: Run) -> None:
    ran = run("eval", "--tasks", "caption", "--cases", 1)
    assert ran.code == 0
    assert "…" not in ran.out
    assert "correct, % (95 % interval)" in ran.out
    assert "held out" in ran.out
    assert all(len(line) <= 40 for line in ran.out.splitlines() if not line.startswith("  cap"))
