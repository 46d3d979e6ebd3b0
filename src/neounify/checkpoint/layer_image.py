"""A layer as the bytes of a buffer: its tensors, their places, and how they are read from files.

A sparse layer can be taken in pieces: all that is not of an expert, and each expert by itself.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from neounify.checkpoint.mapped import MappedFile
from neounify.checkpoint.names import expert_of
from neounify.checkpoint.residency import StoredWeight, code_names
from neounify.errors import RequestError

PIECE = 8 * 2**20
"""Bytes of one read; the readers of a layer share its pieces."""
ALIGNMENT = 256
"""Of tensors in a slot, as torch aligns its own."""


@dataclass(frozen=True)
class Part:
    """A stored tensor at bytes `offset` of a slot, and the parameters that it becomes.

    That is one, or those of a layer of codes by the names of its format. `expert` is the number of
    the expert that it belongs to, if any.
    """

    parameters: Mapping[str, nn.Parameter]
    source: StoredWeight
    offset: int
    expert: int | None = None

    @property
    def stop(self) -> int:
        """Where the next tensor of the slot begins."""
        return self.offset + -(-self.source.info.nbytes // ALIGNMENT) * ALIGNMENT

    def take(self, slot: Tensor) -> None:
        """Make the slot's bytes the values, decoded or quantised where stored otherwise."""
        info = self.source.info
        stored = slot[self.offset : self.offset + info.nbytes].view(info.dtype)
        stored = stored.view(info.stored_shape)
        if self.source.format is not None:
            for name, tensor in self.source.encode(stored).items():
                self.parameters[name].data = tensor
            return
        (parameter,) = self.parameters.values()
        parameter.data = self.source.decode(stored, parameter.dtype)

    def leave(self) -> None:
        for parameter in self.parameters.values():
            parameter.data = parameter.data.new_empty(0)


@dataclass(frozen=True)
class Read:
    """Bytes from `start` of a file on, that go to (offset, size) places of a slot in order."""

    file: MappedFile
    start: int
    places: tuple[tuple[int, int], ...]


class LayerImage:
    """A layer as `size` bytes of a slot: its tensors, and how all of them or some are read."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.size = self.parts[-1].stop
        self.experts = frozenset(p.expert for p in self.parts if p.expert is not None)
        self._whole = tuple(_reads(self.parts))
        self._trunk = tuple(_reads([part for part in self.parts if part.expert is None]))

    def some(self, experts: Collection[int], *, trunk: bool = False) -> list[Part]:
        """The tensors of some experts, and with `trunk` those of none."""
        return [p for p in self.parts if (trunk if p.expert is None else p.expert in experts)]

    def reads(self, experts: Collection[int], *, trunk: bool = False) -> Sequence[Read]:
        """How `some` of the tensors are read."""
        if trunk and len(experts) == len(self.experts):
            return self._whole
        if trunk and not experts:
            return self._trunk
        return list(_reads(self.some(experts, trunk=trunk)))

    def ranges(self, experts: Collection[int], *, trunk: bool = False) -> list[tuple[int, int]]:
        """The (start, stop) bytes of a slot that `some` of the tensors take, joined."""
        joined: list[tuple[int, int]] = []
        for part in self.some(experts, trunk=trunk):
            if joined and joined[-1][1] == part.offset:
                joined[-1] = joined[-1][0], part.stop
            else:
                joined.append((part.offset, part.stop))
        return joined


def layer_image(
    sources: Mapping[str, StoredWeight], parameters: Mapping[str, nn.Parameter]
) -> LayerImage:
    """The image of a layer from its stored weights by our names.

    Raises RequestError for weights of which a rank holds a share.
    """
    parts: list[Part] = []
    for name, source in sorted(
        sources.items(), key=lambda item: (str(item[1].file.path), item[1].info.start)
    ):
        if source.share is not None:
            raise RequestError("memory='layers' cannot be used with shares of ranks")
        names = {name: name} if source.format is None else code_names(name, source)
        offset = parts[-1].stop if parts else 0
        becomes = {key: parameters[ours] for key, ours in names.items()}
        parts.append(Part(becomes, source, offset, expert_of(name)))
    return LayerImage(parts)


def _reads(parts: Sequence[Part]) -> Iterator[Read]:
    """Reads of tensors in the order of their files, those that touch in one."""
    run: list[Part] = []
    for part in parts:
        last = run[-1].source if run else None
        if last and (last.file is not part.source.file or last.info.stop != part.source.info.start):
            yield from _pieces(run)
            run = []
        run.append(part)
    if run:
        yield from _pieces(run)


def _pieces(run: Sequence[Part]) -> Iterator[Read]:
    """Reads of touching tensors, of PIECE bytes each."""
    places = [(part.offset, part.source.info.nbytes) for part in run]
    first = run[0].source.info.start
    total = sum(size for _, size in places)
    cuts = [*range(0, total, PIECE), total]
    for begin, end in pairwise(cuts):
        piece, passed = [], 0
        for offset, size in places:
            low, high = max(begin, passed), min(end, passed + size)
            if high > low:
                piece.append((offset + low - passed, high - low))
            passed += size
        yield Read(run[0].source.file, first + begin, tuple(piece))
