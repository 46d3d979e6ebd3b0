"""docs/serving.md names every option of `neounify serve`."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from neounify.cli.serve import (
    AccessOptions,
    EngineOptions,
    ListenOptions,
    ReplicaOptions,
    SafetyOptions,
    ServeModelOptions,
)

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
GROUPS = (
    ServeModelOptions,
    ListenOptions,
    EngineOptions,
    AccessOptions,
    SafetyOptions,
    ReplicaOptions,
)


def test_every_option_is_named() -> None:
    names = [field.name for group in GROUPS for field in dataclasses.fields(group)]
    assert len(names) > 30
    dashed = [name.replace("_", "-") for name in names]
    assert [n for n in dashed if not re.search(rf"--(no-)?{n}\b(?!-)", PAGE)] == []
