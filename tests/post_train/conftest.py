"""A small model that runs of post-training start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.post_training import BASE
from train.test_trainer import trainer


@pytest.fixture(scope="session", autouse=True)
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    trainer(folder).export(folder / "model")
    BASE[:] = [folder / "model"]
    return BASE[0]
