"""Post-training of the bundled model: RL images a second, shares of an iteration, distillation."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.figure import Figure
from benchmarks.timing import measure_machine
from neounify.bundled import bundled_model
from neounify.train.method import StageContext, TrainStep
from neounify.train.recipe import recipe_from_table
from neounify.train.setup import StageSources, build_setup, freeze

PROMPTS = {
    "kind": "scenes",
    "width": 64,
    "height": 64,
    "categories": {"two_object": 2, "counting": 1, "position": 1, "attribution": 2, "edit": 1},
}
REWARDED = {"prompts": PROMPTS, "prompts_per_iteration": 12, "group": 8, "sheet_every": 0}
RL: Mapping[str, Mapping[str, Any]] = {
    "nft": {**REWARDED, "sampler": {"steps": 8}},
    "flow-grpo": {**REWARDED, "sampler": {"steps": 8}, "window": 2, "guard": True},
}
DISTILLED = {
    "prompts": PROMPTS,
    "prompts_per_step": 8,
    "student": {"steps": 8},
    "teacher": {"guidance": 2.5, "edit_guidance": 2.5},
    "teacher_steps": 2,
}
MICRO_BATCHES = 4
ITERATIONS = 4


class _Checker:
    """Rewards whose time is counted."""

    def __init__(self, rewards: Any) -> None:
        self._rewards, self.seconds = rewards, 0.0

    def __call__(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        result = self._rewards(*arguments)
        self.seconds += time.perf_counter() - start
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rewards, name)


class _Run:
    """Optimizer steps of a method on the bundled model, without the loop around them."""

    def __init__(self, kind: str, method: Mapping[str, Any]) -> None:
        stage = {
            "name": "measured",
            "steps": 1000,
            "data": [],
            "freeze": ["und", "shared"],
            "packs_per_step": MICRO_BATCHES,
            "method": {"kind": kind, **method},
            "optimizer": {"learning_rate": 1e-5},
        }
        table = {"name": "b", "model": {"checkpoint": str(bundled_model())}, "stages": [stage]}
        recipe = recipe_from_table(table)
        folder = Path(tempfile.mkdtemp())
        setup = build_setup(recipe, torch.device("cpu"), folder)
        only = recipe.stages[0]
        freeze(setup.model, only.freeze, only.freeze_last_layers)
        sources = StageSources(recipe)
        self.method: Any = only.method.build(
            StageContext(recipe=recipe, stage=only, setup=setup, sources=sources, folder=folder)
        )
        self.sets = self.method.optimizers()
        self._batches, self._number = self.method.batches(None), 0

    def step(self) -> tuple[float, float]:
        """One step; seconds of drawing its batches, and of losses, gradients and optimizers."""
        start = time.perf_counter()
        drawn = list(islice(self._batches, MICRO_BATCHES))
        sampled = time.perf_counter()
        step = TrainStep(number=self._number, stage_step=self._number, batches=drawn, seed=0)
        for index, batch in enumerate(drawn):
            loss = self.method.loss(batch, replace(step, index=index))
            if loss.requires_grad:
                loss.backward()
        for one in self.sets:
            one.clip_gradients()
            one.step()
            one.zero_grad()
        self.method.end_step(step, True)
        self._number += 1
        return sampled - start, time.perf_counter() - sampled

    def operations(self) -> float:
        """Operations of one step, those of its matrix products and attention."""
        with FlopCounterMode(display=False) as counter:
            self.step()
        return float(counter.get_total_flops())


def figures() -> Iterator[Figure]:
    """All figures of post-training, in float32."""
    make = partial(Figure, dtype="float32", mode="eager")
    rate = measure_machine(torch.float32).matmul_flops
    for kind, method in RL.items():
        run = _Run(kind, method)
        operations = run.operations()
        run.method.rewards = checker = _Checker(run.method.rewards)
        times = [run.step() for _ in range(ITERATIONS)]
        sampling, updating = (sum(column) for column in zip(*times, strict=True))
        seconds, checking = sampling + updating, checker.seconds
        images = method["prompts_per_iteration"] * method["group"] * ITERATIONS
        yield make(
            name=f"{kind}, 8 unguided steps and the checker",
            value=images / seconds,
            unit="images/s",
            share=operations * ITERATIONS / seconds / rate,
            aim="25",
            met=images / seconds >= 25,
            note=f"rollout {(sampling - checking) / seconds:.0%}, update {updating / seconds:.0%}",
        )
        yield make(
            name=f"{kind}, the checker's share of the time",
            value=checking / seconds * 100,
            unit="%",
            aim="25 %",
            met=checking / seconds <= 0.25,
            note=f"{checking / images * 1000:.1f} ms an image",
        )
    run = _Run("trajectory", DISTILLED)
    operations = run.operations()
    times = [run.step() for _ in range(ITERATIONS)]
    sampling, updating = (sum(column) / ITERATIONS for column in zip(*times, strict=True))
    yield make(
        name="trajectory, update of 64 pairs",
        value=updating,
        unit="s",
        aim="1.2 s",
        met=updating <= 1.2,
        note=f"and {sampling:.2g} s for the pairs",
    )
    yield make(
        name="trajectory, pairs and update",
        value=sampling + updating,
        unit="s",
        share=operations / (sampling + updating) / rate,
    )
