"""GGUF files that are written: other readers, exactness, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from neounify.checkpoint import load_model, to_published
from neounify.checkpoint.gguf_save import GGUF_PRESETS, save_gguf
from neounify.checkpoint.mapped import MappedFile
from neounify.checkpoint.reader import CheckpointFolder
from neounify.config import MlpConfig
from neounify.errors import CheckpointError, RequestError
from neounify.quant.blocks import BLOCK_FORMATS
from support.checkpoint_folders import CONFIGS, SMALL, random_weights, write_checkpoint
from support.lora_files import lora_tensors

LAYER = to_published("layers.1.gen.out.mlp.gate_proj.weight")
SHORT = to_published("layers.1.gen.out.mlp.down_proj.weight")
"""Rows of 48 values, which are not whole blocks."""


@pytest.fixture
def checkpoint(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder.open(write_checkpoint(tmp_path / "m", SMALL, random_weights(SMALL)))


def test_presets_are_the_formats_with_an_encoder() -> None:
    assert GGUF_PRESETS == ("f16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


@pytest.mark.parametrize("preset", GGUF_PRESETS)
def test_other_readers_read_the_same(
    checkpoint: CheckpointFolder, tmp_path: Path, preset: str
) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the package gguf")
    folder = save_gguf(checkpoint, tmp_path / "out", preset)
    ours = load_model(folder, dtype="float32").state_dict()
    reader = gguf.GGUFReader(folder / f"model-{preset.upper()}.gguf")
    theirs: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
    assert theirs.keys() == {to_published(name) for name in ours}
    for name, values in ours.items():
        tensor = theirs[to_published(name)]
        assert tuple(tensor.shape) == tuple(values.shape[::-1])
        decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(decoded.reshape(values.shape), values.numpy())
    entry = json.loads((folder / "config.json").read_text())["neounify"]["quantised"]
    assert entry == {"preset": preset, "from": checkpoint.fingerprint(), "version": 1}
    assert reader.fields["general.architecture"].contents() == "sensenova_u15"
    assert theirs[LAYER].tensor_type.name == preset.upper()
    assert theirs[SHORT].tensor_type.name == "F16"
    assert theirs[to_published("embed_tokens.weight")].tensor_type.name == "F16"
    for plain in ("und_norm.weight", "gen_patch.patch.weight", "timestep_embedder.linear1.weight"):
        assert theirs[to_published(plain)].tensor_type.name == "F32"


@pytest.mark.parametrize("preset", ["q8_0", "f16"])
@pytest.mark.parametrize("kind", ["dense", "sparse", "bias", "tied"])
def test_written_read_and_written_again_it_is_the_same_file(
    tmp_path: Path, kind: str, preset: str
) -> None:
    config = CONFIGS[kind]
    first = CheckpointFolder.open(write_checkpoint(tmp_path / "m", config, random_weights(config)))
    files = []
    for name in ("one", "two"):
        folder = save_gguf(first, tmp_path / name, preset)
        files.append((folder / f"model-{preset.upper()}.gguf").read_bytes())
        first = CheckpointFolder.open(folder)
    assert files[0] == files[1]


def test_it_is_as_near_as_its_bits_allow(checkpoint: CheckpointFolder, tmp_path: Path) -> None:
    stored = checkpoint.tensor(LAYER)
    errors = []
    for preset in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0"):
        model = load_model(save_gguf(checkpoint, tmp_path / preset, preset), dtype="float32")
        decoded = model.get_parameter("layers.1.gen.out.mlp.gate_proj.weight")
        errors.append(float((decoded - stored).norm() / stored.norm()))
    assert errors == sorted(errors)
    assert errors[0] < 0.01 < errors[-1] < 0.15


def test_loras_are_merged(checkpoint: CheckpointFolder, tmp_path: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    save_file(lora_tensors(SMALL, [LAYER.removesuffix(".weight")]), lora)
    folder = save_gguf(checkpoint, tmp_path / "out", "q8_0", lora=(lora, 0.5))
    ours = "layers.1.gen.out.mlp.gate_proj.weight"
    merged = load_model(checkpoint, dtype="float32", lora=(lora, 0.5)).get_parameter(ours)
    encode, decode = BLOCK_FORMATS["Q8_0"].encode, BLOCK_FORMATS["Q8_0"].decode
    assert encode is not None
    expected = decode(encode(merged.view(-1, 32))).view(merged.shape)
    actual = load_model(folder, dtype="float32").get_parameter(ours)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "size"), [(LAYER, 1e8), (SHORT, 1e5)])
def test_what_does_not_fit_is_an_error(tmp_path: Path, name: str, size: float) -> None:
    weights = random_weights(SMALL)
    weights[name] *= size
    checkpoint = CheckpointFolder.open(write_checkpoint(tmp_path / "m", SMALL, weights))
    with pytest.raises(CheckpointError, match=r"cannot be written: .* does not fit float16"):
        save_gguf(checkpoint, tmp_path / "out", "q8_0")
    assert not (tmp_path / "out").exists()


def test_unknown_formats_and_full_folders(checkpoint: CheckpointFolder, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="'q6_k' is no GGUF format written here; known: f16"):
        save_gguf(checkpoint, tmp_path / "out", "q6_k")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("x")
    with pytest.raises(CheckpointError, match="is not empty"):
        save_gguf(checkpoint, tmp_path / "out", "q8_0")
    assert save_gguf(checkpoint, tmp_path / "out", "q8_0", overwrite=True).is_dir()
    assert not (tmp_path / "out" / "x").exists()


def test_large_weights_are_written_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SMALL.replace(gen_mlp=MlpConfig(width=96))
    source = CheckpointFolder.open(write_checkpoint(tmp_path / "m", config, random_weights(config)))
    whole = save_gguf(source, tmp_path / "whole", "q5_1")
    monkeypatch.setattr("neounify.checkpoint.gguf_save.CHUNK_ELEMENTS", 1024)
    pieces = save_gguf(source, tmp_path / "pieces", "q5_1")
    file = "model-Q5_1.gguf"
    assert (whole / file).read_bytes() == (pieces / file).read_bytes()
    assert MappedFile(pieces / file).tensors[LAYER].format == "Q5_1"
