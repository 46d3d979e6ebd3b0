"""Guidance × sequence parallel: runs and rows on ranks, the same images as on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed

import neounify
from neounify.config import MlpConfig
from neounify.config.presets import TINY
from neounify.distributed.group import Group
from neounify.engine.denoiser import DenoiseJob, Denoiser
from neounify.engine.spread import Spread, check_sequence, deal
from neounify.errors import ConfigError
from neounify.model import NeoUnify
from neounify.runtime.plan import ExecutionPlan
from neounify.text import byte_tokenizer
from support.denoising import denoised
from support.denoising import started as job
from support.ranks import run_ranks

SPARSE = MlpConfig(
    width=64, num_experts=4, experts_per_token=2, expert_width=32, sparse=(True, True)
)
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "pixel": {"image_head": "pixel"},
    "sparse": {"und_mlp": SPARSE, "gen_mlp": SPARSE, "num_layers": 2},
}


def test_runs_are_dealt_by_tokens_the_largest_first() -> None:
    assert deal([4, 4], 2) == [0, 1]
    assert deal([4, 9, 4, 4], 2) == [1, 0, 1, 1]
    assert deal([5, 5, 5], 2) == [0, 1, 0]
    assert deal([7], 4) == [0]
    assert deal([], 2) == []
    assert deal([5, 5, 5], 1) == [0, 0, 0]


def test_runs_with_a_place_keep_it() -> None:
    assert deal([4, 4, 9], 2, {0: 1, 1: 1}) == [1, 1, 0]


def test_teams_must_make_up_the_group() -> None:
    for ranks, sequence in ((1, 1), (4, 2), (4, 4)):
        check_sequence(ranks, sequence)
    with pytest.raises(ConfigError, match=r"sequence parallel 3 on 4 devices .*so 1, 2, 4"):
        check_sequence(4, 3)


def pipe_of(kind: str) -> neounify.Pipeline:
    torch.manual_seed(0)
    model = NeoUnify(TINY.replace(**KINDS[kind])).eval().requires_grad_(False)
    return neounify.Pipeline(model, byte_tokenizer(), system_message="")


def jobs(pipe: neounify.Pipeline, scale: int) -> list[DenoiseJob]:
    return [
        job(pipe, "a boat", 32 * scale, 4),
        job(pipe, "a house on a hill", 48 * scale, 7, step_cache=0.5, step_cache_warm=2),
        job(pipe, "a cat", 32 * scale, 5, guidance=1.0),
        job(pipe, "a dog", 64 * scale, 3, guidance_interval=(0.5, 1.0), guidance_norm="global"),
    ]


def images_of_rank(
    folder: Path, kind: str, sequence: int, scale: int
) -> list[list[np.ndarray[Any, Any]]]:
    rank, size = distributed.get_rank(), distributed.get_world_size()
    group = Group.meet(folder / "store", rank, ["cpu"] * size)
    pipe = pipe_of(kind)

    def images(started: list[DenoiseJob], late: int = 0) -> list[np.ndarray[Any, Any]]:
        done = denoised(Denoiser(pipe.model, spread=Spread(group, sequence)), started, late)
        spent = [np.array(job.layers_run) for job in started]
        return [x.numpy() for x in done] + spent

    together = images(jobs(pipe, scale), late=2)
    alone = images(jobs(pipe, scale)[1:2])
    distributed.barrier()
    return [together, alone]


CASES = [("dense", 2, 1), ("dense", 2, 2), ("dense", 4, 1), ("dense", 4, 2), ("dense", 4, 4)]
OTHERS = [("pixel", 2, 2), ("sparse", 2, 2), ("sparse", 4, 2)]


@pytest.mark.parametrize(("kind", "ranks", "sequence"), CASES + OTHERS)
def test_ranks_compute_the_images_of_one(
    kind: str, ranks: int, sequence: int, tmp_path: Path
) -> None:
    pipe = pipe_of(kind)
    # Rows alone change no sum: the bound is that of the same attention, on images that leave each
    # rank the rows of a matrix product, since those of a vector have other kernels.
    alone = sequence == ranks
    scale = 8 if alone and kind == "dense" else 2
    started = jobs(pipe, scale)
    plan = ExecutionPlan(attention="blocks" if alone else "auto")
    expected = [x.numpy() for x in denoised(Denoiser(pipe.model, plan), started, late=2)]
    expected += [np.array(job.layers_run) for job in started]
    results = run_ranks(images_of_rank, tmp_path, kind, sequence, scale, ranks=ranks, seconds=120)
    for together, one in results:
        for actual, first in zip((*together, *one), (*results[0][0], *results[0][1]), strict=True):
            np.testing.assert_array_equal(actual, first)
    # Experts have few rows each.
    tolerance = 1e-6 if alone and kind == "dense" else 1e-5
    for actual, wanted in zip(results[0][0], expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())
    # The step cache skipped some layers, and an image is the same alone.
    assert expected[5] < 7 * 2 * pipe.config.num_layers
    np.testing.assert_allclose(results[0][1][0], expected[1], rtol=0, atol=1e-5)
