"""The second family with codes, GGUF files, layers one by one, adapters beside, and bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

import neounify
from neounify.checkpoint import CheckpointFolder
from neounify.checkpoint.gguf_save import save_gguf
from neounify.checkpoint.quantised_layers import quant_modules
from neounify.lora import LoraConfig, add_lora, save_lora
from neounify.tasks.clips import Frames
from neounify.tasks.video import in_tubes
from support.adapted import fill
from support.pixelumm import saved


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("forms") / "model")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> neounify.Pipeline:
    return neounify.load(folder)


@pytest.fixture(scope="module")
def lora(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    adapted = with_adapters(folder)
    path = tmp_path_factory.mktemp("lora") / "adapter.safetensors"
    save_lora(adapted.model, LoraConfig(rank=2, alpha=4), path, form="published")
    return path


def with_adapters(folder: Path) -> neounify.Pipeline:
    """A plain model with filled adapters beside its linear layers."""
    pipe = neounify.load(folder)
    pipe.model.requires_grad_(True)
    add_lora(pipe.model, LoraConfig(rank=2, alpha=4), 0)
    fill(pipe.model)
    pipe.model.requires_grad_(False)
    return pipe


def clip(pipe: neounify.Pipeline, seed: int = 3) -> Tensor:
    """Levels of a clip of two tubes [8, 48, 64, 3]."""
    (video,) = pipe.generate("a fox", frames=8, seed=seed).videos
    return video.frames.int()


def answers(pipe: neounify.Pipeline) -> Tensor:
    """Log-probabilities of the tokens of answers about a clip, seen as frames and in tubes."""
    numbers = np.random.default_rng(0)
    images = [
        PIL.Image.fromarray(numbers.integers(0, 256, (48, 64, 3), dtype=np.uint8)) for _ in range(5)
    ]
    times = [number / 4 for number in range(5)]
    values: list[float] = []
    for shown in (Frames(images, times), in_tubes(pipe.config, images, times)):
        answer = pipe.chat("What moves?", video=shown, max_new_tokens=3, logprobs=0)
        values += [token.chosen for token in answer.logprobs]
    return torch.tensor(values)


def assert_same(one: neounify.Pipeline, other: neounify.Pipeline) -> None:
    """Clips and answers agree, but for the order of sums."""
    assert (clip(one) - clip(other)).abs().max() <= 1
    torch.testing.assert_close(answers(one), answers(other), rtol=1e-3, atol=1e-3)


def assert_differs(one: neounify.Pipeline, other: neounify.Pipeline) -> None:
    assert (clip(one) - clip(other)).abs().max() > 1
    assert (answers(one) - answers(other)).abs().max() > 1e-3


@pytest.mark.parametrize("preset", ["int8", "fp8", "w4"])
def test_codes_compute_as_the_weights_that_they_are_decoded_to(
    folder: Path, pipe: neounify.Pipeline, tmp_path: Path, preset: str
) -> None:
    coded = neounify.load(folder, dtype="float32", quantise=preset, backend="reference")
    coded.save(tmp_path / preset)
    decoded = neounify.load(tmp_path / preset, dtype="float32", backend="decoded")
    assert quant_modules(coded.model)
    assert not quant_modules(decoded.model)
    assert_same(coded, decoded)
    assert_differs(coded, pipe)


def test_gguf_files_hold_the_model(folder: Path, pipe: neounify.Pipeline, tmp_path: Path) -> None:
    """In blocks as the weights that they are decoded to, in halves as the model itself."""
    checkpoint = CheckpointFolder.open(folder)
    for preset in ("q8_0", "f16"):
        save_gguf(checkpoint, tmp_path / preset, preset, tokenizer=pipe.tokenizer)
    coded = neounify.load(tmp_path / "q8_0", dtype="float32")
    assert quant_modules(coded.model)
    assert coded.config == pipe.config
    assert_same(coded, neounify.load(tmp_path / "q8_0", dtype="float32", backend="decoded"))
    assert_differs(coded, pipe)
    halves = neounify.load(tmp_path / "f16", dtype="float32")
    assert (clip(halves) - clip(pipe)).float().abs().mean() < 0.5
    torch.testing.assert_close(answers(halves), answers(pipe), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("memory", ["stream", "layers"])
def test_memory_modes_change_no_clip_and_no_answer(
    folder: Path, pipe: neounify.Pipeline, memory: Any
) -> None:
    other = neounify.load(folder, memory=memory, plan="ignore")
    assert torch.equal(clip(other), clip(pipe))
    assert torch.equal(answers(other), answers(pipe))


def test_adapters_beside_plain_modules_are_the_merged_ones(
    folder: Path, pipe: neounify.Pipeline, lora: Path
) -> None:
    beside, merged = with_adapters(folder), neounify.load(folder, lora=lora)
    assert_same(beside, merged)
    assert_differs(beside, pipe)


def test_adapters_beside_codes_are_those_merged_into_what_codes_are_decoded_to(
    folder: Path, lora: Path, tmp_path: Path
) -> None:
    coded = neounify.load(folder, dtype="float32", quantise="int8")
    coded.save(tmp_path / "int8")
    beside = neounify.load(tmp_path / "int8", dtype="float32", lora=lora, backend="reference")
    merged = neounify.load(tmp_path / "int8", dtype="float32", lora=lora, backend="decoded")
    assert quant_modules(beside.model)
    assert_same(beside, merged)
    assert_differs(beside, coded)


def test_bfloat16_is_close_to_float32(folder: Path, pipe: neounify.Pipeline) -> None:
    """Far closer than other noise is."""
    half = neounify.load(folder, dtype="bfloat16")
    off = (clip(half) - clip(pipe)).float().abs().mean()
    other = (clip(pipe, seed=4) - clip(pipe)).float().abs().mean()
    print(f"bfloat16 {off:.2f} levels, other noise {other:.2f}")
    assert 0 < off < other / 4
    torch.testing.assert_close(answers(half), answers(pipe), rtol=0.05, atol=0.05)
