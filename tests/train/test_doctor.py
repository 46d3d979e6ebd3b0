"""The doctor finds what was broken on purpose, and nothing in what is whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from neounify.train.doctor import examine
from neounify.train.method import NO_TIME, Finding, StageContext
from neounify.train.recipe import Recipe, recipe_from_table
from neounify.train.setup import StageSources, TrainSetup, build_setup
from neounify.train.supervised import SupervisedConfig
from support.own_data import png, write_lines


def case(folder: Path, **stage: Any) -> tuple[Recipe, TrainSetup]:
    changes = {
        "hidden_size": 32,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 16,
        "flow_head_width": 32,
    }
    changes |= stage.pop("changes", {})
    preset = stage.pop("preset", "scenes")
    recipe = recipe_from_table(
        {
            "name": "x",
            "model": {"preset": preset, "changes": changes, "tokenizer": {"samples": 50}},
            "stages": [
                {
                    "name": "a",
                    "steps": 1,
                    "data": [{"world": "easy"}],
                    "optimizer": {"name": "muon", "learning_rate": 5e-3},
                    **stage,
                },
                # Scenes for the tokenizer, whatever the first stage trains.
                {"name": "b", "steps": 1, "data": [{"world": "easy"}]},
            ],
        }
    )
    return recipe, build_setup(recipe, torch.device("cpu"), folder)


def items(recipe: Recipe, start: TrainSetup, **limits: Any) -> Iterator[Finding]:
    stage = recipe.stages[0]
    assert isinstance(stage.method, SupervisedConfig)
    context = StageContext(
        recipe=recipe, stage=stage, setup=start, sources=StageSources(recipe), folder=Path()
    )
    return examine(context, stage.method, **limits)


def findings(recipe: Recipe, start: TrainSetup, steps: int) -> dict[str, Finding]:
    """Bounded by steps, not by time: a busy machine must not change what is judged."""
    return {f.name: f for f in items(recipe, start, seconds=1e9, steps=steps)}


@pytest.mark.slow
def test_a_healthy_stage_learns_every_task(tmp_path: Path) -> None:
    by_name = findings(*case(tmp_path), steps=200)
    assert by_name["gradients"].good
    assert by_name["freezing"].good
    learned = {n: f.good for n, f in by_name.items() if n.endswith(")")}
    assert len(learned) == 11
    assert sum(bool(good) for good in learned.values()) >= 9, learned


def test_skipped_samples_and_fields_are_reported(tmp_path: Path) -> None:
    chat = {"query": "a", "response": "b"}
    lines = [chat, chat, {**chat, "tools": "x"}, {"image": "a.png", "text": "c", "width": 3}]
    path = write_lines(tmp_path / "d.jsonl", lines)
    (tmp_path / "a.png").write_bytes(png())
    for limit, good in ((0.3, None), (0.2, False)):
        data = {"kind": "jsonl", "path": str(path), "max_skipped": limit}
        by_name = findings(*case(tmp_path / str(limit), data=[data]), steps=1)
        assert by_name["data"].what.endswith("1 damaged of 4 samples")
        assert "fields that are not read: width" in by_name["data"].advice
        judged = by_name.get("data d.jsonl", by_name["data"])
        assert judged.good is good
        assert "unknown field …" in judged.what + judged.advice
    assert "1 of 4 samples cannot be used (25.0%), more than max_skipped" in judged.what


def test_what_gets_no_gradient_is_named(tmp_path: Path) -> None:
    reading = {"data": [{"world": "easy", "tasks": {"vqa": 1.0}}]}
    by_name = findings(*case(tmp_path, **reading), steps=1)
    assert by_name["gradients"].good is False
    assert "gen_patch" in by_name["gradients"].advice


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    recipe, start = case(tmp_path)
    with torch.no_grad():
        start.model.lm_head.weight[0, 0] = float("nan")
    first = islice(items(recipe, start, steps=1), 3)
    by_name = {f.name: f for f in first}
    assert by_name["gradients"].good is False
    assert "NaN" in by_name["gradients"].advice


def test_a_rate_that_is_too_low_is_said(tmp_path: Path) -> None:
    slow = {"optimizer": {"learning_rate": 1e-9}}
    by_name = findings(*case(tmp_path, **slow), steps=30)
    assert by_name["caption (text)"].good is False
    assert "raise the learning rate" in by_name["caption (text)"].advice


def test_what_there_was_no_time_for_gets_no_verdict(tmp_path: Path) -> None:
    """A rate that is too low, but one step only: nothing can be said of it yet."""
    recipe, start = case(tmp_path, optimizer={"learning_rate": 1e-9})
    all_findings = list(items(recipe, start, seconds=0.0))
    undecided = [f for f in all_findings if f.advice.startswith(NO_TIME)]
    assert {f.good for f in undecided} == {None}
    assert {"caption (text)", "generation"} <= {f.name for f in undecided}
    assert all("a verdict takes 300 (--seconds" in f.advice for f in undecided)
    assert not [f.name for f in all_findings if f.good is False]


def lines(path: Path, records: list[Any]) -> dict[str, str]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {"kind": "jsonl", "path": str(path)}


GOOD = {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}


def test_a_source_without_a_usable_sample_is_bad(tmp_path: Path) -> None:
    bad = lines(tmp_path / "bad.jsonl", [{**GOOD, "image": "none.png"}] * 3)
    good = lines(tmp_path / "good.jsonl", [GOOD])
    by_name = findings(*case(tmp_path, data=[good, bad]), steps=1)
    assert by_name["data bad.jsonl"].good is False
    assert "none.png" in by_name["data bad.jsonl"].what
    assert by_name["data"].good is None
    assert "3 damaged of 4" in by_name["data"].what
    only = findings(*case(tmp_path, data=[bad]), steps=1)
    assert list(only) == ["data bad.jsonl", "data"]
    assert only["data"].good is False


def test_some_damaged_samples_are_a_note(tmp_path: Path) -> None:
    data = lines(tmp_path / "d.jsonl", [GOOD, {"conversations": []}])
    by_name = findings(*case(tmp_path, data=[data]), steps=1)
    assert by_name["data"].good is None
    assert "d.jsonl, line 2" in by_name["data"].advice


def test_what_does_not_fit_a_pack_is_bad(tmp_path: Path) -> None:
    by_name = findings(*case(tmp_path, method={"tokens_per_pack": 3}), steps=1)
    assert by_name["data SceneDataset"].good is False
    assert "tokens_per_pack 3" in by_name["data SceneDataset"].what


FRAMES = {
    "capabilities": ["generate", "generate_video"],
    "video": {"tube_frames": 1, "image_weights": True, "frame_by_frame": True},
}


@pytest.mark.parametrize(
    "stage",
    [
        {"preset": "motion"},
        {"changes": FRAMES, "method": {"frame_targets": {"all": 0.0, "last": 1.0}}},
    ],
    ids=["whole", "frame by frame"],
)
def test_a_clip_is_generated_where_no_image_is(tmp_path: Path, stage: dict[str, Any]) -> None:
    clips = [{"kind": "motion", "world": "easy", "tasks": {"t2v": 1}}]
    by_name = findings(*case(tmp_path, data=clips, **stage), steps=3)
    assert "the overfitted prompt gives its target at" in by_name["generation"].what
    assert by_name["generation"].good is None  # three steps overfit nothing
