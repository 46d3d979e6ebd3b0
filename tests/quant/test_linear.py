"""Quantised layers compute what their codes mean, by every backend, alone and in a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from neounify.errors import RequestError
from neounify.quant import backends
from neounify.quant.backends import (
    FEW_ROWS,
    SLICE_ELEMENTS,
    W8A8_ROWS,
    choose_backend,
    has_kitchen,
    kitchen,
)
from neounify.quant.formats import FourBits, Fp8Rows, Int8Rows, PublishedFormat
from neounify.quant.fp8 import quantise_fp8
from neounify.quant.int8 import quantise_int8
from neounify.quant.linear import QuantEmbedding, QuantLinear
from neounify.runtime.devices import Abilities
from quant.test_formats import random_weight
from support.device_abilities import pretending
from support.other_device import watching

CPU = torch.device("cpu")
FORMATS: list[PublishedFormat] = [Int8Rows(), Int8Rows(64), Fp8Rows(), FourBits(64)]
EIGHTS: list[PublishedFormat] = [Int8Rows(), Int8Rows(64), FourBits(64)]
COLUMNS = 192


def fill(layer: QuantLinear | QuantEmbedding, weight: Tensor) -> None:
    format: Any = layer.format
    for name, tensor in format.quantise(weight).items():
        layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def quantised(
    format: PublishedFormat, backend: str = "auto", rows: int = 80, *, bias: bool = False
) -> QuantLinear:
    values = nn.Parameter(torch.linspace(-1, 1, rows), requires_grad=False) if bias else None
    chosen = choose_backend(backend, format, (rows, COLUMNS), CPU)
    layer = QuantLinear(format, (rows, COLUMNS), values, chosen)
    fill(layer, random_weight(rows, COLUMNS))
    return layer


def inputs(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(rows)).to(dtype)


def product(layer: QuantLinear, x: Tensor) -> Tensor:
    """x Ŵᵀ + bias in float64."""
    bias = None if layer.bias is None else layer.bias.double()
    return linear(x.double(), layer.decoded().double(), bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_reference_computes_with_the_decoded_weight(
    format: PublishedFormat, bias: bool
) -> None:
    layer, x = quantised(format, "reference", bias=bias), inputs(50)
    expected = product(layer, x)
    torch.testing.assert_close(
        layer(x).double(), expected, rtol=0, atol=1e-6 * float(expected.abs().max())
    )
    assert layer(x[:0]).shape == (0, 80)


def test_slices_of_rows_are_joined() -> None:
    rows = 2 * SLICE_ELEMENTS // COLUMNS + 5
    layer, x = quantised(Int8Rows(64), "reference", rows), inputs(3)
    torch.testing.assert_close(layer(x).double(), product(layer, x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 7, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [1, 64])
def test_int8_on_a_cpu(group: int, dtype: torch.dtype, rows: int) -> None:
    layer, x = quantised(Int8Rows(group), "torch", bias=True), inputs(rows, dtype)
    assert str(layer.backend) == "torch (_weight_int8pack_mm)"
    y, expected = layer(x), product(layer, x)
    assert y.dtype == dtype
    largest = float(expected.abs().max())
    error = (y.double() - expected).abs()
    assert float(error.square().mean().sqrt()) <= 2e-3 * largest
    assert float(error.max()) <= 2**-7 * largest  # roundings of x, of sums and of y


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", EIGHTS, ids=str)
def test_w8a8_is_the_integer_formula(
    format: PublishedFormat, dtype: torch.dtype, bias: bool
) -> None:
    layer, x = quantised(format, "w8a8", bias=bias), inputs(9, dtype)
    assert layer.backend.operator == "_int_mm"
    assert isinstance(format, Int8Rows | FourBits)
    codes, scale = format.int8(layer.tensors())
    rows, row_scale = quantise_int8(x, format.group)
    sums = (rows.long() @ codes.long().t()).float()
    expected = sums * row_scale * scale.t()
    if layer.bias is not None:
        expected = expected + layer.bias
    assert torch.equal(layer(x), expected.to(dtype))
    far = (layer(x).double() - product(layer, x)).abs().max() / product(layer, x).abs().max()
    assert far < 0.02


def test_fp8_products_are_of_fp8_rows() -> None:
    layer, x = quantised(Fp8Rows(), "torch", bias=True), inputs(9)
    assert layer.backend.operator == "scaled_mm"
    rows, scale = quantise_fp8(x)
    expected = product(layer, rows.float() * scale)
    error = (layer(x).double() - expected).abs().max() / expected.abs().max()
    assert error < 2**-8  # the product is given in bfloat16


def plain_rows_agree(x: Tensor) -> bool:
    """Whether products with a plain weight have the same bits for few rows and for many.

    Those of MKL in float32 do not on processors with AMX.
    """
    weight = random_weight(80, COLUMNS).to(x.dtype)
    few = linear(x[:FEW_ROWS], weight)
    return all(torch.equal(linear(x[:n], weight), few[:n]) for n in (1, 2, 3, 5, FEW_ROWS - 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["reference", "torch", "w8a8"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_row_gives_the_same_bits_alone_and_in_a_batch(
    format: PublishedFormat, backend: str, dtype: torch.dtype
) -> None:
    layer, x = quantised(format, backend), inputs(90, dtype)
    if str(layer.backend).startswith("reference") and not plain_rows_agree(x):
        pytest.skip("plain products of few rows and of many differ on this processor")
    few = layer(x[:FEW_ROWS])
    for rows in (1, 2, 3, 5, FEW_ROWS - 1):
        assert torch.equal(layer(x[:rows]), few[:rows]), rows
        assert torch.equal(layer(x[rows : rows + 1]), few[rows : rows + 1]), rows
    many = layer(x)
    for rows in (FEW_ROWS + 1, 64, 65):
        assert torch.equal(layer(x[:rows]), many[:rows]), rows
    if layer.backend.operator != "_weight_int8pack_mm":
        assert torch.equal(few, many[:FEW_ROWS])


@pytest.mark.parametrize("columns", [64, 256, 512])
def test_rotations_of_few_rows_are_the_same_in_a_batch(columns: int) -> None:
    layer = QuantLinear(
        Int8Rows(64), (32, columns), None, choose_backend("torch", Int8Rows(64), (32, columns), CPU)
    )
    fill(layer, random_weight(32, columns))
    x = torch.randn(FEW_ROWS, columns, generator=torch.Generator().manual_seed(1))
    together = layer(x)
    for row in range(FEW_ROWS):
        assert torch.equal(layer(x[row : row + 1])[0], together[row])


def test_what_is_chosen() -> None:
    def chosen(name: str, format: PublishedFormat, columns: int = 64) -> str:
        return choose_backend(name, format, (80, columns), CPU).operator

    assert chosen("auto", Int8Rows()) == chosen("torch", Int8Rows()) == "_weight_int8pack_mm"
    assert chosen("auto", Fp8Rows()) == chosen("auto", FourBits()) == "reference"
    assert chosen("reference", Int8Rows()) == "reference"
    assert chosen("w8a8", Fp8Rows()) == "reference"
    # The operator reads past the end of rows that are no multiple of 16.
    assert chosen("torch", Int8Rows(), 40) == "reference"
    with pytest.raises(RequestError, match="'fast' of quantised layers is unknown; known are auto"):
        chosen("fast", Int8Rows())


def on_a_gpu(format: PublishedFormat, shape: tuple[int, int], monkeypatch: Any) -> QuantLinear:
    """A layer without values as it would be there."""
    monkeypatch.setattr(backends, "has_kitchen", lambda: False)
    with pretending(Abilities(type="cuda", capability=(9, 0))):
        chosen = choose_backend("auto", format, shape, torch.device("cuda"))
    assert str(chosen) == "torch (_int_mm)"
    return QuantLinear(format, shape, None, chosen)


@pytest.mark.parametrize("format", EIGHTS, ids=str)
def test_few_rows_on_a_gpu_are_not_rounded(
    format: PublishedFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = on_a_gpu(format, (80, COLUMNS), monkeypatch)
    for rows in (1, W8A8_ROWS - 1, W8A8_ROWS, 1000):
        with watching() as device:
            y = layer(torch.empty(rows, COLUMNS, dtype=torch.bfloat16, device="meta"))
        assert (y.shape, y.dtype) == ((rows, 80), torch.bfloat16)
        rounded = "aten._int_mm.default" in device.operators
        assert rounded == (rows >= W8A8_ROWS)
        # Without the codes a product of floats is one of weights that were decoded.
        assert any("mm" in name and "int" not in name for name in device.operators) != (
            rounded and format.group == 1
        )
        assert device.waits == []


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", EIGHTS, ids=str)
def test_sums_of_w8a8_are_bounded(
    format: PublishedFormat, dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = quantised(format, "w8a8", bias=bias), inputs(50, dtype)
    whole = layer(x)
    original, sums = torch._int_mm, []

    def int_mm(rows: Tensor, codes: Tensor) -> Tensor:
        sums.append(original(rows, codes))
        return sums[-1]

    monkeypatch.setattr(torch, "_int_mm", int_mm)
    monkeypatch.setattr(backends, "SUM_ELEMENTS", 50 * 40)
    assert torch.equal(layer(x), whole)
    assert [part.shape for part in sums] == [(50, 32), (50, 32), (50, 16)]
    assert layer(x[:0]).shape == (0, 80)


@pytest.mark.parametrize("columns", [4096, 12_288])
def test_slices_of_codes_are_such_that_a_gpu_multiplies_them(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = on_a_gpu(FourBits(256), (4096, columns), monkeypatch)
    heights: list[int] = []

    def int_mm(rows: Tensor, codes: Tensor) -> Tensor:
        heights.append(codes.shape[1])
        return torch.empty(rows.shape[0], codes.shape[1], dtype=torch.int32, device="meta")

    monkeypatch.setattr(torch, "_int_mm", int_mm)
    layer(torch.empty(W8A8_ROWS, columns, device="meta"))
    assert sum(heights) == 4096
    assert len(heights) > 1
    assert all(height % 8 == 0 for height in heights)


@pytest.mark.skipif(has_kitchen(), reason="comfy-kitchen is installed")
def test_comfy_kitchen_must_be_installed() -> None:
    with pytest.raises(RequestError, match="comfy-kitchen is not installed"):
        choose_backend("comfy-kitchen", Int8Rows(), (64, 64), CPU)


@pytest.mark.skipif(not has_kitchen(), reason="comfy-kitchen is not installed")
@pytest.mark.parametrize("format", EIGHTS[1:], ids=str)
def test_comfy_kitchen_computes_as_w8a8(format: PublishedFormat) -> None:
    x = inputs(40, torch.bfloat16)
    layer = quantised(format, "w8a8", bias=True)
    theirs, ours = kitchen(layer, x).double(), layer(x).double()
    assert float((theirs - ours).abs().max() / ours.abs().max()) < 0.01


@pytest.mark.parametrize("backend", ["reference", "torch", "w8a8"])
def test_an_adapter_is_added_from_the_unrotated_input(backend: str) -> None:
    layer, x = quantised(Int8Rows(64), backend), inputs(6)
    plain = layer(x)
    generator = torch.Generator().manual_seed(1)
    pairs = [
        (
            torch.randn(rank, COLUMNS, generator=generator),
            torch.randn(80, rank, generator=generator),
            scale,
        )
        for rank, scale in ((3, 0.5), (2, 2.0))
    ]
    layer.add_adapters(pairs, CPU)
    update = sum(scale * (up.double() @ down.double()) for down, up, scale in pairs)
    assert isinstance(update, Tensor)
    expected = plain.double() + x.double() @ update.t()
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_casts_leave_codes_and_scales_as_they_are(format: PublishedFormat) -> None:
    layer = quantised(format, bias=True)
    before = {name: tensor.clone() for name, tensor in layer.tensors().items()}
    layer.to(torch.bfloat16).double().half()
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float16
    for name, tensor in layer.tensors().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_an_embedding_decodes_the_rows_that_are_looked_up(format: PublishedFormat) -> None:
    embedding = QuantEmbedding(format, (16, COLUMNS))
    fill(embedding, random_weight(16, COLUMNS))
    ids = torch.tensor([3, 3, 15, 0])
    assert torch.equal(embedding(ids), embedding.decoded()[ids])
