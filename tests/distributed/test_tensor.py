"""Tensor parallelism of the understanding stream: what ranks read, and what they compute."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed

from neounify.cache import new_cache, new_paged_cache
from neounify.cache.key_values import text_keys
from neounify.checkpoint import expected_shapes
from neounify.checkpoint.load import load_checkpoint
from neounify.config import MlpConfig, ModelConfig
from neounify.distributed.group import ALONE, Group, share
from neounify.distributed.tensor import check_degree, join, shares
from neounify.errors import ConfigError
from neounify.model import Layout, NeoUnify, Text
from neounify.model.parts import UND
from support.attention import plan
from support.checkpoint_folders import CONFIGS, random_weights, write_checkpoint
from support.models import random_config, random_model
from support.ranks import run_ranks

EIGHT = {
    "num_layers": 2,
    "num_heads": 16,
    "num_kv_heads": 8,
    "head_dim": 8,
    "hidden_size": 32,
    "vocab_size": 47,
}
SPARSE = MlpConfig(
    width=28, num_experts=4, experts_per_token=2, expert_width=12, sparse=(True, False)
)
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"und_mlp": MlpConfig(width=36), "gen_mlp": MlpConfig(width=20)},
    "bias, tied": {
        "und_mlp": MlpConfig(width=36),
        "gen_mlp": MlpConfig(width=20),
        "attention_bias": True,
        "tie_embeddings": True,
    },
    "sparse": {"und_mlp": SPARSE, "gen_mlp": SPARSE, "tie_embeddings": False},
}


def config_of(kind: str) -> ModelConfig:
    values = {"attention_bias": False, "tie_embeddings": False} | KINDS[kind]
    return random_config(random.Random(0), **EIGHT, **values)


def logits(model: NeoUnify) -> np.ndarray[Any, Any]:
    """Of a prompt in pieces and of single tokens, in caches of both kinds."""
    numbers, states = torch.Generator().manual_seed(0), []
    size = model.config.hidden_size
    contiguous, paged = new_cache(model, 2), new_paged_cache(model, 8, 4)
    for cache in (contiguous, paged.open(text_keys(range(9), 0), 3)):
        for length in (5, 4, 1, 1):
            layout = Layout([cache.document(Text(length))])
            x = torch.randn(length, size, generator=numbers)
            attend = plan(layout, [cache], "auto")
            states.append(model.backbone(layout, {UND: x}, attend)[UND])
            cache.advance(layout.documents[0])
    return model.logits(torch.cat(states)).numpy()


def logits_of_rank(folder: Path, kind: str) -> np.ndarray[Any, Any]:
    rank, size = distributed.get_rank(), distributed.get_world_size()
    group = Group.meet(folder / "store", rank, ["cpu"] * size)
    model = random_model(config_of(kind), 0)
    for name, part in shares(model.config, expected_shapes(model.config), group).items():
        parameter = model.get_parameter(name)
        parameter.data = part.of(parameter).contiguous()
    join(model, group)
    with torch.no_grad():
        result = logits(model)
    distributed.barrier()
    return result


CASES = [(kind, ranks) for kind in KINDS for ranks in (2, 4)] + [("dense", 8)]


@pytest.mark.parametrize(("kind", "ranks"), CASES)
def test_ranks_with_shares_compute_the_logits_of_one(kind: str, ranks: int, tmp_path: Path) -> None:
    with torch.no_grad():
        expected = logits(random_model(config_of(kind), 0))
    results = run_ranks(logits_of_rank, tmp_path, kind, ranks=ranks, seconds=120)
    for result in results:
        # The ranks must not part ways, so they have the same bits.
        np.testing.assert_array_equal(result, results[0])
    np.testing.assert_allclose(results[0], expected, rtol=0, atol=4e-6 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("memory", ["all", "stream"])
@pytest.mark.parametrize("kind", ["dense", "sparse", "bias", "tied"])
def test_a_rank_reads_its_part_of_each_weight(
    kind: str, memory: Any, dtype: str, tmp_path: Path
) -> None:
    """Mapped, cast, and read by stream: rows stay mapped where they are stored in that dtype."""
    config = CONFIGS[kind]
    folder = write_checkpoint(tmp_path / kind, config, random_weights(config))
    whole = load_checkpoint(folder, dtype=dtype).model
    shapes = expected_shapes(config)
    for rank in range(2):
        group = Group.__new__(Group)
        group.rank, group.size = rank, 2
        parts = shares(config, shapes, group)
        loaded = load_checkpoint(folder, dtype=dtype, memory=memory, shares=parts)
        with loaded.residency.use(UND):
            for name, parameter in loaded.model.named_parameters():
                if memory == "stream" and ".und." not in name:
                    continue
                wanted: Tensor = whole.get_parameter(name)
                if name in parts:
                    wanted = parts[name].of(wanted)
                assert torch.equal(parameter, wanted), name
        assert (f"layers.0.{UND}.qkv.k_proj.bias" in parts) == (kind == "bias")
        assert not any(".gen." in name for name in parts)


def test_shares_cover_everything_once() -> None:
    for total in (1, 7, 8, 151_936):
        for ranks in (1, 2, 3, 8):
            places = [n for rank in range(ranks) for n in share(total, rank, ranks)]
            assert places == list(range(total))
    assert shares(CONFIGS["dense"], expected_shapes(CONFIGS["dense"]), ALONE) == {}


def test_a_degree_that_does_not_divide_the_key_heads_is_refused() -> None:
    config = config_of("dense")
    for ranks in (1, 2, 4, 8):
        check_degree(config, ranks)
    message = r"understanding on 3 devices: the model's 8 key heads .* by 1, 2, 4 or 8 devices"
    with pytest.raises(ConfigError, match=message):
        check_degree(config, 3)
