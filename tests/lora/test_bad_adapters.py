"""Adapters that are damaged, foreign, or more than plain LoRA: each refused with its reason."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from neounify.checkpoint import load_model
from neounify.checkpoint.lora_file import MAX_RANK
from neounify.errors import CheckpointError, ConfigError
from neounify.lora import load_lora, lora_layers, save_lora
from support.adapted import adapted, everywhere, write_base
from support.checkpoint_folders import SMALL
from support.models import one_thread, random_model  # noqa: F401

Q = "language_model.model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q}"
PATCH = "vision_model.embeddings.patch_embedding"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The adapter of `adapted()`."""
    save_lora(adapted(), everywhere(), tmp_path / "adapter", "some/base")
    return tmp_path / "adapter"


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def read_both_ways(folder: Path, tmp_path: Path) -> list[str]:
    """The errors of training on an adapter and of merging it, the model untouched by both."""
    model = random_model(SMALL, 0)
    with pytest.raises(CheckpointError) as trained:
        load_lora(model, folder)
    assert not lora_layers(model)
    with pytest.raises(CheckpointError) as merged:
        load_model(write_base(tmp_path / "base", SMALL), lora=folder)
    return [str(trained.value), str(merged.value)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "only plain LoRA can be used, this has peft_type 'IA3'"),
        ({"use_dora": True}, "this has use_dora"),
        (
            {"rank_pattern": {"q_proj": 8}},
            "self_attn.q_proj has rank 3, adapter_config.json says 8",
        ),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern of 'q_proj' is 0, expected a whole"),
        ({"rank_pattern": [1]}, "rank_pattern is [1], expected an object"),
        ({"alpha_pattern": {"q_proj": "big"}}, "q_proj is 'big', expected a number"),
        ({"alpha_pattern": {"(a+)+b": 1}}, "'(a+)+b' is too complex to be matched safely"),
        ({"alpha_pattern": {"(a": 1}}, "the pattern '(a' is wrong"),
        ({"alpha_pattern": {f"[{n}]": 1 for n in range(200)}}, "200 regular expressions, at most"),
        ({"kasa_config": {"a": 1}, "bias": "all"}, "this has kasa_config, bias 'all'"),
        ({"modules_to_save": ["norm"]}, "this has modules_to_save"),
        ({"use_something_new": True}, "this has use_something_new"),
        ({"init_lora_weights": "pissa"}, "this has init_lora_weights 'pissa'"),
        ({"lora_alpha": "big"}, "lora_alpha is 'big', expected a number"),
        ({"lora_alpha": float("nan")}, "NaN or infinite"),
        ({"lora_alpha": 10**400}, "expected a number"),
        ({"r": 2.5}, "r is 2.5, expected a whole number"),
        ({"r": None}, "r is None, expected a number"),
        ({"r": 4}, "has rank 3, adapter_config.json says 4"),
        ({"lora_dropout": 2}, "lora_dropout is 2, expected"),
        ({"use_rslora": "false"}, "use_rslora is 'false', expected true"),
    ],
)
def test_wrong_configs(folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    change_config(folder, **changes)
    assert all(message in error for error in read_both_ways(folder, tmp_path))


def test_an_adapter_that_only_trains_differently_is_read(folder: Path) -> None:
    change_config(folder, init_lora_weights="eva", eva_config={"rho": 2.0}, exclude_modules=["x"])
    assert load_lora(random_model(SMALL, 0), folder).rank == 3


def put(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({key: tensor})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(f"{KEY}.lora_B.weight"), f"{Q} has no lora_B.weight"),
        (put(f"{KEY}.lora_A.weight", torch.zeros(3, 33)), "cannot take lora_A [3, 33] and lora_B"),
        (put(f"{KEY}.lora_A.weight", torch.zeros(0, 32)), "cannot take lora_A [0, 32]"),
        (put(f"{KEY}.lora_A.weight", torch.zeros(())), "cannot take lora_A []"),
        (put(f"{KEY}.lora_A.weight", torch.full((3, 32), torch.inf)), f"{Q} holds NaN or infinite"),
        (put(f"{KEY}.lora_A.weight", torch.ones(3, 32, dtype=torch.int64)), "expected floats"),
        (
            put("base_model.model.visual.blocks.0.qkv.lora_A.weight", torch.zeros(3, 32)),
            "visual.blocks.0.qkv is not a weight of this",
        ),
        (put(f"{KEY}.lora_C.weight", torch.zeros(32)), "no part of a LoRA"),
        (
            put(f"{Q}.lora_A.weight", torch.zeros(3, 32)),
            f"stored twice, as {KEY}.lora_A.weight and",
        ),
        (put(f"{KEY}.lora_A.default.weight", torch.zeros(3, 32)), "is stored twice"),
        (dict.clear, "the file holds no tensors"),
    ],
)
def test_wrong_tensors(
    folder: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], object],
    message: str,
) -> None:
    change_tensors(folder, change)
    for error in read_both_ways(folder, tmp_path):
        assert message in error
        assert "problems: 1\n" in error


