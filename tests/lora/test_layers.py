"""Adapters on a model: nothing at first, the formula, gradients, and merging."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from neounify.checkpoint import load_checkpoint, load_model, save_model
from neounify.errors import CheckpointError
from neounify.lora import (
    LoraConfig,
    LoraLinear,
    add_lora,
    load_lora,
    lora_layers,
    merge_lora,
    merged_lora,
    save_lora,
    trainable_only_lora,
)
from neounify.model.stream import Experts
from support.adapted import MODULES, adapted, everywhere, fill, outputs, write_base
from support.checkpoint_folders import CONFIGS, SMALL
from support.models import one_thread, random_model  # noqa: F401

KINDS = list(MODULES)


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_adapters_change_no_bit(kind: str) -> None:
    model = random_model(CONFIGS[kind], 0)
    before = outputs(model)
    names = add_lora(model, everywhere(kind, dropout=0.5))
    linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert set(names) == linear == lora_layers(model).keys()
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), before, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_the_same_as_not(kind: str) -> None:
    model = adapted(kind)
    plain = outputs(random_model(CONFIGS[kind], 0))
    before = outputs(model)
    merge_lora(model)
    assert model.state_dict().keys() == random_model(CONFIGS[kind], 0).state_dict().keys()
    assert not any(p.requires_grad for n, p in model.named_parameters() if "_proj.weight" in n)
    for merged, adapters, without in zip(outputs(model), before, plain, strict=True):
        torch.testing.assert_close(merged, adapters, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(merged, without, rtol=1e-2, atol=1e-2)


def test_a_layer_computes_the_formula() -> None:
    layer = LoraLinear(nn.Linear(6, 4), LoraConfig(rank=4, alpha=6.0, rslora=True, dropout=0.5))
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 6)
    delta = x @ layer.lora_A.T @ layer.lora_B.T * (6.0 / 4**0.5)
    wanted = x @ layer.weight.T + layer.bias + delta
    torch.testing.assert_close(layer.eval()(x), wanted)
    torch.testing.assert_close(layer.merged()(x), wanted)
    assert not torch.allclose(layer.train()(x), wanted)
    assert "rank=4" in repr(layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    layer = LoraLinear(nn.Linear(6, 4).to(dtype), LoraConfig(rank=2)).eval()
    nn.init.normal_(layer.lora_B)
    assert layer.lora_A.dtype == torch.promote_types(dtype, torch.float32)
    merged = layer.merged()
    assert merged.weight.dtype == layer(torch.ones(1, 6, dtype=dtype)).dtype == dtype
    exact = layer.weight.double() + layer.scale * layer.lora_B.double() @ layer.lora_A.double()
    torch.testing.assert_close(merged.weight, exact.to(dtype))


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_gradients_reach_the_adapters_only(kind: str) -> None:
    model = adapted(kind)
    logits, clean = outputs(model)
    (logits.square().mean() + clean.square().mean()).backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    adapters = {f"{n}.{half}" for n in lora_layers(model) for half in ("lora_A", "lora_B")}
    assert with_gradient <= adapters
    # An expert that no token was sent to has none.
    assert all(".experts." in name for name in adapters - with_gradient)


def test_more_can_be_unfrozen_and_frozen_again() -> None:
    model = adapted()
    norm = model.und_norm.weight.requires_grad_(True)
    trainable_only_lora(model)
    assert not norm.requires_grad
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(lora_layers(model))


def test_an_adapted_model_is_saved_merged_or_not_at_all(tmp_path: Path) -> None:
    model = adapted("sparse")
    with pytest.raises(CheckpointError, match="lora_A"):
        save_model(model, tmp_path / "unmerged")
    assert not (tmp_path / "unmerged").exists()
    before = copy.deepcopy(model.state_dict())
    with merged_lora(model) as merged:
        save_model(merged, tmp_path / "merged")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in after)
    merge_lora(model)
    stored = load_model(tmp_path / "merged").state_dict()
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())


def test_the_adapters_return_in_the_mode_of_the_model() -> None:
    model = adapted()
    with merged_lora(model):
        model.train()
    assert all(layer.training for layer in lora_layers(model).values())


COMPILED = """
import torch
from support.checkpoint_folders import SMALL
from support.adapted import adapted, everywhere, fill, outputs
from support.models import random_model
from neounify.lora import add_lora
from neounify.model import build as ours

