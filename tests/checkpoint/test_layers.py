"""memory="layers": the same bits, what is in memory when, and nothing left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from neounify.checkpoint.layers import LayerResidency
from neounify.checkpoint.names import layer_of
from neounify.errors import CheckpointError, RequestError
from neounify.model import NeoUnify
from neounify.pipeline import Pipeline, load
from neounify.text import byte_tokenizer
from support.checkpoint_folders import SMALL, random_weights, write_checkpoint
from support.lora_files import lora_tensors

pytestmark = pytest.mark.filterwarnings("ignore::neounify.errors.SizeWarning")

LORA_TARGETS = [
    "language_model.model.layers.0.self_attn.q_proj_mot_gen",
    "language_model.model.layers.2.mlp.down_proj",
]
LAYERS = 5
DEEP = SMALL.replace(num_layers=LAYERS, vocab_size=512)


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A small float32 checkpoint of five layers, with a tokenizer."""
    weights = {name: 0.1 * tensor for name, tensor in random_weights(DEEP).items()}
    folder = write_checkpoint(tmp_path / "deep", DEEP, weights)
    byte_tokenizer().save(folder)
    return folder


def paint(pipe: Pipeline, **options: object) -> Tensor:
    side = 2 * pipe.config.token_size
    result = pipe.generate("a boat", width=side, height=side, steps=3, guidance=2.0, **options)  # type: ignore[arg-type]
    assert bool(result.pixels.isfinite().all())
    return result.pixels


def layer_values(model: NeoUnify) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if layer_of(name) is not None)


def by_layers(folder: Path, resident: int | None = 0, **options: object) -> Pipeline:
    return load(folder, memory="layers", resident_layers=resident, **options)  # type: ignore[arg-type]


# --- the same bits ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_mode_computes_the_same_bits(deep: Path, dtype: str) -> None:
    expected = paint(load(deep, dtype=dtype, memory="all"))
    assert torch.equal(paint(load(deep, dtype=dtype, memory="stream")), expected)
    for resident in range(LAYERS + 1):
        pipe = by_layers(deep, resident, dtype=dtype)
        assert isinstance(pipe.residency, LayerResidency)
        assert torch.equal(paint(pipe), expected), resident


def test_text_and_loras_are_the_same_too(deep: Path, tmp_path: Path) -> None:
    save_file(lora_tensors(DEEP, LORA_TARGETS), tmp_path / "lora.safetensors")
    options = {"dtype": "float32", "lora": tmp_path / "lora.safetensors"}
    plain, layers = load(deep, memory="all", **options), by_layers(deep, 2, **options)  # type: ignore[arg-type]
    assert torch.equal(paint(layers), paint(plain))
    answers = {pipe.chat("what is it?", max_new_tokens=8).token_ids for pipe in (plain, layers)}
    assert len(answers) == 1


def test_a_step_cache_leaves_layers_out(deep: Path) -> None:
    options = {"step_cache": 1.0, "step_cache_warm": 1}
    expected = paint(load(deep, dtype="float32", memory="all"), **options)
    assert torch.equal(paint(by_layers(deep, 1, dtype="float32"), **options), expected)


# --- what is in memory ---


def test_rebuilt_layers_are_there_one_at_a_time(deep: Path) -> None:
    pipe = by_layers(deep, 2, dtype="bfloat16")
    whole = layer_values(load(deep, dtype="bfloat16", memory="all").model)
    per_stream_layer = whole / (2 * LAYERS)
    most = 0

    def watch(*_: object) -> None:
        nonlocal most
        most = max(most, layer_values(pipe.model))

    for layer in pipe.model.layers:
        layer.register_forward_pre_hook(watch)
    paint(pipe)
    assert most == 3 * per_stream_layer
    assert layer_values(pipe.model) == 2 * per_stream_layer


def test_layers_that_stay_lie_spread_evenly(deep: Path) -> None:
    pipe = by_layers(deep, 2, dtype="bfloat16")
    with pipe.residency.use("gen"):
        kept = {layer_of(n) for n, p in pipe.model.named_parameters() if p.numel()}
    assert kept == {None, (2, "gen"), (4, "gen")}


def test_an_error_in_a_layer_leaves_nothing(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = by_layers(deep, 0, dtype="bfloat16")
    expected = paint(pipe)

    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(pipe.model.get_submodule("layers.2.gen.out"), "forward", fail)
        with pytest.raises(RuntimeError, match="broken"):
            paint(pipe)
    assert layer_values(pipe.model) == 0
    assert torch.equal(paint(pipe), expected)


def test_a_file_that_is_cut_off_is_one_error(deep: Path) -> None:
    for options in ({"dtype": "float32"}, {"dtype": "bfloat16"}):
        folder = deep.with_name(f"cut-{options['dtype']}")
        weights = (deep / "model.safetensors").read_bytes()
        folder.mkdir()
        for file in deep.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        pipe = by_layers(folder, 1, **options)
        paint(pipe)
        os.truncate(folder / "model.safetensors", len(weights) // 2)
        with pytest.raises(CheckpointError, match="was cut off while it was in use"):
            paint(pipe)


@pytest.mark.parametrize("count", [-1, LAYERS + 1])
def test_numbers_of_layers_are_checked(deep: Path, count: int) -> None:
    with pytest.raises(RequestError, match="resident_layers must be from 0 to 5"):
        by_layers(deep, count)


def test_as_many_layers_stay_as_fit(deep: Path) -> None:
    pipe = by_layers(deep, None)
    assert isinstance(pipe.residency, LayerResidency)
    assert pipe.residency.resident == {"und": LAYERS, "gen": LAYERS}
