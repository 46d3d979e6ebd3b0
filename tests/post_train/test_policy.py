"""Predictions behind cached prompts: one call of the model, guidance of a batch of images."""

from __future__ import annotations

import random

import pytest
import torch

from neounify.cache import SequenceCache
from neounify.engine.sequences import ModelInput
from neounify.engine.understanding import forward_und
from neounify.flow.guidance import Branch, Guidance, Norm
from neounify.model import NeoUnify, Text
from neounify.model.layout import Grid
from neounify.post_train.policy import GuidedImages, Prefixes
from support.models import random_config, random_model

IMAGES, GRID = 3, Grid(2, 2)


@pytest.fixture(scope="module")
def model() -> NeoUnify:
    return random_model(random_config(random.Random(0)), 0, torch.float32)


@pytest.fixture(scope="module")
def prefixes(model: NeoUnify) -> Prefixes:
    branches: tuple[Branch, ...] = ("cond", "uncond")
    caches: dict[Branch, SequenceCache] = {}
    for length, branch in enumerate(branches, start=2):
        cache = SequenceCache(model.config, length, dtype=torch.float32, device=model.device)
        with torch.no_grad():
            forward_und(model, [ModelInput(cache, (Text(length),), range(length))])
        caches[branch] = cache
    return caches


def noise(model: NeoUnify) -> torch.Tensor:
    shape = (IMAGES, GRID.length, model.config.token_width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_the_model_is_called_as_a_whole(model: NeoUnify, prefixes: Prefixes) -> None:
    """What shards a model hooks onto its call."""
    calls: list[object] = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(0))
    guided = GuidedImages(model, GRID, [prefixes] * IMAGES, Guidance(text=3.0))
    guided.clean(model, noise(model), 0.5)
    handle.remove()
    assert len(calls) == 1


@pytest.mark.parametrize("norm", ["none", "global", "channel", "cfg_zero_star"])
@pytest.mark.parametrize("t", [0.0, 0.5, 0.875])
def test_one_time_for_all_is_that_time_for_each(
    model: NeoUnify, prefixes: Prefixes, norm: Norm, t: float
) -> None:
    guidance = Guidance(text=3.0, norm=norm, interval=(0.0, 0.6))
    guided = GuidedImages(model, GRID, [prefixes] * IMAGES, guidance)
    z = noise(model)
    each = guided.velocity(model, z, torch.full((IMAGES,), t))
    assert torch.equal(guided.velocity(model, z, t), each)
    assert torch.equal(guided.clean(model, z, t), z + (1 - t) * each)
    assert bool(each.any()) == (norm != "cfg_zero_star" or t > 0)


def test_one_time_for_all_is_combined_once_and_not_read_back(
    model: NeoUnify, prefixes: Prefixes, monkeypatch: pytest.MonkeyPatch
) -> None:
    combined: list[torch.Size] = []
    combine = Guidance.combine

    def counted(self: Guidance, v: dict[Branch, torch.Tensor], *, first_step: bool) -> torch.Tensor:
        combined.append(v["cond"].shape)
        return combine(self, v, first_step=first_step)

    def read(self: torch.Tensor) -> None:
        raise AssertionError("a tensor is read on the host")

    guided = GuidedImages(model, GRID, [prefixes] * IMAGES, Guidance(text=3.0))
    z = noise(model)
    monkeypatch.setattr(Guidance, "combine", counted)
    for name in ("tolist", "item", "__float__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, read)
    guided.velocity(model, z, 0.5)
    monkeypatch.undo()
    assert combined == [z.shape]
