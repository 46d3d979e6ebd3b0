"""Two processes as one group: what tests of distributed code stand on."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed

from support.models import Maker, pack, random_config, random_model
from support.ranks import RankError, run_ranks


def total(start: float) -> float:
    value = torch.tensor(start + distributed.get_rank())
    distributed.all_reduce(value)
    return value.item()


def logits(seed: int) -> np.ndarray[Any, Any]:
    """Of a small model whose weights rank 0 chose and sent to the others."""
    rng = random.Random(0)
    config = random_config(rng)
    model = random_model(config, seed + distributed.get_rank())
    for parameter in model.parameters():
        distributed.broadcast(parameter.data, src=0)
    return run_model(rng, model)


def run_model(rng: random.Random, model: Any) -> np.ndarray[Any, Any]:
    packed = pack([Maker(rng, model.config).document()], model.config, torch.float32)
    with torch.no_grad():
        return packed.run(model)[0].numpy()


def one_fails() -> None:
    if distributed.get_rank() == 1:
        raise ValueError("of rank one")
    distributed.barrier()


def one_dies() -> None:
    if distributed.get_rank() == 1:
        os._exit(3)
    distributed.barrier()


def one_sleeps() -> None:
    if distributed.get_rank() == 1:
        time.sleep(600)


def test_a_sum_over_ranks() -> None:
    assert run_ranks(total, 10.0) == [21.0, 21.0]
    assert run_ranks(total, 1.0, ranks=3) == [6.0, 6.0, 6.0]


def test_a_model_gives_equal_outputs_on_all_ranks() -> None:
    first, second = run_ranks(logits, 5)
    np.testing.assert_array_equal(first, second)
    rng = random.Random(0)
    alone = run_model(rng, random_model(random_config(rng), 5))
    np.testing.assert_allclose(first, alone, rtol=1e-5, atol=1e-6)


def test_the_error_of_a_rank_comes_out_with_its_traceback() -> None:
    with pytest.raises(RankError, match=r"rank 1 raised:(.|\n)*one_fails(.|\n)*of rank one"):
        run_ranks(one_fails)


def test_a_rank_that_dies_ends_the_others() -> None:
    with pytest.raises(RankError, match="rank 1 died"):
        run_ranks(one_dies)


def test_a_rank_that_hangs_is_given_up() -> None:
    with pytest.raises(RankError, match=r"ranks \[0, 1\] of 2 did not end in time|ranks \[1\]"):
        run_ranks(one_sleeps, seconds=4.0)
