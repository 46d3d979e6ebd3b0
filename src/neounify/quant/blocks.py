"""Blocks of GGUF files: formats that give a few dozen weights one scale, decoded and encoded.

A block is a row of bytes, its values are consecutive channels of a weight. Formats of 32 values
hold a scale d and, those named _1, a minimum m, both float16: Ŵ = d·q + m. Formats of 256 values
(_K) have sub-blocks of 16 or 32 with scales and minima in 4, 6 or 8 bits, times d and dmin. The
layouts are those of ggml's `ggml-common.h`; all arithmetic is float32, in the order of its
reference, so that decoded values are equal to its own bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from neounify.quant.formats import CODES, Shape, Tensors

Blocks = UInt8[Tensor, "n bytes"]
Values = Float[Tensor, "n elements"]


@dataclass(frozen=True)
class BlockFormat:
    """A format of blocks: `elements` values in `nbytes` bytes; `number` is its type in GGUF.

    `decode` gives float32 values [n, elements] of blocks [n, nbytes], on any device; `encode` the
    inverse, rounded to nearest, None where this package does not write the format. It raises
    ValueError for values whose scale does not fit float16.
    """

    name: str
    number: int
    elements: int
    nbytes: int
    halves: tuple[int, ...]
    """Places of the float16 numbers in a block; values are finite where these are."""
    decode: Callable[[Blocks], Values]
    encode: Callable[[Values], Blocks] | None = None

    def scales(self, blocks: Blocks) -> Float[Tensor, "n s"]:
        """The float16 numbers of blocks, as float32."""
        return torch.cat([_half(blocks, at) for at in self.halves], dim=1)


@dataclass(frozen=True)
class BlockRows:
    """The format (`formats.WeightFormat`) of weights in blocks, whose rows are whole ones."""

    blocks: BlockFormat
    group = 1

    @property
    def name(self) -> str:
        """The name of the block format, such as Q4_K."""
        return self.blocks.name

    def layout(self, shape: Shape) -> dict[str, tuple[Shape, torch.dtype]]:
        """Rows of bytes."""
        rows, columns = shape
        return {CODES: ((rows, columns // self.blocks.elements * self.blocks.nbytes), torch.uint8)}

    def dequantise(self, tensors: Tensors) -> Float[Tensor, "rows k"]:
        """Ŵ of some rows, float32 on the device of the codes; all rows are alike."""
        codes = tensors[CODES]
        blocks = codes.reshape(-1, self.blocks.nbytes)
        return self.blocks.decode(blocks).view(codes.shape[0], -1)


# --- parts of a block ---


def _half(blocks: Blocks, at: int) -> Float[Tensor, "n 1"]:
    """The float16 number in bytes `at` and `at` + 1, as float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _half_bytes(values: Float[Tensor, "n 1"]) -> UInt8[Tensor, "n 2"]:
    halves = values.half()
    if not bool(halves.isfinite().all()):
        raise ValueError(f"a scale of {float(values.abs().max()):.3g} does not fit float16")
    return halves.view(torch.uint8)


def _split(codes: UInt8[Tensor, "*rows k"], bits: int) -> UInt8[Tensor, "*rows parts k"]:
    """The numbers of 1, 2 or 4 `bits` in bytes, the lowest of all bytes first."""
    # Made on the device: an upload would have the host wait for it.
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)[:, None]
    return (codes[..., None, :] >> shifts) & ((1 << bits) - 1)


def _scaled(q: Tensor, scale: Float[Tensor, "n s"]) -> Float[Tensor, "n s k"]:
    return scale[..., None] * q.view(*scale.shape, -1).float()


# --- blocks of 32 ---


def _nibbles(codes: UInt8[Tensor, "n 16"]) -> UInt8[Tensor, "n 32"]:
    return _split(codes, 4).flatten(1)


def _from_nibbles(q: UInt8[Tensor, "n 32"]) -> UInt8[Tensor, "n 16"]:
    return q[:, :16] | (q[:, 16:] << 4)


def _bits(words: UInt8[Tensor, "n 4"]) -> UInt8[Tensor, "n 32"]:
    """The bits of a little-endian word of 32."""
    return _split(words[..., None], 1).flatten(1)


def _from_bits(bits: UInt8[Tensor, "n 32"]) -> UInt8[Tensor, "n 4"]:
    weights = torch.tensor([1 << n for n in range(8)], dtype=torch.uint8, device=bits.device)
    return (bits.view(-1, 4, 8) * weights).sum(-1, dtype=torch.uint8)


def _fives(codes: UInt8[Tensor, "n 20"]) -> UInt8[Tensor, "n 32"]:
    """Five bits: the highest ones of all first, then the rest as nibbles."""
    return _nibbles(codes[:, 4:]) | (_bits(codes[:, :4]) << 4)


def _from_fives(q: UInt8[Tensor, "n 32"]) -> UInt8[Tensor, "n 20"]:
    return torch.cat([_from_bits(q >> 4), _from_nibbles(q & 15)], dim=1)


def _decode_q4_0(blocks: Blocks) -> Values:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8)


def _decode_q4_1(blocks: Blocks) -> Values:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).float() + _half(blocks, 2)


def _decode_q5_0(blocks: Blocks) -> Values:
    return _half(blocks, 0) * (_fives(blocks[:, 2:]).float() - 16)


def _decode_q5_1(blocks: Blocks) -> Values:
    return _half(blocks, 0) * _fives(blocks[:, 4:]).float() + _half(blocks, 2)


def _decode_q8_0(blocks: Blocks) -> Values:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _half(blocks, 0)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)


