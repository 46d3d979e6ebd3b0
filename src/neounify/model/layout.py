"""Packed batches: the stream, position and visible keys of every token.

A batch is a sequence of documents, a document a sequence of spans. Tokens of all
documents are packed into one row axis per stream. Nothing inside the layers branches on
the kind of a token; the layout has decided it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args

import numpy as np
import torch
from jaxtyping import Float32, Int, Int64
from torch import Tensor

from neounify.model.parts import GEN, STREAMS, UND, StreamName

G = TypeVar("G", bound="Grid")
T = TypeVar("T")
Positions = Int64[Tensor, "n 3"] | Float32[Tensor, "n 3"]
"""(t, h, w) of tokens."""
Kind = Literal["text", "image", "tube"]
"""What a token is of; each kind has an embedding, and tokens of the same width in pixels."""
KINDS: tuple[Kind, ...] = get_args(Kind)
Rows = Mapping[StreamName, range]
"""Consecutive rows of each stream: those that one of several ranks holds."""


@dataclass(frozen=True)
class Text:
    """`length` text tokens: causal, one step of t each."""

    length: int
    stream: ClassVar[StreamName] = UND
    kind: ClassVar[Kind] = "text"

    @property
    def steps(self) -> int:
        """Steps of t."""
        return self.length


@dataclass(frozen=True)
class Grid:
    """Token rows and columns of an image, or of each of the `tubes` of a clip.

    A token of a tube is one place in several frames. Tokens are in order (tube, row, column);
    `step` is t from one tube to the next. An image has 0 tubes.
    """

    rows: int
    columns: int
    tubes: int = 0
    step: float = 1.0

    @property
    def length(self) -> int:
        """Tokens."""
        return self.rows * self.columns * max(1, self.tubes)

    @property
    def kind(self) -> Kind:
        """What its tokens are of."""
        return "tube" if self.tubes else "image"

    def __str__(self) -> str:
        sides = f"{self.rows}x{self.columns}"
        return f"{self.tubes}x{sides}" if self.tubes else sides

    @classmethod
    def of(cls: type[G], grid: Grid) -> G:
        """The same rows, columns, tubes and step as an object of this class."""
        return cls(grid.rows, grid.columns, grid.tubes, grid.step)

    @classmethod
    def of_pixels(cls: type[G], height: int, width: int, token_size: int) -> G:
        """The grid of an image in pixels; ValueError when a side is no multiple of C."""
        grid = cls(height // token_size, width // token_size)
        if (grid.rows * token_size, grid.columns * token_size) != (height, width):
            raise ValueError(f"image sides {(height, width)} must be multiples of {token_size}")
        return grid


class Image(Grid):
    """A clean image or one clean tube of a clip: bidirectional inside, one step of t in all."""

    stream: ClassVar[StreamName] = UND
    steps: ClassVar[int] = 1


class Noise(Grid):
    """A noisy image or clip in the generation stream. It begins at the t of the next image.

    It is one block, bidirectional over all tubes. Nothing but itself sees it and it takes no step
    of t, so a clean copy that follows it has the same positions.
    """

    stream: ClassVar[StreamName] = GEN
    steps: ClassVar[int] = 0

    def next_t(self, t: int) -> int:
        """The t of a token that counted the block, which begins at t, as one before it.

        One more than that of an image; behind a clip, as published, the next whole number above
        all three axes of its positions.
        """
        if not self.tubes:
            return t + 1
        return math.ceil(max(t + (self.tubes - 1) * self.step, self.rows - 1, self.columns - 1)) + 1


Span = Text | Image | Noise


@dataclass(frozen=True)
class Document:
    """Spans that see each other, after `past` cached tokens that end before t = `start_t`."""

    spans: tuple[Span, ...]
    past: int = 0
    start_t: int = 0

    @property
    def end_t(self) -> int:
        """The t of the token that would come next."""
        return self.start_t + sum(span.steps for span in self.spans)

    @property
    def bound_t(self) -> int:
        """A t that all of its positions are below, those of noise included."""
        bound = t = self.start_t
        for span in self.spans:
            bound = max(bound, span.next_t(t) if isinstance(span, Noise) else t + span.steps)
            t += span.steps
        return bound

    def und_length(self) -> int:
        return sum(span.length for span in self.spans if span.stream == UND)


@dataclass(frozen=True)
class Block:
    """Consecutive queries of one stream and document that see the same keys.

    They see the first `visible` context tokens of their document (cached ones included) and, in a
    stream that is not context, all of their own block. A causal block ends at `visible`; its
    queries see only up to themselves.
    """

    document: int
    start: int
    stop: int
    visible: int
    causal: bool

    @property
    def length(self) -> int:
        return self.stop - self.start


class _Derived:
    """An object with values that follow from it, such as index tensors, each built once."""

    def __init__(self) -> None:
        self._values: dict[Hashable, Any] = {}

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of this key, built by the first call that asks for it."""
        if key not in self._values:
            # Made in inference mode, a kept tensor could not serve a training call later.
            with torch.inference_mode(False), torch.no_grad():
                self._values[key] = make()
        value: T = self._values[key]
        return value


