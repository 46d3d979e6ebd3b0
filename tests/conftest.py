"""Settings, hooks and fixtures shared by all tests."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

# Workers of pytest-xdist share the cores: one thread each, and each process that they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without it the products of few rows have other bits than those of many on these processors
# (docs/tasks.md); it is read at the first product.
if Path("/proc/cpuinfo").is_file() and "amx_tile" in Path("/proc/cpuinfo").read_text():
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

# Shapes and types of the annotated tensor code are checked while the tests run, and only then.
install_import_hook("neounify.model", "beartype.beartype")

from support.golden import checkpoint  # noqa: E402
from support.skips import (  # noqa: E402
    pytest_collection_modifyitems,
    pytest_terminal_summary,
)
from support.workers import pytest_xdist_auto_num_workers  # noqa: E402

__all__ = [
    "pytest_collection_modifyitems",
    "pytest_terminal_summary",
    "pytest_xdist_auto_num_workers",
]

# A shell that runs the tests in the background hands down an ignored SIGINT, and so would they.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Processes that tests start by fork server, such as those that load data, import nothing anew.
multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "neounify.data.loader"])
# A busy machine is no failure; pytest-timeout still stops a test that hangs.
settings.register_profile("neounify", deadline=None)
settings.load_profile("neounify")


@pytest.fixture
def quick_starts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that a slow row of a table starts come from the fork server above.

    What they compute is the same; rows that are not slow start processes as users do.
    """
    if request.node.get_closest_marker("slow"):
        forked = multiprocessing.get_context("forkserver")
        monkeypatch.setattr(multiprocessing, "get_context", lambda method: forked)


@pytest.fixture(scope="session")
def golden_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give a function from a golden checkpoint's name to a folder with its weights rebuilt."""
    root = tmp_path_factory.mktemp("checkpoints")

    @cache
    def build(name: str) -> Path:
        return checkpoint(name, root)

    return build
