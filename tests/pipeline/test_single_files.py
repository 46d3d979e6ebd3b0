"""Weights in one file, config and tokenizer elsewhere; models that write no text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import neounify
from neounify.checkpoint import CheckpointFolder, to_published
from neounify.errors import CheckpointError, RequestError, TokenizerError
from support.gguf_files import gguf_of

HEAD = to_published("lm_head.weight")
PREFIX = "model.diffusion_model."


@pytest.fixture
def home(pipe: neounify.Pipeline, tmp_path: Path) -> Path:
    """The folder of the model, its weights included."""
    pipe.save(tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture
def headless(home: Path, tmp_path: Path) -> Path:
    weights = load_file(home / "model.safetensors")
    return gguf_of({n: w for n, w in weights.items() if n != HEAD}).write(tmp_path / "images.gguf")


def pixels(pipe: neounify.Pipeline) -> torch.Tensor:
    return pipe.generate("a boat", width=64, height=64, steps=2, seed=2).pixels


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
@pytest.mark.parametrize("memory", ["all", "stream"])
def test_one_file_is_the_model(home: Path, tmp_path: Path, kind: str, memory: str) -> None:
    weights = {PREFIX + n: w for n, w in load_file(home / "model.safetensors").items()}
    file = tmp_path / f"weights.{kind}"
    if kind == "gguf":
        gguf_of(weights).write(file)
    else:
        save_file(weights, file)
    loaded = neounify.load(file, config=home, memory=memory)  # type: ignore[arg-type]
    expected = neounify.load(home)
    torch.testing.assert_close(pixels(loaded), pixels(expected), rtol=0, atol=1e-5)
    assert loaded.chat("hi", max_new_tokens=5) == expected.chat("hi", max_new_tokens=5)
    with pytest.raises(CheckpointError, match="name the folder"):
        neounify.load(file)
    (tmp_path / "config.json").write_text((home / "config.json").read_text())
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        neounify.load(file)


def test_the_system_message_comes_from_the_config_folder(home: Path, tmp_path: Path) -> None:
    (home / "system_message_generation.txt").write_text("Paint in blue.")
    (home / "model.safetensors").rename(tmp_path / "weights.safetensors")
    loaded = neounify.load(tmp_path / "weights.safetensors", config=home)
    assert loaded.processor.system_message == "Paint in blue."


def test_without_lm_head_images_are_the_same(
    pipe: neounify.Pipeline, home: Path, headless: Path
) -> None:
    loaded = neounify.load(headless, config=home)
    torch.testing.assert_close(pixels(loaded), pixels(pipe), rtol=0, atol=1e-5)
    image = pipe.generate("a boat", width=64, height=64, steps=1).images[0]
    assert loaded.edit("blue", image, width=64, height=64, steps=1).images


def test_without_lm_head_there_is_no_text(home: Path, headless: Path) -> None:
    loaded = neounify.load(headless, config=home)
    for call in (
        lambda: loaded.chat("hi"),
        lambda: list(loaded.chat("hi", stream=True)),
        lambda: loaded.generate("a boat", width=64, height=64, think=True),
        lambda: list(loaded.interleave("a story", width=64, height=64)),
    ):
        with pytest.raises(RequestError, match="has no lm_head, so it writes no text"):
            call()


def test_without_lm_head_it_is_saved_and_loaded(home: Path, headless: Path, tmp_path: Path) -> None:
    loaded = neounify.load(headless, config=home)
    loaded.save(tmp_path / "saved")
    assert HEAD not in CheckpointFolder.open(tmp_path / "saved").tensors
    again = neounify.load(tmp_path / "saved")
    assert again.config == loaded.config
    assert not again.config.lm_head
