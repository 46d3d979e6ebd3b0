"""Experts of a layer whose weights are codes: one stack per tensor of a projection's format.

Off the CPU all experts run by grouped products, so that the host need not wait to learn how many
rows each has. Never more than slices of rows of the weights are decoded: of all experts, or, for
fewer rows than there are experts, of the expert of each row. On the CPU the number of rows is
known, and experts that have some run one after the other, on codes where they are mapped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import silu

from neounify.model.neo import NeoUnify
from neounify.model.stream import PROJECTIONS, Experts, grouped_product, may_group, product_dtype
from neounify.quant.backends import AUTO, DEVICE_SLICE_ELEMENTS
from neounify.quant.formats import CODEBOOK
from neounify.quant.linear import QuantLinear
from neounify.quant.rotation import rotate_groups

GROUPED = "torch (grouped_mm)"
"""What computes stacked experts, as backends are shown."""
GROUPED_BACKENDS = (AUTO, "torch", "reference")
"""Backends by which experts are grouped; the others have no grouped product."""
SLICE_ROWS = 8
"""Slices are of a multiple of so many rows: grouped products want rows of whole 16 bytes."""


def groups_on(device: torch.device) -> bool:
    """Whether experts of codes run by grouped products on a device."""
    return device.type != "cpu"


def stack_codes(model: NeoUnify, backend: str) -> None:
    """Join the codes of the experts of every layer, where the device and the backend group them.

    Experts with adapters, and those whose formats differ in one projection, stay one by one.
    """
    if not groups_on(model.device) or backend not in GROUPED_BACKENDS:
        return
    for mlp in model.sparse_mlps:
        experts = mlp.experts
        if type(experts) is Experts and all(_alike(experts, name) for name in PROJECTIONS):
            mlp.experts = QuantExperts(experts)


def _alike(experts: Experts, name: str) -> bool:
    layers = [expert.get_submodule(name) for expert in experts]
    first = layers[0]
    return isinstance(first, QuantLinear) and all(
        isinstance(layer, QuantLinear) and layer.format == first.format and layer.down is None
        for layer in layers
    )


class QuantExperts(Experts):
    """Experts of which the codes of a projection are one tensor [experts, rows, …].

    The tensors of each expert's layers are views of it, under the names they have one by one.
    """

    def __init__(self, experts: Experts) -> None:
        super().__init__(experts)
        self._join()
        self.train(experts.training)

    def forward(self, rows: Float[Tensor, "m size"], ends: Int[Tensor, " experts"]) -> Tensor:
        """Each expert on its slice of the rows; `ends` are those of the slices."""
        dtype = product_dtype(rows)
        if not self.grouped(dtype):
            return super().forward(rows, ends)
        chosen = None
        if rows.shape[0] < len(self):
            numbers = torch.arange(rows.shape[0], device=rows.device)
            chosen = torch.searchsorted(ends, numbers, right=True)
        x = rows.to(dtype)
        inner = silu(self.product("gate_proj", x, ends, chosen))
        inner = inner * self.product("up_proj", x, ends, chosen)
        return self.product("down_proj", inner, ends, chosen)

    def grouped(self, dtype: torch.dtype) -> bool:
        """Whether all run by grouped products in this dtype."""
        return may_group(dtype, *(self._layer(name).in_features for name in PROJECTIONS))

    def product(
        self,
        name: str,
        x: Float[Tensor, "m k"],
        ends: Int[Tensor, " experts"],
        chosen: Int[Tensor, " m"] | None = None,
    ) -> Float[Tensor, "m n"]:
        """x Ŵᵀ of a projection, each row by its expert: of slices that end at `ends`, or `chosen`.

        Weights are decoded in float32, some of their rows at a time, and cast to the dtype of x.
        """
        layer, stacks = self._layer(name), self._stacks[name]
        format = layer.format
        if format.group > 1:
            x = rotate_groups(x, format.group).to(x.dtype)
        count = len(self) if chosen is None else x.shape[0]
        step = DEVICE_SLICE_ELEMENTS // max(1, count * layer.in_features)
        step = max(SLICE_ROWS, step // SLICE_ROWS * SLICE_ROWS)
        parts = []
        for start in range(0, layer.out_features, step):
            tensors = {}
            for part, stack in stacks.items():
                codes = stack if part == CODEBOOK else stack[:, start : start + step]
                codes = codes if chosen is None else codes[chosen]
                tensors[part] = codes if part == CODEBOOK else codes.flatten(0, 1)
            weight = format.dequantise(tensors).to(x.dtype).unflatten(0, (count, -1))
            if chosen is None:
                parts.append(grouped_product(x, weight, ends))
            else:
                parts.append(torch.bmm(weight, x[:, :, None])[:, :, 0])
        return torch.cat(parts, dim=-1)

    def _layer(self, name: str) -> QuantLinear:
        return cast(QuantLinear, self[0].get_submodule(name))

    def _join(self) -> None:
        """Stack the tensors of each projection, one kind after the other; experts get views."""
        self._stacks: dict[str, dict[str, Tensor]] = {name: {} for name in PROJECTIONS}
        with torch.inference_mode(False), torch.no_grad():
            for name, stacks in self._stacks.items():
                layers = [cast(QuantLinear, expert.get_submodule(name)) for expert in self]
                for part in layers[0].names:
                    stacks[part] = torch.stack([layer.tensors()[part] for layer in layers])
                    for layer, view in zip(layers, stacks[part], strict=True):
                        layer.register_parameter(part, nn.Parameter(view, requires_grad=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._join()
        return self
