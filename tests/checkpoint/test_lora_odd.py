"""LoRA files and folders that are odd or hostile: merged, or refused in one error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from neounify.checkpoint import load_model
from neounify.checkpoint.load import resolve_device
from neounify.checkpoint.reader import CheckpointFolder
from neounify.errors import CheckpointError, NeounifyError, RequestError
from support.checkpoint_folders import SMALL, random_weights, write_checkpoint

TARGET = "language_model.model.layers.1.self_attn.q_proj"
OURS = "layers.1.und.qkv.q_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "model", SMALL, random_weights(SMALL))


def matrices(template: str = "lora_{}.weight", **others: Tensor) -> dict[str, Tensor]:
    out, size_in = random_weights(SMALL)[f"{TARGET}.weight"].shape
    generator = torch.Generator().manual_seed(1)
    down = torch.randn(2, size_in, generator=generator)
    up = torch.randn(out, 2, generator=generator)
    tensors = {f"{TARGET}.{template.format('A')}": down, f"{TARGET}.{template.format('B')}": up}
    return {**tensors, **{f"{TARGET}.{name}": value for name, value in others.items()}}


def merged(folder: Path, lora: Any, **options: Any) -> Tensor:
    """By how much the one target has moved."""
    before = load_model(folder).state_dict()[OURS].clone()
    return load_model(folder, lora=lora, **options).state_dict()[OURS] - before


def assert_merged(moved: Tensor) -> None:
    down, up = matrices().values()
    assert torch.allclose(moved, up @ down, atol=1e-5)


@pytest.mark.parametrize("adapter", ["default", "my-style", "v1 final"])
def test_names_of_adapters_may_be_any(folder: Path, tmp_path: Path, adapter: str) -> None:
    save_file(matrices("lora_{}." + adapter + ".weight"), tmp_path / "x.safetensors")
    assert_merged(merged(folder, tmp_path / "x.safetensors"))


@pytest.mark.parametrize("name", ["pytorch_lora_weights.safetensors", "Style.SAFETENSORS"])
def test_the_only_weight_file_of_a_folder_is_its_lora(
    folder: Path, tmp_path: Path, name: str
) -> None:
    lora = tmp_path / "lora"
    lora.mkdir()
    save_file(matrices(), lora / name)
    (lora / f"._{name}").write_bytes(b"\0\5\x16\7")
    assert_merged(merged(folder, lora))
    save_file(matrices(), lora / "second.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no adapter_model\.safetensors"):
        merged(folder, lora)


def test_weight_files_are_found_in_any_case(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "Weights.SafeTensors")
    assert OURS in load_model(folder).state_dict()
    (folder / "Weights.SafeTensors").rename(folder / "WEIGHTS.BIN")
    with pytest.raises(CheckpointError, match="pickle"):
        CheckpointFolder.open(folder)


@pytest.mark.parametrize("alpha", [1e300, -1e300])
def test_scales_beyond_float32_are_refused(folder: Path, tmp_path: Path, alpha: float) -> None:
    tensors = matrices(alpha=torch.tensor(alpha, dtype=torch.float64))
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="has the scale"):
        merged(folder, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("lora", "strength"),
    [("x", 1e39), ("x", float("nan")), ("x", "much"), (5, 1.0), ([5], 1.0), (("x", "1"), 1.0)],
)
def test_strengths_and_files_of_a_wrong_kind_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: Any, strength: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(matrices(), tmp_path / "x")
    with pytest.raises(NeounifyError):
        merged(folder, lora, lora_strength=strength)


def test_a_strength_times_a_scale_beyond_float32_is_refused(folder: Path, tmp_path: Path) -> None:
    save_file(matrices(alpha=torch.tensor(1e20)), tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="makes the scale"):
        merged(folder, (tmp_path / "x.safetensors", 1e20))


@pytest.mark.parametrize("device", ["meta", "cudaa", "cuda:99", "cpu:x"])
def test_devices_that_hold_no_values_are_refused(device: str) -> None:
    with pytest.raises(RequestError, match="cannot be used here"):
        resolve_device(device)
