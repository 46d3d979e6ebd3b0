"""Recorded calls of the model: decoding steps and small denoising steps without the processor.

A step of a small model, or of one token, is bound by the launches of its kernels. A recorded call
has fixed input tensors; a step copies its values there and replays all launches at once. Decoding
has a recording for each (sequences, pages) in powers of two, denoising for each (grid, branches of
its jobs, room of the prefixes). `cuda_recorder` makes CUDA graphs; elsewhere `rerun_recorder` calls
the function again. Not run on a GPU yet.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from neounify.attention.static import StaticDecoding, StaticPrefixes
from neounify.attention.varlen import Kernel, kernel_for, serves
from neounify.cache import PagedKVCache, PagedSequence, SequenceCache
from neounify.model.layout import Document, Layout, Noise, Text, to_device
from neounify.model.neo import NeoUnify
from neounify.model.parts import GEN, UND

if TYPE_CHECKING:
    from neounify.engine.sequences import ModelInput

KEPT = 16
"""Recordings of each kind that are kept, the latest used."""
MAX_ROWS = 2048
"""Image tokens of a recorded denoising step over all branches: 1024² with guidance. Larger steps
keep a GPU busy by themselves."""
MIN_ROOM = 64
"""Tokens that the least room for a prefix has."""

Run = Callable[[], Tensor]
Recorder = Callable[[Run], tuple[Tensor, Callable[[], None]]]
"""Records a function of no arguments that reads and writes tensors in place; returns its result,
a tensor that every later call of the second value fills again."""


def cuda_recorder(run: Run) -> tuple[Tensor, Callable[[], None]]:
    """Record a CUDA graph, after one plain call that lets libraries allocate what they keep."""
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        run()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return result, graph.replay


def rerun_recorder(run: Run) -> tuple[Tensor, Callable[[], None]]:
    """Nothing is recorded: the function runs again, into the same result."""
    result = run()

    def replay() -> None:
        result.copy_(run())

    return result, replay


def recorder_for(device: torch.device) -> Recorder:
    return cuda_recorder if device.type == "cuda" else rerun_recorder


def recordable(model: NeoUnify) -> bool:
    """Whether calls of a model depend on no value that the host must see, and on no moving weight.

    Hooks bring layers that lie elsewhere; experts run by grouped products alone.
    """
    modules = list(model.layers.modules())
    if any(m._forward_pre_hooks or m._forward_hooks for m in modules):
        return False
    if not all(mlp.experts.grouped(model.compute_dtype) for mlp in model.sparse_mlps):
        return False
    return all(p.device == model.device for p in model.parameters())


def power(number: int, least: int = 1) -> int:
    """The least power of two that is no smaller than both."""
    return 1 << (max(number, least) - 1).bit_length()


T = TypeVar("T")


class _Kept(Generic[T]):
    """Recordings by key, the latest used; all are dropped once a weight of the model has moved."""

    def __init__(self, model: NeoUnify) -> None:
        self._model, self._recordings = model, OrderedDict[Hashable, T]()
        self._places: list[int] = []

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        tensors = chain(self._model.parameters(), self._model.buffers())
        places = [tensor.data_ptr() for tensor in tensors]
        if places != self._places:
            self._recordings.clear()
            self._places = places
        if key not in self._recordings:
            self._recordings[key] = make()
            if len(self._recordings) > KEPT:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        return self._recordings[key]


def _kernel_of(model: NeoUnify) -> Kernel | None:
    """A kernel that reads lengths on the device, where the model's device has one."""
    if model.device.type != "cuda":
        return None  # the reference reads lengths on the host
    served = serves(model.device, model.compute_dtype, model.config.head_dim)
    return kernel_for(model.device) if served else None


# --- decoding ---


class DecodingGraphs:
    """Recorded decoding steps of sequences in one paged cache."""

    def __init__(self, model: NeoUnify, recorder: Recorder | None = None) -> None:
        self._model = model
        self._recorder = recorder or recorder_for(model.device)
        self._kernel = _kernel_of(model)
        self._kept = _Kept[_Decoding](model)

    def serves(self, inputs: Sequence[ModelInput]) -> bool:
        """Whether the inputs are one token each of sequences that begun in one pool."""
        caches = [item.cache for item in inputs]
        paged = [c for c in caches if isinstance(c, PagedSequence) and c.length]
        if len(paged) < len(caches) or len({id(c.pool) for c in paged}) > 1:
            return False
        return all(item.spans == (Text(1),) for item in inputs)

    def step(self, inputs: Sequence[ModelInput]) -> Float[Tensor, "b d"]:
        """As `forward_und`: the keys are in the caches, and the last state of each sequence."""
        caches = [item.cache for item in inputs]
        sequences = [cache for cache in caches if isinstance(cache, PagedSequence)]
        for sequence in sequences:
            sequence.reserve(1)
        pool = sequences[0].pool
        pages = power(max(pool.blocks_for(s.length + 1) for s in sequences))
        rows = power(len(inputs))
        recording = self._kept.get(
            (id(pool), rows, pages), lambda: _Decoding(self._model, pool, rows, pages, self._kernel)
        )
        ids = [item.ids[0] for item in inputs]
        states = recording.step(ids, sequences, self._recorder)
        for sequence in sequences:
            sequence.advance(sequence.document(Text(1)))
        return states