def test_ranks_are_bounded(folder: Path, tmp_path: Path) -> None:
    rank = MAX_RANK + 1
    change_config(folder, r=rank)
    pair = {
        f"{KEY}.lora_A.weight": torch.zeros(rank, 32),
        f"{KEY}.lora_B.weight": torch.zeros(32, rank),
    }
    save_file(pair, folder / "adapter_model.safetensors")
    assert all("more than the 8192" in error for error in read_both_ways(folder, tmp_path))


def test_an_adapter_of_another_model(tmp_path: Path) -> None:
    save_lora(adapted("sparse"), everywhere("sparse"), tmp_path / "a")
    for error in read_both_ways(tmp_path / "a", tmp_path):
        assert re.search(r"(\d+) of (\d+) modules are not in this model: .*experts", error)
        assert re.search(r" and \d+ more$", error)
        assert "problems: 1\n" in error


def test_convolutions_can_be_merged_but_not_trained(folder: Path, tmp_path: Path) -> None:
    weight = random_model(SMALL, 0).get_parameter("und_patch.patch.weight")
    pair = {"lora_A": torch.randn(3, *weight.shape[1:]), "lora_B": torch.randn(16, 3, 1, 1)}
    tensors = {f"base_model.model.{PATCH}.{half}.weight": t for half, t in pair.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    base = write_base(tmp_path / "base", SMALL)
    delta = pair["lora_B"].flatten(1) @ pair["lora_A"].flatten(1) * 5 / 3
    merged = load_model(base, lora=folder).get_parameter("und_patch.patch.weight")
    torch.testing.assert_close(merged, weight + delta.view(weight.shape), rtol=1e-5, atol=1e-5)
    with pytest.raises(CheckpointError, match=r"patch_embedding\.weight is not linear"):
        load_lora(random_model(SMALL, 0), folder)


def test_an_adapter_needs_a_plain_model(folder: Path) -> None:
    with pytest.raises(ConfigError, match="already"):
        load_lora(adapted(), folder)


def test_an_alpha_that_cannot_be_trained_with(folder: Path) -> None:
    change_config(folder, lora_alpha=-1)
    with pytest.raises(CheckpointError, match="cannot be trained on"):
        load_lora(random_model(SMALL, 0), folder)


def test_missing_and_damaged_files(folder: Path, tmp_path: Path) -> None:
    pickled = tmp_path / "pickled"
    shutil.copytree(folder, pickled)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert all("pickles" in error for error in read_both_ways(pickled, tmp_path))
    (pickled / "adapter_model.bin").unlink()
    assert all("holds no adapter_model" in error for error in read_both_ways(pickled, tmp_path))
    file = folder / "adapter_config.json"
    for text, message in [("{", "not valid JSON"), (" " * 2**21, "larger than"), ("[]", "object")]:
        file.write_text(text)
        assert all(message in error for error in read_both_ways(folder, tmp_path))
    file.unlink()
    assert all("adapter_config.json is missing" in e for e in read_both_ways(folder, tmp_path))
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert all("not a whole safetensors" in e for e in read_both_ways(folder, tmp_path))
    gone = tmp_path / "gone"
    assert all("cannot be read" in error for error in read_both_ways(gone, tmp_path))
