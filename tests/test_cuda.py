"""The package on a GPU, where there is one: the recordings of the reference, tasks, training."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import neounify
from neounify.bundled import bundled_model
from neounify.train.log import Log
from neounify.train.loop import Trainer
from neounify.train.recipe import Recipe
from neounify.train.setup import build_setup
from neounify.train.state import saved_states
from recordings.make import GUIDANCE, HEIGHT, PROMPT, SHIFT, STEPS, T_EPS, WIDTH
from recordings.test_recordings import FOLDER, recording
from support.models import assert_close
from support.post_training import BASE, LORA, METHODS, described
from train.test_trainer import recipe

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
"""Without a GPU nothing here runs; docs/log.md says where and when it last did."""

RELATIVE = 2e-3
"""Relative error of a trajectory in float32, whose sums run in another order than on the CPU."""


@pytest.fixture(scope="module")
def pipe() -> neounify.Pipeline:
    return neounify.load(bundled_model(), device="cuda")


@pytest.mark.parametrize("name", ["dense", "sparse"])
@pytest.mark.parametrize("attention", ["auto", "blocks", "sdpa"])
def test_the_recorded_trajectory_of_an_image(name: str, attention: Any) -> None:
    recorded = recording(name).arrays
    pipe = neounify.load(FOLDER / name, dtype="float32", device="cuda", attention=attention)
    result = pipe.generate(
        PROMPT,
        width=WIDTH,
        height=HEIGHT,
        steps=STEPS,
        guidance=GUIDANCE,
        shift=SHIFT,
        t_eps=T_EPS,
        noise=recorded["image.noise"][None].to("cuda"),
    )
    assert_close(result.pixels[0].cpu(), recorded["image.final"], RELATIVE)


def test_every_task_gives_the_same_twice(pipe: neounify.Pipeline) -> None:
    first = pipe.generate("a red circle", seed=1, steps=4).images[0]
    again = pipe.generate("a red circle", seed=1, steps=4).images[0]
    assert np.array_equal(np.asarray(first), np.asarray(again))
    edited = pipe.edit("Make the circle blue.", first, seed=2, steps=4).images[0]
    assert edited.size == first.size
    answers = [pipe.chat("What colour is the circle?", images=[first]).text for _ in range(2)]
    assert answers[0] == answers[1] != ""
    story = pipe.interleave("Tell a story about a red circle.", seed=3, steps=4, max_new_tokens=40)
    assert story is not None


def test_answers_are_those_of_the_cpu(pipe: neounify.Pipeline) -> None:
    image = pipe.generate("a red circle and a blue square", seed=4).images[0]
    on_cpu = neounify.load(bundled_model())
    for question in ("What colour is the square?", "How many shapes are there?"):
        assert pipe.chat(question, images=[image]).text == (
            on_cpu.chat(question, images=[image]).text
        )


def trained(folder: Path, parsed: Recipe, device: str, steps: int | None = None) -> Trainer:
    log = Log(folder, Console(quiet=True), tensorboard=False)
    setup = build_setup(parsed, torch.device(device), folder)
    training = Trainer(parsed, setup, folder, log)
    if states := saved_states(training.states):
        training.resume(states[-1])
    training.run(stop_after=steps)
    return training


def values(folder: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_training_resumes_to_the_bit(tmp_path: Path) -> None:
    parsed = recipe()
    whole = trained(tmp_path / "whole", parsed, "cuda")
    trained(tmp_path / "cut", parsed, "cuda", 5)
    again = trained(tmp_path / "cut", parsed, "cuda")
    for one, two in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)
    losses = values(tmp_path / "whole", "text/loss")
    assert all(math.isfinite(loss) for loss in losses)
    on_cpu = trained(tmp_path / "cpu", parsed, "cpu")
    assert values(tmp_path / "cpu", "text/loss") == pytest.approx(losses, rel=0.05)
    assert asdict(on_cpu.progress)["samples"] == asdict(again.progress)["samples"]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", METHODS)
def test_post_training_resumes_to_the_bit(
    kind: str, lora: bool, tmp_path: Path, base: Path
) -> None:
    streams = list(METHODS[kind].streams)
    stage: dict[str, Any] = {"lora": {**LORA, "streams": streams}} if lora else {}
    parsed = described(kind, **stage)
    whole = trained(tmp_path / "whole", parsed, "cuda")
    trained(tmp_path / "cut", parsed, "cuda", 2)
    again = trained(tmp_path / "cut", parsed, "cuda")
    for one, two in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    trained(folder, recipe(), "cpu", 1).export(folder / "model")
    BASE[:] = [folder / "model"]
    return folder / "model"
