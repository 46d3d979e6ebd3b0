"""Saving: load → save → load is the identity, and a failed save leaves everything as it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from neounify.checkpoint import (
    CheckpointFolder,
    load_checkpoint,
    load_model,
    save,
    save_model,
)
from neounify.config import ModelConfig
from neounify.errors import CheckpointError, RequestError
from neounify.model import NeoUnify
from support.checkpoint_folders import SMALL, random_weights, write_checkpoint
from support.golden import needs_golden

INDEX = "model.safetensors.index.json"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read_json(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(path.read_text())
    return document


def assert_same(first: NeoUnify, second: NeoUnify) -> None:
    assert first.config == second.config
    a, b = first.state_dict(), second.state_dict()
    assert list(a) == list(b)
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_load_save_load_is_the_identity(
    any_config: ModelConfig, tmp_path: Path, max_shard_bytes: int, dtype: torch.dtype
) -> None:
    folder = write_checkpoint(tmp_path / "a", any_config, random_weights(any_config, dtype))
    model = load_model(folder, dtype="stored")
    saved = save_model(model, tmp_path / "b", max_shard_bytes=max_shard_bytes)
    assert saved == tmp_path / "b"
    assert_same(model, load_model(saved, dtype="stored"))
    stored, again = CheckpointFolder.open(folder), CheckpointFolder.open(saved)
    assert stored.tensors.keys() == again.tensors.keys()
    assert ("model.safetensors" in names(saved)) == (max_shard_bytes == 10**9)


@needs_golden
@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe", "tiny-pixelhead"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 2 * 10**7])
def test_published_checkpoints_come_back_as_they_were(
    golden_checkpoint: Callable[[str], Path], tmp_path: Path, name: str, max_shard_bytes: int
) -> None:
    folder = golden_checkpoint(name)
    model = load_model(folder, dtype="stored")
    saved = save_model(model, tmp_path / "saved", max_shard_bytes=max_shard_bytes)
    assert_same(model, load_model(saved, dtype="stored"))
    assert read_json(saved / "config.json") == read_json(folder / "config.json")
    assert CheckpointFolder.open(saved).fingerprint() == CheckpointFolder.open(folder).fingerprint()


def test_published_names_and_metadata(small: Path, tmp_path: Path) -> None:
    saved = save_model(load_model(small), tmp_path / "saved")
    assert names(saved) == ["config.json", "model.safetensors"]
    weights = random_weights(SMALL)
    stored = load_file(saved / "model.safetensors")
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name], weights[name]) for name in weights)
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_and_index(small: Path, tmp_path: Path) -> None:
    limit = 20_000
    saved = save_model(load_model(small), tmp_path / "saved", max_shard_bytes=limit)
    index = read_json(saved / INDEX)
    weights = random_weights(SMALL)
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in weights.values())}
    assert index["weight_map"].keys() == weights.keys()
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 3
    assert shards == [
        f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
    ]
    for shard in shards:
        tensors = load_file(saved / shard)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit


def test_files_have_the_users_permissions(small: Path, tmp_path: Path) -> None:
    saved = save_model(load_model(small), tmp_path / "saved")
    (tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in saved.iterdir()} == {
        (tmp_path / "plain").stat().st_mode
    }


def test_the_stored_dtype_follows_the_weights(small: Path, tmp_path: Path) -> None:
    document = read_json(small / "config.json")
    document["torch_dtype"] = "float32"
    document["llm_config"]["torch_dtype"] = "float32"
    document["vision_config"]["dtype"] = "float32"
    (small / "config.json").write_text(json.dumps(document))
    saved = save_model(load_model(small), tmp_path / "same")
    assert read_json(saved / "config.json") == document
    saved = save_model(load_model(small, dtype="bfloat16"), tmp_path / "half")
    half = read_json(saved / "config.json")
    assert half["torch_dtype"] == half["llm_config"]["torch_dtype"] == "bfloat16"
    assert half["vision_config"]["dtype"] == "bfloat16"
    assert document["torch_dtype"] == "float32"


def test_a_model_from_random_weights_has_its_dtype(tmp_path: Path) -> None:
    model = NeoUnify(SMALL).to(torch.float16)
    document = read_json(save_model(model, tmp_path / "new") / "config.json")
    assert document["torch_dtype"] == "float16"
    assert_same(model, load_model(tmp_path / "new", dtype="stored"))


def test_unknown_config_keys_and_a_given_config(small: Path, tmp_path: Path) -> None:
    document = read_json(small / "config.json")
    document["P_mean"] = -0.8
    (small / "config.json").write_text(json.dumps(document))
    model = load_model(small)
    config = model.config.replace(max_positions=128)
    saved = save_model(model, tmp_path / "saved", config=config)
    assert read_json(saved / "config.json")["P_mean"] == -0.8
    assert load_model(saved).config == config


def test_tokenizer_and_extra_files_come_along(small: Path, tmp_path: Path) -> None:
    class Tokenizer:
        def save(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    extra = {"system_message_generation.txt": "Paint."}
    saved = save_model(
        load_model(small), tmp_path / "saved", tokenizer=Tokenizer(), extra_files=extra
    )
    assert names(saved) == [
        "config.json",
        "model.safetensors",
        "system_message_generation.txt",
        "tokenizer.json",
    ]
    assert (saved / "system_message_generation.txt").read_text() == "Paint."


def test_a_folder_with_files_is_not_replaced_unasked(small: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    save_model(load_model(small), target)
    before = names(target)
    with pytest.raises(CheckpointError, match="is not empty; choose another folder"):
        save_model(load_model(small), target)
    with pytest.raises(CheckpointError, match="is a file"):
        save_model(load_model(small), target / "config.json")
    assert names(target) == before
    assert names(tmp_path) == ["small", "target"]


def test_a_model_can_overwrite_the_folder_it_is_mapped_from(small: Path, tmp_path: Path) -> None:
    model = load_model(small)
    model.embed_tokens.weight.mul_(2)
    (small / "note.txt").write_text("gone after the overwrite")
    save_model(model, small, overwrite=True)
    assert names(small) == ["config.json", "model.safetensors"]
    assert names(tmp_path) == ["small"]
    assert_same(model, load_model(small))
    expected = 2 * random_weights(SMALL)["language_model.model.embed_tokens.weight"]
    assert torch.equal(load_model(small).embed_tokens.weight, expected)


@pytest.mark.parametrize(
    "error", [SafetensorError("I/O error: No space left on device"), OSError(28, "No space left")]
)
def test_a_full_disk_leaves_the_old_checkpoint(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    model = load_model(small, dtype="bfloat16")
    before = {path.name: path.read_bytes() for path in small.iterdir()}
    written = []

    def fail_at_the_third(tensors: Any, path: Path, metadata: Any) -> None:
        written.append(path)
        if len(written) == 3:
            raise error
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(save, "save_file", fail_at_the_third)
    with pytest.raises(CheckpointError, match=r"could not be saved: .*No space left"):
        save_model(model, small, max_shard_bytes=20_000, overwrite=True)
    assert len(written) == 3
    assert {path.name: path.read_bytes() for path in small.iterdir()} == before
    assert names(tmp_path) == ["small"]


def test_an_interrupted_swap_puts_the_old_checkpoint_back(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system cannot exchange two folders."""
    model = load_model(small)
    before = names(small)
    rename = Path.rename

    def fail_for_the_new(self: Path, target: Path) -> Path:
        if self.suffix == ".saving":
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr("neounify.files._exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save_model(model, small, overwrite=True)
    assert names(small) == before
    assert names(tmp_path) == ["small"]


@pytest.mark.parametrize("extra", ["config.json", "../outside.txt"])
def test_extra_files_that_cannot_be_added(small: Path, tmp_path: Path, extra: str) -> None:
    with pytest.raises(CheckpointError, match=extra):
        save_model(load_model(small), tmp_path / "saved", extra_files={extra: ""})
    assert names(tmp_path) == ["small"]


def test_weights_that_are_not_in_memory_are_not_saved(small: Path, tmp_path: Path) -> None:
    model, residency, *_ = load_checkpoint(small, dtype="bfloat16", memory="stream")
    with pytest.raises(CheckpointError, match="weights are not in memory"):
        save_model(model, tmp_path / "saved")
    with residency.use("und"), residency.use("gen"):
        save_model(model, tmp_path / "saved")
        assert_same(model, load_model(tmp_path / "saved", dtype="stored"))
    with torch.device("meta"):
        empty = NeoUnify(SMALL)
    with pytest.raises(CheckpointError, match="weights are not in memory"):
        save_model(empty, tmp_path / "meta")


def test_a_config_of_another_size(small: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not as the config says, embed_tokens"):
        save_model(load_model(small), tmp_path / "x", config=SMALL.replace(vocab_size=97))


def test_shard_size_must_be_positive(small: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="at least 1, got 0"):
        save_model(load_model(small), tmp_path / "x", max_shard_bytes=0)
