"""The path between noise and data, forwards and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neounify.flow.path import clean_from_velocity, noisy, sampling_t_eps, velocity

TIMES = st.floats(0, 1)
EPS = st.sampled_from([0.02, 0.05])


def _triple(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, noise, v = torch.randn(3, 2, 4, 3, generator=generator, dtype=torch.float64)
    return x, noise, v


@given(TIMES, EPS, st.integers(0, 99))
def test_velocity_and_clean_image_are_inverse(t: float, t_eps: float, seed: int) -> None:
    x, z, v = _triple(seed)
    torch.testing.assert_close(clean_from_velocity(velocity(x, z, t, t_eps), z, t, t_eps), x)
    torch.testing.assert_close(velocity(clean_from_velocity(v, z, t, t_eps), z, t, t_eps), v)


@given(st.floats(0, 0.97), st.floats(0.1, 8), st.integers(0, 99))
def test_the_velocity_at_a_point_of_the_path_is_that_of_the_path(
    t: float, scale: float, seed: int
) -> None:
    """dz/dt = x - σ·ε, as long as 1 - t is above the clamp."""
    x, noise, _ = _triple(seed)
    z = noisy(x, noise, t, scale)
    torch.testing.assert_close(velocity(x, z, t, 0.02), x - scale * noise)


def test_ends_of_the_path() -> None:
    x, noise, _ = _triple(0)
    assert torch.equal(noisy(x, noise, 0.0, 3.0), 3.0 * noise)
    assert torch.equal(noisy(x, noise, 1.0, 3.0), x)
    torch.testing.assert_close(noisy(x, noise, 0.25, 2.0), 0.25 * x + 1.5 * noise)


@pytest.mark.parametrize("t_eps", [0.02, 0.05])
def test_the_clamp_near_the_end(t_eps: float) -> None:
    x, z, _ = _triple(1)
    inside, edge = 1 - 2 * t_eps, 1 - t_eps / 2
    torch.testing.assert_close(velocity(x, z, inside, t_eps), (x - z) / (2 * t_eps))
    torch.testing.assert_close(velocity(x, z, edge, t_eps), (x - z) / t_eps)
    torch.testing.assert_close(velocity(x, z, 1.0, t_eps), (x - z) / t_eps)


def test_times_may_be_tensors() -> None:
    x, z, _ = _triple(2)
    times = torch.tensor([0.3, 0.999], dtype=torch.float64)[:, None, None]
    scales = torch.tensor([2.0, 5.0], dtype=torch.float64)[:, None, None]
    for function, extra in ((velocity, 0.02), (clean_from_velocity, 0.02)):
        together = function(x, z, times, extra)
        alone = [function(x[i], z[i], t, extra) for i, t in enumerate([0.3, 0.999])]
        torch.testing.assert_close(together, torch.stack(alone))
    alone = [noisy(x[0], z[0], 0.3, 2.0), noisy(x[1], z[1], 0.999, 5.0)]
    torch.testing.assert_close(noisy(x, z, times, scales), torch.stack(alone))


@pytest.mark.parametrize(("last_t", "t_eps"), [(0.5, 0.02), (0.9875, 0.0125), (0.999, 0.001)])
def test_the_sampling_clamp_is_no_longer_than_the_last_step(last_t: float, t_eps: float) -> None:
    assert sampling_t_eps(last_t) == pytest.approx(t_eps)
    x, z, _ = _triple(4)
    end = z + (1 - last_t) * velocity(x, z, last_t, sampling_t_eps(last_t))
    torch.testing.assert_close(end, x)