class StreamRows(_Derived):
    """The rows of one stream: `blocks` cover them in order, `ranges` are those of each document.

    `spans` pairs every span with its t; `grids` are those of all images, tubes and clips, clean
    ones of `und`, noisy ones of `gen`. Positions are integers, unless tubes of a clip stand between
    them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.length = 0
        self.blocks: list[Block] = []
        self.ranges: list[tuple[int, int]] = []
        self.spans: list[tuple[Span, int]] = []
        self.grids: list[Grid] = []

    @property
    def positions(self) -> Positions:
        """(t, h, w) of every row, on the CPU."""
        return self.positions_on(torch.device("cpu"))

    def positions_on(self, device: torch.device) -> Positions:
        """(t, h, w) of every row, built once per device."""
        return self.derived(
            ("positions", device), lambda: to_device(self._make_positions(), device)
        )

    def owners_on(self, device: torch.device) -> Int64[Tensor, " n"]:
        """For each token of a grid, the number of that grid, built once per device."""
        lengths = [grid.length for grid in self.grids]
        return self.derived(
            ("owners", device),
            lambda: to_device(np.repeat(np.arange(len(lengths)), lengths), device),
        )

    def grids_of(self, kind: Kind) -> list[Grid]:
        """The grids of tokens of one kind."""
        return [grid for grid in self.grids if grid.kind == kind]

    def rows_of(self, kind: Kind, device: torch.device) -> Int64[Tensor, " k"] | None:
        """The rows of one kind in order, built once per device; None where all rows are."""
        if all(span.kind == kind for span, _ in self.spans):
            return None
        return self.derived(("rows", kind, device), lambda: to_device(self._rows_of(kind), device))

    def order_on(self, device: torch.device) -> Int64[Tensor, " n"] | None:
        """Rows of cat([text, image, tube]), each kind by itself, in packed order.

        None where that is the packed order.
        """
        if len({span.kind for span, _ in self.spans}) < 2:
            return None

        def make() -> Tensor:
            order = np.empty(self.length, dtype=np.int64)
            order[np.concatenate([self._rows_of(kind) for kind in KINDS])] = np.arange(self.length)
            return to_device(order, device)

        return self.derived(("order", device), make)

    def _rows_of(self, kind: Kind) -> Int64[np.ndarray, " k"]:
        kinds = np.repeat(
            np.array([KINDS.index(span.kind) for span, _ in self.spans]),
            [span.length for span, _ in self.spans],
        )
        return np.flatnonzero(kinds == KINDS.index(kind))

    def _make_positions(self) -> Int64[np.ndarray, "n 3"] | Float32[np.ndarray, "n 3"]:
        whole = all(float(grid.step).is_integer() for grid in self.grids)
        positions = np.zeros((self.length, 3), dtype=np.int64 if whole else np.float32)
        start = 0
        for span, t in self.spans:
            rows = positions[start : start + span.length]
            if isinstance(span, Text):
                rows[:, 0] = np.arange(t, t + span.length)
            else:
                cells = _cells(span)
                tubes = np.repeat(np.arange(max(1, span.tubes)), len(cells))
                rows[:, 0] = t + tubes * span.step
                rows[:, 1:] = np.tile(cells, (max(1, span.tubes), 1))
            start += span.length
        return positions


class _SomeRows(StreamRows):
    """Rows of a stream, chosen by their indices: their number and positions."""

    def __init__(self, whole: StreamRows, indices: Int64[np.ndarray, " n"]) -> None:
        super().__init__()
        self._whole, self._indices = whole, indices
        self.length = len(indices)

    def _make_positions(self) -> Int64[np.ndarray, "n 3"] | Float32[np.ndarray, "n 3"]:
        return self._whole._make_positions()[self._indices]


class _PlacedRows(StreamRows):
    """Rows of a stream at positions that are values of a tensor and may change."""

    def __init__(self, whole: StreamRows, positions: Positions) -> None:
        super().__init__()
        self.length, self.grids = whole.length, whole.grids
        self.blocks, self.ranges, self.spans = whole.blocks, whole.ranges, whole.spans
        self._positions = positions

    def positions_on(self, device: torch.device) -> Positions:
        return self._positions

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """Rotations are computed in every call, all else once."""
        if isinstance(key, tuple) and key[0] == "rotation":
            return make()
        return super().derived(key, make)


class Layout(_Derived):
    """The packed tokens of some documents; `layout[stream]` are the rows of one stream.

    `text_length` is the number of text tokens.
    """

    def __init__(self, documents: Iterable[Document]) -> None:
        super().__init__()
        self.documents = tuple(documents)
        self._streams = {name: StreamRows() for name in STREAMS}
        self.text_length = 0
        for number, document in enumerate(self.documents):
            self._add(number, document)

    def __getitem__(self, stream: StreamName) -> StreamRows:
        return self._streams[stream]

    @property
    def lengths(self) -> dict[StreamName, int]:
        """Rows of every stream that has some."""
        return {name: rows.length for name, rows in self._streams.items() if rows.length}

    def pairs(self, stream: StreamName) -> int:
        """(query, key) pairs of a stream: in text, no key behind the query counts.

        Noisy tokens see their prefix and their own image.
        """
        context = STREAMS[stream].context
        total = 0
        for block in self[stream].blocks:
            total += block.length * (block.visible if context else block.visible + block.length)
            if block.causal:
                total -= block.length * (block.length - 1) // 2
        return total

    @property
    def is_decode(self) -> bool:
        """Whether every document is one text token."""
        return all(document.spans == (Text(1),) for document in self.documents)

    def part(self, stream: StreamName, indices: Int64[np.ndarray, " n"]) -> Layout:
        """Some rows of one stream, by their indices: for layers of a rank that holds those.

        It has their positions, and neither documents nor blocks.
        """
        part = Layout(())
        part._streams[stream] = _SomeRows(self[stream], indices)
        return part

    def at(self, stream: StreamName, positions: Positions) -> Layout:
        """The same documents with the rows of one stream at given positions (t, h, w).

        What follows from them is computed in every call, so that a recorded call reads new ones.
        """
        placed = Layout(self.documents)
        placed._streams[stream] = _PlacedRows(self[stream], positions)
        return placed

    def _add(self, number: int, document: Document) -> None:
        firsts = {name: rows.length for name, rows in self._streams.items()}
        seen, t = document.past, document.start_t
        for span in document.spans:
            rows, start = self._streams[span.stream], self._streams[span.stream].length
            causal = isinstance(span, Text)
            if STREAMS[span.stream].context:
                seen += span.length
            if span.length or not causal:
                stop = start + span.length
                rows.blocks.append(Block(number, start, stop, seen, causal))
                rows.spans.append((span, t))
                rows.length = stop
            if isinstance(span, Text):
                self.text_length += span.length
            else:
                rows.grids.append(Grid.of(span))
            t += span.steps
        for name, rows in self._streams.items():
            rows.ranges.append((firsts[name], rows.length))

    def last_rows(self) -> list[int]:
        """The row of each document's last understanding token."""
        return [stop - 1 for _, stop in self[UND].ranges]


def stills(grids: Sequence[Grid]) -> list[Grid]:
    """The grids with those of clips as one image for every tube."""
    return [Grid(grid.rows, grid.columns) for grid in grids for _ in range(max(1, grid.tubes))]


def grid_patches(
    grids: Sequence[Grid], merge: int, device: torch.device
) -> Int64[Tensor, "n mm 2"]:
    """(row, column) in patch units of the merge × merge patches of every token of some images."""
    tokens = np.concatenate([_cells(grid) for grid in grids])
    return to_device(tokens[:, None] * merge + _cells(Grid(merge, merge)), device)


def _cells(grid: Grid) -> Int[np.ndarray, "n 2"]:
    """(row, column) of every cell of an image or of one tube, row by row."""
    return np.stack(np.divmod(np.arange(grid.rows * grid.columns), grid.columns), axis=1)


def to_device(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Values of the host on a device; the host does not wait for the copy."""
    # Pageable memory is staged before the call returns, except on mps, which reads it later.
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    return tensor.to(device, non_blocking=device.type != "mps")
