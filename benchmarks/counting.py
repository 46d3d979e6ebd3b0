"""Operations of inference: 2 × the weights a token passes, 4 · visible pairs · heads · d.

A pair is a query and a key that it sees (`Layout.pairs`): in text no key behind the query counts,
as a causal kernel computes none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from neounify.model import Document, Layout, NeoUnify, Noise
from neounify.model.layout import Grid, Span
from neounify.model.parts import GEN, UND
from neounify.train.speed import attention, layer_weights, weights


class _Counter(TorchDispatchMode):
    """Counts operators; composite ones, which inference mode passes on whole, by their parts."""

    count = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        with self:
            parts = func.decompose(*args, **options)
        if parts is not NotImplemented:
            return parts
        self.count += 1
        return func(*args, **options)


def operators(call: Callable[[], object]) -> int:
    """Operators of torch that a call runs, each of which costs some microseconds."""
    with _Counter() as counter:
        call()
    return counter.count


def prefill(model: NeoUnify, spans: Sequence[Span]) -> int:
    """Operations of a prefill of one document; logits of the last position only."""
    layout = Layout([Document(tuple(spans))])
    rows, images = layout[UND].length, layout[UND].length - layout.text_length
    operations = 2 * layer_weights(model, UND) * rows + attention(model.config, layout.pairs(UND))
    logits = 2 * model.config.vocab_size * model.config.hidden_size
    return operations + 2 * weights(model.und_patch) * images + logits


def denoise(model: NeoUnify, grid: Grid, prefixes: Sequence[int]) -> int:
    """Operations of one step behind prefixes of so many tokens; its pixels are embedded once."""
    layout = Layout(Document((Noise.of(grid),), past=prefix) for prefix in prefixes)
    embed, head = model.pixel_layers(grid.kind)
    passed = layer_weights(model, GEN) + weights(head)
    layers = 2 * passed * layout[GEN].length + attention(model.config, layout.pairs(GEN))
    return layers + 2 * weights(embed) * grid.length
