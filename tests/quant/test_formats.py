"""Formats of quantised weights, against their formulas in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from neounify.quant.formats import (
    CHANNEL,
    CODEBOOK,
    CODES,
    RELATIVE,
    SCALE,
    FourBits,
    Fp8Rows,
    Int8Rows,
    PublishedFormat,
    decode,
    rows_of,
)
from neounify.quant.fp8 import dequantise_fp8
from neounify.quant.rotation import hadamard, rotate_groups
from neounify.quant.w4 import unpack_w4

Array = np.ndarray[Any, Any]
FORMATS = [Int8Rows(), Int8Rows(16), Int8Rows(64), Fp8Rows(), FourBits(), FourBits(64)]


def random_weight(rows: int = 24, columns: int = 192, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * torch.rand(rows, 1, generator=generator)


def turn(columns: int, group: int) -> Array:
    """The rotation of all channels as one matrix, float64."""
    if group == 1:
        return np.eye(columns)
    one = hadamard(group, torch.device("cpu")).double().numpy()
    return np.kron(np.eye(columns // group), one)


def double(tensor: Tensor) -> Array:
    return tensor.double().numpy()


def meant(format: PublishedFormat, tensors: dict[str, Tensor], columns: int) -> Array:
    """Ŵ by the formulas of the specification, in float64."""
    if isinstance(format, FourBits):
        packed = tensors[CODES].view(torch.uint8).numpy()
        numbers = np.zeros((packed.shape[0], columns), int)
        numbers[:, 0::2], numbers[:, 1::2] = packed & 15, packed >> 4
        book = double(tensors[CODEBOOK]) if format.codebook else np.arange(16) - 8.0
        relative = np.repeat(double(tensors[RELATIVE]), 16, axis=1)
        eights = np.clip(np.rint(book[numbers] * relative), -127, 127)
        rotated = double(tensors[CHANNEL])[:, None] * eights
    else:
        rotated = double(tensors[CODES]) * double(tensors[SCALE])
    matrix: Array = rotated @ turn(columns, format.group)
    return matrix


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_codes_decode_to_the_formula(format: PublishedFormat) -> None:
    weight = random_weight()
    tensors = format.quantise(weight)
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == format.layout((24, 192))
    expected = meant(format, tensors, 192)
    np.testing.assert_allclose(decode(format, tensors), expected, atol=1e-6, rtol=0)
    some = decode(format, rows_of(tensors, slice(3, 9)))
    np.testing.assert_allclose(some, expected[3:9], atol=1e-6, rtol=0)


@pytest.mark.parametrize("group", [1, 4, 64])
def test_int8_codes_are_rounded_rows(group: int) -> None:
    weight = random_weight()
    rotated = double(weight) @ turn(192, group)
    scale = np.abs(rotated).max(axis=1, keepdims=True) / 127
    tensors = Int8Rows(group).quantise(weight)
    np.testing.assert_allclose(tensors[SCALE], scale, rtol=1e-6)
    off = np.abs(rotated / scale - double(tensors[CODES]))
    assert off.max() <= 0.5 + 1e-4
    assert np.abs(double(tensors[CODES])).max(axis=1).tolist() == [127] * 24


def test_halves_are_rounded_to_even() -> None:
    row = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    codes = Int8Rows().quantise(row)[CODES]
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]]


def test_fp8_codes_are_the_nearest_numbers() -> None:
    weight = random_weight()
    tensors = Fp8Rows().quantise(weight)
    scale = np.abs(double(weight)).max(axis=1, keepdims=True) / 448
    np.testing.assert_allclose(tensors[SCALE], scale, rtol=1e-6)
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = numbers[numbers.isfinite()]
    wanted = torch.from_numpy(double(weight) / scale)
    nearest = (wanted[..., None] - numbers).abs().amin(-1)
    off = (wanted - tensors[CODES].double()).abs()
    assert float((off - nearest).max()) <= 1e-4 * 448


def test_every_fp8_number_is_read_as_torch_reads_it() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[codes.float().isfinite()][None]
    assert codes.shape == (1, 254)
    assert torch.equal(dequantise_fp8(codes, torch.ones(1, 1)), codes.float())


@pytest.mark.parametrize("part", [(Fp8Rows(), CODES), (FourBits(16), RELATIVE)], ids=str)
def test_a_nan_among_codes_does_not_become_a_number(part: tuple[PublishedFormat, str]) -> None:
    format, name = part
    tensors = format.quantise(random_weight(8, 64))
    for row, code in ((2, 0x7F), (5, 0xFF)):
        tensors[name].view(torch.uint8)[row, -1] = code
    damaged = format.dequantise(tensors).isnan().all(dim=1)
    assert damaged.nonzero().flatten().tolist() == [2, 5]
    if isinstance(format, FourBits):
        scale = format.int8(tensors)[1]
        assert scale.isnan().flatten().nonzero().flatten().tolist() == [2, 5]


def test_four_bits_choose_the_nearest_level_of_their_group() -> None:
    weight = random_weight(8, 64)
    tensors = FourBits(64).quantise(weight)
    book, relative = double(tensors[CODEBOOK]), double(tensors[RELATIVE])
    assert (np.diff(book) >= 0).all()
    levels = np.clip(np.rint(relative[..., None] * book), -127, 127)
    wanted = double(weight) @ turn(64, 64) / double(tensors[CHANNEL])[:, None]
    wanted = wanted.reshape(8, 4, 16, 1)
    nearest = np.abs(wanted - levels[:, :, None, :]).min(axis=-1)
    got = double(unpack_w4(tensors[CODES], tensors[RELATIVE], tensors[CODEBOOK]))
    off = np.abs(wanted[..., 0] - got.reshape(8, 4, 16))
    np.testing.assert_allclose(off, nearest, atol=1e-3)


def test_the_even_element_is_in_the_low_half() -> None:
    codes = torch.tensor([[0x21, 0x43, 0, 0, 0, 0, 0, 0x0F]], dtype=torch.int8)
    relative = torch.ones(1, 1).to(torch.float8_e4m3fn)
    assert unpack_w4(codes, relative, None)[0, :4].tolist() == [-7, -6, -5, -4]
    assert unpack_w4(codes, relative, None)[0, -2:].tolist() == [7, -8]


@pytest.mark.parametrize(
    ("format", "largest"),
    [(Int8Rows(64), 0.009), (Fp8Rows(), 0.028), (FourBits(64), 0.078)],
    ids=str,
)
def test_errors_are_those_of_the_number_of_bits(format: PublishedFormat, largest: float) -> None:
    weight = random_weight(64, 1024)
    error = decode(format, format.quantise(weight)) - weight
    assert 0.5 * largest < float(error.norm() / weight.norm()) < largest


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_rows_of_zeros_and_outliers(format: PublishedFormat) -> None:
    weight = random_weight()
    weight[3], weight[5, 7] = 0.0, 1e6
    decoded = decode(format, format.quantise(weight))
    assert bool(decoded.isfinite().all())
    assert decoded[3].abs().max() == 0
    assert float(decoded[5].abs().max()) == pytest.approx(1e6, rel=0.1)


def test_rotation_spreads_outliers() -> None:
    weight = random_weight(8, 256)
    weight[:, 17] *= 100
    errors = [
        float((decode(format, format.quantise(weight)) - weight).norm())
        for format in (Int8Rows(), Int8Rows(256))
    ]
    assert errors[1] < errors[0] / 2
    assert torch.equal(rotate_groups(weight, 1), weight)
