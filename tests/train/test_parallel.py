"""The `[parallel]` table and what is refused before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from neounify.distributed.mesh import MeshShape, ParallelConfig, mesh_shape
from neounify.distributed.owners import owners
from neounify.distributed.ranks import Ranks, ranks_of
from neounify.errors import ConfigError
from neounify.train.parallel import check_model, check_parallel
from neounify.train.recipe import recipe_from_table
from neounify.train.setup import recipe_config
from support.parallel_runs import SPARSE, one_stage, recipe


@pytest.mark.parametrize(
    ("config", "ranks", "shape"),
    [
        (None, 1, MeshShape()),
        (None, 6, MeshShape(shard=6)),
        (ParallelConfig(replicate=2), 8, MeshShape(replicate=2, shard=4)),
        (ParallelConfig(replicate=2, shard=3), 6, MeshShape(replicate=2, shard=3)),
        (
            ParallelConfig(replicate=2, expert=4),
            24,
            MeshShape(replicate=2, shard=3, expert=4),
        ),
        (ParallelConfig(shard=1, expert=4), 4, MeshShape(expert=4)),
        (ParallelConfig(sequence=2), 6, MeshShape(shard=3, sequence=2)),
        (ParallelConfig(sequence=2, replicate=2), 4, MeshShape(replicate=2, sequence=2)),
    ],
)
def test_the_shape_of_a_mesh(config: ParallelConfig | None, ranks: int, shape: MeshShape) -> None:
    assert mesh_shape(config, ranks) == shape
    assert shape.ranks == ranks


GRPO = one_stage(method={"kind": "text-grpo"}, freeze=["gen"], data=[])


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"parallel": {"replicate": 2, "shard": 3}}, 4, "replicate 2 × shard 3 are 6 ranks"),
        ({"parallel": {"shard": 2, "expert": 4}}, 4, "shard 2 × expert 4 are 8 ranks"),
        ({"parallel": {"replicate": 2, "expert": 4}}, 4, "2 ranks cannot be .* groups of 4"),
        ({"parallel": {"expert": 2}, **one_stage(compile=True)}, 2, "compile is not available"),
        ({"parallel": {"sequence": 3}}, 4, "4 ranks cannot be divided into groups of 3"),
        ({"parallel": {"sequence": 2, "replicate": 3}}, 4, "2 ranks cannot be divided into 3"),
        (
            {"parallel": {"sequence": 2}, **one_stage(packs_per_step=3)},
            4,
            "multiple of the 2 groups of 2 ranks, such as 4",
        ),
        ({"parallel": {"replicate": 3}}, 4, "4 ranks cannot be divided into 3 copies"),
        ({"parallel": {"streams": 6}}, 4, "4 ranks cannot share the 6 data streams.*parallel"),
        (one_stage(packs_per_step=6), 4, r"packs_per_step \(6\).* such as 8"),
        (
            {**one_stage(lora={"rank": 2}), "parallel": {"expert": 2}},
            2,
            r"lora is not available with parallel\.expert \(2\)",
        ),
        (
            {**one_stage(lora={"rank": 2, "dropout": 0.1}), "parallel": {"sequence": 2}},
            2,
            r"lora\.dropout \(0\.1\) is not available with parallel\.sequence",
        ),
        ({**GRPO, "parallel": {"expert": 2}}, 2, "text-grpo needs the whole model on every rank"),
        ({**GRPO, "parallel": {"shard": 2}}, 2, "text-grpo needs the whole model on every rank"),
        (GRPO, 2, "2 ranks share the rollouts of an iteration, 1 of 16 prompts; .* such as 8"),
        (
            {**GRPO, "parallel": {"sequence": 2}},
            2,
            "text-grpo needs .* leave parallel.shard",
        ),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], ranks: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_parallel(recipe(**changes), ranks)


def test_axes_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"expert \(2\) and sequence \(2\) are not available"):
        recipe(parallel={"sequence": 2, "expert": 2})


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({}, MeshShape(expert=2), "expert is 2, and the model has no experts"),
        ({"model": SPARSE}, MeshShape(expert=3), "expert is 3, which does not divide the 4"),
        (
            {"model": {"image_head": "pixel"}},
            MeshShape(sequence=2),
            "2 ranks cannot share an image",
        ),
    ],
)
def test_models_that_cannot_use_an_axis(
    changes: dict[str, Any], shape: MeshShape, message: str
) -> None:
    config = recipe_config(recipe(**changes))
    with pytest.raises(ConfigError, match=message):
        check_model(config, shape)
    check_model(config, MeshShape(shard=3))


def test_stages_that_need_the_whole_model_have_it_by_default() -> None:
    grpo = one_stage(method={"kind": "dmd2"}, freeze=["und", "shared"], data=[])
    assert check_parallel(recipe(**grpo), 4) == MeshShape(replicate=4)
    lora = one_stage(lora={"rank": 2})
    for changes in ({}, lora):
        assert check_parallel(recipe(**changes), 4) == MeshShape(shard=4)


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


@pytest.mark.parametrize(("items", "size"), [(7, 3), (2, 4), (0, 2), (8, 1)])
def test_ranks_share_items_side_by_side(items: int, size: int) -> None:
    shares = [Ranks(rank, size).share(items) for rank in range(size)]
    assert [n for share in shares for n in share] == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_owners_have_equal_work() -> None:
    shapes = [(8, 8)] * 7 + [(64, 64)]
    chosen = owners(shapes, 2)
    assert chosen[-1] == 0
    assert chosen[:-1] == [1] * 7
    assert owners([], 3) == []
