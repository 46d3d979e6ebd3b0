"""Workers as actors of Ray: the same bytes as in one process."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from neounify.curate import CurateError, curate, recipe_from_table
from neounify.curate.executor import RayActors
from support.curation import bytes_of, encoded, recipe_of, textured, write_samples

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="the extra ray is not installed")


def test_the_bytes_are_those_of_one_process(tmp_path: Path) -> None:
    samples = [
        (f"n{n}", encoded(textured(n % 8), "JPEG", quality=95), f"a view of stone {n}")
        for n in range(10)
    ]
    recipe = recipe_of({"web": write_samples(tmp_path / "in", samples)}, samples_per_unit=3)
    curate(recipe, tmp_path / "one")
    curate(recipe, tmp_path / "ray", workers=2, ray="local")
    assert bytes_of(tmp_path / "ray") == bytes_of(tmp_path / "one")


def test_an_error_of_a_task_is_raised_as_it_is() -> None:
    executor = RayActors(1, "local")
    try:
        with pytest.raises(CurateError, match="sources"):
            list(executor.run(recipe_from_table, [({"sources": []}, None)]))
    finally:
        executor.close()
