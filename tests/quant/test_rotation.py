"""The rotation, against its definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from neounify.quant.rotation import group_size, hadamard, is_group, rotate_groups

FOUR = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2


@pytest.mark.parametrize("power", [1, 2, 3, 4])
def test_the_matrix_is_a_kronecker_power(power: int) -> None:
    expected: np.ndarray[Any, Any] = np.ones((1, 1))
    for _ in range(power):
        expected = np.kron(expected, FOUR)
    matrix = hadamard(4**power, torch.device("cpu")).double().numpy()
    np.testing.assert_array_equal(matrix, expected)
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_allclose(matrix @ matrix, np.eye(4**power), atol=1e-12)


@pytest.mark.parametrize(
    ("channels", "size"), [(4096, 256), (12288, 256), (192, 64), (48, 16), (12, 4), (30, 1), (7, 1)]
)
def test_the_group_is_the_largest_power_of_four(channels: int, size: int) -> None:
    assert group_size(channels) == size
    assert is_group(size, channels) is (size > 1)


def test_groups_are_rotated_apart_and_back() -> None:
    rows = torch.randn(3, 48, generator=torch.Generator().manual_seed(0))
    rotated = rotate_groups(rows, 16)
    alone = rotate_groups(rows[:, 16:32], 16)
    torch.testing.assert_close(rotated[:, 16:32], alone)
    torch.testing.assert_close(rotate_groups(rotated, 16), rows)
    for wrong in (0, 2, 8, 32, 1024, -4):
        assert not is_group(wrong, 48)
