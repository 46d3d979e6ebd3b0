"""Random numbers of training as functions of (seed, step, pack), so that resuming is exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

NOISE, DROPOUT = 0, 1
"""What numbers are drawn for; the streams of the two are independent."""


def pack_seed(seed: int, step: int, pack: int, purpose: int = NOISE) -> int:
    """A seed in [0, 2^63) for one pack of one step, independent of those of all others."""
    sequence = np.random.SeedSequence((seed, step, pack, purpose))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Seed torch's global generators, which dropout draws from; as before afterwards."""
    index = device.index if device.type == "cuda" else None
    with torch.random.fork_rng(devices=[] if index is None else [index]):
        torch.manual_seed(seed)
        yield
