"""LoRA files merged into quantised checkpoints, which keep their formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from neounify.checkpoint import CheckpointFolder, load_checkpoint, load_model
from neounify.checkpoint.gguf_save import save_gguf
from neounify.checkpoint.quantise_files import STORED, quantise_checkpoint
from neounify.checkpoint.residency import StoredWeight
from neounify.errors import CheckpointError, RequestError
from neounify.quant.formats import FourBits, Fp8Rows
from neounify.quant.presets import QUANT_PRESETS
from support.checkpoint_folders import CONFIGS, SMALL, random_weights, write_checkpoint
from support.lora_files import lora_tensors

CONFIG = SMALL.replace(num_layers=3)
TARGET = "language_model.model.layers.1.mlp_mot_gen.gate_proj"
OTHER = "language_model.model.layers.1.self_attn.q_proj"
LARGEST = {"int8": 0.02, "int8-all": 0.02, "fp8": 0.04, "w4-mixed": 0.12, "w4": 0.12}
"""Error of the formats on these small random weights, relative to the merged weight."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merging") / "plain"
    return write_checkpoint(folder, CONFIG, random_weights(CONFIG))


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    tensors = {name: 0.6 * t for name, t in lora_tensors(CONFIG, [TARGET, OTHER]).items()}
    save_file(tensors, path)
    return path


def coded_folder(folder: Path, source: Path, preset: str, **options: Any) -> Path:
    return quantise_checkpoint(CheckpointFolder.open(source), folder, preset, **options)


def values(folder: Path, **options: Any) -> dict[str, Tensor]:
    return load_model(folder, dtype="float32", **options).state_dict()


@pytest.mark.parametrize("preset", QUANT_PRESETS)
def test_the_merged_weights_are_within_the_error_of_the_format(
    tmp_path: Path, plain: Path, lora: Path, preset: str
) -> None:
    coded = coded_folder(tmp_path / "coded", plain, preset)
    merged = coded_folder(tmp_path / "merged", coded, STORED, lora=(lora, 0.5))
    wanted, actual = values(coded, lora=(lora, 0.5)), values(merged)
    changed = 0
    for name, before in values(coded).items():
        if torch.equal(before, wanted[name]):
            assert torch.equal(actual[name], before), name
            continue
        changed += 1
        error = float((actual[name] - wanted[name]).norm() / wanted[name].norm())
        assert 0 < error < LARGEST[preset], name
        assert error < float((before - wanted[name]).norm() / wanted[name].norm()) / 2
    assert changed == 2


def test_formats_names_and_all_other_bytes_stay(tmp_path: Path, plain: Path, lora: Path) -> None:
    coded = coded_folder(tmp_path / "coded", plain, "w4-mixed")
    merged = coded_folder(tmp_path / "merged", coded, STORED, lora=lora)
    before, after = (load_file(folder / "model.safetensors") for folder in (coded, merged))
    assert before.keys() == after.keys()
    differing = set()
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape)
        if not torch.equal(
            tensor.view(-1).view(torch.uint8), after[name].view(-1).view(torch.uint8)
        ):
            differing.add(name.rpartition(".")[0])
    assert differing == {TARGET, OTHER}
    entry = json.loads((merged / "config.json").read_text())["neounify"]["quantised"]
    assert entry["preset"] == "w4-mixed"
    assert entry["from"] == CheckpointFolder.open(coded).fingerprint()


@pytest.mark.parametrize("preset", ["int8-all", "fp8", "w4"])
def test_without_a_lora_every_byte_stays(tmp_path: Path, plain: Path, preset: str) -> None:
    coded = coded_folder(tmp_path / "coded", plain, preset)
    again = coded_folder(tmp_path / "again", coded, STORED)
    assert (again / "model.safetensors").read_bytes() == (coded / "model.safetensors").read_bytes()


def test_the_merge_is_that_of_the_decoded_weights_quantised(
    tmp_path: Path, plain: Path, lora: Path
) -> None:
    coded = coded_folder(tmp_path / "coded", plain, "int8")
    merged = coded_folder(tmp_path / "merged", coded, STORED, lora=lora)
    module = "layers.1.gen.out.mlp.gate_proj"
    layer: Any = load_checkpoint(merged, dtype="float32").model.get_submodule(module)
    expected = layer.format.quantise(values(coded, lora=lora)[f"{module}.weight"])
    for name, tensor in layer.tensors().items():
        assert torch.equal(tensor, expected[name])


def test_experts_and_shards(tmp_path: Path) -> None:
    config = CONFIGS["sparse"]
    plain = write_checkpoint(tmp_path / "plain", config, random_weights(config))
    target = "language_model.model.layers.0.mlp_mot_gen.experts.2.up_proj"
    save_file(lora_tensors(config, [target]), tmp_path / "lora.safetensors")
    lora = tmp_path / "lora.safetensors"
    coded = coded_folder(tmp_path / "coded", plain, "int8", max_shard_bytes=20_000)
    merged = coded_folder(tmp_path / "merged", coded, STORED, lora=lora, max_shard_bytes=30_000)
    assert len(list(merged.glob("*.safetensors"))) > 2
    wanted, actual = values(coded, lora=lora), values(merged)
    for name, tensor in wanted.items():
        assert float((actual[name] - tensor).norm()) <= 0.02 * float(tensor.norm()), name


