"""Fixtures of the checkpoint tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from neounify.config import ModelConfig
from support.checkpoint_folders import CONFIGS, SMALL, random_weights, write_checkpoint


@pytest.fixture(params=list(CONFIGS))
def any_config(request: pytest.FixtureRequest) -> ModelConfig:
    """One small config after the other: every kind of model there is."""
    return CONFIGS[request.param]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A small dense float32 checkpoint folder."""
    return write_checkpoint(tmp_path / "small", SMALL, random_weights(SMALL))


Status = Callable[[str], int]


@pytest.fixture
def memory_status() -> Status:
    """Give a function that reads a line of /proc/self/status, such as "RssFile", in bytes."""
    path = Path("/proc/self/status")
    if not path.exists():
        pytest.skip("resident memory is read from /proc, which is not here")

    def read(key: str) -> int:
        lines = path.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))

    return read
