"""Summaries: the published models' sizes, and what a folder really holds."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch

from neounify.checkpoint import CheckpointFolder, SummaryRow, expected_shapes, stream_of, summarise
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
    parameters: Counter[str] = Counter()
    for name, shape in expected_shapes(U1_8B).items():
        parameters[stream_of(name)] += shape.numel()
    billions = {stream: round(count / 1e9, 3) for stream, count in parameters.items()}
    assert billions == {"und": 8.121, "gen": 8.186, "shared": 1.245}
    assert round(parameters.total() / 1e9, 3) == 17.552


def test_the_published_sparse_model() -> None:
    def parameters(layers: int) -> int:
        und, gen = (
            dataclasses.replace(mlp, sparse=mlp.sparse[:layers])
            for mlp in (U1_A3B.und_mlp, U1_A3B.gen_mlp)
        )
        config = U1_A3B.replace(num_layers=layers, und_mlp=und, gen_mlp=gen)
        return sum(shape.numel() for shape in expected_shapes(config).values())

    one, two = parameters(1), parameters(2)
    assert one + 47 * (two - one) == pytest.approx(39e9, rel=0.01)


def test_the_total_of_a_folder(any_config: ModelConfig, tmp_path: Path) -> None:
    weights = random_weights(any_config)
    folder = CheckpointFolder.open(write_sharded(tmp_path / "any", any_config, weights))
    summary = summarise(folder)
    assert {row.dtype for row in summary.rows} == {"float32"}
    assert summary.total.tensors == len(weights)
    assert summary.total.parameters == sum(t.numel() for t in weights.values())
    assert summary.total.bytes == sum(t.nbytes for t in weights.values())


def test_rows(tmp_path: Path) -> None:
    weights = random_weights(CONFIGS["sparse"], torch.bfloat16)
    folder = CheckpointFolder.open(write_checkpoint(tmp_path / "x", CONFIGS["sparse"], weights))
    rows = {(row.stream, row.part): row for row in summarise(folder).rows}
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
