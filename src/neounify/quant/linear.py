"""Linear layers and embeddings whose weights stay codes.

They stand where a plain `nn.Linear` or `nn.Embedding` would, with the tensors of their format as
parameters, so that names, mappings and streaming of weights apply to them as to any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from neounify.quant.backends import Backend
from neounify.quant.formats import Shape, WeightFormat, decode, rows_of


class QuantModule(nn.Module):
    """The tensors of a quantised weight [N, K], on the meta device until they are given.

    Casts of a model leave them as they are; moves do not.
    """

    def __init__(self, format: WeightFormat, shape: Shape) -> None:
        super().__init__()
        self.format = format
        self.shape = shape
        layout = format.layout(shape)
        self.names = tuple(layout)
        for name, (size, dtype) in layout.items():
            tensor = torch.empty(size, dtype=dtype, device="meta")
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the format by name."""
        # Not get_parameter, which costs more than a small product.
        return {name: self._parameters[name] for name in self.names}  # type: ignore[misc]

    def decoded(self, start: int = 0, stop: int | None = None) -> Float[Tensor, "rows k"]:
        """Ŵ of rows `start` to `stop` in float32; all of it is four times as large as the codes."""
        end = self.shape[0] if stop is None else stop
        return decode(self.format, rows_of(self.tensors(), slice(start, end)))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantModule:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(torch.empty(0, device=tensor.device)).device)

        for name, tensor in self.tensors().items():
            self.register_parameter(name, nn.Parameter(move(tensor), requires_grad=False))
        return self

    def extra_repr(self) -> str:
        return f"{self.shape[1]} to {self.shape[0]}, {self.format.name}"


class QuantLinear(QuantModule):
    """y = x Ŵᵀ + bias [+ an adapter], from [n, in] to [n, out], by a backend chosen once.

    The adapter, up (down x), is added beside the codes, of x as it is: not rotated.
    """

    def __init__(
        self, format: WeightFormat, shape: Shape, bias: nn.Parameter | None, backend: Backend
    ) -> None:
        super().__init__(format, shape)
        self.out_features, self.in_features = shape
        self.bias = bias
        self.backend = backend
        self.down: Tensor | None
        self.up: Tensor | None
        self.register_buffer("down", None, persistent=False)
        self.register_buffer("up", None, persistent=False)
        self._ones: Tensor | None = None

    def forward(self, x: Float[Tensor, "n k"]) -> Float[Tensor, "n m"]:
        y = self.backend.product(self, x)
        if self.down is None or self.up is None:
            return y
        return y + linear(linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))

    def add_adapters(
        self, pairs: Sequence[tuple[Tensor, Tensor, float]], device: torch.device
    ) -> None:
        """Put scale · up @ down of adapters, (down, up, scale), beside the codes."""
        self.down = torch.cat([down.float() for down, _, _ in pairs]).to(device)
        self.up = torch.cat([up.float() * scale for _, up, scale in pairs], dim=1).to(device)

    def ones(self, dtype: torch.dtype) -> Float[Tensor, " out"]:
        """A scale of 1 per row, for operators that ask for scales of a dtype."""
        device = self._parameters["weight"].device  # type: ignore[union-attr]
        if self._ones is None or self._ones.device != device:
            self._ones = torch.ones(self.out_features, dtype=dtype, device=device)
        return self._ones

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        super()._apply(fn, recurse)
        if self.bias is not None:
            self.bias = nn.Parameter(fn(self.bias.data), requires_grad=False)
        if self.down is not None and self.up is not None:
            self.down, self.up = fn(self.down), fn(self.up)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.backend}"


class QuantEmbedding(QuantModule):
    """Rows of Ŵ by their numbers; a row is decoded when it is looked up."""

    def forward(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n k"]:
        return decode(self.format, rows_of(self.tensors(), ids))
