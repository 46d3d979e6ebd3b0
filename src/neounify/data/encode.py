"""From a sample to one training document: spans, token ids, labels and sized pictures.

The text is laid out exactly as the prompts of inference are (`text/template.py`), and cut for
the tokenizer at the same places, so what is trained is what is asked for later. A target picture
stands first as a noisy block, which carries the image loss, then, if anything follows that is
learnt, as a clean copy at the same positions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PilImage
from pydantic.dataclasses import dataclass as settings

from neounify.config import ModelConfig
from neounify.data.buckets import crop_to, nearest_bucket
from neounify.data.sample import DataError, ImagePart, Sample, TextPart, Turn
from neounify.image.sizes import fit_size
from neounify.model.layout import Document, Image, Noise, Span, Text
from neounify.settings import STRICT
from neounify.text.special import IM_END, IM_START, IMAGE_CLOSE, IMAGE_OPEN, THINK_CLOSE, THINK_OPEN
from neounify.text.tokenizer import Tokenizer

PAINTING_TASKS = ("t2i", "t2i_think", "edit", "edit_think")
"""Tasks whose answer is one picture; inference opens it, so `<img>` is not learnt."""

Drop = Literal["none", "text", "all"]
Pixels = NDArray[np.uint8]

_THINK_MARKS = re.compile(f"({re.escape(THINK_OPEN)}|{re.escape(THINK_CLOSE)})")


@settings(frozen=True, kw_only=True, config=STRICT)
class GuidanceDropout:
    """Chances that a painting sample loses its text, or its text and pictures, for guidance."""

    text: float = 0.1
    all: float = 0.1

    def __post_init__(self) -> None:
        if min(self.text, self.all) < 0 or self.text + self.all > 1:
            raise DataError(f"guidance dropout {self.text} + {self.all} must be chances up to 1")

    def draw(self, rng: np.random.Generator) -> Drop:
        x = rng.random()
        if x < self.all:
            return "all"
        return "text" if x < self.all + self.text else "none"


@dataclass(frozen=True, eq=False)
class Encoded:
    """One document. U counts its understanding rows.

    `ids` are its text tokens; `label_rows` (0..U-1) and `label_ids` say which rows must predict
    which token; `images` the clean pictures and `targets` one picture per noisy block, uint8
    [height, width, 3].
    """

    sample: str
    task: str
    document: Document
    ids: tuple[int, ...]
    label_rows: tuple[int, ...]
    label_ids: tuple[int, ...]
    images: tuple[Pixels, ...]
    targets: tuple[Pixels, ...]

    @property
    def length(self) -> int:
        """Tokens of both streams."""
        return sum(span.length for span in self.document.spans)


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """How samples become documents for one model.

    `noise_draws` noisy copies of every target share the document that leads to them: the
    understanding stream never sees noise, so further draws cost the generation stream only.
    `target_buckets` are (width, height) pairs to crop targets to; without any, targets keep their
    shape within `target_pixels` = (least, greatest) area.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    system_message: str = ""
    dropout: GuidanceDropout = field(default_factory=GuidanceDropout)
    noise_draws: int = 1
    target_pixels: tuple[int, int] | None = None
    target_buckets: tuple[tuple[int, int], ...] = ()

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Encoded:
        """Encode one sample; `rng` draws the guidance dropout. Raises DataError."""
        drop = self.dropout.draw(rng)
        paints = any(part.role == "target" for part in sample.images)
        writer = _Writer(self, sample)
        if paints and drop != "none":
            writer.without_text(pictures=drop == "text")
        else:
            for turn in sample.turns:
                writer.turn(turn)
        return writer.finish()


