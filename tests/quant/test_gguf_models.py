"""Models of GGUF files whose linear layers stay codes, mapped."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import linear

import neounify
from neounify.checkpoint import (
    CheckpointFolder,
    load_checkpoint,
    load_model,
    save_model,
    to_published,
)
from neounify.checkpoint.gguf_save import save_gguf
from neounify.cli.toy import toy_pipeline
from neounify.errors import CheckpointError
from neounify.model import NeoUnify
from neounify.quant.linear import QuantLinear
from support.checkpoint_folders import SMALL, random_weights, write_checkpoint
from support.gguf_files import STRING, Stored, gguf_of, value
from support.lora_files import lora_tensors

LINEAR = "layers.1.gen.out.mlp.gate_proj"
NAME = to_published(f"{LINEAR}.weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, its layers in Q5_1."""
    base = tmp_path_factory.mktemp("models")
    plain = write_checkpoint(base / "plain", SMALL, random_weights(SMALL))
    return save_gguf(CheckpointFolder.open(plain), base / "q5_1", "q5_1")


def layer_of(model: NeoUnify) -> QuantLinear:
    layer = model.get_submodule(LINEAR)
    assert isinstance(layer, QuantLinear)
    return layer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_compute_with_mapped_codes(folder: Path, dtype: str) -> None:
    loaded = load_checkpoint(folder, dtype=dtype)
    layer = layer_of(loaded.model)
    info = loaded.checkpoint.tensors[NAME]
    codes = layer.get_parameter("weight")
    assert codes.dtype == torch.uint8
    assert (*codes.shape,) == info.stored_shape == (48, 24)
    assert codes.data_ptr() == loaded.checkpoint.tensor(NAME).data_ptr()
    plain = load_model(folder, dtype=dtype).get_parameter(f"{LINEAR}.weight")
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).to(plain.dtype)
    torch.testing.assert_close(layer(x), linear(x, plain))
    short = loaded.model.get_parameter("layers.1.gen.out.mlp.down_proj.weight")
    assert short.dtype == loaded.dtype.dtype  # rows of 48 values are no whole blocks


@pytest.mark.parametrize("memory", ["all", "stream", "layers"])
def test_tasks_give_what_decoded_weights_give(tmp_path: Path, memory: Any) -> None:
    toy = toy_pipeline(0)
    toy.save(tmp_path / "plain")
    checkpoint = CheckpointFolder.open(tmp_path / "plain")
    home = save_gguf(checkpoint, tmp_path / "q8_0", "q8_0", tokenizer=toy.tokenizer)
    codes = neounify.load(home, dtype="float32", memory=memory)
    decoded = neounify.load(home, dtype="float32", backend="decoded")
    assert any(isinstance(m, QuantLinear) for m in codes.model.modules())
    assert not any(isinstance(m, QuantLinear) for m in decoded.model.modules())
    images = [
        p.generate("a boat", width=64, height=64, steps=2, seed=1).pixels for p in (codes, decoded)
    ]
    torch.testing.assert_close(*images, rtol=0, atol=1e-4)
    assert codes.chat("hi", max_new_tokens=5) == decoded.chat("hi", max_new_tokens=5)
    stories = [
        list(p.interleave("hi", width=64, height=64, steps=1, max_new_tokens=4))
        for p in (codes, decoded)
    ]
    assert [type(part) for part in stories[0]] == [type(part) for part in stories[1]]


def test_loras_stay_beside_the_codes(folder: Path, tmp_path: Path) -> None:
    lora = tmp_path / "lora.safetensors"
    save_file(lora_tensors(SMALL, [NAME.removesuffix(".weight")]), lora)
    layer = layer_of(load_checkpoint(folder, dtype="float32", lora=lora).model)
    merged = load_model(folder, dtype="float32", lora=lora).get_parameter(f"{LINEAR}.weight")
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), linear(x, merged), rtol=1e-4, atol=1e-4)


def _folder_with(path: Path, codes: bytes, kind: int, **fields: Any) -> Path:
    """A model with one layer in these codes."""
    weights = random_weights(SMALL)
    write_checkpoint(path, SMALL, weights)
    (path / "model.safetensors").unlink()
    file = gguf_of({n: w for n, w in weights.items() if n != NAME}, **fields)
    file.tensors.append((NAME, Stored(weights[NAME].shape[::-1], kind, codes)))
    file.write(path / "model.gguf")
    return path


@pytest.mark.parametrize("memory", ["all", "stream"])
def test_scales_that_are_nan_are_seen(tmp_path: Path, memory: str) -> None:
    options: dict[str, Any] = {"dtype": "float32", "memory": memory}
    for bad in (0, 47):
        scales = [float("nan") if block == bad else 0.01 for block in range(48)]
        codes = b"".join(struct.pack("<e", scale) + bytes(32) for scale in scales)
        path = _folder_with(tmp_path / str(bad), codes, 8)
        for verify in (True, False):  # the whole weight is in the first 4 KiB, which are read
            with pytest.raises(CheckpointError, match=r"gate_proj.*holds NaN or infinite values"):
                load_checkpoint(path, verify=verify, **options)


def test_codes_that_are_not_aligned_are_copied(folder: Path, tmp_path: Path) -> None:
    """Operators on codes want them at multiples of 16 bytes, which files need not give."""
    expected = load_checkpoint(folder, dtype="float32")
    codes = expected.checkpoint.tensor(NAME).numpy().tobytes()
    places = set()
    for padding in ("", "12345678"):
        pairs = [("general.alignment", value(4, 8)), ("padding", value(STRING, padding))]
        path = _folder_with(tmp_path / f"m{padding}", codes, 7, pairs=pairs, alignment=8)
        loaded = load_checkpoint(path, dtype="float32")
        places.add(loaded.checkpoint.tensors[NAME].start % 16)
        ours, theirs = (layer_of(m).get_parameter("weight") for m in (loaded.model, expected.model))
        assert torch.equal(ours, theirs)
    assert places == {0, 8}


def test_they_are_saved_only_decoded(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match='load it with backend="decoded" to save it'):
        save_model(load_checkpoint(folder).model, tmp_path / "out")
    save_model(load_model(folder, dtype="float32"), tmp_path / "out")
    assert NAME in load_file(tmp_path / "out" / "model.safetensors")
