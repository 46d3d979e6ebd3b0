"""Previews of a model that is cut over ranks: each samples its own prompts, from the shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import numel

from neounify.distributed.shards import local, whole
from neounify.errors import ImageError
from neounify.model import NeoUnify
from neounify.pipeline import Pipeline
from neounify.train.loop import Trainer
from neounify.train.previews import SampleGrid
from neounify.train.progress import Progress, Sampling
from support.parallel_runs import SPARSE, numpy, recipe, this_rank, trainer
from support.ranks import run_ranks

PROMPTS = ["a red circle", "a long text of a blue square under two green stars", "three"]
CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": {"model": SPARSE, "parallel": {"expert": 2}},
    "bfloat16": {"defaults": {"precision": "bfloat16"}, "parallel": {"sequence": 2}},
}
SIZES: dict[str, Any] = {"width": 64, "height": 64, "steps": 2}


def copied(training: Trainer) -> Pipeline:
    """A pipeline around a whole copy of the model, in the dtype that its layers are gathered in."""
    model = NeoUnify(training.model.config)
    model.stack_experts()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in training.model.named_parameters():
            parameters[name].copy_(whole(parameter))
    model = model.requires_grad_(False).eval().to(training.parallel.gathered_in)
    return Pipeline(model, training.setup.tokenizer, system_message="")


def previewed(folder: Path, case: str) -> dict[str, Any]:
    """Images of this rank's prompts, of which the first rank has all but one, and the weights."""
    training = trainer(folder, recipe(**CASES[case], prompts=PROMPTS), this_rank())
    grid = SampleGrid(training.recipe, folder, ranks=this_rank())
    errors: list[float] = []
    mine = PROMPTS[:2] if this_rank().first else PROMPTS[2:]

    def evaluate(sampling: Sampling, progress: Progress) -> dict[str, float]:
        pipe = copied(training)
        wanted = [pipe.generate(prompt, seed=1, **SIZES).pixels for prompt in mine]
        with sampling() as pipe:
            in_layers = list(training.model.layers.parameters())
            assert sum(local(p).numel() for p in in_layers) < 0.6 * sum(map(numel, in_layers))
            for prompt, image in zip(mine, wanted, strict=True):
                pixels = pipe.generate(prompt, seed=1, **SIZES).pixels
                errors.append(float((pixels - image).abs().max()))
        return grid(sampling, progress)

    training.evaluate = evaluate
    training.run()
    plain = trainer(folder / "plain", recipe(**CASES[case]), this_rank())
    plain.run()
    pairs = zip(training.model.parameters(), plain.model.parameters(), strict=True)
    same = all(np.array_equal(numpy(one), numpy(other)) for one, other in pairs)
    return {"errors": errors, "same": same}


def failing(folder: Path) -> str:
    """A preview that fails on one rank, and is reported by the first."""
    training = trainer(folder, recipe(prompts=PROMPTS), this_rank())
    grid = SampleGrid(training.recipe, folder, ranks=this_rank())
    original = Pipeline.generate
    messages: list[str] = []

    def generate(pipe: Pipeline, *arguments: Any, **settings: Any) -> Any:
        if this_rank().rank == 1:
            raise ImageError("no such size")
        return original(pipe, *arguments, **settings)

    training.evaluate = grid
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.log, "warn", messages.append)
        patch.setattr(Pipeline, "generate", generate)
        training.run()
    return messages[0]


def on_ranks(folder: str) -> dict[str, Any]:
    results: dict[str, Any] = {case: previewed(Path(folder) / case, case) for case in CASES}
    return {**results, "failing": failing(Path(folder) / "failing")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("previews")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return run_ranks(on_ranks, str(folder), ranks=2, seconds=400.0)


@pytest.mark.parametrize("case", CASES)
def test_each_rank_samples_its_prompts_from_the_shards(
    folder: Path, two: list[dict[str, Any]], case: str
) -> None:
    """The images of a whole model, and training that does not know of them."""
    for rank, prompts in zip(two, (2, 1), strict=True):
        assert len(rank[case]["errors"]) == prompts
        assert max(rank[case]["errors"]) < 1e-5
        assert rank[case]["same"]
    assert (folder / case / "samples" / "step-00000003.png").is_file()


def test_a_preview_that_fails_on_one_rank(two: list[dict[str, Any]]) -> None:
    assert "no evaluation: rank 1: no such size" in two[0]["failing"]
