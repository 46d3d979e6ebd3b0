"""Shares of quantised weights: ranks hold parts of the codes of one process, not other ones."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from neounify.checkpoint import CheckpointFolder, expected_shapes, load_checkpoint
from neounify.checkpoint.gguf_save import save_gguf
from neounify.checkpoint.load import LoadedCheckpoint
from neounify.checkpoint.quantise_files import quantise_checkpoint
from neounify.checkpoint.quantised_layers import quant_modules
from neounify.checkpoint.residency import Share
from neounify.config import MlpConfig, ModelConfig
from neounify.distributed.group import Group
from neounify.distributed.tensor import shares
from neounify.errors import ConfigError
from neounify.model.parts import UND
from neounify.quant.linear import QuantLinear
from support.checkpoint_folders import CONFIGS, random_weights, write_checkpoint
from support.lora_files import lora_tensors

CONFIG = CONFIGS["dense"].replace(
    num_heads=12, num_kv_heads=2, head_dim=8, und_mlp=MlpConfig(width=32)
)
"""Projections of 96 and 32 channels: halves of them are whole groups of 16."""
BLOCKS = CONFIG.replace(num_heads=8, und_mlp=MlpConfig(width=64))
OUT = f"layers.1.{UND}.out.o_proj"


def parts_of(config: ModelConfig, rank: int) -> dict[str, Share]:
    group = Group.__new__(Group)
    group.rank, group.size = rank, 2
    return shares(config, expected_shapes(config), group)


def codes_of(loaded: LoadedCheckpoint) -> dict[str, torch.Tensor]:
    """What the codes of each layer mean, without the rotation, by the name of the weight."""
    return {
        f"{name}.weight": layer.format.dequantise(layer.tensors())
        for name, layer in quant_modules(loaded.model).items()
    }


def check(folder: Path, config: ModelConfig, **options: Any) -> None:
    expected = codes_of(load_checkpoint(folder, **options))
    assert f"{OUT}.weight" in expected
    for rank in range(2):
        parts = parts_of(config, rank)
        for memory in ("all", "stream"):
            loaded = load_checkpoint(folder, memory=memory, plan="ignore", shares=parts, **options)
            with loaded.residency.use("und"), loaded.residency.use("gen"):
                actual = codes_of(loaded)
            assert actual.keys() == expected.keys()
            for name, codes in actual.items():
                wanted = expected[name]
                wanted = parts[name].of(wanted) if name in parts else wanted
                assert torch.equal(codes, wanted), name


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("m") / "plain", CONFIG, random_weights(CONFIG))


@pytest.mark.parametrize("preset", ["int8-all", "fp8", "w4-mixed", "w4"])
def test_ranks_hold_parts_of_the_stored_codes(preset: str, plain: Path, tmp_path: Path) -> None:
    folder = quantise_checkpoint(CheckpointFolder.open(plain), tmp_path / preset, preset)
    check(folder, CONFIG)


@pytest.mark.parametrize("preset", ["int8-all", "fp8", "w4"])
def test_ranks_quantise_as_one_process(preset: str, plain: Path) -> None:
    """Scales of rows and levels are those of the whole weight."""
    check(plain, CONFIG, quantise=preset)


def test_ranks_hold_parts_of_blocks(tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "plain", BLOCKS, random_weights(BLOCKS))
    check(save_gguf(CheckpointFolder.open(plain), tmp_path / "q5_1", "q5_1"), BLOCKS)


def test_adapters_beside_codes_are_cut_too(plain: Path, tmp_path: Path) -> None:
    targets = [
        f"language_model.model.layers.1.{part}" for part in ("self_attn.o_proj", "mlp.up_proj")
    ]
    save_file(lora_tensors(CONFIG, targets), tmp_path / "lora.safetensors")
    options: dict[str, Any] = {"lora": tmp_path / "lora.safetensors", "quantise": "int8"}

    def adapters(parts: dict[str, Share] | None) -> list[torch.Tensor]:
        model = load_checkpoint(plain, dtype="float32", shares=parts, **options).model
        layers = [model.get_submodule(name) for name in (OUT, OUT.replace("o_proj", "mlp.up_proj"))]
        tensors = []
        for layer in layers:
            assert isinstance(layer, QuantLinear)
            assert layer.down is not None
            assert layer.up is not None
            tensors += [layer.down, layer.up]
        return tensors

    whole, halves = adapters(None), [adapters(parts_of(CONFIG, rank)) for rank in range(2)]
    for n, dim in ((0, 1), (3, 0)):
        assert torch.equal(torch.cat([half[n] for half in halves], dim=dim), whole[n])
    for n in (1, 2):
        assert all(torch.equal(half[n], whole[n]) for half in halves)


def test_a_cut_inside_a_group_is_refused_or_decoded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rotated groups of 64 channels, of which each rank would have a half."""
    plain = write_checkpoint(tmp_path / "plain", BLOCKS, random_weights(BLOCKS))
    parts = parts_of(BLOCKS, 1)
    message = r"columns 32 to 64 of 64, but int8_tensorwise keeps groups of 64 together"
    with pytest.raises(ConfigError, match=message):
        load_checkpoint(plain, quantise="int8", shares=parts)
    folder = quantise_checkpoint(CheckpointFolder.open(plain), tmp_path / "int8", "int8")
    with pytest.raises(ConfigError, match=message):
        load_checkpoint(folder, backend="reference", shares=parts)
    with caplog.at_level(logging.WARNING, "neounify"):
        model = load_checkpoint(folder, dtype="float32", shares=parts).model
    assert "quantised weights are decoded, such as layers.0.und.out.o_proj.weight" in caplog.text
    whole = load_checkpoint(folder, dtype="float32", backend="decoded").model
    wanted = parts[f"{OUT}.weight"].of(whole.get_parameter(f"{OUT}.weight"))
    assert torch.equal(model.get_parameter(f"{OUT}.weight"), wanted)
    assert isinstance(model.get_submodule(f"layers.1.{UND}.qkv.q_proj"), QuantLinear)
