"""First steps: help, wrong usage, the bundled model."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import neounify
from neounify.errors import install_command

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

COMMANDS = (
    "generate",
    "edit",
    "chat",
    "story",
    "serve",
    "provenance",
    "inspect",
    "convert",
    "quantise",
    "parity",
    "train",
    "report",
    "doctor",
    "curate",
    "plan",
    "eval",
    "toy",
    "bench",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(run_bare: Callable[..., Any], command: str) -> None:
    ran = run_bare(command, "--help")
    assert ran.code == 0
    assert f"neounify {command} " in ran.out


def test_the_first_help_names_all_commands_and_an_example(run_bare: Callable[..., Any]) -> None:
    ran = run_bare("--help")
    assert all(command in ran.out for command in COMMANDS)
    assert "neounify generate" in ran.out
    assert all(family in ran.out for family in ("SenseNova-U1", "PixelUMM"))


def test_version(run_bare: Callable[..., Any]) -> None:
    assert run_bare("--version").out.strip() == f"neounify {neounify.__version__}"


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from neounify.cli.app import app\n"
        "for args in (['--help'], ['generate', '--help'], ['eval', '--help']):\n"
        "    CliRunner().invoke(app, args, env={'NEOUNIFY_MODEL': None})\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "a red circle", "--steps", "2", "--output", "a.png"),
        ("chat", "Is there a star?", "--max-new-tokens", "2"),
        ("inspect",),
    ],
)
def test_without_a_model_commands_use_the_one_of_the_package(
    run_bare: Callable[..., Any], arguments: tuple[str, ...]
) -> None:
    ran = run_bare(*arguments)
    assert ran.code == 0, ran.err
    assert ran.out


def test_a_model_folder_that_is_not_there(run_bare: Callable[..., Any]) -> None:
    ran = run_bare("generate", "a boat", "--model", "nowhere")
    assert ran.code == 1
    assert "--model nowhere does not exist" in ran.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("generate",), "PROMPT"),
        (("generate", "a", "--steps", "many"), "steps"),
        (("generate", "a", "--size", "64"), "WIDTHxHEIGHT"),
        (("generate", "a", "--size", "64x64", "--width", "64"), "not both"),
        (("generate", "a", "--interval", "half"), "LO,HI"),
        (("generate", "a", "--image-guidance", "2"), "No such option"),
        (("generate", "a", "--output", "x.jpg"), ".png"),
        (("generate", "a", "b", "--output", "x.png"), "one file for 2 images"),
        (("generate", "a", "--input", "jobs.jsonl"), "not both"),
        (("edit", "bluer"), "--image"),
        (("story", "a", "--output", "x.html"), "folder"),
        (("chat", "--json"), "QUESTION"),
        (("convert", "MODEL", "OUT", "--max-shard-size", "big"), "5GB"),
        (("paint", "a"), "No such command"),
    ],
)
def test_wrong_usage_exits_with_2(
    run: Callable[..., Any], toy: Path, arguments: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    ran = run(*(str(toy) if a == "MODEL" else a for a in arguments))
    assert ran.code == 2
    assert words in ran.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (("--size", "33x64"), "nearest: 32x64, 64x64"),
        (("--steps", "0"), "steps must be from 1"),
        (("--norm", "loud"), "known: none, global"),
        (("--solver", "magic"), "euler"),
        (("--interval", "0.9,0.1"), "guidance_interval"),
        (("--width", "64"), "both width and height"),
        (("--count", "0"), "images_per_prompt"),
        (("--dtype", "int3"), "known are auto"),
        (("--device", "toaster"), "toaster"),
        (("--memory", "some"), "all, stream"),
        (("--lora", "nowhere.safetensors:0.5"), "nowhere.safetensors"),
    ],
)
def test_the_librarys_own_messages_are_shown(
    run: Callable[..., Any], option: tuple[str, str], words: str
) -> None:
    ran = run("generate", "a boat", *option)
    assert ran.code == 1
    assert words in ran.err
    assert "\nerror: " in "\n" + ran.err
    assert "Traceback" not in ran.err


def test_extras_are_installed_from_a_clone(
    run_bare: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing anywhere names a distribution that does not exist."""
    monkeypatch.setitem(sys.modules, "neounify.serve.run", None)
    ran = run_bare("serve")
    assert ran.code == 1
    assert f"in the repository: {install_command('serve')}" in ran.err
    root = Path(neounify.__file__).parents[2]
    named = {"serve", "ray", "train", "watermark"}
    metadata = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))
    assert named <= set(metadata["project"]["optional-dependencies"])
    for file in (*root.glob("docs/*.md"), root / "README.md", *root.glob("src/**/*.py")):
        text = file.read_text("utf-8")
        assert "install 'neounify" not in text, file
        for extra in re.findall(r"pip install .*'\.\[(\w+)\]'", text):
            assert install_command(extra) in text, file


@pytest.mark.parametrize("columns", ["70", "120"])
def test_without_arguments_the_help_is_shown(
    run_bare: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    ran = run_bare()
    assert ran.code == 2
    assert all(command in ran.out + ran.err for command in COMMANDS)


def test_a_command_imports_no_other_command() -> None:
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from neounify.cli.app import app\n"
        "CliRunner().invoke(app, ['doctor', '--help'])\n"
        "from neounify.cli.app import COMMANDS\n"
        "names = [n for n in COMMANDS if f'neounify.cli.{n}' in sys.modules]\n"
        "assert names == ['doctor'], names\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
