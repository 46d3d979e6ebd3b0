"""Times of a sampler and the strength of the noise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neounify.config import FlowConfig
from neounify.flow.guidance import Guidance
from neounify.flow.path import cut_times, initial_noise, noise_scale, shift_time, timesteps

STEPS = st.integers(1, 200)
SHIFTS = st.floats(0.2, 12)


@given(STEPS, SHIFTS)
def test_times_rise_from_noise_to_data(steps: int, shift: float) -> None:
    times = timesteps(steps, shift)
    assert times.shape == (steps + 1,)
    assert times.dtype == torch.float32
    assert float(times[0]) == pytest.approx(0, abs=2e-7)
    assert float(times[-1]) == 1
    assert (times.diff() > 0).all()


@pytest.mark.parametrize("shift", [1.32, 2.14, 4.03])
def test_times_start_at_zero_whatever_the_shift(shift: float) -> None:
    """A first time below 0 would lie outside a guidance interval that starts at 0."""
    times = timesteps(8, shift)
    assert Guidance(text=4.0).acts_at(float(times[0]))
    assert float(times[0]) == 0


@given(STEPS, SHIFTS)
def test_times_follow_the_formula(steps: int, shift: float) -> None:
    times = timesteps(steps, shift).tolist()
    for k, time in enumerate(times):
        u = 1 - k / steps
        assert time == pytest.approx(1 - shift * u / (1 + (shift - 1) * u), abs=1e-6)


@given(STEPS, SHIFTS, st.floats(0.0001, 0.5))
def test_times_from_a_first_one(steps: int, shift: float, first: float) -> None:
    """`first` is shifted as the others are, and the end is exact."""
    times = timesteps(steps, shift, first)
    u = 1 - first
    assert float(times[0]) == pytest.approx(1 - shift * u / (1 + (shift - 1) * u), abs=1e-6)
    assert float(times[-1]) == 1
    assert (times.diff() > 0).all()


@given(STEPS, SHIFTS, st.integers(1, 2000))
def test_cut_times(steps: int, shift: float, grid: int) -> None:
    times = timesteps(steps, shift, 0.001).tolist()
    for t, cut in zip(times, cut_times(times, grid), strict=True):
        if 1 - t < 1 / grid:
            assert cut == t
        else:
            count = round((1 - cut) * grid)
            assert cut == 1 - count / grid
            assert count / grid <= 1 - t < (count + 1) / grid
    assert cut_times(times, 0) == times


@pytest.mark.parametrize(("steps", "same"), [(112, False), (113, True), (1000, True)])
def test_cut_times_may_be_equal(steps: int, same: bool) -> None:
    """From 113 steps on the published code loses its place in this schedule."""
    cut = cut_times(timesteps(steps, 10.0, 0.001).tolist(), 1000)
    assert (cut[0] == cut[1]) is same
    assert cut == sorted(cut)


@given(STEPS)
def test_no_shift_is_linear(steps: int) -> None:
    torch.testing.assert_close(timesteps(steps, 1.0), torch.linspace(0, 1, steps + 1))


@given(st.floats(0.001, 0.999), st.floats(1.01, 12))
def test_a_shift_moves_towards_noise_and_its_inverse_back(t: float, shift: float) -> None:
    there = shift_time(torch.tensor(t, dtype=torch.float64), shift)
    assert there < t
    assert float(shift_time(there, 1 / shift)) == pytest.approx(t, abs=1e-9)


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        ("fixed", 1.5),
        ("resolution", 1.5 * math.sqrt(5)),
        ("dynamic", 1.5 * math.sqrt(5)),
        ("dynamic_sqrt", math.sqrt(1.5 * math.sqrt(5))),
    ],
)
def test_noise_scale_modes(mode: str, wanted: float) -> None:
    flow = FlowConfig(noise_scale=1.5, noise_scale_mode=mode, noise_scale_base_tokens=20)  # type: ignore[arg-type]
    assert noise_scale(100, flow) == pytest.approx(wanted)


def test_the_cap_is_for_sampling_only() -> None:
    flow = FlowConfig()
    assert noise_scale(64 * 64, flow) == 8
    assert noise_scale(64 * 100, flow) == 8
    assert noise_scale(64 * 100, flow, cap=False) == 10
    assert noise_scale(64 * 100, FlowConfig(noise_scale_max=16.0)) == 10
    assert noise_scale(6, flow) == pytest.approx(math.sqrt(6 / 64))


def test_initial_noise_is_one_scaled_draw() -> None:
    shape = (2, 3, 4, 6)
    noise = initial_noise(shape, 2.5, torch.Generator().manual_seed(11))
    again = torch.randn(*shape, generator=torch.Generator().manual_seed(11))
    assert noise.dtype == torch.float32
    assert torch.equal(noise, again * 2.5)
