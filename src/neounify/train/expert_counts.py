"""Tokens per expert of sparse models, counted on the devices and read once per report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from neounify.distributed.ranks import Ranks
from neounify.model.neo import NeoUnify
from neounify.model.parts import STREAMS
from neounify.model.stream import Layer, SparseMlp

Call = Callable[[nn.Module, Tensor, Tensor], Tensor]
Counts = Mapping[str, Sequence[int]]
"""Tokens of each expert, by stream and layer: "und.0"."""


class ExpertCounts:
    """Counts the rows that a model's layers give to each of their experts.

    Inside `counting` alone: a backward pass may compute a layer again.
    """

    def __init__(self, model: NeoUnify) -> None:
        mlps: dict[str, SparseMlp] = {}
        for layer in model.layers:
            assert isinstance(layer, Layer)
            for stream in STREAMS:
                if isinstance(mlp := layer[stream].out.mlp, SparseMlp):
                    mlps[f"{stream}.{layer.number}"] = mlp
        sizes = [mlp.router.out_features for mlp in mlps.values()]
        self._all = torch.zeros(sum(sizes), dtype=torch.int64, device=model.device)
        self._counts = dict(zip(mlps, self._all.split(sizes), strict=True)) if sizes else {}
        self._counting = False
        for name, mlp in mlps.items():
            mlp.call = partial(self._call, mlp.call, self._counts[name])

    @contextmanager
    def counting(self) -> Iterator[None]:
        self._counting = True
        try:
            yield
        finally:
            self._counting = False

    def read(self, ranks: Ranks) -> Counts:
        """The counts of all ranks since the last reading; collective."""
        if not self._counts:
            return {}
        ranks.add_(self._all)
        counts = {name: part.tolist() for name, part in self._counts.items()}
        self._all.zero_()
        return counts

    def _call(
        self, call: Call, counts: Tensor, experts: nn.Module, rows: Tensor, ends: Tensor
    ) -> Tensor:
        if self._counting:
            counts += ends.diff(prepend=ends.new_zeros(1))
        return call(experts, rows, ends)


def balance(counts: Counts) -> dict[str, float]:
    """How evenly experts are used, by stream: tokens of a layer's busiest expert over the mean of
    its experts, of the most uneven layer, and the share of experts without a token."""
    means: dict[str, float] = {}
    for stream in STREAMS:
        layers = [c for name, c in counts.items() if name.startswith(f"{stream}.") and any(c)]
        if layers:
            uneven = max(max(c) * len(c) / sum(c) for c in layers)
            idle = sum(list(c).count(0) for c in layers) / sum(map(len, layers))
            means[f"experts/{stream}/busiest_over_mean"] = uneven
            means[f"experts/{stream}/idle"] = idle
    return means
