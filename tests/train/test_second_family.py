"""A PixelUMM-like model from fresh weights on clips: its tokenizer, previews, and the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from neounify.config import VideoConfig
from neounify.errors import ConfigError
from neounify.pipeline import load
from neounify.text.forms import PIXELUMM
from neounify.train.log import Log
from neounify.train.loop import Trainer
from neounify.train.previews import SampleGrid
from neounify.train.recipe import Recipe, recipe_from_table
from neounify.train.setup import build_setup, recipe_config
from neounify.video.read import read_video
from support.models import one_thread
from support.own_data import png, text_record, write_lines

__all__ = ["one_thread"]  # a fixture

CHANGES: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "vocab_size": 320,
    "und_mlp": {"width": 32},
    "gen_mlp": {"width": 32},
    "max_positions": 2048,
    "sampling": {
        "chat_min_pixels": 32**2,
        "chat_max_pixels": 64**2,
        "edit_min_pixels": 32**2,
        "edit_max_pixels": 64**2,
        "video": {"size": [32, 32], "frames": 8, "fps": 8.0},
    },
}


def recipe(**changes: Any) -> Recipe:
    table: dict[str, Any] = {
        "name": "fresh",
        "workers": 0,
        "model": {
            "preset": "pixelumm",
            "changes": CHANGES,
            "tokenizer": {"vocab_size": 300, "samples": 40},
        },
        "stages": [
            {
                "name": "clips",
                "steps": 2,
                "method": {"tokens_per_pack": 512, "target_pixels": [1024, 1024]},
                "data": [{"kind": "motion", "world": "easy", "shown_fps": 0}],
            }
        ],
    }
    return recipe_from_table({**table, **changes})


def train(asked: Recipe, folder: Path) -> Trainer:
    log = Log(folder, Console(quiet=True), tensorboard=False)
    setup = build_setup(asked, torch.device("cpu"), folder)
    trainer = Trainer(asked, setup, folder, log, SampleGrid(asked, folder))
    trainer.run()
    return trainer


def test_a_fresh_model_has_the_tokens_of_its_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neounify.train.previews.GRID_STEPS", 3)
    folder = tmp_path / "run"
    tokenizer = train(recipe(), folder).setup.tokenizer
    assert tokenizer.vocab_size <= 300
    assert all(tokenizer.find(name) is not None for name in PIXELUMM.tokens)
    assert tokenizer.find("<img>") is None
    ids = tokenizer.encode("<|vision_start|>")
    assert tokenizer.id("<|vision_start|>") not in ids  # typed, it stays text
    pipe = load(folder / "model")
    assert pipe.config.family == "pixelumm"
    assert pipe.tokenizer.digest() == tokenizer.digest()
    clip = pipe.generate("a star moves left", frames=8, steps=3).videos[0]
    assert clip.frames.shape == (8, 32, 32, 3)
    assert pipe.chat("Which way?", video=clip, tubes=True, max_new_tokens=2).token_ids
    _check_previews(folder / "samples")


def _check_previews(folder: Path) -> None:
    """Four clips as files, and a sheet with eight frames of each."""
    clips = sorted(folder.glob("*.mp4"))
    assert [clip.name for clip in clips] == [f"step-00000002-{n}.mp4" for n in (1, 2, 3, 4)]
    video = read_video(clips[0])
    assert (video.clip.frames, video.clip.size, video.clip.seconds) == (8, (32, 32), 1.0)
    sheet = np.asarray(Image.open(folder / "step-00000002-clips.png"))
    assert sheet.shape[1] > 8 * 128
    assert not (folder / "step-00000002.png").exists()


def test_a_model_of_images_gains_tubes() -> None:
    """Of a preset, or of a checkpoint, whose other weights stay."""
    changes = {"video": {"tube_frames": 2, "und": True}, "capabilities": ["chat", "generate_video"]}
    asked = recipe(model={"preset": "tiny", "changes": changes})
    config = recipe_config(asked)
    assert config.video == VideoConfig(tube_frames=2, und=True)
    assert config.capabilities == ("chat", "generate_video")
    with pytest.raises(ConfigError, match=r"model\.changes\.video: .*frames"):
        recipe_config(recipe(model={"preset": "tiny", "changes": {"video": {"frames": 2}}}))


def test_previews_of_a_recipe_follow_its_data(tmp_path: Path) -> None:
    """Prompts of clips where samples have clips, of images where they have images, or both."""
    write_lines(tmp_path / "a.jsonl", [text_record("a wall", "<image>", image="a.png")])
    (tmp_path / "a.png").write_bytes(png())
    files = {"kind": "jsonl", "path": str(tmp_path / "a.jsonl")}
    motion = {"kind": "motion"}
    for data, of_clips, of_images in (
        ([motion], True, False),
        ([files], False, True),
        ([motion, files], True, True),
    ):
        for prompts in ([], ["a wall"] * 6):
            table = {"name": "s", "steps": 1, "data": data}
            grid = SampleGrid(recipe(stages=[table], prompts=prompts), tmp_path)
            found_prompts = grid._prompts_of(0)
            assert bool(found_prompts.clips) == of_clips
            assert bool(found_prompts.images) == of_images
            assert len(found_prompts.clips) <= 4
            if prompts:
                assert set(found_prompts.images) | set(found_prompts.clips) == {"a wall"}


def test_a_tokenizer_without_texts_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [text_record("a", "b")])
    data = [{"kind": "jsonl", "path": str(tmp_path / "a.jsonl")}]
    asked = recipe(stages=[{"name": "s", "steps": 1, "data": data}])
    with pytest.raises(ConfigError, match="the tokenizer of a fresh model is trained on a synth"):
        build_setup(asked, torch.device("cpu"), tmp_path / "run")
