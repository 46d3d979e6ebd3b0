"""Commands and code of the README, run as they stand there."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from neounify.cli.app import app

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[str]:
    lines = "\n".join(blocks("bash")).splitlines()
    # `serve` runs until it is stopped: tests/serve/test_command.py does that.
    ours = [line for line in lines if line.startswith("neounify ")]
    assert "neounify serve" in ours
    return [line for line in ours if line != "neounify serve"]


def arguments(command: str) -> list[str]:
    return [a or b for a, b in re.findall(r'"([^"]*)"|(\S+)', command)][1:]


def test_readme_commands_and_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NEOUNIFY_MODEL", raising=False)
    assert len(commands()) >= 6
    for command in commands():
        result = CliRunner().invoke(app, arguments(command))
        assert result.exit_code == 0, f"{command}\n{result.output}"
    assert (tmp_path / "shapes.png").is_file()
    (source,) = blocks("python")
    exec(compile(source, "README.md", "exec"), {})
    assert "Part" in capsys.readouterr().out


def test_every_file_the_readme_links_to_exists() -> None:
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text(encoding="utf-8"))
    assert links
    for link in links:
        assert (README.parent / link).is_file(), link
