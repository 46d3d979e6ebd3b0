"""Backends of quantised linear layers: one function each, chosen once per layer.

| name | of | products |
|---|---|---|
| reference | every format and device | float, of slices of rows that are dequantised for the call |
| torch | int8 on a CPU | `_weight_int8pack_mm` for few rows of x, else as reference |
| | int8 and 4 bits on a GPU | as `w8a8` for many rows of x, else as reference |
| | fp8 | `scaled_mm`: x in fp8 too, with a scale per row |
| w8a8 | int8 and 4 bits | `_int_mm`: x in int8 too, with a scale per row; exact in int32 |
| comfy-kitchen | int8 and 4 bits on a GPU | the kernels of that package, as w8a8 |

A row of x gives the same bits whatever rows are beside it, but that `torch` computes few rows in
another way than more: up to `FEW_ROWS` on a CPU, fewer than `W8A8_ROWS` on a GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import linear, pad

from neounify.errors import RequestError
from neounify.quant.formats import FourBits, Fp8Rows, Int8Rows, Shape, WeightFormat, rows_of
from neounify.quant.fp8 import quantise_fp8
from neounify.quant.int8 import quantise_int8
from neounify.quant.rotation import rotate_groups
from neounify.runtime.devices import Abilities, abilities

if TYPE_CHECKING:
    from neounify.quant.linear import QuantLinear

Product: TypeAlias = Callable[["QuantLinear", Tensor], Tensor]
"""y = x Ŵᵀ + bias for rows x [n, in], in the dtype of x."""

AUTO, DECODED = "auto", "decoded"
BACKENDS = ("reference", "torch", "w8a8", "comfy-kitchen")
FEW_ROWS = 32
"""Rows up to which reading codes is what costs; products with more are faster dequantised."""
MIN_ROWS = 8
"""Rows that float products are filled up to: with fewer, libraries add in another order."""
WIDE = 256
"""Channels from which a rotation of one row is a product of many rows already."""
SLICE_ELEMENTS = 2**18
"""Elements dequantised at a time on a CPU, 1 MB in float32, which stay in its cache."""
DEVICE_SLICE_ELEMENTS = 2**21
"""The same on other devices: with all intermediate results at most 64 MB."""
SUM_ELEMENTS = 2**23
"""Sums of `w8a8` at a time: 64 MB, as they are in int32 and in float32 for a moment."""
SLICE_UNIT = 16
"""Rows of slices there are a multiple of this, as operators want them."""
INT8PACK_CHANNELS = 16
"""`_weight_int8pack_mm` reads past the end of rows that are no multiple of this."""
ANY_SHAPE = (256, 256)
"""A shape that every format has."""
INT_MM_ROWS = 32
"""`_int_mm` on a GPU wants more than 16 rows."""
W8A8_ROWS = 96
"""Rows from which `torch` rounds x to int8 on a GPU; for fewer, only weights are in 8 bits."""
UNITS = {"_int_mm": 8, "scaled_mm": 16}
"""Rows and columns of weights that an operator takes on a GPU: multiples of so many."""


class Backend(NamedTuple):
    """A backend as it was chosen: its name, the operator behind it, and the product."""

    name: str
    operator: str
    product: Product

    def __str__(self) -> str:
        return self.name if self.operator == self.name else f"{self.name} ({self.operator})"


def check_backend(name: str) -> None:
    """Raise RequestError for a name that is no backend of quantised layers."""
    known = (AUTO, DECODED, *BACKENDS)
    if name not in known:
        raise RequestError(
            f"backend {name!r} of quantised layers is unknown; known are {', '.join(known)}",
            param="backend",
        )


def choose_backend(name: str, format: WeightFormat, shape: Shape, device: torch.device) -> Backend:
    """The backend of a layer with a weight [N, K] of this shape; "auto" is the best one here.

    A backend that does not serve a format or a shape falls back to the reference, layer by layer,
    so that a name serves models of several formats; so do fp8 products on a device that has none
    beside those of int8. Raises RequestError for an unknown name, for comfy-kitchen where it is not
    installed, and for a name that has no products on the device at all.
    """
    check_backend(name)
    if name == "comfy-kitchen" and not has_kitchen():
        raise RequestError(
            "backend comfy-kitchen is not installed; pip install comfy-kitchen, or choose another",
            param="backend",
        )
    here = abilities(device)
    _check_products(name, here)
    eights = isinstance(format, Int8Rows | FourBits)
    on_gpu = device.type == "cuda"
    if eights and on_gpu and (name == "comfy-kitchen" or (name == AUTO and has_kitchen())):
        return Backend("comfy-kitchen", "comfy-kitchen", kitchen)
    by_torch = name == "torch" or (name == AUTO and on_gpu)
    fits = {op: not on_gpu or all(n % unit == 0 for n in shape) for op, unit in UNITS.items()}
    if eights and here.int8_products and fits["_int_mm"]:
        if name == "w8a8":
            return Backend("w8a8", "_int_mm", w8a8)
        if on_gpu and by_torch:
            return Backend("torch", "_int_mm", int_mm)
    if isinstance(format, Fp8Rows) and by_torch and here.float8_products and fits["scaled_mm"]:
        return Backend("torch", "scaled_mm", scaled)
    packs = isinstance(format, Int8Rows) and shape[1] % INT8PACK_CHANNELS == 0
    if packs and device.type == "cpu" and name in (AUTO, "torch"):
        return Backend("torch", "_weight_int8pack_mm", int8pack)
    return Backend("reference", "reference", reference)


def _check_products(name: str, here: Abilities) -> None:
    """Raise RequestError for a backend that has no products on a device, of any format."""
    has = {
        "torch": here.int8_products or here.float8_products,
        "w8a8": here.int8_products,
        "comfy-kitchen": here.type == "cuda",
    }
    if not has.get(name, True):
        raise RequestError(
            f"backend {name!r} of quantised layers has no products on {here}; take 'auto' or "
            "'reference'",
            param="backend",
        )


def check_held(format: WeightFormat, device: torch.device) -> None:
    """Raise RequestError for a format whose tensors a device cannot hold."""
    dtypes = {dtype for _, dtype in format.layout(ANY_SHAPE).values()}
    eights = {dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize == 1}
    if eights and not abilities(device).float8:
        raise RequestError(
            f"weights quantised as {format.name} cannot be held on {device.type}, which has no "
            "float8: take backend='decoded' for stored ones, int8 for new ones",
            param="quantise",
        )


def has_kitchen() -> bool:
    """Whether comfy-kitchen is installed."""
    return importlib.util.find_spec("comfy_kitchen") is not None


def reference(layer: QuantLinear, x: Float[Tensor, "n k"]) -> Float[Tensor, "n m"]:
    """Products with slices of rows of Ŵ, dequantised in float32 and cast to the dtype of x."""
    filled = fill_rows(x, MIN_ROWS)
    if layer.format.group > 1:
        filled = rotate_groups(filled, layer.format.group).to(x.dtype)
    parts = [
        linear(filled, layer.format.dequantise(tensors).to(x.dtype))
        for _, tensors in _slices(layer, _decoded_rows(layer))
    ]
    return _finish(layer, torch.cat(parts, dim=-1)[: x.shape[0]], x.dtype)


def int8pack(layer: QuantLinear, x: Float[Tensor, "n k"]) -> Float[Tensor, "n m"]:
    """Few rows in bfloat16 times the codes as they are stored, scaled in float32."""
    if x.shape[0] > FEW_ROWS:
        return reference(layer, x)
    rows, group = x, layer.format.group
    if group > 1 and layer.in_features >= WIDE:
        rows = rotate_groups(x, group)
    elif group > 1:
        rows = rotate_groups(fill_rows(x, MIN_ROWS), group)[: x.shape[0]]
    tensors = layer.tensors()
    ones = layer.ones(torch.bfloat16)
    y = torch._weight_int8pack_mm(rows.bfloat16(), tensors["weight"], ones)
    return _finish(layer, y * tensors["weight_scale"].squeeze(1), x.dtype)


def int_mm(layer: QuantLinear, x: Float[Tensor, "n k"]) -> Float[Tensor, "n m"]:
    """`w8a8` for rows enough to pay for it; fewer as they are, times decoded weights."""
    return (w8a8 if x.shape[0] >= W8A8_ROWS else reference)(layer, x)


def w8a8(layer: QuantLinear, x: Float[Tensor, "n k"]) -> Float[Tensor, "n m"]:
    """x in int8 with a scale per row: int32 products, exact, times both scales in float32."""
    format = layer.format
    assert isinstance(format, Int8Rows | FourBits)
    rows, row_scale = quantise_int8(x, format.group)
    if x.device.type == "cuda":
        rows = fill_rows(rows, INT_MM_ROWS)
    step = _in_units(SUM_ELEMENTS // max(1, rows.shape[0]), SLICE_UNIT)
    if isinstance(format, FourBits):  # whose codes are unpacked for the call
        step = min(step, _decoded_rows(layer))
    y = x.new_empty(x.shape[0], layer.out_features)
    for places, tensors in _slices(layer, step):
        codes, scale = format.int8(tensors)
        part = torch._int_mm(rows, codes.t())[: x.shape[0]].float()
        part.mul_(row_scale).mul_(scale.t())
        if layer.bias is not None:
            part.add_(layer.bias[places].float())
        y[:, places] = part
    return y


def scaled(layer: QuantLinear, x: Float[Tensor, "n k"]) -> Float[Tensor, "n m"]:
    """x in fp8 with a scale per row, times codes in fp8."""
    from torch.nn.functional import ScalingType, scaled_mm

    tensors = layer.tensors()
    rows, row_scale = quantise_fp8(fill_rows(x, INT_MM_ROWS))
    by_row = ScalingType.RowWise
    y = scaled_mm(
        rows,
        tensors["weight"].t(),
        row_scale,
        by_row,
        tensors["weight_scale"].t(),
        by_row,
        output_dtype=torch.bfloat16,
    )
    return _finish(layer, y[: x.shape[0]], x.dtype)


def kitchen(layer: QuantLinear, x: Float[Tensor, "n k"]) -> Float[Tensor, "n m"]:
    """The linear operations of comfy-kitchen, which picks kernels for the device."""
    import comfy_kitchen

    format, tensors = layer.format, layer.tensors()
    if isinstance(format, FourBits):
        return comfy_kitchen.w4a8_int8_linear(
            x,
            tensors["weight"].view(torch.int8),
            tensors["weight_s_rel"],
            tensors["weight_s_channel"],
            codebook=tensors.get("weight_codebook"),
            bias=layer.bias,
            convrot_groupsize=format.group,
            out_dtype=x.dtype,
        )
    return comfy_kitchen.int8_linear(
        x,
        tensors["weight"],
        tensors["weight_scale"],
        bias=layer.bias,
        out_dtype=x.dtype,
        convrot=format.group > 1,
        convrot_groupsize=format.group,
    )


def _decoded_rows(layer: QuantLinear) -> int:
    """Rows of the weight that are dequantised at a time."""
    if layer.tensors()["weight"].device.type == "cpu":
        return max(1, SLICE_ELEMENTS // layer.in_features)
    return _in_units(DEVICE_SLICE_ELEMENTS // layer.in_features, SLICE_UNIT)


def _in_units(rows: int, unit: int) -> int:
    """`rows` cut to whole units, at least one."""
    return max(unit, rows // unit * unit)


def _slices(layer: QuantLinear, step: int) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """The tensors of a layer, `step` rows of the weight at a time, and which rows these are."""
    tensors = layer.tensors()
    for start in range(0, layer.out_features, step):
        places = slice(start, start + step)
        yield places, rows_of(tensors, places)


def fill_rows(x: Tensor, least: int) -> Tensor:
    """`x` with rows of zeros behind it, so that there are at least so many."""
    return pad(x, (0, 0, 0, least - x.shape[0])) if x.shape[0] < least else x


def _finish(layer: QuantLinear, y: Tensor, dtype: torch.dtype) -> Tensor:
    return (y if layer.bias is None else y + layer.bias.float()).to(dtype)