real = torch.compile
torch.compile = lambda f, dynamic: real(f, dynamic=dynamic, backend="eager")
ours.MIN_ROWS = 1
wanted = outputs(adapted())
before, after = adapted(), random_model(SMALL, 0)
ours.compile_streams(before)
ours.compile_streams(after)
add_lora(after, everywhere())
fill(after)
for model in (before, after):
    for actual, expected in zip(outputs(model), wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
"""


def test_compiled_streams() -> None:
    """Adapters may come before or after; no kernel is built here, the graphs are what counts."""
    # In a separate process: the shape checks of the tests cannot be compiled.
    ran = subprocess.run(
        [sys.executable, "-c", COMPILED],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_memory_by_stream(tmp_path: Path, dtype: str) -> None:
    """Streamed base weights come and go under adapters; rebuilt ones cannot be merged into."""
    base = write_base(tmp_path / "base", SMALL)
    loaded = load_checkpoint(base, dtype=dtype, memory="stream")
    add_lora(loaded.model, everywhere())
    fill(loaded.model)
    x = torch.randn(3, 32, dtype=getattr(torch, dtype))
    wanted = adapted().to(x.dtype)
    name = "layers.0.{}.qkv.q_proj"
    for stream in ("und", "gen", "und"):
        with loaded.residency.use(stream):
            actual = loaded.model.get_submodule(name.format(stream))(x)
        torch.testing.assert_close(actual, wanted.get_submodule(name.format(stream))(x))
    if dtype == "float32":
        merge_lora(loaded.model)
        with loaded.residency.use("gen"), loaded.residency.use("und"):
            merged = loaded.model.get_submodule("layers.0.und.qkv.q_proj")(x)
        torch.testing.assert_close(merged, wanted.get_submodule("layers.0.und.qkv.q_proj")(x))
    else:
        with pytest.raises(CheckpointError, match="not in memory"):
            merge_lora(loaded.model)
        assert lora_layers(loaded.model)


@pytest.mark.parametrize("modules", [("gate_proj", "up_proj", "down_proj"), ("q_proj",)])
def test_adapters_on_a_model_with_joined_experts(tmp_path: Path, modules: tuple[str, ...]) -> None:
    """They are those of single experts; experts without stay joined, and files do not differ."""
    each, joined = (random_model(CONFIGS["sparse"], 0) for _ in range(2))
    joined.stack_experts()
    config = LoraConfig(rank=2, modules=modules)
    assert add_lora(each, config) == add_lora(joined, config)
    alone = any(".experts." in name for name in lora_layers(joined))
    assert alone == any(isinstance(mlp.experts, Experts) for mlp in joined.sparse_mlps)
    for model in (each, joined):
        for number, layer in enumerate(lora_layers(model).values()):
            nn.init.constant_(layer.lora_B, 0.01 * (number + 1))
    for wanted, actual in zip(outputs(each), outputs(joined), strict=True):
        torch.testing.assert_close(actual, wanted)
    for model, folder in ((each, "each"), (joined, "joined")):
        save_lora(model, config, tmp_path / f"{folder}-lora")
        load_lora(random_model(CONFIGS["sparse"], 0), tmp_path / f"{folder}-lora")
        merge_lora(model)
        save_model(model, tmp_path / folder)
    for file in ("-lora/adapter_model.safetensors", "/model.safetensors"):
        assert (tmp_path / f"each{file}").read_bytes() == (tmp_path / f"joined{file}").read_bytes()
