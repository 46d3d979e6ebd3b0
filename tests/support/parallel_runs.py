"""Runs of the trainer on many ranks: small recipes, and what is compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, distributed

from neounify.distributed.ranks import Ranks
from neounify.distributed.shards import whole
from neounify.train.log import Log
from neounify.train.loop import Trainer
from neounify.train.recipe import Recipe, recipe_from_table
from neounify.train.setup import build_setup
from neounify.train.state import saved_states
from support.models import TINY_CHANGES

DEFAULTS = {
    "method": {"tokens_per_pack": 300},
    "log_every": 1,
    "save_every": 100,
    "ema": 0.5,
    "optimizer": {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1},
    "data": [{"kind": "scenes", "world": "easy"}],
}


def recipe(**changes: Any) -> Recipe:
    """A recipe of one small stage of four packs a step, in four data streams."""
    changes = dict(changes)
    defaults = {**DEFAULTS, **changes.pop("defaults", {})}
    parallel = changes.pop("parallel", {})
    model = {"preset": "scenes", "changes": {**TINY_CHANGES, **changes.pop("model", {})}}
    return recipe_from_table(
        {
            "name": "test",
            "workers": 0,
            "model": {**model, "tokenizer": {"samples": 50}},
            "defaults": defaults,
            "parallel": {"streams": 4, **parallel},
            "stages": [{"name": "both", "steps": 3, "packs_per_step": 4}],
            **changes,
        }
    )


def one_stage(**fields: Any) -> dict[str, Any]:
    return {"stages": [{"name": "both", "steps": 3, "packs_per_step": 4, **fields}]}


MUON = {"name": "muon", "learning_rate": 1e-3}
EXPERTS = {
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_width": 16,
    "sparse": [True, True],
}
SPARSE = {"und_mlp": EXPERTS, "gen_mlp": EXPERTS}
CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "tied": {"model": {"tie_embeddings": True}},
    "sparse": {"model": SPARSE},
    "frozen und": one_stage(freeze=["und", "shared"]),
    "frozen gen": one_stage(freeze=["gen"]),
    "recomputed": {"defaults": {"checkpoint_activations": True}},
    "muon": {"defaults": {"optimizer": MUON}},
    "bfloat16": {"defaults": {"precision": "bfloat16"}},
    "compiled": {"defaults": {"compile": True}},
    "rows": {"parallel": {"sequence": 2}, "defaults": {"checkpoint_activations": True}},
    "rows of copies": {"parallel": {"sequence": 2, "replicate": 2}},
    "copies": {"parallel": {"replicate": 2}},
    "experts": {"model": SPARSE, "parallel": {"expert": 2}},
    "experts muon": {
        "model": SPARSE,
        "parallel": {"expert": 2},
        "defaults": {"optimizer": MUON, "checkpoint_activations": True},
    },
    "copies of experts": {"model": SPARSE, "parallel": {"expert": 2, "replicate": 2}},
    "experts of four": {"model": SPARSE, "parallel": {"expert": 4}},
    "moved": one_stage(steps=6),
    "moved experts": {"model": SPARSE, "parallel": {"expert": 2}, **one_stage(steps=6)},
}
"""Changes of the recipe by the name of a case."""


def trainer(folder: Path, parsed: Recipe, ranks: Ranks) -> Trainer:
    folder.mkdir(parents=True, exist_ok=True)
    setup = build_setup(parsed, torch.device("cpu"), folder, ranks)
    log = Log(folder, Console(quiet=True), tensorboard=False, writes=ranks.first)
    return Trainer(parsed, setup, folder, log)


def this_rank() -> Ranks:
    many = distributed.is_initialized()
    return Ranks(distributed.get_rank(), distributed.get_world_size()) if many else Ranks()


def train(folder: Path, case: str, stop_after: int | None = None) -> dict[str, Any]:
    """Train a case on this rank, from the newest state on if there is one; the weights then."""
    ranks = this_rank()
    changes = CASES[case]
    if ranks.size == 1:  # of one rank, which is alone on every axis
        changes = {**changes, "parallel": {}}
    training = trainer(folder, recipe(**changes), ranks)
    if states := saved_states(training.states):
        training.resume(states[-1])
    training.run(stop_after=stop_after)
    return {name: numpy(p) for name, p in training.model.named_parameters()}


def numpy(tensor: Tensor) -> Any:
    return whole(tensor.detach()).float().numpy().copy()


def losses(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]
