"""Blocks of GGUF files are decoded and encoded as the `gguf` package does, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from neounify.quant.blocks import BLOCK_FORMATS, BlockFormat, BlockRows

gguf = pytest.importorskip("gguf", reason="needs the package gguf")

ENCODED = [name for name, format in BLOCK_FORMATS.items() if format.encode]


def _type(format: BlockFormat) -> Any:
    return gguf.GGMLQuantizationType(format.number)


def _random_blocks(format: BlockFormat, count: int) -> np.ndarray[Any, Any]:
    """Any bytes, but for scales: those that would be infinite or NaN get another exponent."""
    blocks = np.random.default_rng(0).integers(0, 256, (count, format.nbytes), dtype=np.uint8)
    with np.errstate(invalid="ignore"):
        values = gguf.quants.dequantize(blocks, _type(format))
    return blocks[np.isfinite(values).all(axis=1) & (np.abs(values).max(axis=1) < 1e30)]


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_a_format_is_named_and_sized_as_in_the_reference(name: str) -> None:
    format = BLOCK_FORMATS[name]
    assert _type(format).name == name
    assert gguf.GGML_QUANT_SIZES[_type(format)] == (format.elements, format.nbytes)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_values_are_those_of_the_reference(name: str) -> None:
    format = BLOCK_FORMATS[name]
    blocks = _random_blocks(format, 400)
    assert len(blocks) > 300
    expected = gguf.quants.dequantize(blocks, _type(format))
    actual = format.decode(torch.from_numpy(blocks))
    assert actual.shape == (len(blocks), format.elements)
    assert actual.dtype == torch.float32
    np.testing.assert_array_equal(actual.numpy(), expected)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_values_are_finite_where_the_scales_are(name: str) -> None:
    format = BLOCK_FORMATS[name]
    draw = np.random.default_rng(1)
    blocks = torch.from_numpy(draw.integers(0, 256, (2000, format.nbytes), dtype=np.uint8))
    finite = format.scales(blocks).isfinite().all(dim=1)
    assert torch.equal(finite, format.decode(blocks).isfinite().all(dim=1))
    assert 0.7 < float(finite.float().mean()) < 1


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_rows_are_decoded_alone(name: str) -> None:
    format = BLOCK_FORMATS[name]
    stored = torch.from_numpy(_random_blocks(format, 200)[:64])
    rows, whole = stored.view(16, -1), format.decode(stored).view(16, -1)
    for start, stop in ((0, 1), (1, 3), (14, 16), (0, 16)):
        assert torch.equal(
            BlockRows(format).dequantise({"weight": rows[start:stop]}), whole[start:stop]
        )


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0])
def test_encoded_bytes_are_those_of_the_reference(name: str, scale: float) -> None:
    format = BLOCK_FORMATS[name]
    assert format.encode is not None
    values = torch.randn(500, 32, generator=torch.Generator().manual_seed(1)) * scale
    values[3] = 0
    values[4] = scale
    values[5, ::2] = 0
    expected = gguf.quants.quantize(values.numpy(), _type(format))
    np.testing.assert_array_equal(format.encode(values).numpy(), expected)


@pytest.mark.parametrize(
    ("name", "error"),
    [("Q8_0", 0.006), ("Q5_1", 0.04), ("Q5_0", 0.05), ("Q4_1", 0.08), ("Q4_0", 0.1)],
)
def test_the_error_of_normal_weights(name: str, error: float) -> None:
    format = BLOCK_FORMATS[name]
    assert format.encode is not None
    values = torch.randn(500, 32, generator=torch.Generator().manual_seed(2))
    decoded = format.decode(format.encode(values))
    relative = float((decoded - values).norm() / values.norm())
    assert error / 3 < relative < error


def test_q8_0_of_what_it_decodes_to_is_the_same() -> None:
    format = BLOCK_FORMATS["Q8_0"]
    assert format.encode is not None
    generator = torch.Generator().manual_seed(3)
    sizes = 10.0 ** torch.randint(-12, 6, (5000, 1), generator=generator)
    blocks = format.encode(torch.randn(5000, 32, generator=generator) * sizes)
    assert torch.equal(format.encode(format.decode(blocks)), blocks)
