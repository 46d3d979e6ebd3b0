"""The runs of the joint experiment: recipes that differ in their data alone, trained once each."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import neounify
from neounify.data.sample import DataError
from neounify.train.log import Log
from neounify.train.loop import Trainer
from neounify.train.recipe import recipe_from_table
from neounify.train.setup import StageSources, build_setup
from neounify.train.state import saved_states
from neounify.train.supervised import SupervisedConfig, build_encoder

ALONE = {
    "understanding": {"vqa": 0.6, "caption": 0.3, "text": 0.1},
    "generation": {"t2i": 0.7, "edit": 0.3},
}
"""The tasks of each kind, and their shares."""
JOINT = "joint"
KINDS = (*ALONE, JOINT)
MEASURED = 8000
"""Samples whose mean length says how many tokens a step needs."""
_DATA_SEED = 10_000


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the models are trained.

    `samples` of each kind; `per_step` samples in every step of every run; `changes` of the preset's
    config; a tokenizer trained on `tokenizer_samples`; `compile` pays from some thousand samples
    on; `workers` processes load data. Raises DataError for values out of range.
    """

    samples: int = 40_000
    per_step: int = 64
    preset: str = "scenes"
    changes: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_samples: int = 4000
    noise_draws: int = 2
    learning_rate: float = 2e-3
    precision: str = "bfloat16"
    compile: bool = True
    workers: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.per_step <= self.samples:
            raise DataError(
                f"samples per step must be from 1 to the {self.samples} in all, not {self.per_step}"
            )

    @property
    def steps(self) -> int:
        """Of a run alone; the joint run makes twice as many."""
        return round(self.samples / self.per_step)


@dataclass(frozen=True)
class Trained:
    """A finished run. `counts`: samples of each kind it saw, tokens, steps and seconds."""

    kind: str
    seed: int
    folder: Path
    counts: Mapping[str, float]
    recipe: Mapping[str, Any]
    reused: bool

    @property
    def model(self) -> Path:
        """Its checkpoint."""
        return self.folder / "model"

    def to_json(self) -> dict[str, Any]:
        """The run as plain data, its recipe included."""
        return {
            "kind": self.kind,
            "seed": self.seed,
            "folder": self.folder.name,
            "reused": self.reused,
            **self.counts,
            "recipe": self.recipe,
        }


def recipes(training: Training, world: str, seed: int) -> dict[str, dict[str, Any]]:
    """A recipe's table for each of `KINDS`.

    A pack is as many tokens as `per_step` samples of its kind have on average, so that all runs
    see as many samples a step.
    """
    data = {
        kind: {"world": world, "tasks": tasks, "seed": _DATA_SEED + 2 * seed + number}
        for number, (kind, tasks) in enumerate(ALONE.items())
    }
    tables = {
        kind: _table(training, kind, seed, training.steps, [source])
        for kind, source in data.items()
    }
    sizes = {kind: _tokens_per_pack(table, training.per_step) for kind, table in tables.items()}
    tables[JOINT] = _table(training, JOINT, seed, 2 * training.steps, list(data.values()))
    sizes[JOINT] = round(sum(sizes.values()) / len(sizes))
    for kind, table in tables.items():
        table["stages"][0]["method"]["tokens_per_pack"] = sizes[kind]
    return tables


def train(kind: str, table: dict[str, Any], root: Path) -> Trained:
    """Train as a table says, or take the run of the same table that is finished in `root`.

    An interrupted run resumes from its last state. Raises the errors of the trainer.
    """
    folder = root / f"{table['name']}-{_fingerprint(table)}"
    record = folder / "finished.json"
    if record.is_file():
        return Trained(kind, table["seed"], folder, json.loads(record.read_text()), table, True)
    recipe = recipe_from_table(table)
    torch.compiler.reset()  # else the code of earlier runs counts towards the most torch keeps
    log = Log(folder, Console(stderr=True), tensorboard=False)
    setup = build_setup(recipe, torch.device("cpu"), folder)
    trainer = Trainer(recipe, setup, folder, log)
    states = saved_states(trainer.states)
    if states:
        trainer.resume(states[-1])
    trainer.run()
    method = recipe.stages[0].method
    assert isinstance(method, SupervisedConfig)
    counts = _counts(trainer, method.noise_draws)
    record.write_text(json.dumps(counts, indent=1) + "\n")
    shutil.rmtree(trainer.states)
    return Trained(kind, table["seed"], folder, counts, table, False)


def _table(
    training: Training, kind: str, seed: int, steps: int, data: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "name": f"{kind}-seed{seed}",
        "seed": seed,
        "workers": training.workers,
        "keep": 1,
        "model": {
            "preset": training.preset,
            "changes": dict(training.changes),
            "tokenizer": {"samples": training.tokenizer_samples},
        },
        "stages": [
            {
                "name": kind,
                "steps": steps,
                "method": {"noise_draws": training.noise_draws},
                "precision": training.precision,
                "compile": training.compile,
                "ema": 0.999,
                "log_every": 50,
                "save_every": 200,
                "optimizer": {
                    "name": "muon",
                    "learning_rate": training.learning_rate,
                    "weight_decay": 0.01,
                },
                "schedule": {
                    "name": "linear",
                    "warmup": round(0.05 * steps),
                    "decay": 0.4,
                    "final": 0.02,
                },
                "data": data,
            }
        ],
    }


def _tokens_per_pack(table: Mapping[str, Any], per_step: int) -> int:
    """Tokens of `per_step` samples on average, at least those of the longest one."""
    recipe = recipe_from_table(table)
    with tempfile.TemporaryDirectory() as folder:
        setup = build_setup(recipe, torch.device("cpu"), Path(folder))
    stage = recipe.stages[0]
    assert isinstance(stage.method, SupervisedConfig)
    encode = build_encoder(setup, stage.method)
    source = StageSources(recipe).of(stage)
    lengths = [
        encode(source[index], np.random.default_rng((recipe.seed, 0, index))).length
        for index in range(MEASURED)
    ]
    return max(max(lengths), round(per_step * float(np.mean(lengths))))


def _counts(trainer: Trainer, noise_draws: int) -> dict[str, float]:
    """Only samples of generation have a target image, `noise_draws` times."""
    progress = trainer.progress
    targets = progress.images // noise_draws
    return {
        "understanding_samples": progress.samples - targets,
        "generation_samples": targets,
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": round(progress.seconds, 1),
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
    }


def _fingerprint(table: Mapping[str, Any]) -> str:
    words = json.dumps([neounify.__version__, table], sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()[:8]
