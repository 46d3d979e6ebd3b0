"""Recorded arrays of the published implementation, if they are available."""

import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor


def _find() -> Path | None:
    variable = os.environ.get("NEOUNIFY_GOLDEN")
    folders = [Path(variable)] if variable else [Path(__file__).parents[3] / "shared" / "golden"]
    return next((folder.resolve() for folder in folders if folder.is_dir()), None)


GOLDEN: Path | None = _find()
"""The folder of recorded arrays, or None."""

needs_golden = pytest.mark.skipif(
    GOLDEN is None, reason="no recorded arrays here; point NEOUNIFY_GOLDEN at their folder"
)


def golden_path(*parts: str) -> Path:
    """Return a path inside the golden folder; skips the running test where there is none."""
    if GOLDEN is None:
        pytest.skip("no recorded arrays here; point NEOUNIFY_GOLDEN at their folder")
    return GOLDEN.joinpath(*parts)


def load_fixture(
    name: str, group: str, family: str = ""
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load the tensors (none where the group has only a JSON file) and the JSON of a group.

    `family` is the folder of a family other than the first one.
    """
    folder = golden_path(family, "fixtures", name)
    arrays = folder / f"{group}.safetensors"
    tensors = load_file(arrays) if arrays.is_file() else {}
    return tensors, json.loads((folder / f"{group}.json").read_text(encoding="utf-8"))


def checkpoint(name: str, tmp_root: Path, family: str = "") -> Path:
    """Copy a golden checkpoint folder under `tmp_root` and rebuild its weights there."""
    target, source = tmp_root / name, golden_path(family, name)
    # Contents only: the originals are read-only.
    for file in (path for path in source.rglob("*") if path.is_file()):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    spec = json.loads((target / "weights_spec.json").read_text(encoding="utf-8"))
    _weight_generator().write_checkpoint(target, spec, spec.get("shards", 1))
    return target


def _weight_generator() -> Any:
    path = golden_path("weightgen.py")
    module_spec = importlib.util.spec_from_file_location("golden_weightgen", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module
