"""The `[parallel]` table and what is refused before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from neounify.distributed.mesh import MeshShape, ParallelConfig, mesh_shape
from neounify.distributed.owners import owners
from neounify.distributed.ranks import Ranks, ranks_of
from neounify.errors import ConfigError
from neounify.train.parallel import check_parallel
from neounify.train.recipe import recipe_from_table
from support.parallel_runs import one_stage, recipe


@pytest.mark.parametrize(
    ("config", "ranks", "shape"),
    [
        (None, 1, (1, 1)),
        (None, 6, (1, 6)),
        (ParallelConfig(replicate=2), 8, (2, 4)),
        (ParallelConfig(replicate=2, shard=3), 6, (2, 3)),
    ],
)
def test_the_shape_of_a_mesh(
    config: ParallelConfig | None, ranks: int, shape: tuple[int, int]
) -> None:
    assert mesh_shape(config, ranks) == MeshShape(replicate=shape[0], shard=shape[1])


GRPO = one_stage(method={"kind": "text-grpo"}, freeze=["gen"], data=[])


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"parallel": {"replicate": 2, "shard": 3}}, 4, "replicate 2 × shard 3 are 6 ranks"),
        ({"parallel": {"replicate": 3}}, 4, "4 ranks cannot be divided into 3 copies"),
        ({"parallel": {"streams": 6}}, 4, "4 ranks cannot share the 6 data streams.*parallel"),
        (one_stage(packs_per_step=6), 4, r"packs_per_step \(6\).* such as 8"),
        (one_stage(lora={"rank": 2}), 2, "lora"),
        (GRPO, 2, "text-grpo runs on one rank"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_parallel(recipe(**changes), ranks)


@pytest.mark.parametrize("axis", ["expert", "sequence"])
def test_axes_that_do_not_exist_are_refused(axis: str) -> None:
    with pytest.raises(ConfigError, match=f"parallel: {axis}: this axis is not available"):
        recipe(parallel={axis: 2})


def test_without_a_table_the_data_streams_are_the_workers() -> None:
    table = {"name": "r", "model": {"preset": "scenes"}, "stages": [{"name": "a", "steps": 1}]}
    assert recipe_from_table({**table, "workers": 3}).streams == 3
    assert recipe_from_table({**table, "workers": 0}).streams == 1
    assert recipe_from_table({**table, "parallel": {}}).streams == 64


TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def test_ranks_by_the_environment() -> None:
    assert ranks_of({}) == Ranks()
    assert ranks_of(TORCHRUN) == Ranks(1, 4, 1)
    with pytest.raises(ConfigError, match="not MASTER_PORT"):
        ranks_of({name: value for name, value in TORCHRUN.items() if name != "MASTER_PORT"})
    with pytest.raises(ConfigError, match=r"in 0\.\.3, got 4"):
        ranks_of({**TORCHRUN, "RANK": "4"})


def test_owners_have_equal_work() -> None:
    shapes = [(8, 8)] * 7 + [(64, 64)]
    chosen = owners(shapes, 2)
    assert chosen[-1] == 0
    assert chosen[:-1] == [1] * 7
    assert owners([], 3) == []
