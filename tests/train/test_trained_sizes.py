"""A recipe's image sizes go into the checkpoint's config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from neounify.config import CheckpointDefaults, ModelConfig
from neounify.config.presets import SCENES
from neounify.train.recipe import Recipe, recipe_from_table
from neounify.train.setup import build_setup, with_trained_sizes

JSONL = {"kind": "jsonl", "path": "data.jsonl"}
UNRECORDED = SCENES.replace(
    sampling=CheckpointDefaults(
        image_size=(64, 64), edit_min_pixels=32**2, edit_max_pixels=256**2, steps=40
    )
)


def recipe(*stages: dict[str, Any]) -> Recipe:
    numbered = [{"name": f"s{n}", "steps": 1, **stage} for n, stage in enumerate(stages)]
    model = {"preset": "scenes", "tokenizer": {"samples": 50}}
    return recipe_from_table({"name": "test", "model": model, "stages": numbered})


@pytest.mark.parametrize(
    ("stage", "sizes", "pixels"),
    [
        ({"data": [{"kind": "scenes"}]}, ((64, 64),), None),
        ({"data": [{"kind": "scenes", "side": 96}]}, ((96, 96),), None),
        (
            {"data": [{"kind": "scenes", "sizes": [[64, 64, 2], [128, 64, 0.5]]}]},
            ((64, 64), (128, 64)),
            None,
        ),
        ({"data": [{"kind": "scenes", "tasks": {"vqa": 1.0}}]}, (), None),
        (
            {"data": [JSONL], "method": {"target_buckets": [(64, 96), (96, 64)]}},
            ((64, 96), (96, 64)),
            None,
        ),
        ({"data": [JSONL], "method": {"target_pixels": (4096, 9216)}}, (), (4096, 9216)),
        ({"data": [JSONL]}, (), (32**2, 256**2)),
        ({"data": [{**JSONL, "task": "vqa"}]}, (), None),
    ],
)
def test_sizes_of_one_stage(
    stage: dict[str, Any], sizes: tuple[Any, ...], pixels: tuple[int, int] | None
) -> None:
    sampling = with_trained_sizes(UNRECORDED, recipe(stage)).sampling
    assert sampling.trained_sizes == sizes
    assert sampling.trained_pixels == pixels


def test_stages_and_what_the_checkpoint_had_add_up() -> None:
    stages = recipe(
        {"data": [{"kind": "scenes", "side": 96}]},
        {"data": [{"kind": "scenes"}, {"kind": "scenes"}]},
    )
    before: ModelConfig = with_trained_sizes(UNRECORDED, recipe({"data": [JSONL]}))
    after = with_trained_sizes(before, stages).sampling
    assert after.trained_sizes == ((96, 96), (64, 64))
    assert after.trained_pixels == (32**2, 256**2)


def test_a_model_in_training_carries_them(tmp_path: Path) -> None:
    start = build_setup(
        recipe({"data": [{"kind": "scenes"}]}), torch.device("cpu"), tmp_path / "run"
    )
    assert start.model.config.sampling.trained_sizes == ((64, 64),)
