"""The counts of files are of a real run: they must find what is known to be entered."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_file_is_entered_by_a_call_and_not_by_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "entered_example"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "called.py").write_text("from entered_example import idle\ndef f(): return 1\n")
    (package / "idle.py").write_text("class A:\n    x = 1\ndef g(): return 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    recorder = script("entered_files").Recorder(str(package))
    recorder.start()
    try:
        importlib.import_module("entered_example.called").f()
    finally:
        recorder.stop()
    assert recorder.files() == {"called.py"}


def test_ways_in_this_process_enter_model_and_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    count = script("count_files")
    generation, training = count.prompt_to_png(), count.sample_to_gradient()
    assert {"model/neo.py", "flow/path.py", "pipeline/pipeline.py"} <= generation
    assert {"model/neo.py", "flow/path.py", "data/sources.py"} <= training
    assert not any(file.startswith(("serve/", "cli/")) for file in generation | training)


def test_sizes_are_of_all_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    count = script("count_files")
    assert count.sizes().files == len(list((SCRIPTS.parent / "src").rglob("*.py")))
    assert not count.sizes().long_files
    monkeypatch.setattr(count, "MAX_FILE_LINES", 100)
    monkeypatch.setattr(count, "MAX_FUNCTION_LINES", 20)
    assert count.sizes().long_files
    assert count.sizes().long_functions


@pytest.mark.slow
def test_the_whole_table(tmp_path: Path) -> None:
    """With the servers: their processes report, whichever of them does the work."""
    command = [sys.executable, str(SCRIPTS / "count_files.py"), "--json"]
    result = subprocess.run(command, capture_output=True, check=True, timeout=300, cwd=tmp_path)
    table = json.loads(result.stdout)
    for way in table["ways"]:
        assert "model/neo.py" in way["files"], way["name"]
    for way in table["ways"][1:3]:
        assert any(file.startswith("serve/http/") for file in way["files"]), way["name"]
