"""Where every token of a packed batch stands: stream, position, and whom it sees.

A batch is a sequence of documents, a document a sequence of spans. Tokens of all
documents are packed into one row axis per stream. Nothing inside the layers asks
what a token is; this object has decided it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from neounify.model.block import Block
from neounify.model.padding import Padding, make_padding


@dataclass(frozen=True)
class Text:
    """`length` text tokens: causal, one step of t each."""

    length: int


@dataclass(frozen=True)
class _Grid:
    rows: int
    columns: int

    @property
    def length(self) -> int:
        return self.rows * self.columns


class Image(_Grid):
    """A clean image of rows × columns tokens: bidirectional inside, one step of t in all."""


class Noise(_Grid):
    """A noisy image block in the generation stream. It stands at the t of the next image.

    Nothing but itself sees it and it takes no step of t, so a clean copy that
    follows it has the same positions.
    """


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
        return self.start_t + sum(_steps(span) for span in self.spans)

    def und_length(self) -> int:
        return sum(span.length for span in self.spans if not isinstance(span, Noise))


class Layout:
    """The packed tokens of some documents.

    `und_positions` [U, 3] and `gen_positions` [G, 3] hold (t, h, w); `und_blocks`
    and `gen_blocks` cover the rows of each stream in order; `und_ranges` gives each
    document's rows in the understanding stream; `image_grids` and `noise_grids`
    are the (rows, columns) of all clean and all noisy images, in packed order.
    """

    def __init__(self, documents: Iterable[Document]) -> None:
        self.documents = tuple(documents)
        self.und_blocks: list[Block] = []
        self.gen_blocks: list[Block] = []
        self.und_ranges: list[tuple[int, int]] = []
        self._und_spans: list[tuple[Text | Image, int]] = []
        self._gen_spans: list[tuple[Noise, int]] = []
        self.und_length = self.gen_length = 0
        self._paddings: dict[torch.device, Padding | None] = {}
        for number, document in enumerate(self.documents):
            self._add(number, document)

    def _add(self, number: int, document: Document) -> None:
        first = self.und_length
        t = document.start_t
        for span in document.spans:
            seen = document.past + self.und_length - first
            if isinstance(span, Noise):
                stop = self.gen_length + span.length
                self.gen_blocks.append(Block(number, self.gen_length, stop, seen, causal=False))
                self._gen_spans.append((span, t))
                self.gen_length = stop
            elif span.length:
                stop = self.und_length + span.length
                causal = isinstance(span, Text)
                visible = seen + span.length
                self.und_blocks.append(Block(number, self.und_length, stop, visible, causal))
                self._und_spans.append((span, t))
                self.und_length = stop
            t += _steps(span)
        self.und_ranges.append((first, self.und_length))

    @property
    def text_length(self) -> int:
        """Text tokens of all documents."""
        return sum(s.length for s, _ in self._und_spans if isinstance(s, Text))

    @property
    def image_grids(self) -> list[tuple[int, int]]:
        return [(s.rows, s.columns) for s, _ in self._und_spans if isinstance(s, Image)]

    @property
    def noise_grids(self) -> list[tuple[int, int]]:
        return [(s.rows, s.columns) for s, _ in self._gen_spans]

    @cached_property
    def und_positions(self) -> Tensor:
        return _positions(self._und_spans)

    @cached_property
    def gen_positions(self) -> Tensor:
        return _positions(self._gen_spans)

    @cached_property
    def und_order(self) -> Tensor | None:
        """Rows of cat([text tokens, image tokens]) in packed order; None where that is the order.

        [U] int64.
        """
        if self.text_length in (0, self.und_length):
            return None
        text, image, pieces = 0, self.text_length, []
        for span, _ in self._und_spans:
            if isinstance(span, Text):
                pieces.append(range(text, text + span.length))
                text += span.length
            else:
                pieces.append(range(image, image + span.length))
                image += span.length
        # Made in inference mode, the kept tensor could not serve a training call later.
        with torch.inference_mode(False):
            return torch.tensor([row for piece in pieces for row in piece])

    def padding(self, device: torch.device) -> Padding | None:
        """The documents side by side, on a device; None where they are few, long or uneven."""
        if device not in self._paddings:
            # Made in inference mode, the kept tensors could not serve a training call later.
            with torch.inference_mode(False):
                made = make_padding(self.und_ranges, self.und_blocks, self.gen_blocks)
                self._paddings[device] = made if made is None else made.to(device)
        return self._paddings[device]

    def last_rows(self) -> list[int]:
        """The row of each document's last understanding token."""
        return [stop - 1 for _, stop in self.und_ranges]


def grid_places(grids: Sequence[tuple[int, int]], merge: int) -> Tensor:
    """(row, column) in patch units of the merge × merge patches of every token, [N, M·M, 2]."""
    inner = torch.cartesian_prod(torch.arange(merge), torch.arange(merge)).view(1, merge**2, 2)
    tokens = [_grid(rows, columns) for rows, columns in grids]
    return torch.cat(tokens).unsqueeze(1) * merge + inner


def _steps(span: Span) -> int:
    if isinstance(span, Text):
        return span.length
    return 1 if isinstance(span, Image) else 0


def _grid(rows: int, columns: int) -> Tensor:
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2)


def _positions(spans: Sequence[tuple[Span, int]]) -> Tensor:
    if not spans:
        return torch.zeros(0, 3, dtype=torch.int64)
    return torch.cat([_span_positions(span, t) for span, t in spans])


def _span_positions(span: Span, t: int) -> Tensor:
    positions = torch.zeros(span.length, 3, dtype=torch.int64)
    if isinstance(span, Text):
        positions[:, 0] = torch.arange(t, t + span.length)
    else:
        positions[:, 0] = t
        positions[:, 1:] = _grid(span.rows, span.columns)
    return positions
