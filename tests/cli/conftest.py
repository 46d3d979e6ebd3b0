"""A toy model, built once, and a way to run commands, each in an empty folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import neounify.pipeline
from neounify.cli.app import app
from neounify.cli.toy import toy_pipeline


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one line of stdout, parsed."""
        lines = self.out.splitlines()
        assert len(lines) == 1, self.out
        document: dict[str, Any] = json.loads(lines[0])
        return document


Run = Callable[..., Ran]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other would be most of the time of models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load of a model, by any command, is a failure."""

    def load(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(neounify.pipeline, "load", load)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained model."""
    folder = tmp_path_factory.mktemp("models") / "toy"
    toy_pipeline(seed=0).save(folder)
    return folder


@pytest.fixture
def run_bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in an empty folder, no model named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NEOUNIFY_MODEL", raising=False)

    def run(*arguments: object, input: str | None = None) -> Ran:
        result = CliRunner().invoke(app, [str(a) for a in arguments], input=input)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ran(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def run(run_bare: Run, toy: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in an empty folder, the toy named by the environment."""
    monkeypatch.setenv("NEOUNIFY_MODEL", str(toy))
    return run_bare


@pytest.fixture
def image_file(tmp_path: Path) -> Path:
    """A small image in the folder that commands run in."""
    levels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(levels).save(path)
    return path
