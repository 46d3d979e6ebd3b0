"""The recorded images are far smaller than any size the published models were trained at."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/golden" in item.path.as_posix():
            item.add_marker(pytest.mark.filterwarnings("ignore::neounify.errors.SizeWarning"))
