"""Pytest plugin that writes down which recorded arrays the tests of a session read.

Loaded with `-p support.golden_reads`; the names go into the JSON file that the environment
variable READS names, as folder/group/array.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from support import golden

READS = "NEOUNIFY_GOLDEN_READS"
_read: set[str] = set()


class _Arrays(dict[str, Tensor]):
    """Arrays of a group; to ask whether there is one, or to list them, reads none."""

    def __init__(self, group: str, arrays: Mapping[str, Tensor]) -> None:
        super().__init__(arrays)
        self._group = group

    def __getitem__(self, name: str) -> Tensor:
        _read.add(f"{self._group}/{name}")
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        if name in self:
            _read.add(f"{self._group}/{name}")
        return super().get(name, default)


def pytest_configure() -> None:
    load_file = golden.load_file
    patch = pytest.MonkeyPatch()
    patch.setattr(
        golden,
        "load_file",
        lambda path: _Arrays(f"{path.parent.name}/{path.stem}", load_file(path)),
    )


def pytest_sessionfinish() -> None:
    Path(os.environ[READS]).write_text(json.dumps(sorted(_read)), encoding="utf-8")
