"""Methods of post-training and adapters on two ranks, against one process."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from neounify.post_train import doctor
from neounify.train.recipe import Recipe
from neounify.train.state import saved_states
from support import post_training
from support.parallel_runs import DEFAULTS, numpy, one_stage, recipe, this_rank, trainer
from support.post_training import METHODS, described, metrics
from support.ranks import run_ranks

STEPS = 3
COUNTED = ("samples", "images", "tokens")
ADAPTERS = {"rank": 2, "dropout": 0.25}
DEALT = {"prompts_per_iteration": 4, "prompts_per_rollout": 1}
"""Rollouts of one prompt, so that ranks share them."""


def recipe_of(case: str, folder: Path) -> Recipe:
    """The recipe of a method, with adapters where the case says so, or supervised."""
    if case == "supervised lora":
        return recipe(**one_stage(lora=ADAPTERS), parallel={"streams": 4}, defaults=dict(DEFAULTS))
    name, _, lora = case.partition(" ")
    changes: dict[str, Any] = {}
    if "prompts_per_iteration" in METHODS.get(name, METHODS["nft"]).settings and name != "mopd":
        changes |= DEALT
    if name == "mopd":
        changes |= merging(folder)
    if name == "trajectory":
        changes["prompts_per_step"] = 5
    # A larger eps, so that gradients near zero do not make steps of a whole learning rate.
    optimizer = {"name": "adamw", "learning_rate": 1e-3, "eps": 1e-5}
    # The pairs of DPO are fewer than its micro-batches, so that ranks have empty ones.
    parts = 8 if name == "dpo" else 4
    stage: dict[str, Any] = {"steps": STEPS, "packs_per_step": parts, "optimizer": optimizer}
    if lora:
        stage["lora"] = {"rank": 2, "streams": ["gen"]}
    return described(name, changes, **stage)


def merging(folder: Path) -> dict[str, Any]:
    """Settings of a merge of two experts, of which one is the base."""
    return {
        "prompts": {"width": 32, "height": 32},
        "prompts_per_step": 5,
        "epoch_steps": 1,
        "sheet_every": 0,
        "teachers": {"single_object": str(post_training.BASE[0]), "edit": str(folder / "editor")},
        "sampler": {"steps": 3, "guidance": 4.0, "edit_guidance": 1.0},
    }


CASES = [
    "supervised lora",
    *("nft", "nft lora", "flow-grpo", "dpo", "trajectory", "mopd", "dmd2", "text", "joint"),
]


def train(folder: Path, case: str, stop_after: int | None = None) -> dict[str, Any]:
    """Train a case on this rank, from its newest state on; the trained weights and the log."""
    training = trainer(folder / case, recipe_of(case, folder.parent), this_rank())
    if states := saved_states(training.states):
        training.resume(states[-1])
    training.run(stop_after=stop_after)
    weights = {n: numpy(p) for n, p in training.model.named_parameters()}
    return {"weights": weights, "log": metrics(folder / case)}


DOCTOR = ("nft", "trajectory", "dmd2")


def examined(folder: Path, kind: str) -> dict[str, Any]:
    """What the doctor finds of a method, and the weights behind it."""
    training = trainer(folder / kind, recipe_of(kind, folder), this_rank())
    stage = training.recipe.stages[0]
    # Ranks whose clocks differ must end together.
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() * (1 + 99 * this_rank().rank))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "time", clock)
        checks = stage.method.examine(training._context(stage), 4)
        findings = {finding.name: finding.good for finding in checks}
    return {"findings": findings, "weights": [numpy(p) for p in training.model.parameters()]}


def on_ranks(base: str, folder: str) -> dict[str, Any]:
    post_training.BASE[:] = [Path(base)]
    findings = {kind: examined(Path(folder) / "doctor", kind) for kind in DOCTOR}
    results = {case: train(Path(folder) / "two", case) for case in CASES}
    for case in ("flow-grpo", "trajectory"):
        train(Path(folder) / "moved", case, stop_after=1)
    return {**results, "doctor": findings}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an expert, whose image head differs from the base's."""
    at = tmp_path_factory.mktemp("ranks")
    expert = trainer(at / "expert", described("trajectory"), this_rank())
    with torch.no_grad():
        expert.model.get_parameter("image_head.linear2.weight").mul_(1.5)
    expert.export(at / "editor")
    return at


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    base = str(post_training.BASE[0])
    return run_ranks(on_ranks, base, str(folder), ranks=2, seconds=540)


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """What a line of the log measures of the training itself, not of its ranks."""
    of_ranks = ("wait", "slowest", "rank_")
    return {k: v for k, v in line.items() if type(v) is float and not k.startswith(of_ranks)}


def check(alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    for name, weight in alone["weights"].items():
        assert np.array_equal(ranks[0]["weights"][name], ranks[-1]["weights"][name]), name
        # Sums of two halves round otherwise, which three steps of AdamW make larger.
        assert np.abs(ranks[0]["weights"][name] - weight).max() < 3e-5, name
    lines = [line for line in ranks[0]["log"] if line["kind"] == "train"]
    expected = [line for line in alone["log"] if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == [1, 2, 3]
    for mine, theirs in zip(expected, lines, strict=True):
        assert numbers(theirs) == pytest.approx(numbers(mine), rel=1e-3, abs=1e-5, nan_ok=True)
        assert {k: mine.get(k) for k in COUNTED} == {k: theirs.get(k) for k in COUNTED}
        assert theirs["slowest_over_mean"] >= 1


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one(folder: Path, two: list[dict[str, Any]], case: str) -> None:
    check(train(folder / "alone", case), [rank[case] for rank in two])


@pytest.mark.parametrize("case", ["flow-grpo", "trajectory"])
def test_a_run_moves_from_two_ranks_to_one(
    folder: Path, two: list[dict[str, Any]], case: str
) -> None:
    moved = train(folder / "moved", case)
    check(moved, [rank[case] for rank in two])


@pytest.mark.parametrize("kind", DOCTOR)
def test_the_doctor_examines_methods_on_two_ranks(two: list[dict[str, Any]], kind: str) -> None:
    mine, theirs = (rank["doctor"][kind] for rank in two)
    assert mine["findings"] == theirs["findings"]
    assert mine["findings"]["gradients"]
    for one, other in zip(mine["weights"], theirs["weights"], strict=True):
        assert np.array_equal(one, other)
