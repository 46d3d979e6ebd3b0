"""Imports of a process before it works: start-up time, stated without a clock."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from neounify.runtime import lasting_imports

HEAVY = {
    *("torch._dynamo", "torch._inductor", "sympy", "scipy", "pandas", "matplotlib"),
    *("fastapi", "starlette", "uvicorn", "prometheus_client", "llguidance", "tensorboard"),
    *("PIL.AvifImagePlugin", "PIL.TiffImagePlugin", "neounify.serve", "neounify.train"),
    *("neounify.data", "neounify.scenes", "neounify.lora", "neounify.video.read", "av"),
}
"""Modules that generating one image does not need."""

COMMAND = """
import sys
from neounify.cli import main
sys.argv = ["neounify", "generate", "a red circle", "--steps", "1", "--output", "circle.png"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
LIBRARY = """
import neounify
from neounify.bundled import bundled_model
pipe = neounify.load(bundled_model(), dtype="float32")
pipe.generate("a red circle", steps=1).images[0].save("circle.png")
"""
PRINT = "import sys\nprint(*sys.modules, sep='\\n')\n"


@pytest.mark.parametrize("code", [COMMAND, LIBRARY], ids=["command", "library"])
def test_generating_an_image_imports_nothing_heavy_but_torch(code: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", code + PRINT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "circle.png").is_file()
    modules = set(done.stdout.splitlines())
    assert "torch" in modules
    assert not modules & HEAVY


def test_lasting_imports_are_exempt_from_garbage_collection() -> None:
    assert gc.isenabled()
    before = gc.get_freeze_count()
    try:
        with lasting_imports():
            assert not gc.isenabled()
            kept = [[] for _ in range(1000)]  # type: ignore[var-annotated]
        assert gc.isenabled()
        assert gc.get_freeze_count() >= before + len(kept)
    finally:
        gc.unfreeze()


def test_collection_continues_after_a_failed_import() -> None:
    try:
        with pytest.raises(ImportError), lasting_imports():
            raise ImportError
        assert gc.isenabled()
    finally:
        gc.unfreeze()
