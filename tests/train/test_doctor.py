"""The doctor finds what was broken on purpose, and nothing in what is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from neounify.train.doctor import Finding, examine
from neounify.train.recipe import Recipe, recipe_from_table
from neounify.train.setup import Start, starting_model


def case(folder: Path, **stage: Any) -> tuple[Recipe, Start]:
    changes = {
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 16,
        "flow_head_width": 32,
    }
    recipe = recipe_from_table(
        {
            "name": "x",
            "model": {"preset": "scenes", "changes": changes, "tokenizer": {"samples": 50}},
            "stages": [
                {
                    "name": "a",
                    "steps": 1,
                    "data": [{"world": "easy"}],
                    "optimizer": {"name": "muon", "learning_rate": 5e-3},
                    **stage,
                }
            ],
        }
    )
    return recipe, starting_model(recipe, torch.device("cpu"), folder)


def findings(recipe: Recipe, start: Start, steps: int) -> dict[str, Finding]:
    """Bounded by steps, not by time: a busy machine must not change what is found."""
    return {f.name: f for f in examine(start, recipe.stages[0], 1e9, steps)}


def test_a_healthy_stage_learns_every_task(tmp_path: Path) -> None:
    found = findings(*case(tmp_path), steps=200)
    assert found["gradients"].good
    assert found["freezing"].good
    learnt = {n: f.good for n, f in found.items() if n.endswith(")")}
    assert len(learnt) == 11
    assert sum(bool(good) for good in learnt.values()) >= 9, learnt


def test_what_gets_no_gradient_is_named(tmp_path: Path) -> None:
    reading = {"data": [{"world": "easy", "tasks": {"vqa": 1.0}}]}
    found = findings(*case(tmp_path, **reading), steps=1)
    assert found["gradients"].good is False
    assert "gen_patch" in found["gradients"].advice


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    recipe, start = case(tmp_path)
    with torch.no_grad():
        start.model.lm_head.weight[0, 0] = float("nan")
    items = examine(start, recipe.stages[0], steps=1)
    found = {f.name: f for _, f in zip(range(3), items, strict=False)}
    assert found["gradients"].good is False
    assert "NaN" in found["gradients"].advice


def test_a_rate_that_is_too_low_is_said(tmp_path: Path) -> None:
    slow = {"optimizer": {"learning_rate": 1e-9}}
    found = findings(*case(tmp_path, **slow), steps=30)
    assert found["caption (text)"].good is False
    assert "raise the learning rate" in found["caption (text)"].advice
