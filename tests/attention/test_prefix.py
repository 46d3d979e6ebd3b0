"""Noisy images read side by side see what each sees alone."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from neounify.attention import AttentionPlan, backends
from neounify.attention.backends import PrefixAttention
from neounify.cache import SequenceCache
from neounify.engine.sequences import ModelInput
from neounify.engine.understanding import forward_und
from neounify.model import Layout, NeoUnify, Noise, Text
from neounify.model.parts import GEN
from support.attention import plan
from support.models import random_config

CPU = torch.device("cpu")
GRIDS = ((2, 3), (1, 1), (2, 3), (3, 4))


@pytest.fixture(scope="module", params=[0, 1, 2, 3])
def model(request: pytest.FixtureRequest) -> NeoUnify:
    torch.manual_seed(request.param)
    return NeoUnify(random_config(random.Random(request.param))).eval().requires_grad_(False)


@pytest.fixture
def caches(model: NeoUnify) -> list[SequenceCache]:
    """Of 7, 1, 12 and again these 7 tokens."""
    built = []
    for length in (7, 1, 12):
        cache = SequenceCache(model.config, 3, dtype=torch.float32, device=CPU)
        forward_und(model, [ModelInput(cache, (Text(length),), [n % 29 for n in range(length)])])
        built.append(cache)
    return [*built, built[0]]


def hidden(model: NeoUnify, layout: Layout, noise: Tensor, attend: AttentionPlan) -> Tensor:
    return model.backbone(layout, {GEN: noise}, attend)[GEN]


def test_a_batch_computes_what_each_does_alone(
    model: NeoUnify, caches: list[SequenceCache]
) -> None:
    layout = Layout(c.document(Noise(*grid)) for c, grid in zip(caches, GRIDS, strict=True))
    lengths = [rows * columns for rows, columns in GRIDS]
    attend = PrefixAttention(layout, caches, CPU)
    kept = [cache.keys.clone() for cache in caches]
    for _ in range(2):  # the second step must find nothing of the first
        noise = torch.randn(sum(lengths), model.config.hidden_size)
        together = hidden(model, layout, noise, attend).split(lengths)
        torch.testing.assert_close(
            torch.cat(together), hidden(model, layout, noise, plan(layout, caches, "blocks"))
        )
        for x, joint, cache, grid in zip(
            noise.split(lengths), together, caches, GRIDS, strict=True
        ):
            alone = Layout([cache.document(Noise(*grid))])
            torch.testing.assert_close(
                joint, hidden(model, alone, x, plan(alone, [cache], "blocks"))
            )
            single = PrefixAttention(alone, [cache], CPU)
            torch.testing.assert_close(joint, hidden(model, alone, x, single))
    for cache, before in zip(caches, kept, strict=True):
        assert torch.equal(cache.keys[:, :, : cache.length], before[:, :, : cache.length])


@pytest.mark.parametrize("broken", range(3))
def test_nan_in_one_prefix_or_image_reaches_no_other(
    model: NeoUnify, caches: list[SequenceCache], broken: int
) -> None:
    caches = caches[:3]
    lengths = [rows * columns for rows, columns in GRIDS[:3]]
    layout = Layout(c.document(Noise(*grid)) for c, grid in zip(caches, GRIDS, strict=False))
    noise = torch.randn(sum(lengths), model.config.hidden_size)
    expected = hidden(model, layout, noise, PrefixAttention(layout, caches, CPU)).split(lengths)
    bad = noise.clone()
    bad.split(lengths)[broken].fill_(float("nan"))
    actual = hidden(model, layout, bad, PrefixAttention(layout, caches, CPU)).split(lengths)
    caches[broken].keys.fill_(float("nan"))
    caches[broken].values.fill_(float("nan"))
    behind = hidden(model, layout, noise, PrefixAttention(layout, caches, CPU)).split(lengths)
    for index in range(3):
        for output in (actual[index], behind[index]):
            if index == broken:
                assert not torch.isfinite(output).any()
            else:
                torch.testing.assert_close(output, expected[index])


def test_gradients(model: NeoUnify, caches: list[SequenceCache]) -> None:
    """Two steps behind one plan have the gradients of the reference, and caches none."""
    layout = Layout(c.document(Noise(*grid)) for c, grid in zip(caches, GRIDS, strict=True))
    lengths = [rows * columns for rows, columns in GRIDS]
    noise = torch.randn(2, sum(lengths), model.config.hidden_size)
    gradients = []
    for attend in (PrefixAttention(layout, caches, CPU), plan(layout, caches, "blocks")):
        x = noise.clone().requires_grad_()
        steps = [hidden(model, layout, step, attend) for step in x]
        (steps[0].square().sum() + steps[1].sin().sum()).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
    assert not any(cache.keys.requires_grad for cache in caches)


def test_half_precision(model: NeoUnify, caches: list[SequenceCache]) -> None:
    """Company changes nothing beyond the rounding of the numbers themselves."""
    half = NeoUnify(model.config).eval().requires_grad_(False).bfloat16()
    half.load_state_dict(model.state_dict())
    for cache in caches[:3]:
        cache.keys, cache.values = cache.keys.bfloat16(), cache.values.bfloat16()
    layout = Layout(c.document(Noise(2, 3)) for c in caches)
    noise = torch.randn(24, model.config.hidden_size).bfloat16()
    together = hidden(half, layout, noise, PrefixAttention(layout, caches, CPU))
    for number, cache in enumerate(caches):
        rows = noise[6 * number : 6 * number + 6]
        layout = Layout([cache.document(Noise(2, 3))])
        alone = hidden(half, layout, rows, PrefixAttention(layout, [cache], CPU))
        torch.testing.assert_close(together[6 * number : 6 * number + 6], alone, atol=0.05, rtol=0)


@pytest.mark.parametrize("longest", [3, 8, 13, 14])
def test_images_that_see_much_attend_block_by_block(
    model: NeoUnify, caches: list[SequenceCache], longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same call, whichever they are; gradients as well."""
    layout = Layout(c.document(Noise(*grid)) for c, grid in zip(caches, GRIDS, strict=True))
    noise = torch.randn(layout[GEN].length, model.config.hidden_size)
    results = []
    for name in ("blocks", "auto"):
        monkeypatch.setattr(backends, "MAX_PREFIX", longest)
        attend = plan(layout, caches, name)
        assert isinstance(attend, PrefixAttention) == (name == "auto")
        x = noise.clone().requires_grad_()
        output = hidden(model, layout, x, attend)
        output.square().sum().backward()
        results.append((output.detach(), x.grad))
    torch.testing.assert_close(results[1], results[0])


def test_what_it_does_not_serve(
    caches: list[SequenceCache], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text, two images of one document, an image that sees too much, and no caches."""
    cache = caches[0]
    for spans in ((Text(1),), (Text(1), Noise(1, 1)), (Noise(1, 1), Noise(1, 1))):
        assert PrefixAttention.plan(Layout([cache.document(*spans)]), [cache], CPU) is None
    image = Layout([cache.document(Noise(2, 3))])
    assert PrefixAttention.plan(image, None, CPU) is None
    for longest, served in ((13, True), (12, False)):
        monkeypatch.setattr(backends, "MAX_PREFIX", longest)
        assert (PrefixAttention.plan(image, [cache], CPU) is not None) == served
