"""Summaries: the published models' sizes, and what a folder really holds."""

import dataclasses
from pathlib import Path

import pytest
import torch

from neounify.checkpoint import CheckpointFolder, SummaryRow, summarise, summarise_config
from neounify.config import ModelConfig
from neounify.config.presets import U1_8B, U1_A3B
from support.checkpoint_folders import (
    CONFIGS,
    SMALL,
    random_weights,
    write_checkpoint,
    write_sharded,
)


def test_the_published_dense_model() -> None:
    summary = summarise_config(U1_8B)
    billions = {row.stream: round(row.parameters / 1e9, 3) for row in summary.streams}
    assert billions == {"und": 8.121, "gen": 8.186, "shared": 1.245}
    assert round(summary.total.parameters / 1e9, 3) == 17.552
    assert summary.total.bytes == 2 * summary.total.parameters


def test_the_published_sparse_model() -> None:
    def parameters(layers: int) -> int:
        und, gen = (
            dataclasses.replace(mlp, sparse=mlp.sparse[:layers])
            for mlp in (U1_A3B.und_mlp, U1_A3B.gen_mlp)
        )
        config = U1_A3B.replace(num_layers=layers, und_mlp=und, gen_mlp=gen)
        return summarise_config(config).total.parameters

    one, two = parameters(1), parameters(2)
    assert one + 47 * (two - one) == pytest.approx(39e9, rel=0.01)


def test_folder_and_config_agree(any_config: ModelConfig, tmp_path: Path) -> None:
    weights = random_weights(any_config)
    folder = CheckpointFolder.open(write_sharded(tmp_path / "any", any_config, weights))
    summary = summarise(folder)
    assert summary == summarise_config(any_config, torch.float32)
    assert summary.total.tensors == len(weights)
    assert summary.total.parameters == sum(t.numel() for t in weights.values())
    assert summary.total.bytes == sum(t.nbytes for t in weights.values())


def test_rows() -> None:
    rows = {(row.stream, row.part): row for row in summarise_config(CONFIGS["sparse"]).rows}
    assert rows["und", "experts"].tensors == 4 * 3
    assert rows["gen", "experts"].parameters == 2 * 3 * 3 * 32 * 40
    assert rows["und", "router"] == SummaryRow("und", "router", "bfloat16", 1, 4 * 32, 2 * 4 * 32)
    assert rows["und", "mlp"].tensors == 3
    assert ("gen", "mlp") not in rows
    streams = [stream for stream, _ in rows]
    assert streams == sorted(streams, key=("und", "gen", "shared").index)


def test_dtypes_and_unknown_tensors_have_rows_of_their_own(tmp_path: Path) -> None:
    weights = random_weights(SMALL, torch.bfloat16)
    norm = "language_model.model.norm.weight"
    weights[norm] = weights[norm].float()
    weights["stray"] = torch.zeros(5, dtype=torch.int64)
    summary = summarise(CheckpointFolder.open(write_checkpoint(tmp_path / "x", SMALL, weights)))
    assert SummaryRow("und", "norm", "float32", 1, 32, 128) in summary.rows
    assert SummaryRow("unknown", "unknown", "int64", 1, 5, 40) in summary.rows
    assert summary.of_stream("und").dtype == "bfloat16, float32"
    assert [row.stream for row in summary.streams] == ["und", "gen", "shared", "unknown"]