def test_a_lora_is_merged_before_plain_weights_are_quantised(
    tmp_path: Path, plain: Path, lora: Path
) -> None:
    merged = coded_folder(tmp_path / "merged", plain, "int8", lora=lora)
    twice = coded_folder(tmp_path / "twice", plain, "int8")
    twice = coded_folder(tmp_path / "again", twice, STORED, lora=lora)
    wanted = values(plain, lora=lora)
    name = "layers.1.gen.out.mlp.gate_proj.weight"
    errors = [float((values(f)[name] - wanted[name]).norm()) for f in (merged, twice)]
    assert 0 < errors[0] < errors[1]


def test_other_forms_of_files(tmp_path: Path, lora: Path) -> None:
    """fp8 in the older form, with a prefix, beside fp8 without a scale."""
    weights: dict[str, Tensor] = {}
    for name, tensor in random_weights(CONFIG).items():
        module = name.removesuffix(".weight")
        if module == TARGET:
            weights[f"model.diffusion_model.{name}"] = (tensor / 0.01).to(torch.float8_e4m3fn)
            weights[f"model.diffusion_model.{module}.scale_weight"] = torch.tensor(0.01)
        else:
            plain = tensor.to(torch.float8_e4m3fn) if module == OTHER else tensor
            weights[f"model.diffusion_model.{name}"] = plain
    weights["model.diffusion_model.scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    coded = write_checkpoint(tmp_path / "coded", CONFIG, weights)
    again = coded_folder(tmp_path / "again", coded, STORED)
    for name, tensor in values(coded).items():
        assert torch.equal(values(again)[name], tensor), name
    assert f"{TARGET}.weight_scale" in load_file(again / "model.safetensors")
    merged = coded_folder(tmp_path / "merged", coded, STORED, lora=lora)
    quantised = CheckpointFolder.open(merged).quantised
    assert {name: type(codes.format) for name, codes in quantised.items()} == {
        f"{TARGET}.weight": Fp8Rows,
        f"{OTHER}.weight": Fp8Rows,
    }
    wanted, actual = values(coded, lora=lora), values(merged)
    for name, tensor in wanted.items():
        assert float((actual[name] - tensor).norm()) <= 0.04 * float(tensor.norm()), name
    entry = json.loads((merged / "config.json").read_text())["neounify"]["quantised"]
    assert entry["preset"] == STORED


def test_levels_are_fitted_where_there_were_none(tmp_path: Path, plain: Path, lora: Path) -> None:
    coded = coded_folder(tmp_path / "coded", plain, "w4")
    tensors = load_file(coded / "model.safetensors")
    tensors = {name: t for name, t in tensors.items() if not name.endswith("_codebook")}
    save_file(tensors, coded / "model.safetensors")
    merged = coded_folder(tmp_path / "merged", coded, STORED, lora=lora)
    for name, codes in CheckpointFolder.open(merged).quantised.items():
        assert isinstance(codes.format, FourBits)
        assert codes.format.codebook == (name in (f"{TARGET}.weight", f"{OTHER}.weight"))


def test_memory_holds_some_rows_of_a_weight(
    tmp_path: Path, plain: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    coded = coded_folder(tmp_path / "coded", plain, "int8")
    quantised = {name.removesuffix(".weight") for name in CheckpointFolder.open(coded).quantised}
    read, sizes = StoredWeight.read, dict.fromkeys([TARGET, OTHER], 0)

    def watch(self: StoredWeight, dtype: torch.dtype, device: torch.device) -> Tensor:
        rows = read(self, dtype, device)
        module = self.name.removesuffix(".weight")
        if module in quantised:
            sizes[module] = max(sizes[module], rows.numel())
        return rows

    monkeypatch.setattr(StoredWeight, "read", watch)
    monkeypatch.setattr("neounify.quant.formats.SLICE_ELEMENTS", 256)
    coded_folder(tmp_path / "merged", coded, STORED, lora=lora)
    assert sizes == {TARGET: 256, OTHER: 256}


def test_what_is_refused(tmp_path: Path, plain: Path, lora: Path) -> None:
    with pytest.raises(RequestError, match="plain holds no quantised weights that 'stored' could"):
        coded_folder(tmp_path / "x", plain, STORED, lora=lora)
    gguf = save_gguf(CheckpointFolder.open(plain), tmp_path / "q8", "q8_0")
    with pytest.raises(RequestError, match=r"q8 is a GGUF file, .* name one, such as q8_0"):
        coded_folder(tmp_path / "x", gguf, STORED, lora=lora)
    coded = coded_folder(tmp_path / "coded", plain, "int8")
    with pytest.raises(RequestError, match="coded is quantised already"):
        coded_folder(tmp_path / "x", coded, "int8", lora=lora)
    assert not (tmp_path / "x").exists()


def test_codes_that_are_damaged_are_not_copied(tmp_path: Path, plain: Path) -> None:
    for preset, part in (("fp8", "weight"), ("w4", "weight_s_rel")):
        coded = coded_folder(tmp_path / preset, plain, preset)
        tensors = load_file(coded / "model.safetensors")
        tensors[f"{TARGET}.{part}"].view(torch.uint8)[0, 0] = 0x7F
        save_file(tensors, coded / "model.safetensors")
        with pytest.raises(CheckpointError, match=rf"{TARGET}.{part}' holds NaN"):
            coded_folder(tmp_path / "x", coded, STORED)
