"""The input: documents of spans, the tokens they make, and which of them see which."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from support.reference.pieces import Array


@dataclass(frozen=True)
class Text:
    """Text tokens."""

    ids: Sequence[int]


@dataclass(frozen=True)
class Clean:
    """An image to look at: normalised pixels [3, H, W]. `image` names what it shows."""

    pixels: Array
    image: str


@dataclass(frozen=True)
class Noisy:
    """A noisy image [3, H, W] at time t; `noise` is σ / σ_max. `image` names what it shows."""

    pixels: Array
    image: str
    t: float
    noise: float


@dataclass(frozen=True)
class Tube:
    """A clean tube to look at: normalised frames [F, 3, H, W]."""

    frames: Array


@dataclass(frozen=True)
class NoisyClip:
    """A noisy clip [frames, 3, H, W] in tubes of F frames, at a frame rate and a time t."""

    frames: Array
    per_tube: int
    fps: float
    t: float
    noise: float


Span: TypeAlias = Text | Clean | Noisy
ClipSpan: TypeAlias = Span | Tube | NoisyClip
"""Spans of documents with clips, which the model of images does not read."""
Document: TypeAlias = Sequence[Span]


@dataclass(frozen=True)
class Token:
    """Where one token stands and which block of pixels, if any, it belongs to."""

    document: int
    order: int
    gen: bool
    block: int | None
    """The index of its image, tube or clip in the document; None for text."""
    position: tuple[float, int, int]


def tokens_of(documents: Iterable[Sequence[ClipSpan]], side: int) -> list[list[Token]]:
    """Lay out every document: order, stream, block and (t, h, w) of each token."""
    return [_tokens_of_one(number, document, side) for number, document in enumerate(documents)]


def _tokens_of_one(number: int, document: Sequence[ClipSpan], side: int) -> list[Token]:
    tokens: list[Token] = []
    time = 0
    time_of_image: dict[str, int] = {}
    for index, span in enumerate(document):
        if isinstance(span, Text):
            for _ in span.ids:
                tokens.append(Token(number, len(tokens), False, None, (time, 0, 0)))
                time += 1
            continue
        if isinstance(span, Tube):  # every tube takes the next index
            for row, column in cells_of(span.frames, side):
                tokens.append(Token(number, len(tokens), False, index, (time, row, column)))
            time += 1
            continue
        if isinstance(span, NoisyClip):  # one block; what follows does not see it
            for tube in range(len(span.frames) // span.per_tube):
                at_tube = time + tube * 24 / span.fps
                for row, column in cells_of(span.frames, side):
                    tokens.append(Token(number, len(tokens), True, index, (at_tube, row, column)))
            continue
        if span.image not in time_of_image:  # the first showing takes the next index ...
            time_of_image[span.image] = time
            time += 1
        at = time_of_image[span.image]  # ... and every other showing stands at the same place
        for row, column in cells_of(span.pixels, side):
            gen = isinstance(span, Noisy)
            tokens.append(Token(number, len(tokens), gen, index, (at, row, column)))
    return tokens


def cells_of(pixels: Array, side: int) -> list[tuple[int, int]]:
    """Row and column of every token of an image or frame [..., H, W], row by row."""
    cells = []
    for row in range(pixels.shape[-2] // side):
        for column in range(pixels.shape[-1] // side):
            cells.append((row, column))
    return cells


def next_time(positions: Iterable[tuple[float, int, int]]) -> int:
    """Where a token behind a noisy clip would stand: ceil of the largest position, and one."""
    return math.ceil(max(max(position) for position in positions)) + 1


def sees(query: Token, key: Token) -> bool:
    """Say whether the query may attend to the key."""
    if query.document != key.document:
        return False
    if key.gen:
        return query.gen and query.block == key.block
    if key.order <= query.order:
        return True
    return not query.gen and key.block is not None and query.block == key.block


def mask_of(queries: Sequence[Token], keys: Sequence[Token]) -> Array:
    """Give the boolean [queries, keys] table of `sees`."""
    mask = np.zeros((len(queries), len(keys)), dtype=bool)
    for i, query in enumerate(queries):
        for j, key in enumerate(keys):
            mask[i, j] = sees(query, key)
    return mask