def _symmetric(values: Values, levels: int) -> tuple[Tensor, Tensor]:
    """(d, q) of the formats _0: d = -x / (levels / 2) for the x of the largest magnitude."""
    at = values.abs().argmax(dim=1, keepdim=True)
    scale = values.gather(1, at) / -(levels // 2)
    q = torch.trunc(values * _inverse(scale) + (levels // 2 + 0.5))
    return scale, q.clamp(0, levels - 1).to(torch.uint8)


def _affine(values: Values, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """(d, m, q) of the formats _1: d = (max - min) / (levels - 1), m = min."""
    low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    scale = (high - low) / (levels - 1)
    q = torch.trunc((values - low) * _inverse(scale) + 0.5)
    return scale, low, q.clamp(0, levels - 1).to(torch.uint8)


def _encode_q4_0(values: Values) -> Blocks:
    scale, q = _symmetric(values, 16)
    return torch.cat([_half_bytes(scale), _from_nibbles(q)], dim=1)


def _encode_q4_1(values: Values) -> Blocks:
    scale, low, q = _affine(values, 16)
    return torch.cat([_half_bytes(scale), _half_bytes(low), _from_nibbles(q)], dim=1)


def _encode_q5_0(values: Values) -> Blocks:
    scale, q = _symmetric(values, 32)
    return torch.cat([_half_bytes(scale), _from_fives(q)], dim=1)


def _encode_q5_1(values: Values) -> Blocks:
    scale, low, q = _affine(values, 32)
    return torch.cat([_half_bytes(scale), _half_bytes(low), _from_fives(q)], dim=1)


def _encode_q8_0(values: Values) -> Blocks:
    """d = max |x| / 127; halves are rounded away from zero, as the reference rounds."""
    scale = values.abs().amax(dim=1, keepdim=True) / 127
    x = values * _inverse(scale)
    q = torch.sign(x) * torch.floor(x.abs() + 0.5)
    # A scale below float16's smallest is written as 0; so are its codes, or a copy would differ.
    q = torch.where(scale.half() == 0, torch.zeros_like(q), q)
    return torch.cat([_half_bytes(scale), q.to(torch.int8).view(torch.uint8)], dim=1)


# --- blocks of 256 ---


def _decode_q2_k(blocks: Blocks) -> Values:
    scales, d, dmin = blocks[:, :16], _half(blocks, 80), _half(blocks, 82)
    q = _split(blocks[:, 16:80].view(-1, 2, 32), 2)
    low = dmin * (scales >> 4).float()
    return (_scaled(q, d * (scales & 15).float()) - low[..., None]).flatten(1)


def _decode_q3_k(blocks: Blocks) -> Values:
    packed = blocks[:, 96:108]
    lowest = _split(packed[:, :8], 4).flatten(1)
    highest = _split(packed[:, 8:], 2).flatten(1)
    scales = (lowest | (highest << 4)).float() - 32
    two = _split(blocks[:, 32:96].view(-1, 2, 32), 2).flatten(1)
    third = _split(blocks[:, :32], 1).flatten(1)
    q = (two | (third << 2)).float() - 4
    return _scaled(q, _half(blocks, 108) * scales).flatten(1)


def _six_bits(packed: UInt8[Tensor, "n 12"]) -> tuple[Tensor, Tensor]:
    """(scales, minima) [n, 8] of Q4_K and Q5_K, 6 bits each in 12 bytes."""
    a, b, c = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat([a & 63, (c & 15) | ((a >> 6) << 4)], dim=1)
    minima = torch.cat([b & 63, (c >> 4) | ((b >> 6) << 4)], dim=1)
    return scales.float(), minima.float()


def _with_minima(blocks: Blocks, q: Tensor) -> Values:
    scales, minima = _six_bits(blocks[:, 4:16])
    low = _half(blocks, 2) * minima
    return (_scaled(q, _half(blocks, 0) * scales) - low[..., None]).flatten(1)


def _decode_q4_k(blocks: Blocks) -> Values:
    return _with_minima(blocks, _split(blocks[:, 16:].view(-1, 4, 32), 4).flatten(1))


def _decode_q5_k(blocks: Blocks) -> Values:
    four = _split(blocks[:, 48:].view(-1, 4, 32), 4).flatten(1)
    fifth = _split(blocks[:, 16:48], 1).flatten(1)
    return _with_minima(blocks, four | (fifth << 4))


def _decode_q6_k(blocks: Blocks) -> Values:
    four = _split(blocks[:, :128].view(-1, 2, 64), 4).flatten(1)
    two = _split(blocks[:, 128:192].view(-1, 2, 32), 2).flatten(1)
    q = (four | (two << 4)).float() - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return _scaled(q, _half(blocks, 208) * scales).flatten(1)


BLOCK_FORMATS = {
    format.name: format
    for format in (
        BlockFormat("Q4_0", 2, 32, 18, (0,), _decode_q4_0, _encode_q4_0),
        BlockFormat("Q4_1", 3, 32, 20, (0, 2), _decode_q4_1, _encode_q4_1),
        BlockFormat("Q5_0", 6, 32, 22, (0,), _decode_q5_0, _encode_q5_0),
        BlockFormat("Q5_1", 7, 32, 24, (0, 2), _decode_q5_1, _encode_q5_1),
        BlockFormat("Q8_0", 8, 32, 34, (0,), _decode_q8_0, _encode_q8_0),
        BlockFormat("Q2_K", 10, 256, 84, (80, 82), _decode_q2_k),
        BlockFormat("Q3_K", 11, 256, 110, (108,), _decode_q3_k),
        BlockFormat("Q4_K", 12, 256, 144, (0, 2), _decode_q4_k),
        BlockFormat("Q5_K", 13, 256, 176, (0, 2), _decode_q5_k),
        BlockFormat("Q6_K", 14, 256, 210, (208,), _decode_q6_k),
    )
}
"""Name → format."""