class _Decoding:
    """The fixed tensors of one recording, made in the first step."""

    def __init__(
        self, model: NeoUnify, pool: PagedKVCache, rows: int, pages: int, kernel: Kernel | None
    ) -> None:
        self._model, self._rows, device = model, rows, model.device
        self._attend = StaticDecoding(pool, rows, pages, kernel)
        self._ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self._positions = torch.zeros(rows, 3, dtype=torch.int64, device=device)
        layout = Layout(Document((Text(1),)) for _ in range(rows))
        self._layout = layout.at(UND, self._positions)
        self._recorded: tuple[Tensor, Callable[[], None]] | None = None

    def _run(self) -> Tensor:
        self._attend.prepare()
        x = self._model.embed_und(self._layout, self._ids)
        return self._model.backbone(self._layout, {UND: x}, self._attend)[UND]

    def step(
        self, ids: Sequence[int], sequences: Sequence[PagedSequence], recorder: Recorder
    ) -> Tensor:
        """States [n, D] behind the tokens."""
        filled = list(range(len(ids))) + [0] * (self._rows - len(ids))
        positions = np.zeros((self._rows, 3), dtype=np.int64)
        positions[:, 0] = [sequences[n].next_t for n in filled]
        device = self._model.device
        self._ids.copy_(to_device(np.array([ids[n] for n in filled]), device), non_blocking=True)
        self._positions.copy_(to_device(positions, device), non_blocking=True)
        self._attend.load(sequences)
        if self._recorded is None:
            self._recorded = recorder(self._run)
        states, replay = self._recorded
        replay()
        # The next step writes its states over these.
        return states[: len(ids)].clone()


# --- denoising ---


class DenoisingGraphs:
    """Recorded denoising steps of small images of one size."""

    def __init__(self, model: NeoUnify, recorder: Recorder | None = None) -> None:
        self._model = model
        self._recorder = recorder or recorder_for(model.device)
        self._kernel = _kernel_of(model)
        self._kept = _Kept[_Denoising](model)

    def serves(self, layout: Layout) -> bool:
        """Whether a layout has images of one size, small enough together, and no clip.

        Positions of a clip may lie between whole numbers, and its tokens are wider.
        """
        rows = layout[GEN]
        is_same = len(set(rows.grids)) == 1 and not rows.grids[0].tubes
        return is_same and rows.length <= MAX_ROWS

    def step(
        self,
        layout: Layout,
        caches: Sequence[SequenceCache],
        jobs: Sequence[int],
        z: Float[Tensor, "n ccc"],
        t: Float[Tensor, " j"],
        noise_scale: Float[Tensor, " j"],
    ) -> Float[Tensor, "g ccc"]:
        """The clean images [rows of all runs, C²·channels] that the network predicts, float32.

        `layout` and `caches` have a document for every run, `z`, `t` and `noise_scale` an image for
        every job; `jobs` are the numbers of the jobs of the runs.
        """
        grid = layout[GEN].grids[0]
        room = power(max(cache.length for cache in caches), MIN_ROOM)
        key = (grid, tuple(jobs), room)
        recording = self._kept.get(
            key, lambda: _Denoising(self._model, layout, jobs, room, caches[0], self._kernel)
        )
        return recording.step(layout, caches, (z, t, noise_scale), self._recorder)


class _Denoising:
    """The fixed tensors of one recording, made in the first step."""

    def __init__(
        self,
        model: NeoUnify,
        layout: Layout,
        jobs: Sequence[int],
        room: int,
        like: SequenceCache,
        kernel: Kernel | None,
    ) -> None:
        grids, device = layout[GEN].grids, model.device
        count, tokens = max(jobs) + 1, grids[0].length
        self._model, self._grids, self._count = model, grids, count
        self._attend = StaticPrefixes(len(grids), tokens, room, like, kernel)
        self._z = torch.zeros(count * tokens, model.config.token_width, device=device)
        self._t, self._noise_scale = (torch.zeros(count, device=device) for _ in range(2))
        self._positions = torch.zeros(len(grids) * tokens, 3, dtype=torch.int64, device=device)
        self._layout = Layout(layout.documents).at(GEN, self._positions)
        self._images = Layout(Document((Noise.of(grids[0]),)) for _ in range(count))
        self._order = to_device(np.array(jobs), device)
        self._loaded: Layout | None = None
        self._recorded: tuple[Tensor, Callable[[], None]] | None = None

    def _run(self) -> Tensor:
        x = self._model.embed_noisy(self._images, self._z, self._t, self._noise_scale)
        x = x.unflatten(0, (self._count, -1)).index_select(0, self._order).flatten(0, 1)
        hidden = self._model.backbone(self._layout, {GEN: x}, self._attend)[GEN]
        return self._model.clean_prediction(hidden, self._grids).float()

    def step(
        self,
        layout: Layout,
        caches: Sequence[SequenceCache],
        inputs: Sequence[Tensor],
        recorder: Recorder,
    ) -> Tensor:
        if self._loaded is not layout:
            self._attend.load(caches)
            self._positions.copy_(layout[GEN].positions_on(self._positions.device))
            self._loaded = layout
        for buffer, values in zip((self._z, self._t, self._noise_scale), inputs, strict=True):
            buffer.copy_(values)
        if self._recorded is None:
            self._recorded = recorder(self._run)
        clean, replay = self._recorded
        replay()
        # The next step writes its prediction over this one.
        return clean.clone()
