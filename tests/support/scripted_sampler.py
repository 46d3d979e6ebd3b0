"""Tokens that a test chooses in place of the sampler."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from neounify.decode.sampler import SampledToken, SamplingBatch


def script_sampler(monkeypatch: pytest.MonkeyPatch, choose: Callable[[Tensor], int]) -> None:
    """Let `choose` give the token for each row of logits [vocab], one row after the other."""

    def sample(self: SamplingBatch, logits: Tensor) -> list[SampledToken]:
        return [SampledToken(choose(row)) for row in logits]

    monkeypatch.setattr(SamplingBatch, "sample", sample)
