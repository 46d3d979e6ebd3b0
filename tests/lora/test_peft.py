"""Adapters in PEFT's format: there and back, merged while loading, saved whole or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from neounify.checkpoint import load_model
from neounify.errors import CheckpointError, ConfigError
from neounify.lora import LoraConfig, add_lora, load_lora, merge_lora, save_lora
from neounify.pipeline import load
from neounify.text import byte_tokenizer
from support.adapted import MODULES, adapted, everywhere, fill, outputs, write_base
from support.checkpoint_folders import CONFIGS, SMALL
from support.models import one_thread, random_model  # noqa: F401

Q = "language_model.model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q}"
BYTES = SMALL.replace(vocab_size=byte_tokenizer().vocab_size)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The adapter of `adapted()`."""
    save_lora(adapted(), everywhere(), tmp_path / "adapter", "some/base")
    return tmp_path / "adapter"


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", list(MODULES))
def test_there_and_back(kind: str, rslora: bool, tmp_path: Path) -> None:
    config = everywhere(kind, rslora=rslora, dropout=0.25)
    model = adapted(kind, config)
    save_lora(model, config, tmp_path / "a")
    again = random_model(CONFIGS[kind], 0)
    loaded = load_lora(again, tmp_path / "a")
    assert (loaded.rank, loaded.alpha, loaded.dropout, loaded.rslora) == (3, 5.0, 0.25, rslora)
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    trained = {n for n, p in again.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(a, b) for a, b in zip(outputs(again), outputs(model), strict=True))
    save_lora(again, loaded, tmp_path / "b")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    merge_lora(model)
    merged = load_model(write_base(tmp_path / "base", CONFIGS[kind]), lora=tmp_path / "a")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore::neounify.errors.SizeWarning")
def test_the_pipeline_generates_the_same(tmp_path: Path) -> None:
    config = LoraConfig(rank=2, streams=("gen",), layers=(1, 2))
    base = write_base(tmp_path / "base", BYTES)
    byte_tokenizer().save(base)
    pipe = load(base)
    plain = pipe.generate("a boat", width=64, height=64, steps=2).pixels
    add_lora(pipe.model, config)
    fill(pipe.model)
    wanted = pipe.generate("a boat", width=64, height=64, steps=2).pixels
    save_lora(pipe.model, config, tmp_path / "adapter")
    for lora in (tmp_path / "adapter", tmp_path / "adapter" / "adapter_model.safetensors"):
        result = load(base, lora=lora).generate("a boat", width=64, height=64, steps=2).pixels
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(result, plain, rtol=1e-2, atol=1e-2)


def test_both_formats_say_the_same(folder: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", SMALL)
    renamed: dict[str, Tensor] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.")
        name = name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        renamed[name] = tensor
        renamed[name.rpartition(".lora_")[0] + ".alpha"] = torch.tensor(5.0)
    save_file(renamed, tmp_path / "published.safetensors")
    ours = load_model(base, lora=(folder, 0.5)).state_dict()
    theirs = load_model(base, lora=(tmp_path / "published.safetensors", 0.5)).state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    both = load_model(base, lora=[folder, tmp_path / "published.safetensors"], lora_strength=0.25)
    for name, tensor in both.state_dict().items():
        torch.testing.assert_close(tensor, ours[name], rtol=1e-5, atol=1e-5)
    with pytest.raises(CheckpointError, match="merged while loading"):
        load_lora(random_model(SMALL, 0), tmp_path / "published.safetensors")


def test_the_files_are_those_of_peft(folder: Path) -> None:
    document = json.loads((folder / "adapter_config.json").read_text())
    assert document["base_model_name_or_path"] == "some/base"
    assert (document["r"], document["lora_alpha"], document["bias"]) == (3, 5, "none")
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors[f"{KEY}.lora_A.weight"].shape == (3, 32)
    assert tensors[f"{KEY}.lora_B.weight"].shape == (32, 3)
    targets = {key.removeprefix("base_model.model.").rpartition(".lora_")[0] for key in tensors}
    assert set(document["target_modules"]) == targets
    assert "fm_modules.fm_head.0" in targets


def test_saving_is_all_or_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "adapter_model.safetensors").read_bytes()

    def full(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("neounify.lora.peft.write_json", full)
        with pytest.raises(CheckpointError, match="disk full"):
            save_lora(adapted(), everywhere(), folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    save_lora(adapted(), everywhere(), folder, "other/base")
    assert "other/base" in (folder / "adapter_config.json").read_text()


def test_what_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no adapters"):
        save_lora(random_model(SMALL, 0), everywhere(), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"rank 3 and scale 1\.6.*, the config says 3 and 2\.8"):
        save_lora(adapted(), everywhere(rslora=True), tmp_path / "a")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not lose")
    with pytest.raises(CheckpointError, match="holds no adapter"):
        save_lora(adapted(), everywhere(), tmp_path / "mine")
    with pytest.raises(CheckpointError, match="is a file"):
        save_lora(adapted(), everywhere(), tmp_path / "mine" / "thesis.txt")
