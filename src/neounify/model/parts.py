"""Names of the streams and parts of the model, and how each stream takes part in attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

StreamName: TypeAlias = Literal["und", "gen"]

UND: StreamName = "und"
"""The understanding stream: text and clean images."""
GEN: StreamName = "gen"
"""The generation stream: noisy images."""


@dataclass(frozen=True)
class StreamRule:
    """Visibility of a stream's tokens.

    Tokens of a `context` stream are visible to the later tokens of their document, in every stream,
    and their keys and values are cached. Tokens of any other stream are visible only to their own
    block and never cached.
    """

    context: bool


STREAMS: Mapping[StreamName, StreamRule] = {
    UND: StreamRule(context=True),
    GEN: StreamRule(context=False),
}
"""Every stream of the model, in the order in which their keys are joined. The first is context."""

WeightStream: TypeAlias = StreamName | Literal["shared"]
"""The stream that weights belong to; those of token embedding and text head are "shared"."""
PartName: TypeAlias = Literal[
    "experts",
    "attention",
    "norm",
    "mlp",
    "router",
    "embedding",
    "lm head",
    "patch embedding",
    "timestep",
    "noise scale",
    "image head",
]
LABELS: tuple[str, ...] = (*STREAMS, "shared", *get_args(PartName))
"""Names of streams and of parts, by which settings choose parameters."""
