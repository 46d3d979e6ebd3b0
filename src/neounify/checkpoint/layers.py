"""Weights by layers: of the stream in use some layers stay, the others come as they are used.

`memory="layers"`. On the CPU a layer is used where its file is mapped, and its pages are released
behind it; on other devices layers pass through a few buffers (`checkpoint.staging`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from neounify.checkpoint.mapped import MappedFile
from neounify.checkpoint.names import expert_of, layer_of
from neounify.checkpoint.residency import StoredWeight, StreamResidency, make_weight
from neounify.model.neo import NeoUnify
from neounify.model.parts import STREAMS, StreamName
from neounify.model.stream import SparseMlp, Stream, call_plain
from neounify.runtime.memory_plan import resident_layers
from neounify.runtime.process import return_freed_memory

Layers = Mapping[int, Mapping[str, StoredWeight]]
"""The stored weights of layers by their numbers, and by our names."""


class Feed(Protocol):
    """Brings the layers of one stream that do not stay. Safe for many threads."""

    def open(self) -> None:
        """A user of the stream begins."""

    def close(self) -> None:
        """A user has ended; with the last one, threads and buffers go."""

    def take(self, number: int, *, few: bool | None = None) -> None:
        """Wait for a layer's weights, but for those of its experts, which `fetch` brings.

        `few`: whether sparse layers have few tokens now, None where that is not known. Raises
        CheckpointError for a file that is cut off.
        """

    def fetch(self, number: int, experts: Collection[int]) -> None:
        """Wait for the weights of these experts of a layer that was taken, if it does not stay."""

    def give_back(self, number: int) -> None:
        """The layer has been computed."""


class LayerResidency:
    """Of the stream in use, what stands outside the layers and `resident` of them stay.

    The others are there while they are computed, in any order; those that stay lie spread evenly.
    Streams come and go as with StreamResidency, and the same rules hold for parameters: the model
    must not be moved or cast afterwards, and layers are computed by calling them.
    """

    def __init__(
        self,
        model: NeoUnify,
        sources: Mapping[str, StoredWeight],
        resident: Mapping[StreamName, int],
    ) -> None:
        count = model.config.num_layers
        stay = {name: resident_layers(count, resident.get(name, 0)) for name in STREAMS}
        kept: dict[str, StoredWeight] = {}
        coming: dict[StreamName, dict[int, dict[str, StoredWeight]]] = {s: {} for s in STREAMS}
        for name, source in sources.items():
            place = layer_of(name)
            if place is None or stay[place[1]][place[0]]:
                kept[name] = source
            else:
                coming[place[1]].setdefault(place[0], {})[name] = source
        self.resident = {name: sum(stays) for name, stays in stay.items()}
        self._kept = StreamResidency(model, kept)
        self._feeds = _feeds(model, coming)
        self._taken: dict[tuple[int, int], list[StreamName]] = {}
        for stream, layers in coming.items():
            for number in layers:
                mlp = model.get_submodule(f"layers.{number}.{stream}.out.mlp")
                if isinstance(mlp, SparseMlp):
                    mlp.call = _fetching(self._feeds[stream], number)
        for layer in model.layers:
            layer.register_forward_pre_hook(self._before)
            layer.register_forward_hook(self._after, always_call=True)

    @contextmanager
    def use(self, stream: StreamName) -> Iterator[None]:
        """See Residency."""
        with self._kept.use(stream):
            self._feeds[stream].open()
            try:
                yield
            finally:
                self._feeds[stream].close()

    def _before(self, layer: nn.Module, arguments: tuple[Any, ...]) -> None:
        number: int = layer.number  # type: ignore[assignment]
        taken = self._taken[threading.get_ident(), number] = []
        for stream, x in arguments[0].items():
            self._feeds[stream].take(number, few=_is_few(layer[stream], x.shape[0]))  # type: ignore[index]
            taken.append(stream)

    def _after(self, layer: nn.Module, arguments: tuple[Any, ...], output: object) -> None:
        number: int = layer.number  # type: ignore[assignment]
        # Also after an error, which may have come before a layer was there.
        for stream in self._taken.pop((threading.get_ident(), number), ()):
            self._feeds[stream].give_back(number)


def _is_few(stream: Stream, rows: int) -> bool | None:
    """Whether so few rows pass through a sparse layer that most of its experts have none."""
    mlp = stream.out.mlp
    if not isinstance(mlp, SparseMlp):
        return None
    return 2 * rows * mlp.top_k <= mlp.router.out_features


def _fetching(feed: Feed, number: int) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """How a sparse layer calls its experts: once those that have rows are there."""

    def call(experts: nn.Module, rows: Tensor, ends: Tensor) -> Tensor:
        edges = pairwise([0, *ends.tolist()])
        feed.fetch(number, [n for n, (start, stop) in enumerate(edges) if stop > start])
        return call_plain(experts, rows, ends)

    return call


def _feeds(
    model: NeoUnify, coming: Mapping[StreamName, dict[int, dict[str, StoredWeight]]]
) -> dict[StreamName, Feed]:
    parameters = dict(model.named_parameters())
    if in_place(model.device):
        pages = LayerPages(
            {
                (stream, number): sources
                for stream, layers in coming.items()
                for number, sources in layers.items()
            },
            parameters,
        )
        return {stream: InPlace(stream, pages) for stream in STREAMS}
    from neounify.checkpoint.layer_image import layer_image
    from neounify.checkpoint.staging import DeviceCopies, Staged

    copies = DeviceCopies(model.device)
    return {
        stream: Staged(
            {number: layer_image(sources, parameters) for number, sources in layers.items()}, copies
        )
        for stream, layers in coming.items()
    }


def in_place(device: torch.device) -> bool:
    """Whether layers are used where their files are mapped."""
    return device.type == "cpu"


class LayerPages:
    """Weights of layers on the CPU: filled for their first user, dropped behind the last one.

    The system maps pages around a touched one, and the streams of a layer lie side by side in a
    file: where no stream of a layer is in use, the pages of all are dropped.
    """

    def __init__(
        self,
        layers: Mapping[tuple[StreamName, int], Mapping[str, StoredWeight]],
        parameters: Mapping[str, nn.Parameter],
    ) -> None:
        self._files = {source.file for layer in layers.values() for source in layer.values()}
        self._weights = {
            key: [(expert_of(n), make_weight(parameters, n, source)) for n, source in layer.items()]
            for key, layer in layers.items()
        }
        # What they leave, and what it took to make them, would stay with the process.
        self._rebuilds = any(not w.mapped for some in self._weights.values() for _, w in some)
        self._users = dict.fromkeys(layers, 0)
        self._lock = threading.Lock()

    def take(self, stream: StreamName, number: int) -> None:
        key = stream, number
        if key not in self._weights:
            return
        with self._lock:
            if not self._users[key]:
                # A mapped page behind the end of a file would end the process.
                for file in self._files:
                    file.check_length()
                try:
                    self._fill(key, (None,))
                except BaseException:
                    self._drop(number)
                    raise
            self._users[key] += 1

    def fetch(self, stream: StreamName, number: int, experts: Collection[int]) -> None:
        with self._lock:
            self._fill((stream, number), experts)

    def _fill(self, key: tuple[StreamName, int], experts: Collection[int | None]) -> None:
        """Fill the weights of some experts of a layer, or of None: those that are of no expert."""
        with torch.inference_mode(False), torch.no_grad():
            for expert, weight in self._weights[key]:
                if expert in experts:
                    weight.fill()

    def give_back(self, stream: StreamName, number: int) -> None:
        key = stream, number
        if key not in self._weights:
            return
        with self._lock:
            self._users[key] -= 1
            self._drop(number)

    def _drop(self, number: int) -> None:
        keys = [(stream, number) for stream in STREAMS if (stream, number) in self._weights]
        if any(self._users[key] for key in keys):
            return
        pages: dict[MappedFile, list[tuple[int, int]]] = {}
        with torch.inference_mode(False), torch.no_grad():
            for key in keys:
                for _, weight in self._weights[key]:
                    weight.drop(pages)
        for file, ranges in pages.items():
            file.release_ranges(ranges)
        if self._rebuilds:
            return_freed_memory()


class InPlace:
    """The layers of one stream on the CPU."""

    def __init__(self, stream: StreamName, pages: LayerPages) -> None:
        self._stream, self._pages = stream, pages

    def open(self) -> None:
        pass

    def close(self) -> None:
        pass

    def take(self, number: int, *, few: bool | None = None) -> None:
        self._pages.take(self._stream, number)

    def fetch(self, number: int, experts: Collection[int]) -> None:
        self._pages.fetch(self._stream, number, experts)

    def give_back(self, number: int) -> None:
        self._pages.give_back(self._stream, number)
