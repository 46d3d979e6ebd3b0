"""Recipes of one post-training stage for a small model, and what their runs leave behind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from neounify.checkpoint.names import stream_of
from neounify.train.loop import Trainer
from neounify.train.recipe import Recipe
from neounify.train.state import load_state
from train.test_trainer import recipe, trainer

STEPS = 6
LORA = {"rank": 2, "streams": ["gen"]}
BASE: list[Path] = []
"""The folder of a small model with fresh weights (`post_train/conftest.py`)."""

PROMPTS = {"categories": {"single_object": 1.0, "edit": 1.0}, "width": 32, "height": 32}
QUESTIONS = {"categories": {"question/where": 1.0, "caption": 1.0}, "width": 32, "height": 32}
GROUPS = {
    "prompts": PROMPTS,
    "prompts_per_iteration": 4,
    "group": 3,
    "sampler": {"steps": 3},
    "sheet_every": 0,
    "rewards": [{"kind": "program", "name": "support.rewards:redness"}],
}
PAIRS = {"prompts": PROMPTS, "prompts_per_step": 3, "sheet_every": 0}
TEXT = {
    "prompts": QUESTIONS,
    "prompts_per_iteration": 4,
    "group": 3,
    "updates": 2,
    "max_new_tokens": 12,
    "kl": 0.1,
    "sheet_every": 0,
    "rewards": [{"kind": "program", "name": "support.rewards:lengths"}],
}
STORIES = {
    **TEXT,
    "prompts": {**QUESTIONS, "categories": {"story": 2.0, "caption": 1.0}},
    "rewards": [{"kind": "program", "name": "support.rewards:redness_with_text"}],
    "sampler": {"steps": 1},
    "max_new_tokens": 40,
}
JOINT = {
    **GROUPS,
    "updates": 2,
    "window": 1,
    "think": True,
    "max_think_tokens": 6,
    "kl": 0.1,
    "thought_kl": 0.1,
}


@dataclass(frozen=True)
class Described:
    """A method of tests: its kind, settings, and the streams that it trains."""

    kind: str
    settings: dict[str, Any]
    streams: tuple[str, ...] = ("gen",)


METHODS = {
    "flow-grpo": Described(
        "flow-grpo", {**GROUPS, "window": 1, "guard": True, "kl": 0.1, "updates": 2}
    ),
    "nft": Described("nft", {**GROUPS, "kl": 0.1, "updates": 2, "decay_rate": 0.2}),
    "dpo": Described("dpo", {**GROUPS, "beta": 100.0}),
    "trajectory": Described("trajectory", {**PAIRS, "student": {"steps": 2}, "teacher_steps": 2}),
    "dmd2": Described("dmd2", {**PAIRS, "student": {"steps": 2}, "fake_steps": 2, "ida": 0.1}),
    "text": Described("text-grpo", TEXT, ("und",)),
    "story": Described("text-grpo", STORIES, ("und",)),
    "limit": Described("text-grpo", {**TEXT, "length": "limit", "kl": 0.0}, ("und",)),
    "joint": Described("flow-grpo", JOINT, ("und", "gen")),
}
"""Methods by the name that a test gives them, of which some are the same kind."""


def described(name: str, method: dict[str, Any] | None = None, **stage: Any) -> Recipe:
    """A recipe of one stage with a method of `METHODS`, or of the kind `name`."""
    known = METHODS.get(name, Described(name, {}))
    frozen = ["gen"] if "gen" not in known.streams else []
    frozen += ["und", "shared"] if "und" not in known.streams else []
    one = {
        "name": "post",
        "steps": STEPS,
        "packs_per_step": 2,
        "data": [],
        "save_every": 1,
        "method": {"kind": known.kind, **known.settings, **(method or {})},
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
        **({} if "lora" in stage else {"freeze": frozen}),
        **stage,
    }
    model = {"checkpoint": str(BASE[0])}
    return recipe(model=model, defaults={"log_every": 1, "ema": 0.5}, stages=[one], keep=99)


def run(folder: Path, name: str, method: dict[str, Any] | None = None, **stage: Any) -> Trainer:
    """The trainer of `described` behind its run."""
    training = trainer(folder, described(name, method, **stage))
    training.run()
    return training


def built(folder: Path, name: str, method: dict[str, Any] | None = None) -> Any:
    """The method of `described` at the start of its stage."""
    training = trainer(folder, described(name, method))
    stage = training.recipe.stages[0]
    for parameter_name, parameter in training.model.named_parameters():
        parameter.requires_grad_(stream_of(parameter_name) not in stage.freeze)
    return stage.method.build(training._context(stage))


def state_tensors(folder: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a saved state."""
    tensors, _ = load_state(folder / "states" / f"step-{step:08d}")
    return {f"{file}.{n}": t for file, named in tensors.items() for n, t in named.items()}


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, without what depends on time."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    timed = ("seconds", "per_second", "left", "gib", "memory", "matmul", "flops", "share")
    return [
        {k: v for k, v in line.items() if not any(part in k for part in timed)} for line in lines
    ]