class _Writer:
    """Collects spans, ids and labels while the pieces of a sample go by."""

    def __init__(self, encoder: Encoder, sample: Sample) -> None:
        self.encoder, self.sample = encoder, sample
        self.tokenizer = encoder.tokenizer
        self.spans: list[Span] = []
        self.ids: list[int] = []
        self.labels: list[tuple[int, int]] = []
        self.images: list[Pixels] = []
        self.targets: list[Pixels] = []
        self._plain = ""
        self._learn = False
        self._row = 0
        self._given_thought = False
        if sample.turns[0].role != "system" and sample.task in PAINTING_TASKS:
            self._system(encoder.system_message)

    # --- turns ---

    def turn(self, turn: Turn) -> None:
        if turn.role == "system":
            self._system("".join(p.text for p in turn.parts if isinstance(p, TextPart)))
        elif turn.role == "user":
            self._open("user")
            for part in turn.parts:
                if isinstance(part, TextPart):
                    self._text(part.text, learn=False)
                else:
                    self._input(part)
            self._close(learn=False)
        else:
            self._answer(turn)

    def _answer(self, turn: Turn) -> None:
        self._open("assistant")
        self._flush()
        first = turn.parts[0] if turn.parts else None
        thinks = isinstance(first, TextPart) and first.text.startswith(THINK_OPEN)
        paints = any(isinstance(part, ImagePart) for part in turn.parts)
        if paints and not thinks:
            self._no_thought()
        self._given_thought = thinks and self.sample.task in PAINTING_TASKS
        for part in turn.parts:
            if isinstance(part, TextPart):
                self._answer_text(part)
            else:
                self._target(part)
        if self.sample.task not in PAINTING_TASKS:
            self._close(learn=any(part.loss for part in turn.parts))

    def _answer_text(self, part: TextPart) -> None:
        """Text of an answer: thought marks become their tokens; what inference adds is given."""
        for piece in _THINK_MARKS.split(part.text):
            given = self._given_thought
            if piece == THINK_OPEN:
                self._special(piece, learn=part.loss and not given)
            elif piece == THINK_CLOSE:
                self._special(piece, learn=part.loss)
            elif given and piece.startswith("\n") and self._after(THINK_OPEN):
                self._text("\n", learn=False)
                self._text(piece[1:], learn=part.loss)
            else:
                forced = given and self._after(THINK_CLOSE)
                self._text(piece, learn=part.loss and not forced)

    def _after(self, name: str) -> bool:
        return not self._plain and bool(self.ids) and self.ids[-1] == self.tokenizer.id(name)

    def without_text(self, *, pictures: bool) -> None:
        """The prefix of guidance: the input pictures alone, or nothing, then `<img>`."""
        self.spans, self.ids, self.labels, self._plain, self._row = [], [], [], "", 0
        inputs = [part for part in self.sample.images if part.role == "input"]
        targets = [part for part in self.sample.images if part.role == "target"]
        self._open("user")
        for part in inputs if pictures else ():
            self._input(part)
        self._close(learn=False)
        self._open("assistant")
        if pictures:
            for part in targets:
                self._target(part, learn=False)
        else:
            self._special(IMAGE_OPEN, learn=False)
            for part in targets:
                self._noise(self._sized_target(part))

    # --- pieces ---

    def _system(self, text: str) -> None:
        if text:
            self._open("system")
            self._text(text, learn=False)
            self._close(learn=False)

    def _open(self, role: str) -> None:
        self._special(IM_START, learn=False)
        self._text(f"{role}\n", learn=False)

    def _close(self, *, learn: bool) -> None:
        self._special(IM_END, learn=learn)
        self._text("\n", learn=False)

    def _no_thought(self) -> None:
        for name in (THINK_OPEN, THINK_CLOSE):
            self._special(name, learn=False)
            self._text("\n\n", learn=False)
        self._flush()

    def _text(self, text: str, *, learn: bool) -> None:
        if learn != self._learn:
            self._flush()
            self._learn = learn
        self._plain += text

    def _special(self, name: str, *, learn: bool) -> None:
        self._flush()
        self._write([self.tokenizer.id(name)], learn)

    def _flush(self) -> None:
        if self._plain:
            ids = self.tokenizer.encode(self._plain)
            self._plain = ""
            self._write(ids, self._learn)

    def _write(self, ids: list[int], learn: bool) -> None:
        if learn:
            if self._row == 0:
                raise DataError("the first token of a document cannot be predicted")
            self.labels += [(self._row - 1 + place, token) for place, token in enumerate(ids)]
        self.ids += ids
        self._row += len(ids)
        last = self.spans[-1] if self.spans else None
        if isinstance(last, Text):
            self.spans[-1] = Text(last.length + len(ids))
        else:
            self.spans.append(Text(len(ids)))

    def _input(self, part: ImagePart) -> None:
        self._special(IMAGE_OPEN, learn=False)
        sampling = self.encoder.config.sampling
        if any(p.role == "target" for p in self.sample.images):
            bounds = sampling.edit_bounds(sum(p.role == "input" for p in self.sample.images))
        else:
            bounds = sampling.chat_min_pixels, sampling.chat_max_pixels
        self._clean(self._fitted(part.pixels(), bounds))
        self._special(IMAGE_CLOSE, learn=False)

    def _target(self, part: ImagePart, *, learn: bool | None = None) -> None:
        """A painted picture: noisy blocks, and its clean copy for what comes after it."""
        writes = self.sample.task not in PAINTING_TASKS
        if not part.loss:
            raise DataError("a picture in an answer must be a target")
        self._special(IMAGE_OPEN, learn=writes if learn is None else learn)
        pixels = self._sized_target(part)
        self._noise(pixels)
        if writes:
            self._clean(pixels)
            self._special(IMAGE_CLOSE, learn=False)

    def _noise(self, pixels: Pixels) -> None:
        rows, columns = self._grid(pixels)
        for _ in range(self.encoder.noise_draws):
            self.spans.append(Noise(rows, columns))
            self.targets.append(pixels)

    def _clean(self, pixels: Pixels) -> None:
        image = Image(*self._grid(pixels))
        self.spans.append(image)
        self.images.append(pixels)
        self._row += image.length

    def _grid(self, pixels: Pixels) -> tuple[int, int]:
        side = self.encoder.config.token_size
        return pixels.shape[0] // side, pixels.shape[1] // side

    def _sized_target(self, part: ImagePart) -> Pixels:
        pixels, encoder = part.pixels(), self.encoder
        if encoder.target_buckets:
            size = nearest_bucket(pixels.shape[1], pixels.shape[0], encoder.target_buckets)
            if size == (pixels.shape[1], pixels.shape[0]):
                return pixels
            return np.asarray(crop_to(PilImage.fromarray(pixels), size))
        sampling = encoder.config.sampling
        bounds = encoder.target_pixels or (sampling.edit_min_pixels, sampling.edit_max_pixels)
        return self._fitted(pixels, bounds)

    def _fitted(self, pixels: Pixels, bounds: tuple[int, int]) -> Pixels:
        height, width = fit_size(
            pixels.shape[0],
            pixels.shape[1],
            multiple=self.encoder.config.token_size,
            min_pixels=bounds[0],
            max_pixels=bounds[1],
        )
        if (height, width) == pixels.shape[:2]:
            return pixels
        image = PilImage.fromarray(pixels)
        return np.asarray(image.resize((width, height), PilImage.Resampling.BICUBIC))

    def finish(self) -> Encoded:
        # Nothing is learnt from what stands behind the last label or noisy block.
        self._plain = ""
        document = Document(tuple(self.spans))
        limit = self.encoder.config.max_positions
        if document.end_t > limit:
            raise DataError(f"the sample is {document.end_t} positions long, the model has {limit}")
        rows, ids = zip(*self.labels, strict=True) if self.labels else ((), ())
        return Encoded(
            self.sample.id,
            self.sample.task,
            document,
            tuple(self.ids),
            rows,
            ids,
            tuple(self.images),
            tuple(self.targets),
        )
