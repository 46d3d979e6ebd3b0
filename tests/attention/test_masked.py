"""Masked attention in half precision on a CPU: how far rounded scores may lead."""

from __future__ import annotations

import pytest
import torch

from neounify.attention.padded import masked_attention


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_rounded_scores_stay_within_a_bound(dtype: torch.dtype, bound: float) -> None:
    """Against float64 on the same inputs, with scores up to about 11, per unit of the values."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, rows: int, size: float = 1.0) -> torch.Tensor:
        return (torch.randn(8, heads, rows, 64, generator=generator) * size).to(dtype)

    q, k, v = draw(8, 40, 2.0), draw(4, 120), draw(4, 120)
    mask = torch.rand(8, 1, 40, 120, generator=generator) < 0.8
    mask[..., 0] = True
    got = masked_attention(q, k, v, mask)
    wide_k, wide_v = (x.double().repeat_interleave(2, dim=1) for x in (k, v))
    scores = (q.double() @ wide_k.transpose(-1, -2)) / 8
    assert 9 < scores.abs().max() < 13
    expected = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ wide_v
    assert got.dtype == dtype
    assert float((got.double() - expected).abs().max() / v.abs().max()) < bound
