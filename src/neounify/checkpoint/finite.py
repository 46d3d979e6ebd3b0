"""Whether weights are numbers at all."""

import math

import torch
from torch import Tensor


def all_finite(values: Tensor) -> bool:
    """False when any value is NaN or infinite. Any floating dtype, any shape."""
    if values.numel() == 0:
        return True
    if values.dtype.itemsize == 1:
        values = values.to(torch.bfloat16)
    # The extremes carry NaN and infinity along and need no memory, unlike isfinite().
    return all(math.isfinite(float(bound)) for bound in values.aminmax())
