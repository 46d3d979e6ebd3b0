"""The small parts alone, each against the reference."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from neounify.model import Document, Layout, Noise
from neounify.model.embed import ScalarEmbed, sinusoids
from neounify.model.heads import FlowHead, PixelHead
from neounify.model.layout import Grid
from neounify.model.stream import (
    RMSNorm,
    attention_rotation,
    frequencies,
    patch_rotation,
    rotate,
    rotate_patches,
)
from support import reference
from support.models import (
    assert_close,
    embed_clean,
    exact,
    facts_of,
    random_config,
    random_model,
    to_tokens,
    weights_of,
)


def test_norm() -> None:
    norm = RMSNorm(6, 0.25).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(6) + 0.5)
    weight = norm.weight.detach().numpy()
    wanted = np.stack([reference.rms_norm(row, weight, 0.25) for row in x.numpy()])
    with exact(), torch.no_grad():
        assert_close(norm(x), wanted, 1e-14)
    assert_close(norm(x).detach(), wanted, 1e-6)


def test_norm_rounds_before_the_weight() -> None:
    """In bfloat16 the normalised vector is rounded first and then multiplied."""
    norm = RMSNorm(64, 1e-6)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.5)
    norm = norm.bfloat16().requires_grad_(False)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    wide = x.float()
    unit = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(norm(x), norm.weight * unit.bfloat16())
    assert not torch.equal(norm(x), (norm.weight.float() * unit).bfloat16())


@pytest.mark.parametrize("d", [8, 16, 40])
def test_rotation_of_heads(d: int) -> None:
    numbers = np.random.default_rng(d)
    positions = numbers.integers(0, 30, size=(7, 3))
    x = numbers.normal(size=(7, 2, d))
    with exact():
        rotation = attention_rotation(
            torch.from_numpy(positions), d, theta=70.0, theta_hw=9.0, dtype=torch.float64
        )
        actual = rotate(torch.from_numpy(x), rotation)
    wanted = np.zeros_like(x)
    for token, (t, h, w) in enumerate(positions.tolist()):
        for head in range(2):
            parts = np.split(x[token, head], [d // 2, d // 2 + d // 4])
            wanted[token, head] = np.concatenate(
                [
                    reference.rotate_halves(parts[0], t, 70.0),
                    reference.rotate_halves(parts[1], h, 9.0),
                    reference.rotate_halves(parts[2], w, 9.0),
                ]
            )
    assert_close(actual, wanted, 1e-13)


def test_rotation_keeps_only_relative_places() -> None:
    """⟨R(p) a, R(q) b⟩ depends on p - q alone, along each axis."""
    a, b = torch.randn(2, 1, 1, 16, generator=torch.Generator().manual_seed(0)).double()

    def product(p: list[int], q: list[int]) -> float:
        with exact():
            turned = [
                rotate(
                    x,
                    attention_rotation(
                        torch.tensor([position]), 16, theta=50.0, theta_hw=6.0, dtype=torch.float64
                    ),
                )
                for x, position in ((a, p), (b, q))
            ]
        return float((turned[0] * turned[1]).sum())

    near, far = product([5, 2, 1], [3, 7, 4]), product([105, 12, 31], [103, 17, 34])
    assert near == pytest.approx(far, abs=1e-12)
    assert abs(near - product([5, 2, 1], [3, 4, 7])) > 1e-3


def test_angles_are_float32_whatever_the_dtype() -> None:
    positions = torch.tensor([[200_001, 0, 0]])
    half = attention_rotation(positions, 8, theta=3.0, theta_hw=3.0, dtype=torch.bfloat16)
    full = attention_rotation(positions, 8, theta=3.0, theta_hw=3.0, dtype=torch.float32)
    assert torch.equal(half.cos, full.cos.bfloat16())
    assert full.cos[0, 0, 0].item() == pytest.approx(math.cos(200_001), abs=1e-6)


def test_frequencies() -> None:
    actual = frequencies(8, 16.0, torch.device("cpu"))
    assert actual.tolist() == pytest.approx([1.0, 1 / 2, 1 / 4, 1 / 8])


def test_rotation_of_patches() -> None:
    config = random_config(random.Random(0), vision_hidden_size=12)
    x = np.random.default_rng(0).normal(size=(3, 5, 12))
    rows, columns = torch.meshgrid(torch.arange(3), torch.arange(5), indexing="ij")
    with exact():
        places = torch.stack([rows.flatten(), columns.flatten()], dim=1)
        rotation = patch_rotation(places, 12, config.rope_theta_vision)
        actual = rotate_patches(torch.from_numpy(x).flatten(0, 1), rotation)
    assert_close(actual, reference.rotate_patches(x, facts_of(config)).reshape(15, 12), 1e-13)


@pytest.mark.parametrize(("seed", "channels"), [*((s, 3) for s in range(6)), (0, 1), (1, 4)])
def test_patch_embeddings(seed: int, channels: int) -> None:
    """Several images of different sizes in one call, both streams."""
    rng = random.Random(seed)
    sides = {"patch_size": rng.choice([4, 8]), "merge": 1 + seed % 3}
    config = random_config(rng, **sides, channels=channels)
    model = random_model(config, seed, torch.float64)
    weights, facts, side = weights_of(model), facts_of(config), config.token_size
    numbers = np.random.default_rng(seed)
    grids = [Grid(2, 3), Grid(1, 1), Grid(3, 1)]
    images = [numbers.normal(size=(channels, g.rows * side, g.columns * side)) for g in grids]
    with exact():
        und = embed_clean(model, [torch.from_numpy(image) for image in images])
        z = torch.from_numpy(np.concatenate([to_tokens(image, config) for image in images]))
        t, noise = torch.tensor([0.1, 0.5, 0.9]).double(), torch.tensor([0.3, 2.0, 1.0]).double()
        gen = model.embed_noisy(Layout([Document(tuple(map(Noise.of, grids)))]), z, t, noise)
    wanted = [reference.patch_embed(image, weights, False, facts) for image in images]
    assert_close(und, np.concatenate(wanted), 1e-12)
    wanted = []
    for image, at, scale in zip(images, t.tolist(), noise.tolist(), strict=True):
        extra = reference.scalar_embed(at, weights, "timestep_embedder")
        if config.flow.noise_scale_embedding:
            relative = scale / config.flow.noise_scale_max
            extra = extra + reference.scalar_embed(relative, weights, "noise_scale_embedder")
        wanted.append(reference.patch_embed(image, weights, True, facts) + extra)
    assert_close(gen, np.concatenate(wanted), 1e-12)


def test_scalar_embedding() -> None:
    values = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    wanted = np.stack([reference.sinusoids(value) for value in values.tolist()])
    with exact():
        assert_close(sinusoids(values), wanted, 1e-13)
    assert_close(sinusoids(values.float()), wanted, 1e-6)
    assert sinusoids(values.float()).dtype == torch.float32
    embed = ScalarEmbed(5).double().requires_grad_(False)
    weights = {
        f"fm_modules.x.mlp.{number}.{kind}": getattr(layer, kind).numpy()
        for number, layer in ((0, embed.linear1), (2, embed.linear2))
        for kind in ("weight", "bias")
    }
    wanted = np.stack([reference.scalar_embed(v, weights, "x") for v in values.tolist()])
    with exact():
        assert_close(embed(values, torch.float64), wanted, 1e-12)


@pytest.mark.parametrize("channels", [3, 1, 4])
@pytest.mark.parametrize("head", ["flow", "pixel"])
def test_image_heads(head: str, channels: int) -> None:
    """Several images, some of one size beside each other, as rows of (row, column, channel)."""
    rng = random.Random(3)
    config = random_config(rng, image_head=head, patch_size=4, merge=2, channels=channels)
    model = random_model(config, 0, torch.float64)
    assert isinstance(model.image_head, PixelHead if head == "pixel" else FlowHead)
    weights, side = weights_of(model), config.token_size
    grids = [Grid(2, 3), Grid(2, 3), Grid(3, 2), Grid(1, 1), Grid(2, 3)]
    hidden = torch.randn(25, config.hidden_size, dtype=torch.float64)
    wanted = []
    for grid, x in zip(grids, hidden.split([6, 6, 6, 1, 6]), strict=True):
        if head == "pixel":
            image = reference.pixel_head(
                x.numpy(), grid.rows, grid.columns, weights, (2, 2, side // 4)
            )
        else:
            image = reference.flow_head(x.numpy(), grid.rows, grid.columns, weights, side)
        wanted.append(to_tokens(image, config))
    assert_close(model.clean_prediction(hidden, grids), np.concatenate(wanted), 1e-12)
