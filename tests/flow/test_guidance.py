"""Classifier-free guidance against its formulas, and when it acts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neounify.errors import RequestError
from neounify.flow.guidance import Branch, Guidance, Norm, Velocities

SEEDS = st.integers(0, 999)
TOKENS, VALUES = 5, 12


def _velocities(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    c, i, u = torch.randn(3, TOKENS, VALUES, generator=generator, dtype=torch.float64)
    return c, i, u


def _combine(guidance: Guidance, seed: int = 0, *, first_step: bool = False) -> Tensor:
    """Only the branches that are asked for are there."""
    c, i, u = _velocities(seed)
    table: dict[Branch, Tensor] = {"cond": c, "image": i, "uncond": u}
    needed: Velocities = {branch: table[branch] for branch in guidance.branches()}
    return guidance.combine(needed, first_step=first_step)


# --- text to image -------------------------------------------------------------------------------


@given(st.floats(1.01, 20), SEEDS, st.booleans())
def test_text_to_image(g: float, seed: int, first_step: bool) -> None:
    c, _, u = _velocities(seed)
    guidance = Guidance(text=g)
    assert guidance.branches() == ("cond", "uncond")
    actual = _combine(guidance, seed, first_step=first_step)
    torch.testing.assert_close(actual, u + g * (c - u))


@pytest.mark.parametrize("g", [0.0, 0.5, 1.0])
def test_text_to_image_without_guidance(g: float) -> None:
    guidance = Guidance(text=g, image=3.0)
    assert guidance.branches() == ("cond",)
    assert not guidance.acts_at(0.5)


# --- editing -------------------------------------------------------------------------------------

CASES: list[tuple[float, float, tuple[str, ...]]] = [
    (1.0, 1.0, ("cond",)),
    (4.0, 1.0, ("cond", "image")),
    (0.5, 1.0, ("cond", "image")),
    (3.0, 3.0, ("cond", "uncond")),
    (4.0, 2.0, ("cond", "image", "uncond")),
    (1.0, 2.0, ("cond", "image", "uncond")),
]


@pytest.mark.parametrize(("g", "m", "branches"), CASES)
def test_editing(g: float, m: float, branches: tuple[str, ...]) -> None:
    c, i, u = _velocities()
    guidance = Guidance(text=g, image=m, editing=True)
    assert guidance.branches() == branches
    assert guidance.acts_at(0.5) == (branches != ("cond",))
    if g == 1 and m == 1:
        wanted = c
    elif m == 1:
        wanted = i + g * (c - i)
    elif g == m:
        wanted = u + g * (c - u)
    else:
        wanted = u + g * (c - i) + m * (i - u)
    torch.testing.assert_close(_combine(guidance), wanted)


def test_the_special_cases_of_editing_agree_with_the_general_formula() -> None:
    """At m = 1 and at g = m the general formula needs one branch fewer, and says the same."""
    c, i, u = _velocities()
    for g, m in ((4.0, 1.0), (3.0, 3.0)):
        general = u + g * (c - i) + m * (i - u)
        torch.testing.assert_close(_combine(Guidance(text=g, image=m, editing=True)), general)


# --- norms ---------------------------------------------------------------------------------------


@given(st.floats(1.01, 20), SEEDS)
def test_the_global_norm_is_never_longer_than_the_conditional(g: float, seed: int) -> None:
    c, _, u = _velocities(seed)
    plain = u + g * (c - u)
    actual = _combine(Guidance(text=g, norm="global"), seed)
    assert float(actual.norm()) <= float(c.norm()) * (1 + 1e-9)
    ratio = min(1.0, float(c.norm()) / (float(plain.norm()) + 1e-8))
    torch.testing.assert_close(actual, plain * ratio)


@given(st.floats(1.01, 20), SEEDS)
def test_the_channel_norm_works_token_by_token(g: float, seed: int) -> None:
    c, _, u = _velocities(seed)
    plain = u + g * (c - u)
    actual = _combine(Guidance(text=g, norm="channel"), seed)
    for token in range(TOKENS):
        ratio = min(1.0, float(c[token].norm()) / (float(plain[token].norm()) + 1e-8))
        torch.testing.assert_close(actual[token], plain[token] * ratio)


@pytest.mark.parametrize("norm", ["global", "channel"])
def test_norms_do_not_lengthen(norm: Norm) -> None:
    """A guided velocity that is shorter than the conditional one stays as it is."""
    c = torch.randn(TOKENS, VALUES, generator=torch.Generator().manual_seed(0))
    guidance = Guidance(text=1.5, norm=norm)
    actual = guidance.combine({"cond": c, "uncond": 1.5 * c}, first_step=False)
    torch.testing.assert_close(actual, 0.75 * c)


@pytest.mark.parametrize(("g", "m"), [(4.0, 1.0), (1.0, 3.0), (3.0, 3.0), (4.0, 2.0), (0.5, 3.0)])
@pytest.mark.parametrize("norm", ["global", "channel"])
def test_norms_of_editing(g: float, m: float, norm: Norm) -> None:
    c, _, _ = _velocities()
    plain = _combine(Guidance(text=g, image=m, editing=True))
    actual = _combine(Guidance(text=g, image=m, editing=True, norm=norm))
    if norm == "global":
        ratio = (c.norm() / plain.norm()).clamp(max=1)
    else:
        ratio = (c.norm(dim=1, keepdim=True) / plain.norm(dim=1, keepdim=True)).clamp(max=1)
    torch.testing.assert_close(actual, plain * ratio)


@pytest.mark.parametrize(("g", "m"), [(0.5, 1.0), (0.2, 0.7), (0.5, 0.5)])
def test_no_norm_when_neither_guidance_is_above_one(g: float, m: float) -> None:
    c, i, u = _velocities()
    velocities: Velocities = {"cond": c, "image": 9 * i, "uncond": 9 * u}  # longer than c
    plain = Guidance(text=g, image=m, editing=True).combine(velocities, first_step=False)
    assert plain.norm() > c.norm()
    norms: tuple[Norm, ...] = ("global", "channel")
    for norm in norms:
        guidance = Guidance(text=g, image=m, editing=True, norm=norm)
        assert torch.equal(guidance.combine(velocities, first_step=False), plain)


@given(st.floats(1.01, 20), SEEDS)
def test_zero_star_projects_the_unconditional_velocity(g: float, seed: int) -> None:
    c, _, u = _velocities(seed)
    a = sum(x * y for x, y in zip(c.flatten().tolist(), u.flatten().tolist(), strict=True))
    a /= sum(y * y for y in u.flatten().tolist()) + 1e-8
    guidance = Guidance(text=g, norm="cfg_zero_star")
    torch.testing.assert_close(_combine(guidance, seed), a * u + g * (c - a * u))
    # What the projection leaves is at right angles to u.
    assert float(((c - a * u) * u).sum()) == pytest.approx(0, abs=1e-6)


def test_zero_star_begins_with_nothing() -> None:
    guidance = Guidance(text=4.0, norm="cfg_zero_star")
    assert not _combine(guidance, first_step=True).any()
    assert _combine(guidance, first_step=False).any()


def test_zero_star_with_a_zero_unconditional_velocity() -> None:
    c = torch.ones(TOKENS, VALUES)
    guidance = Guidance(text=4.0, norm="cfg_zero_star")
    actual = guidance.combine({"cond": c, "uncond": torch.zeros_like(c)}, first_step=False)
    torch.testing.assert_close(actual, 4 * c)


# --- when it acts --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "acts", "rests"),
    [
        ((0.0, 1.0), [0.0, 0.5, 1.0], []),
        ((0.2, 0.6), [0.2, 0.4, 0.6], [0.0, 0.19, 0.61, 1.0]),
        ((0.0, 0.4), [0.0, 0.4], [0.41]),
        ((0.3, 0.3), [0.3], [0.29, 0.31]),
    ],
)
def test_the_interval_of_text_to_image_has_both_ends(
    interval: tuple[float, float], acts: list[float], rests: list[float]
) -> None:
    for published in (False, True):  # the switch is about editing
        guidance = Guidance(text=4.0, interval=interval, published_interval=published)
        assert all(guidance.acts_at(t) for t in acts)
        assert not any(guidance.acts_at(t) for t in rests)


def test_an_interval_with_an_open_end() -> None:
    """0.95 ≥ 1 - t > 0.5 in the time of PixelUMM."""
    guidance = Guidance(text=4.0, interval=(0.05, 0.5), open_end=True)
    assert all(guidance.acts_at(t) for t in (0.05, 0.3, 0.4999))
    assert not any(guidance.acts_at(t) for t in (0.0, 0.0499, 0.5, 1.0))
    assert not Guidance(text=4.0, open_end=True).acts_at(1.0)


@pytest.mark.parametrize(
    ("interval", "acts", "rests"),
    [
        ((0.0, 1.0), [0.0, 0.5, 0.999], [1.0]),
        ((0.2, 0.6), [0.21, 0.59], [0.0, 0.2, 0.6, 1.0]),
        ((0.0, 0.4), [0.0, 0.39], [0.4, 0.9]),
    ],
)
def test_the_interval_of_editing_is_open_but_for_zero(
    interval: tuple[float, float], acts: list[float], rests: list[float]
) -> None:
    guidance = Guidance(text=4.0, editing=True, interval=interval)
    assert all(guidance.acts_at(t) for t in acts)
    assert not any(guidance.acts_at(t) for t in rests)


@pytest.mark.parametrize(
    ("interval", "acts", "rests"),
    [
        ((0.0, 0.4), [0.0, 0.39, 0.4, 0.9, 1.0], []),
        ((0.2, 0.6), [0.21, 0.59], [0.0, 0.2, 0.6, 1.0]),
    ],
)
def test_the_published_interval_of_editing_never_ends_when_it_starts_at_zero(
    interval: tuple[float, float], acts: list[float], rests: list[float]
) -> None:
    guidance = Guidance(text=4.0, editing=True, interval=interval, published_interval=True)
    assert all(guidance.acts_at(t) for t in acts)
    assert not any(guidance.acts_at(t) for t in rests)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"interval": (0.5, 0.4)}, r"guidance_interval \(0.5, 0.4\) must be 0 <= low <= high <= 1"),
        ({"interval": (-0.1, 1.0)}, "guidance_interval"),
        ({"interval": (0.0, 1.1)}, "guidance_interval"),
        ({"interval": (float("nan"), 1.0)}, "guidance_interval"),
        ({"norm": "loud"}, "'loud' is unknown; known: none, global, channel, cfg_zero_star"),
        ({"norm": "cfg_zero_star", "editing": True}, "text-to-image only"),
        ({"text": -1.0}, "guidance must be from 0 to 1000, got -1"),
        ({"text": float("nan")}, "guidance must be from 0 to 1000, got nan"),
        ({"image": float("inf")}, "image_guidance must be from 0 to 1000, got inf"),
        ({"text": 1e9}, "guidance must be from 0 to 1000, got 1000000000.0"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Guidance(**values)
