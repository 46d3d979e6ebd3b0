"""Tubes: their tokens and back, and what fills the last one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from neounify.image.clips import rows_to_frames, tube_rows
from support import reference


@pytest.mark.parametrize(
    ("frames", "per_tube", "height", "width", "side"), [(4, 4, 4, 6, 2), (6, 3, 6, 3, 3)]
)
def test_tubes_equal_the_reference(
    frames: int, per_tube: int, height: int, width: int, side: int
) -> None:
    clip = np.random.default_rng(0).normal(size=(frames, 3, height, width))
    wanted = reference.tube_rows(clip, per_tube, side)
    rows = tube_rows(torch.from_numpy(clip), side, per_tube)
    np.testing.assert_array_equal(rows.numpy(), wanted)
    back = rows_to_frames(rows, height // side, width // side, side, per_tube)
    np.testing.assert_array_equal(
        back.numpy(), reference.frames_of(wanted, per_tube, height, width, side)
    )
    np.testing.assert_array_equal(back.numpy(), clip)


def test_what_is_no_tube_is_refused() -> None:
    with pytest.raises(ValueError, match="5 frames of 6x4 pixels: frames must be a multiple of 4"):
        tube_rows(torch.zeros(5, 3, 4, 6), 2, 4)
    with pytest.raises(ValueError, match="sides of 4"):
        tube_rows(torch.zeros(4, 3, 4, 6), 4, 4)
    with pytest.raises(ValueError, match=r"tokens \(5, 48\) are no tubes of 2 x 1"):
        rows_to_frames(torch.zeros(5, 48), 2, 1, 2, 4)
