"""Preview of a source: samples as the model sees them, and what of the data would be skipped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np

from neounify.data.encode import Encoded, Encoder
from neounify.data.loader import Skipped, skipped_sample, spread
from neounify.data.sizes import Pixels
from neounify.data.sources import FileSource, Mixture
from neounify.model.layout import Image, Text
from neounify.text.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Piece:
    """Consecutive tokens of one kind: text, or an image or clip to look at or to generate.

    `loss`: whether the model must predict them. `pixels` of an image are those of its size in
    training, uint8 [height, width, 3]; of a tube or clip with frames in front.
    """

    tokens: int
    loss: bool
    text: str = ""
    pixels: Pixels | None = None

    @property
    def frames(self) -> int:
        """Frames of a tube or clip; 0 for text and images."""
        return len(self.pixels) if self.pixels is not None and self.pixels.ndim == 4 else 0

    @property
    def about(self) -> str:
        """Size of an image or clip, in words."""
        assert self.pixels is not None
        height, width = self.pixels.shape[-3:-1]
        frames = f", {self.frames} frames" if self.frames else ""
        return f"{width}x{height}{frames}, {self.tokens:,} tokens"


@dataclass(frozen=True, eq=False)
class Shown:
    """One sample as the model sees it."""

    location: str
    sample: str
    task: str
    pieces: tuple[Piece, ...]

    @property
    def tokens(self) -> int:
        return sum(piece.tokens for piece in self.pieces)

    @property
    def with_loss(self) -> int:
        return sum(piece.tokens for piece in self.pieces if piece.loss)


@dataclass(eq=False)
class Preview:
    """Result of reading some samples of a source, spread evenly over it.

    `lengths` are tokens of the usable samples, of both streams.
    """

    size: int
    shown: list[Shown] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    tasks: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)

    @property
    def tried(self) -> int:
        return len(self.lengths) + len(self.skipped)

    @property
    def reasons(self) -> Counter[str]:
        return Counter(skipped.reason for skipped in self.skipped)


def preview(source: FileSource, encoder: Encoder, tries: int, shown: int) -> Iterator[Preview]:
    """Read up to `tries` samples and keep the first `shown` usable ones; yields after each.

    Every yield is the same object. The encoder should be one without guidance dropout.
    """
    result, mixture = Preview(source.size), Mixture([(source, 1.0)], 0)
    # The samples to show are spread over the source too, so these come first.
    numbers = dict.fromkeys((*spread(source, shown), *spread(source, tries)))
    for number in list(numbers)[: max(tries, shown)]:
        try:
            encoded = encoder(source[number], np.random.default_rng(0))
        except Exception as error:  # as in the loader
            result.skipped.append(skipped_sample(mixture, 0, number, error))
        else:
            result.tasks[encoded.task] += 1
            result.lengths.append(encoded.length)
            if len(result.shown) < shown:
                pieces = tuple(pieces_of(encoded, encoder.tokenizer))
                location = source.location(number)
                result.shown.append(Shown(location, encoded.sample, encoded.task, pieces))
        yield result


def pieces_of(encoded: Encoded, tokenizer: Tokenizer) -> Iterator[Piece]:
    """The pieces of a document, in order."""
    predicted = {row + 1 for row in encoded.label_rows}
    ids, images, targets = iter(encoded.ids), iter(encoded.images), iter(encoded.targets)
    row = 0
    for span in encoded.document.spans:
        if isinstance(span, Text):
            tokens = [(row + n in predicted, next(ids)) for n in range(span.length)]
            for loss, group in groupby(tokens, key=lambda token: token[0]):
                numbers = [token for _, token in group]
                text = tokenizer.decode(numbers, skip_special=False)
                yield Piece(len(numbers), loss, text=text)
            row += span.length
        elif isinstance(span, Image):
            yield Piece(span.length, False, pixels=next(images))
            row += span.length
        else:
            yield Piece(span.length, True, pixels=next(targets))
